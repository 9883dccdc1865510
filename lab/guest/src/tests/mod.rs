//! All tests, one file for each part. A new file is one line here.

mod drm;
mod holder;
mod holders;
mod lab;
mod lockdep;
mod model;
mod peer;
mod signal;
mod vfio;
mod vulkan;

use crate::test::Test;

/// Every test, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Test> {
    [
        lab::TESTS,
        vfio::TESTS,
        drm::TESTS,
        holder::TESTS,
        holders::TESTS,
        signal::TESTS,
        vulkan::TESTS,
        model::TESTS,
        peer::TESTS,
        lockdep::TESTS,
    ]
    .into_iter()
    .flatten()
}
