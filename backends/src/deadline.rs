//! Deadlines, of timeouts of any length.

use std::time::{Duration, Instant};

/// As far ahead as anybody waits. The clock of Linux counts on for centuries after this.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The instant at which `timeout` is over, from now on. [`Duration::MAX`], and whatever else is longer than a
/// century, gives an instant a century ahead: `Instant::now() + timeout` would panic.
pub fn deadline_after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(LONGEST)
}
