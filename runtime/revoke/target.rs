//! What a revoke needs of exports and attachments. The modules above implement these traits, so that nothing here
//! depends on them.

use std::sync::Arc;
use std::time::Instant;

use super::RevokeCause;
use super::machine::{AtDeadline, ChangeId};
use crate::Result;
use crate::gate::Gate;

/// What lets the accesses of one attachment in: a gate, or what tells another process. Called under the revoker's lock, so
/// that everyone hears in the order of the decisions: nothing here waits, calls back, or drops an attachment.
pub(crate) trait Admission: Send + Sync {
    /// Lets nobody in: the memory is about to be taken back.
    fn close(&self, drain: Drain);

    /// Lets in again, to the same memory as before: nothing was taken back.
    fn call_off(&self, generation: u64);

    /// Lets in, to memory of `generation`.
    fn open(&self, generation: u64);

    /// Memory of `generation` is away, or about to be: who is still inside is torn.
    fn shut(&self, generation: u64, cause: RevokeCause);

    /// Lets nobody in: the device of memory of `generation` has failed, for `cause`. Who is inside is torn, since nobody
    /// knows what it has read since.
    fn bar(&self, generation: u64, cause: RevokeCause);

    /// Memory of `generation` is gone for good.
    fn shut_for_good(&self, generation: u64);
}

/// What an attachment is told when its memory is about to be taken back.
#[cfg_attr(
    any(not(feature = "broker"), feature = "shuttle"),
    allow(dead_code, reason = "of brokers and their clients")
)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Drain {
    /// Of which an answer is an answer to.
    pub change: ChangeId,
    /// Why.
    pub cause: RevokeCause,
    /// Until when an answer counts.
    pub deadline: Instant,
    /// What happens then.
    pub at_deadline: AtDeadline,
}

impl Admission for Gate {
    fn close(&self, drain: Drain) {
        self.close(drain.cause);
    }

    fn call_off(&self, generation: u64) {
        self.open(generation);
    }

    fn open(&self, generation: u64) {
        self.open(generation);
    }

    fn shut(&self, generation: u64, cause: RevokeCause) {
        self.shut(generation, cause);
    }

    fn bar(&self, generation: u64, cause: RevokeCause) {
        self.bar(generation, cause);
    }

    fn shut_for_good(&self, generation: u64) {
        self.shut_for_good(generation);
    }
}

/// An attachment, as a revoke sees it.
pub(crate) trait RevokeTarget: Send + Sync {
    /// What lets its accesses in.
    fn admission(&self) -> Arc<dyn Admission>;

    /// Waits until nobody uses the memory, at most until `deadline`. Returns whether that is so.
    fn wait_idle(&self, deadline: Instant) -> bool;

    /// Frees the import, where it must be freed before the call. Nobody uses it.
    fn free(&self);

    /// The importer's name, for messages.
    fn importer(&self) -> String;

    /// The importer's name and how many of its accesses are inside, for messages.
    fn describe(&self) -> String;
}

/// Exported memory, as a revoke sees it.
pub(crate) trait ExportedMemory: Send + Sync {
    /// Stops the device's own work on the memory.
    ///
    /// # Errors
    /// What the owner says, which is in the log.
    fn quiesce(&self) -> Result<()>;

    /// Has the device's own work start again on memory whose content is unknown.
    ///
    /// # Errors
    /// What the owner says.
    fn resume(&self) -> Result<()>;

    /// The inode of its dma-buf, if it has one.
    fn inode(&self) -> Option<u64>;

    /// Whether importers may have its dma-buf that this process does not know.
    fn is_handed_out(&self) -> bool;
}
