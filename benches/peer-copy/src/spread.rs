//! `Spread`: the middle of many times, how far they lie apart, and which lie outside.
//!
//! Medians throughout: on a shared machine a few of any hundred times are interruptions. Those are named, not
//! thrown away.

use peervram_programs::Samples;
use serde::{Deserialize, Serialize};

/// How many outliers are named; a run with more has no middle to speak of.
const NAMED: usize = 8;

/// Times of one thing, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// How many.
    pub count: usize,
    /// The middle one.
    pub median_ns: f64,
    /// A tenth are shorter.
    pub p10_ns: f64,
    /// A tenth are longer.
    pub p90_ns: f64,
    /// The shortest.
    pub least_ns: f64,
    /// The longest.
    pub most_ns: f64,
    /// How many lie more than one and a half times the quartiles' distance outside the quartiles.
    pub outlier_count: usize,
    /// The first of those.
    pub outliers: Vec<Outlier>,
}

/// A time that lies outside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outlier {
    /// Which one, counted from one.
    pub number: usize,
    /// How long it took.
    pub ns: f64,
}

impl Spread {
    /// Of times in the order in which they were taken; none where there are none.
    pub fn of(times_ns: &[f64]) -> Option<Spread> {
        if times_ns.is_empty() {
            return None;
        }
        let times: Samples = times_ns.iter().copied().collect();
        let (low, high) = (times.percentile(25.0), times.percentile(75.0));
        let margin = 1.5 * (high - low);
        let is_outside = |ns: f64| ns < low - margin || ns > high + margin;
        let outside = times_ns.iter().enumerate().filter(|(_, ns)| is_outside(**ns));
        let outliers: Vec<Outlier> = outside.map(|(index, &ns)| Outlier { number: index + 1, ns }).collect();
        Some(Spread {
            count: times_ns.len(),
            median_ns: times.median(),
            p10_ns: times.percentile(10.0),
            p90_ns: times.percentile(90.0),
            least_ns: times.least(),
            most_ns: times.most(),
            outlier_count: outliers.len(),
            outliers: outliers.into_iter().take(NAMED).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_what_lies_far_out_and_names_it() {
        let spread = Spread::of(&[3.0, 1.0, 2.0, 4.0, 1000.0, 5.0]).unwrap();
        assert_eq!((spread.median_ns, spread.least_ns, spread.most_ns), (3.5, 1.0, 1000.0));
        assert_eq!(spread.outliers, [Outlier { number: 5, ns: 1000.0 }]);
    }

    #[test]
    fn percentiles_lie_between_neighbours() {
        let times: Vec<f64> = (0..=10).map(f64::from).collect();
        let spread = Spread::of(&times).unwrap();
        assert_eq!((spread.p10_ns, spread.median_ns, spread.p90_ns), (1.0, 5.0, 9.0));
        assert_eq!(spread.outlier_count, 0);
        let two = Spread::of(&[10.0, 20.0]).unwrap();
        assert_eq!((two.p10_ns, two.median_ns, two.p90_ns), (11.0, 15.0, 19.0));
    }

    #[test]
    fn one_time_is_its_own_middle_and_none_has_none() {
        let one = Spread::of(&[7.0]).unwrap();
        assert_eq!((one.p10_ns, one.median_ns, one.p90_ns), (7.0, 7.0, 7.0));
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn many_outliers_are_counted_and_the_first_named() {
        let mut times = vec![1.0; 60];
        times.extend(vec![9.0; 12]);
        let spread = Spread::of(&times).unwrap();
        assert_eq!((spread.outlier_count, spread.outliers.len()), (12, NAMED));
        assert_eq!(spread.outliers[0].number, 61);
    }
}
