//! How the lab tells what it is doing. It never prints by itself.

use std::time::{Duration, Instant};

/// Told of everything that takes long.
pub trait Progress: Sync {
    /// A step begins.
    fn begin(&self, what: &str);
    /// The step that began last has done `done` of about `about` parts.
    fn advance(&self, _done: usize, _about: usize) {}
    /// The step that began last is over.
    fn end(&self, succeeded: bool, took: Duration);
    /// Something that a person should know.
    fn note(&self, text: &str);
}

/// Tells nobody.
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _what: &str) {}
    fn end(&self, _succeeded: bool, _took: Duration) {}
    fn note(&self, _text: &str) {}
}

/// Does `work` as one step.
pub fn step<T>(
    progress: &dyn Progress,
    what: &str,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    progress.begin(what);
    let start = Instant::now();
    let result = work();
    progress.end(result.is_ok(), start.elapsed());
    result
}
