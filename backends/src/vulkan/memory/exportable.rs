//! Exportable allocations: a `VkBuffer` on memory that the driver can give out by a descriptor, and that descriptor.
//!
//! What [`DeviceMemory`](crate::vulkan::DeviceMemory) (a dma-buf) and [`OpaqueMemory`](crate::vulkan::OpaqueMemory) (a driver's
//! own handle) are made of. The order is that of imports: ask whether the driver can, create the buffer, allocate
//! what it requires, bind.
#![expect(unsafe_code, reason = "allocating memory, and taking a descriptor from the driver")]

use std::os::fd::{FromRawFd, OwnedFd};

use ash::vk;

use super::memory_type;
use super::raw_buffer::RawBuffer;
use super::resource::{Handle, Origin};
use crate::ranges::check_whole_pages;
use crate::vulkan::discovery::physical_device::external_features;
use crate::vulkan::failure::failure;
use crate::vulkan::logical::device::LogicalDevice;
use crate::vulkan::usage::BufferUsage;
use crate::{Error, Kind, Result};

/// An allocation that can be exported, and what an importer of the same driver must repeat of it.
pub(crate) struct Exportable {
    pub(crate) buffer: RawBuffer,
    pub(crate) allocation_bytes: u64,
    pub(crate) memory_type_index: u32,
    pub(crate) is_dedicated: bool,
}

impl Exportable {
    /// `size_bytes`, a multiple of the page size, of `device`'s own memory, for `handle`.
    pub(crate) fn new(
        tried: &'static str,
        device: &LogicalDevice,
        size_bytes: u64,
        handle: vk::ExternalMemoryHandleTypeFlags,
        origin: Origin,
    ) -> Result<Self> {
        check_whole_pages(tried, size_bytes)?;
        let usage = BufferUsage::default();
        // VUID-VkExportMemoryAllocateInfo-handleTypes-00656: the handle type must be exportable.
        let (instance, physical) = device.ash_instance();
        let features = external_features(instance, physical, usage.flags(), handle);
        if !features.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE) {
            return Err(Error::new(Kind::Unsupported, tried, "the driver exports none for a buffer's usage")
                .next("lend memory of another device, or of the host"));
        }
        let mut buffer = RawBuffer::new(tried, device, usage, handle, size_bytes, origin)?;
        let needs = buffer.needs();
        let memory_type_index = memory_type::for_device_access(device.memory_types(), needs.memory_type_bits)
            .ok_or_else(|| Error::new(Kind::Vulkan, tried, "no memory type suits it"))?;
        let is_dedicated = needs.is_dedicated(features);
        let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(handle);
        let mut dedicate = buffer.handle().dedicate();
        let mut info = vk::MemoryAllocateInfo::default()
            .allocation_size(needs.size_bytes)
            .memory_type_index(memory_type_index)
            .push_next(&mut export);
        if is_dedicated {
            info = info.push_next(&mut dedicate);
        }
        // SAFETY: size and type are what the buffer requires, and the chain outlives the call.
        unsafe { buffer.resource.allocate(tried, &info, 0, || ()) }?;
        Ok(Self { buffer, allocation_bytes: needs.size_bytes, memory_type_index, is_dedicated })
    }
}

/// A new descriptor of the memory of `buffer`, which was made for `handle`. It is the caller's.
pub(crate) fn descriptor(
    tried: &'static str,
    buffer: &RawBuffer,
    handle: vk::ExternalMemoryHandleTypeFlags,
) -> Result<OwnedFd> {
    let Some(functions) = buffer.resource.device().memory_fd() else {
        return Err(Error::new(Kind::VulkanMissing, tried, "VK_KHR_external_memory_fd is not enabled"));
    };
    let info = vk::MemoryGetFdInfoKHR::default().memory(buffer.resource.memory()).handle_type(handle);
    // SAFETY: VUID-VkMemoryGetFdInfoKHR-handleType-00671: the memory was allocated for that handle type.
    let fd = unsafe { functions.get_memory_fd(&info) }.map_err(|result| failure(tried, result))?;
    // SAFETY: a new descriptor, which vkGetMemoryFdKHR gives to the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
