//! A broker lends VRAM to processes of another user, on a real kernel.
//!
//! [`lent`] is who sees which bytes, [`causes`] every cause of a revoke, [`late`] clients that do not answer, [`hidden`]
//! memory that somebody still has, [`killed`] processes that are killed, [`scrubbed`] what is left in memory.

mod causes;
mod hidden;
mod killed;
mod late;
mod lent;
mod scene;
mod scrubbed;

use crate::test::Test;

/// Every test of the broker.
pub fn tests() -> impl Iterator<Item = &'static Test> {
    [lent::TESTS, causes::TESTS, late::TESTS, hidden::TESTS, scrubbed::TESTS, killed::TESTS]
        .into_iter()
        .flatten()
}
