//! Memory is taken back under work that goes on, and nobody gets hurt.
//!
//! [`table`] is every cause against every importer, [`coherent`] the same of coherent memory; the others are what a table does not show: a thousand
//! times in a row, importers that do not answer, and a kernel that refuses.

mod coherent;
mod endurance;
mod late;
mod refusals;
pub mod table;

use crate::test::Test;

/// Every test of a revoke.
pub fn tests() -> impl Iterator<Item = &'static Test> {
    [table::TESTS, coherent::TESTS, late::TESTS, refusals::TESTS, endurance::TESTS].into_iter().flatten()
}
