//! All tests, one file for each part. A new file is one line here.

mod adopt;
mod bind;
mod broker;
mod coherent_trust;
mod command_line;
mod doctor;
mod drivers;
pub mod drm;
mod gbm;
mod holder;
mod holders;
mod images;
mod lab;
mod lenders;
mod lockdep;
mod model;
mod network_card;
pub mod nvgrace;
mod peer;
mod power;
mod revoke;
mod route;
mod routes;
mod shadow;
mod signal;
mod slots;
mod staged;
mod storage;
mod trial;
mod trust;
mod two_drivers;
mod verify;
mod vfio;
mod vulkan;

use crate::test::Test;

/// Every test, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Test> {
    [
        lab::TESTS,
        vfio::TESTS,
        drm::TESTS,
        lenders::TESTS,
        holder::TESTS,
        holders::TESTS,
        signal::TESTS,
        vulkan::TESTS,
        images::TESTS,
        gbm::TESTS,
        two_drivers::TESTS,
        drivers::TESTS,
        model::TESTS,
        peer::TESTS,
        network_card::TESTS,
        storage::TESTS,
        verify::TESTS,
        staged::TESTS,
        trust::TESTS,
        power::TESTS,
        shadow::TESTS,
        adopt::TESTS,
        slots::TESTS,
        routes::TESTS,
        route::TESTS,
        nvgrace::TESTS,
        coherent_trust::TESTS,
        doctor::TESTS,
        bind::TESTS,
        command_line::TESTS,
        trial::TESTS,
    ]
    .into_iter()
    .flatten()
    .chain(revoke::tests())
    .chain(broker::tests())
    // After everything that it watches.
    .chain(lockdep::TESTS)
}
