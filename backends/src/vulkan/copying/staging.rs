//! `Staging`: memory that both the CPU and the device read and write without flushing.
#![expect(unsafe_code, reason = "allocating and mapping device memory")]

use std::ptr::{self, NonNull};
use std::sync::Arc;

use ash::vk;

use crate::vulkan::failure::failure;
use crate::vulkan::logical::device::LogicalDevice;
use crate::vulkan::memory::memory_type;
use crate::vulkan::memory::raw_buffer::RawBuffer;
use crate::{Error, Kind, Result};

/// A buffer of this device's own, mapped.
pub(crate) struct Staging {
    buffer: Arc<RawBuffer>,
    start: NonNull<u8>,
}

// SAFETY: the pointer refers to the mapped memory of `buffer`, which is freed with it. Whoever
// copies through it sees to it that no commands are in flight.
unsafe impl Send for Staging {}
// SAFETY: see `Send`; `write` and `read` are unsafe to call for that reason.
unsafe impl Sync for Staging {}

impl Staging {
    pub(crate) fn new(device: &LogicalDevice, size_bytes: u64) -> Result<Self> {
        const TRIED: &str = "allocate staging memory";
        let buffer = RawBuffer::own(TRIED, device, size_bytes, memory_type::for_host_access)?;
        let ash = device.ash();
        // SAFETY: the type is host-visible, and the memory is mapped here only. Freeing unmaps.
        let start = unsafe {
            ash.map_memory(buffer.resource.memory(), 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty())
        }
        .map_err(|result| failure(TRIED, result))?;
        let start = NonNull::new(start.cast())
            .ok_or_else(|| Error::new(Kind::Vulkan, TRIED, "the driver mapped it at address zero"))?;
        Ok(Self { buffer: Arc::new(buffer), start })
    }

    pub(crate) fn raw(&self) -> &Arc<RawBuffer> {
        &self.buffer
    }

    pub(crate) fn buffer(&self) -> vk::Buffer {
        self.buffer.handle()
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.buffer.size_bytes
    }

    /// Copies `bytes` to its start.
    ///
    /// # Safety
    /// They fit, and no commands that use it are in flight.
    pub(crate) unsafe fn write(&self, bytes: &[u8]) {
        debug_assert!(bytes.len() as u64 <= self.size_bytes());
        // SAFETY: the caller vouches that they fit; device memory does not overlap Rust's.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr(), bytes.len()) };
    }

    /// Copies from its start until `into` is full.
    ///
    /// # Safety
    /// As [`Staging::write`].
    pub(crate) unsafe fn read(&self, into: &mut [u8]) {
        debug_assert!(into.len() as u64 <= self.size_bytes());
        // SAFETY: the caller vouches that they fit; device memory does not overlap Rust's.
        unsafe { ptr::copy_nonoverlapping(self.start.as_ptr(), into.as_mut_ptr(), into.len()) };
    }
}
