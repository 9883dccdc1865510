//! What a revoke needs of exports and attachments. The modules above implement these traits, so that nothing here
//! depends on them.

use std::sync::Arc;
use std::time::Instant;

use crate::Result;
use crate::gate::Gate;

/// An attachment, as a revoke sees it.
pub(crate) trait RevokeTarget: Send + Sync {
    /// What lets its accesses in.
    fn gate(&self) -> &Arc<Gate>;

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
