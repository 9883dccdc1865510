//! `Buffer`: a `VkBuffer` bound to imported `VkDeviceMemory`.
//!
//! Made by the imports of [`Device`]. It holds its device, and its mapping where it was imported by
//! host pointer; dropping it destroys the `VkBuffer`, frees the memory, and only then lets go of
//! those. The application must have finished with the raw handles by then; an
//! [`Engine`](crate::Engine) sees to its own work.
//!
//! Freeing may block: [`Resource`](crate::vulkan::memory::resource::Resource) says when.

use std::fmt;
use std::sync::Arc;

use ash::vk::Handle;

use crate::vulkan::device::Device;
use crate::vulkan::memory::raw_buffer::RawBuffer;
use crate::vulkan::memory::resource::release;
use crate::vulkan::usage::BufferUsage;
use crate::{Mapping, Result};

/// A `VkBuffer` on imported memory.
pub struct Buffer {
    device: Device,
    raw: Arc<RawBuffer>,
}

impl Buffer {
    pub(crate) fn new(device: &Device, raw: RawBuffer) -> Self {
        Self { device: device.clone(), raw: Arc::new(raw) }
    }

    /// The same buffer once more.
    pub(crate) fn share(&self) -> Self {
        Self { device: self.device.clone(), raw: Arc::clone(&self.raw) }
    }

    /// What work in flight holds.
    pub(crate) fn raw(&self) -> &Arc<RawBuffer> {
        &self.raw
    }

    /// `VkBuffer`. Valid until the buffer is dropped or released.
    pub fn raw_buffer(&self) -> u64 {
        self.raw.handle().as_raw()
    }

    /// `VkDeviceMemory`. Valid until the buffer is dropped or released.
    pub fn raw_memory(&self) -> u64 {
        self.raw.resource.memory().as_raw()
    }

    /// The size of the buffer in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.raw.size_bytes
    }

    /// What it was made for.
    pub fn usage(&self) -> BufferUsage {
        self.raw.usage
    }

    /// The device that it is of.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether it was imported by host pointer rather than as a dma-buf.
    pub fn is_host_pointer(&self) -> bool {
        self.mapping().is_some()
    }

    /// The memory behind it, where it was imported by host pointer.
    pub(crate) fn mapping(&self) -> Option<&Arc<Mapping>> {
        self.raw.resource.mapping()
    }

    /// Frees it now.
    pub(crate) fn release(self) -> Result<()> {
        release("free an imported buffer", self.raw)
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("buffer", &self.raw.handle())
            .field("size_bytes", &self.raw.size_bytes)
            .field("device", &self.device)
            .finish()
    }
}
