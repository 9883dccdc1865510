//! `Samples`: times of one thing, the middle of them, and how far they lie apart.
//!
//! Medians throughout: on a shared machine a few of any hundred times are interruptions.

use std::time::Instant;

/// The least share of samples that a mode has, and how much larger the next mode begins than it ends.
const MODE_SHARE: f64 = 0.1;
const MODE_GAP: f64 = 1.02;

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
        self.percentile(50.0)
    }

    /// What so many of a hundred are smaller than, between the two nearest in proportion; not a number where there
    /// are none.
    pub fn percentile(&self, percent: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let place = percent / 100.0 * sorted.len().saturating_sub(1) as f64;
        let at = |place: f64| sorted.get(place as usize).copied().unwrap_or(f64::NAN);
        let (below, above) = (at(place.floor()), at(place.ceil()));
        below + (above - below) * place.fract()
    }

    /// The median of each of its modes, the smaller first: where a gap in the middle splits it, there are two.
    pub fn modes(&self) -> (Samples, Option<Samples>) {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let least = (sorted.len() as f64 * MODE_SHARE).ceil().max(1.0) as usize;
        let gap = |at: &usize| sorted[*at] / sorted[*at - 1];
        let widest =
            (least..(sorted.len() + 1).saturating_sub(least)).max_by(|a, b| gap(a).total_cmp(&gap(b)));
        match widest.filter(|at| gap(at) > MODE_GAP) {
            Some(at) => {
                let upper = sorted.split_off(at);
                (Samples(sorted), Some(Samples(upper)))
            }
            None => (Samples(sorted), None),
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
    fn a_gap_in_the_middle_makes_two_modes() {
        let of = |samples: &[f64]| {
            let (lower, upper) = samples.iter().copied().collect::<Samples>().modes();
            (lower.median(), upper.map(|upper| upper.median()))
        };
        let mut two: Vec<f64> = (0..40).map(|i| 60_000.0 + f64::from(i)).collect();
        two.extend((0..20).map(|i| 66_000.0 + f64::from(i)));
        assert_eq!(of(&two), (60_019.5, Some(66_009.5)));
        assert_eq!(of(&two[..40]), (60_019.5, None));
        // A few that lie far out are no mode.
        assert_eq!(of(&two[..43]).1, None);
        assert!(of(&[]).0.is_nan());
        assert_eq!(of(&[5.0]), (5.0, None));
    }

    #[test]
    fn the_median_ignores_what_lies_far_out() {
        let samples: Samples = [3.0, 1.0, 1000.0].into_iter().collect();
        assert_eq!((samples.median(), samples.least(), samples.most()), (3.0, 1.0, 1000.0));
        let even: Samples = [4.0, 1.0, 2.0, 90.0].into_iter().collect();
        assert_eq!(even.median(), 3.0);
        assert!(Samples::default().median().is_nan());
    }

    #[test]
    fn percentiles_lie_between_neighbours() {
        let two: Samples = [20.0, 10.0].into_iter().collect();
        assert_eq!([10.0, 50.0, 90.0].map(|percent| two.percentile(percent)), [11.0, 15.0, 19.0]);
        let many: Samples = (0..=10).map(f64::from).collect();
        assert_eq!([0.0, 10.0, 25.0, 100.0].map(|percent| many.percentile(percent)), [0.0, 1.0, 2.5, 10.0]);
    }
}
