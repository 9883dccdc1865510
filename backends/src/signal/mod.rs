//! `Signal`: something that fires once, when work on memory is over.
//!
//! An access to memory that may be taken back lasts until its signal has fired. What a device's work
//! has to say of its end is one of
//! - [`SyncFile`], a kernel fence as a descriptor: any DRM driver, `VK_KHR_external_fence_fd`, or what
//!   importers left in a dma-buf ([`SyncFile::of_dma_buf`]);
//! - `vulkan::FenceSignal` and `vulkan::TimelineSignal`, an application's own `VkFence` or timeline
//!   semaphore, by handle;
//! - [`Flag`], for work of the CPU.
//!
//! An application with another kind of end (an interrupt of its own driver, a value in memory)
//! implements the trait.
//!
//! Absent on purpose: taking a signal back, firing twice, callbacks. Whoever wants to know waits.

mod flag;
mod sync_file;

pub use flag::Flag;
pub use sync_file::{Before, SyncFile};

use std::time::Duration;

use crate::Result;

/// Fires once, when work on memory is over; what an access is held until.
pub trait Signal: Send + Sync {
    /// Waits until it has fired, at most `timeout`; zero only looks. Says whether it has.
    ///
    /// Several threads may wait at once. Once it has fired it stays so: waits that are under way end, and later
    /// ones return at once. The signal is dropped when its work is over and nobody waits.
    ///
    /// # Errors
    /// The device was lost, the work failed, or the wait itself did. Nobody knows then whether the
    /// memory is still worked on, and whoever waits treats the work as not over.
    fn wait(&self, timeout: Duration) -> Result<bool>;
}
