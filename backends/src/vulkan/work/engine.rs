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

use crate::Result;
use crate::vulkan::copying::lazy::Lazy;
use crate::vulkan::copying::pipeline::Pipeline;
use crate::vulkan::copying::staging::Staging;
use crate::vulkan::device::Device;
use crate::vulkan::logical::commands::Commands;

/// Work of a device on imported buffers.
///
/// Shaders are compiled at their first use, which a software driver takes a second for and which
/// no deadline covers. An engine whose work missed a deadline first waits for that work in its next
/// call; dropped before it has ended, it waits two seconds more and then leaks what the work uses.
pub struct Engine {
    pub(crate) commands: Commands,
    pub(crate) device: Device,
    pub(crate) checksum: Lazy<Pipeline>,
    pub(crate) paint: Lazy<Pipeline>,
    pub(crate) sum: Lazy<Staging>,
    pub(crate) staging: Lazy<Staging>,
}

impl Engine {
    /// On the queue that `device` was made with. Checksums and pictures take one that computes.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for an application's device without a [lock](Device::with_queue_lock) for its queue;
    /// [`Kind::Vulkan`](crate::Kind::Vulkan) where the driver refuses.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            commands: Commands::new(device.logical(), false)?,
            device: device.clone(),
            checksum: Lazy::new(),
            paint: Lazy::new(),
            sum: Lazy::new(),
            staging: Lazy::new(),
        })
    }

    /// The device it works on.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Engine").field(&self.device).finish()
    }
}
