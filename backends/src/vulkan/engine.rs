//! `Engine`: ready-made work of the device on imported buffers and images.
//!
//! A [checksum](Engine::checksum) of what the device sees, a picture [painted](Engine::paint) in
//! place, and copies [out](Engine::read_back) and [in](Engine::upload); of an image's pixels, too
//! ([`read_image`](Engine::read_image), [`write_image`](Engine::write_image)). Each call hands the memory
//! over to the device, works, hands it back, and returns when that is done or the deadline has
//! passed; large buffers are worked through in parts that the device's limits allow.
//!
//! Absent on purpose: overlap. One call, one wait. An application that wants its own work to run
//! beside the CPU's records it itself, between [`Device::record_acquire`] and
//! [`Device::record_release`].

use std::sync::Arc;

use super::commands::Commands;
use super::pipeline::Pipeline;
use super::staging::Staging;
use super::{Buffer, BufferUsage, Device};
use crate::{Error, Kind, Result};

/// Work of a device on imported buffers.
///
/// Shaders are compiled at their first use, which a software driver takes a second for and which
/// no deadline covers. An engine whose work missed a deadline first waits for that work in its next
/// call; dropped before it has ended, it waits two seconds more and then leaks what the work uses.
pub struct Engine {
    pub(super) commands: Commands,
    pub(super) device: Device,
    pub(super) checksum: Option<Arc<Pipeline>>,
    pub(super) paint: Option<Arc<Pipeline>>,
    pub(super) sum: Option<Arc<Staging>>,
    pub(super) staging: Option<Arc<Staging>>,
}

impl Engine {
    /// On the queue that `device` was made with. Checksums and pictures take one that computes.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for an application's device without a [lock](Device::with_queue_lock) for its queue;
    /// [`Kind::Vulkan`] where the driver refuses.
    pub fn new(device: &Device) -> Result<Self> {
        Self::on_queue(device, false)
    }

    /// On that queue, or on the device's transfer queue, which does copies only.
    pub(super) fn on_queue(device: &Device, only_transfers: bool) -> Result<Self> {
        Ok(Self {
            commands: Commands::new(device, only_transfers)?,
            device: device.clone(),
            checksum: None,
            paint: None,
            sum: None,
            staging: None,
        })
    }

    /// The device it works on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether `buffer` is of this device and made for `usage`.
    pub(super) fn check(&self, tried: &'static str, buffer: &Buffer, usage: BufferUsage) -> Result<()> {
        let why = if !self.device.is_same(buffer.device()) {
            "the buffer is of another Vulkan device"
        } else if !buffer.usage().contains(usage) {
            "the buffer was imported without the usage for it"
        } else {
            return Ok(());
        };
        Err(Error::new(Kind::InvalidInput, tried, why))
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Engine").field(&self.device).finish()
    }
}

/// What is in `slot`, made at first use.
pub(super) fn made<T>(slot: &mut Option<Arc<T>>, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
    if let Some(value) = slot {
        return Ok(Arc::clone(value));
    }
    let value = Arc::new(make()?);
    *slot = Some(Arc::clone(&value));
    Ok(value)
}
