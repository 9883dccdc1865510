//! `Buffer`: a `VkBuffer` bound to imported `VkDeviceMemory`.
//!
//! Made by the imports of [`Device`]. It holds its device, and its mapping where it was imported by
//! host pointer; dropping it destroys the `VkBuffer`, frees the memory, and only then lets go of
//! those. The application must have finished with the raw handles by then; an
//! [`Engine`](super::Engine) sees to its own work.
//!
//! Freeing unmaps the memory in the kernel and closes the driver's descriptor. Where that is the
//! last one of a VFIO dma-buf whose device is being reset, it waits until the reset is over.
#![expect(unsafe_code, reason = "destroying Vulkan objects")]

use std::fmt;
use std::ops::BitOr;
use std::sync::Arc;

use ash::vk::{self, Handle};

use super::failure::failure;
use super::{Device, memory_type};
use crate::{Error, Kind, Mapping, Result};

/// What a buffer will be used for: `VkBufferUsageFlags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferUsage(pub u32);

impl BufferUsage {
    /// The source of copies.
    pub const TRANSFER_SRC: Self = Self(vk::BufferUsageFlags::TRANSFER_SRC.as_raw());
    /// The target of copies.
    pub const TRANSFER_DST: Self = Self(vk::BufferUsageFlags::TRANSFER_DST.as_raw());
    /// Read and written by shaders.
    pub const STORAGE_BUFFER: Self = Self(vk::BufferUsageFlags::STORAGE_BUFFER.as_raw());
    /// Found by shaders at an address (`vkGetBufferDeviceAddress`). Only of an application's device, made with the feature
    /// `bufferDeviceAddress` (VUID-VkMemoryAllocateInfo-flags-03331): whether it has that, nobody can ask here. The
    /// next import of the memory is another buffer, at another address.
    pub const SHADER_DEVICE_ADDRESS: Self = Self(vk::BufferUsageFlags::SHADER_DEVICE_ADDRESS.as_raw());

    /// Whether all of `other` is in it.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub(super) fn flags(self) -> vk::BufferUsageFlags {
        vk::BufferUsageFlags::from_raw(self.0)
    }
}

impl Default for BufferUsage {
    /// What [`Engine`](super::Engine) needs: copies both ways, and shaders.
    fn default() -> Self {
        Self::TRANSFER_SRC | Self::TRANSFER_DST | Self::STORAGE_BUFFER
    }
}

impl BitOr for BufferUsage {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// How to import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImportOptions {
    /// What the buffer will be used for.
    pub usage: BufferUsage,
    /// The size of the buffer, from the start of the memory on; all of it if not given.
    pub size_bytes: Option<u64>,
    /// Whether the memory shall be dedicated to the buffer. It is in any case where the driver
    /// demands that; never for host pointers.
    pub dedicated: bool,
}

/// A `VkBuffer` on imported memory.
pub struct Buffer(pub(super) Arc<Allocation>);

/// The `VkBuffer` and its memory. Work that is in flight holds it beside its [`Buffer`].
pub(super) struct Allocation {
    pub(super) device: Device,
    pub(super) buffer: vk::Buffer,
    pub(super) memory: vk::DeviceMemory,
    pub(super) size_bytes: u64,
    pub(super) usage: BufferUsage,
    pub(super) origin: Origin,
}

/// Where the memory came from, which decides how it is handed over.
pub(super) enum Origin {
    /// Of a dma-buf, imported or exported: owned by the outside's queue family between uses.
    DmaBuf,
    /// Shared with another device of the same driver, which owns it between uses.
    SameDriver,
    /// Of this process's address space, which the mapping keeps.
    HostPointer(Arc<Mapping>),
    /// Allocated here.
    Own,
}

