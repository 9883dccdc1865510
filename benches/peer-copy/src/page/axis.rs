//! `Axis`: a logarithmic scale that ends at round numbers. Sizes and speeds span decades.

/// Round numbers of a decade.
const STEPS: [f64; 3] = [1.0, 2.0, 5.0];
/// Beyond so many decades only powers of ten are named.
const FINE_DECADES: f64 = 2.4;

/// A scale from one round number to another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Axis {
    least: f64,
    most: f64,
}

impl Axis {
    /// As long as it takes to hold all values; what is not above zero counts as one.
    pub fn around(values: &[f64]) -> Axis {
        let values = values.iter().map(|value| value.max(1.0));
        let (least, most) =
            values.fold((f64::INFINITY, 1.0), |(least, most), value| (value.min(least), value.max(most)));
        let least = round_below(least.min(most));
        // Never without a length.
        let most = round_below(most * 0.999_999).max(least);
        Axis { least, most: next_after(most) }
    }

    /// Where a value lies, from 0 to 1.
    pub fn share(&self, value: f64) -> f64 {
        (value.max(1.0) / self.least).log10() / (self.most / self.least).log10()
    }

    /// Whether it is on the scale.
    pub fn has(&self, value: f64) -> bool {
        (self.least..=self.most).contains(&value)
    }

    /// Round numbers to be named, the smallest first.
    pub fn ticks(&self) -> Vec<f64> {
        let is_fine = (self.most / self.least).log10() <= FINE_DECADES;
        let mut ticks = Vec::new();
        let mut value = self.least;
        while value <= self.most * 1.000_001 {
            if is_fine || is_power_of_ten(value) {
                ticks.push(value);
            }
            value = next_after(value);
        }
        ticks
    }
}

fn is_power_of_ten(value: f64) -> bool {
    let log = value.log10();
    (log - log.round()).abs() < 1e-6
}

/// The largest round number that is not above it.
fn round_below(value: f64) -> f64 {
    let decade = 10_f64.powi((value.log10() + 1e-9).floor() as i32);
    STEPS
        .into_iter()
        .rev()
        .map(|step| step * decade)
        .find(|&round| round <= value * 1.000_001)
        .unwrap_or(decade)
}

fn next_after(round: f64) -> f64 {
    let decade = 10_f64.powi((round.log10() + 1e-9).floor() as i32);
    let next = STEPS.into_iter().map(|step| step * decade).find(|&next| next > round * 1.000_001);
    next.unwrap_or(10.0 * decade)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(values: &[f64]) -> (f64, f64) {
        let axis = Axis::around(values);
        (axis.least.round(), axis.most.round())
    }

    #[test]
    fn it_ends_at_the_round_numbers_around() {
        assert_eq!(ends(&[3e6, 7e8]), (2e6, 1e9));
        assert_eq!(ends(&[1e6, 1e9]), (1e6, 1e9));
        assert_eq!(ends(&[4e6]), (2e6, 5e6));
        assert_eq!(ends(&[1e6]), (1e6, 2e6));
        assert_eq!(ends(&[0.0, -3.0]), (1.0, 2.0));
    }

    #[test]
    fn values_lie_on_it_in_order() {
        let axis = Axis::around(&[3e6, 7e8]);
        assert!(axis.has(3e6) && axis.has(7e8) && !axis.has(2e9));
        let shares = [2e6, 3e6, 7e8, 1e9].map(|value| axis.share(value));
        assert!((shares[0]).abs() < 1e-9 && (shares[3] - 1.0).abs() < 1e-9, "{shares:?}");
        assert!(shares.is_sorted(), "{shares:?}");
    }

    #[test]
    fn few_ticks_are_named_and_never_fewer_than_two() {
        assert_eq!(Axis::around(&[3e6, 7e6]).ticks().len(), 3);
        for most in [1.1e3, 9e3, 2e5, 3e7, 4e9, 5e11] {
            let ticks = Axis::around(&[1e3, most]).ticks();
            assert!((2..=10).contains(&ticks.len()), "{ticks:?}");
        }
    }
}
