//! All tests, one file for each part. A new file is one line here.

mod lab;

use crate::test::Test;

/// Every test, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Test> {
    [lab::TESTS].into_iter().flatten()
}
