//! `Samples`: times of one thing, and the middle of them.
//!
//! Medians throughout: on a shared machine a few of any hundred times are interruptions.

use std::time::Instant;

/// Times in nanoseconds, or ratios.
#[derive(Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds how long `what` took.
    pub fn time<T>(&mut self, what: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let value = what();
        self.push(start.elapsed().as_nanos() as f64);
        value
    }

    /// Does `what`, and adds how long it took if it is `counted`.
    pub fn time_if<T>(&mut self, counted: bool, what: impl FnOnce() -> T) -> T {
        if counted { self.time(what) } else { what() }
    }

    /// Adds what somebody else measured.
    pub fn push(&mut self, figure: f64) {
        self.0.push(figure);
    }

    /// The median; not a number where there are none.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            length if length.is_multiple_of(2) => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        }
    }

    /// The smallest.
    pub fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::min)
    }

    /// The largest.
    pub fn most(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::max)
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Samples {
        Samples(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_what_lies_far_out() {
        let samples: Samples = [3.0, 1.0, 1000.0].into_iter().collect();
        assert_eq!((samples.median(), samples.least(), samples.most()), (3.0, 1.0, 1000.0));
        let even: Samples = [4.0, 1.0, 2.0, 90.0].into_iter().collect();
        assert_eq!(even.median(), 3.0);
        assert!(Samples::default().median().is_nan());
    }
}