/// How a buffer is made: of one queue family, or shared by those that the device has queues of.
pub(super) fn buffer_info(device: &Device, size_bytes: u64, usage: BufferUsage) -> vk::BufferCreateInfo<'_> {
    let families = device.sharing_families();
    // VUID-VkBufferCreateInfo-sharingMode-00914: at least two, and different ones.
    let sharing = if families.is_empty() { vk::SharingMode::EXCLUSIVE } else { vk::SharingMode::CONCURRENT };
    vk::BufferCreateInfo::default()
        .size(size_bytes)
        .usage(usage.flags())
        .sharing_mode(sharing)
        .queue_family_indices(families)
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let device = self.device.ash();
        // SAFETY: both handles are null or were made from `device`, here only, and no work of ours
        // is in flight, since that would hold `self` (VUID-vkDestroyBuffer-buffer-00922,
        // VUID-vkFreeMemory-memory-00677). The fields that the memory rests on are dropped later.
        unsafe {
            device.destroy_buffer(self.buffer, None);
            device.free_memory(self.memory, None);
        }
    }
}

impl Allocation {
    /// A buffer of this device's own for the default usage, in memory of a type that `choose` picks.
    pub(super) fn own(
        tried: &'static str,
        device: &Device,
        size_bytes: u64,
        choose: fn(&[vk::MemoryType], u32) -> Option<u32>,
    ) -> Result<Self> {
        let failed = |result| failure(tried, result);
        let usage = BufferUsage::default();
        let ash = device.ash();
        let info = buffer_info(device, size_bytes, usage);
        // SAFETY: a plain structure; nobody asks for a buffer of no bytes.
        let buffer = unsafe { ash.create_buffer(&info, None) }.map_err(failed)?;
        let mut allocation = Self {
            device: device.clone(),
            buffer,
            memory: vk::DeviceMemory::null(),
            size_bytes,
            usage,
            origin: Origin::Own,
        };
        // SAFETY: made above.
        let needs = unsafe { ash.get_buffer_memory_requirements(buffer) };
        let memory_type = choose(device.memory_types(), needs.memory_type_bits)
            .ok_or_else(|| Error::new(Kind::Vulkan, tried, "no memory type suits it"))?;
        let info =
            vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(memory_type);
        // SAFETY: size and type are what the buffer requires.
        allocation.memory = unsafe { ash.allocate_memory(&info, None) }.map_err(failed)?;
        // SAFETY: both were made above, for each other.
        unsafe { ash.bind_buffer_memory(buffer, allocation.memory, 0) }.map_err(failed)?;
        Ok(allocation)
    }
}

impl Buffer {
    /// `VkBuffer`. Valid until the buffer is dropped or released.
    pub fn raw_buffer(&self) -> u64 {
        self.0.buffer.as_raw()
    }

    /// `VkDeviceMemory`. Valid until the buffer is dropped or released.
    pub fn raw_memory(&self) -> u64 {
        self.0.memory.as_raw()
    }

    /// The size of the buffer in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.0.size_bytes
    }

    /// What it was made for.
    pub fn usage(&self) -> BufferUsage {
        self.0.usage
    }

    /// The device that it is of.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Whether it was imported by host pointer rather than as a dma-buf.
    pub fn is_host_pointer(&self) -> bool {
        matches!(self.0.origin, Origin::HostPointer(_))
    }

    /// Memory of the device's own.
    pub(super) fn own(device: &Device, size_bytes: u64) -> Result<Self> {
        const TRIED: &str = "make staging memory";
        let allocation = Allocation::own(TRIED, device, size_bytes, memory_type::for_device_access)?;
        Ok(Self(Arc::new(allocation)))
    }

    /// The memory behind it, where it was imported by host pointer.
    pub(super) fn mapping(&self) -> Option<&Arc<Mapping>> {
        match &self.0.origin {
            Origin::HostPointer(mapping) => Some(mapping),
            _ => None,
        }
    }

    /// Frees it now.
    pub(super) fn release(self) -> Result<()> {
        match Arc::try_unwrap(self.0) {
            Ok(allocation) => {
                drop(allocation);
                Ok(())
            }
            Err(_in_flight) => {
                let why = "work that missed its deadline still runs on it";
                Err(Error::new(Kind::StillInUse, "free an imported buffer", why)
                    .next("it is freed when that work ends"))
            }
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("buffer", &self.0.buffer)
            .field("size_bytes", &self.0.size_bytes)
            .field("device", &self.0.device)
            .finish()
    }
}
