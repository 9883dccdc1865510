//! Imported `VkDeviceMemory`: of a dma-buf or of a mapping, for a buffer or an image that says what it needs.
//!
//! Both go the same way: what was made for external memory says what it requires, a memory type is chosen that
//! it and the handle allow, and the memory is allocated by import. Only the allocation proves that the driver
//! can: `vkGetMemoryFdPropertiesKHR` says yes to memory that cannot be mapped.
#![expect(unsafe_code, reason = "handing a descriptor or a pointer to the driver")]

use std::os::fd::{AsRawFd, IntoRawFd};
use std::sync::Arc;

use ash::{ext, khr, vk};

use super::memory_type;
use super::resource::{Handle, Needs, Resource};
use crate::vulkan::failure::failure;
use crate::vulkan::logical::device::LogicalDevice;
use crate::{DmaBuf, Error, Kind, Mapping, Result};

pub(crate) const DMA_BUF: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
pub(crate) const HOST_POINTER: vk::ExternalMemoryHandleTypeFlags =
    vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;

/// The functions for dma-bufs.
pub(crate) fn for_dma_bufs<'a>(
    tried: &'static str,
    device: &'a LogicalDevice,
) -> Result<&'a khr::external_memory_fd::Device> {
    device.dma_buf_functions().ok_or_else(|| {
        let why = "VK_KHR_external_memory_fd or VK_EXT_external_memory_dma_buf is not enabled";
        Error::new(Kind::VulkanMissing, tried, why)
            .next("enable what required_extensions() lists; Mesa's lavapipe has it from version 25 on")
    })
}

impl<H: Handle> Resource<H> {
    /// Imports `size_bytes` of a dma-buf as its memory, and binds it there from `offset_bytes` on.
    pub(crate) fn import_dma_buf(
        &mut self,
        tried: &'static str,
        dma_buf: &DmaBuf,
        size_bytes: u64,
        needs: &Needs,
        is_dedicated: bool,
        offset_bytes: u64,
    ) -> Result<()> {
        let device = self.device().clone();
        let memory_fd = for_dma_bufs(tried, &device)?;
        let fd = dma_buf.duplicate()?;
        let mut fd_properties = vk::MemoryFdPropertiesKHR::default();
        // SAFETY: `fd` is open, and stays ours here. VUID-vkGetMemoryFdPropertiesKHR-handleType-00674:
        // the handle type is not OPAQUE_FD.
        unsafe { memory_fd.get_memory_fd_properties(DMA_BUF, fd.as_raw_fd(), &mut fd_properties) }
            .map_err(|result| failure(tried, result))?;
        // VUID-VkMemoryAllocateInfo-memoryTypeIndex-00648, VUID-vkBindBufferMemory-memory-01035 and
        // VUID-vkBindImageMemory-memory-01047.
        let memory_type =
            choose_type(tried, &device, fd_properties.memory_type_bits & needs.memory_type_bits)?;

        let mut import = vk::ImportMemoryFdInfoKHR::default().handle_type(DMA_BUF).fd(fd.as_raw_fd());
        let (mut flags, mut dedicate) = (needs.flags(), is_dedicated.then(|| self.handle().dedicate()));
        let mut info = vk::MemoryAllocateInfo::default()
            .allocation_size(size_bytes)
            .memory_type_index(memory_type)
            .push_next(&mut import)
            .push_next(&mut flags);
        if let Some(dedicate) = &mut dedicate {
            info = info.push_next(dedicate);
        }
        // SAFETY: the chain is initialised and outlives the call; the type is one that the resource needs, and the caller
        // compared the size; `fd` is open and a duplicate that nobody else knows. Only when memory was allocated is the
        // descriptor the driver's; on failure it is ours, and dropping it closes it.
        unsafe {
            self.allocate(tried, &info, offset_bytes, || {
                let _ = fd.into_raw_fd();
            })
        }
    }

    /// Imports all of the mapping that is its origin, which outlives the memory, and binds it there from `offset_bytes` on.
    pub(crate) fn import_mapping(
        &mut self,
        tried: &'static str,
        needs: &Needs,
        features: vk::ExternalMemoryFeatureFlags,
        offset_bytes: u64,
    ) -> Result<()> {
        let device = self.device().clone();
        let mapping =
            Arc::clone(self.mapping().expect("memory by host pointer has its mapping for an origin"));
        let functions = for_host_pointers(tried, &device, &mapping)?;
        // VUID-VkMemoryAllocateInfo-pNext-02806.
        if needs.is_dedicated(features) {
            let why = "the driver wants memory that is dedicated, and memory by host pointer must not be";
            return Err(Error::new(Kind::ImporterCannot, tried, why).next("export a dma-buf and import that"));
        }
        let pointer = mapping.as_ptr();
        let mut pointer_properties = vk::MemoryHostPointerPropertiesEXT::default();
        // SAFETY: the extension is enabled, and the pointer is aligned
        // (VUID-vkGetMemoryHostPointerPropertiesEXT-pHostPointer-01753) and mapped, by `mapping`.
        unsafe {
            (functions.fp().get_memory_host_pointer_properties_ext)(
                functions.device(),
                HOST_POINTER,
                pointer.cast(),
                &mut pointer_properties,
            )
        }
        .result()
        .map_err(|result| failure(tried, result))?;
        let bits = pointer_properties.memory_type_bits & needs.memory_type_bits;
        let memory_type = choose_type(tried, &device, bits)?;

        let mut import = vk::ImportMemoryHostPointerInfoEXT::default()
            .handle_type(HOST_POINTER)
            .host_pointer(pointer.cast());
        let mut flags = needs.flags();
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(mapping.len() as u64)
            .memory_type_index(memory_type)
            .push_next(&mut import)
            .push_next(&mut flags);
        // SAFETY: pointer and length are aligned (VUID-VkImportMemoryHostPointerInfoEXT-pHostPointer-01749,
        // VUID-VkMemoryAllocateInfo-allocationSize-01745), `self` keeps the mapping, the caller compared the size, and the type is
        // one that the resource needs.
        unsafe { self.allocate(tried, &info, offset_bytes, || ()) }
    }
}

/// The functions for host pointers, for a mapping that is aligned as the device wants it.
pub(crate) fn for_host_pointers<'a>(
    tried: &'static str,
    device: &'a LogicalDevice,
    mapping: &Mapping,
) -> Result<&'a ext::external_memory_host::Device> {
    let (Some(functions), Some(alignment_bytes)) =
        (device.host_pointer(), device.host_pointer_alignment_bytes())
    else {
        let why = "VK_EXT_external_memory_host is not enabled, or imports no buffers";
        return Err(Error::new(Kind::Unsupported, tried, why).next("export a dma-buf and import that"));
    };
    check_alignment(tried, mapping.as_ptr().addr() as u64, mapping.len() as u64, alignment_bytes)?;
    Ok(functions)
}

fn choose_type(tried: &'static str, device: &LogicalDevice, allowed_bits: u32) -> Result<u32> {
    memory_type::for_import(device.memory_types(), allowed_bits).ok_or_else(|| {
        let why = "no memory type suits both the memory and what is to be made of it";
        Error::new(Kind::ImporterCannot, tried, why).next("ask for fewer usages of it")
    })
}

/// VUID-VkImportMemoryHostPointerInfoEXT-pHostPointer-01749 (the pointer) and
/// VUID-VkMemoryAllocateInfo-allocationSize-01745 (the length).
fn check_alignment(tried: &'static str, address: u64, length_bytes: u64, alignment_bytes: u64) -> Result<()> {
    for (what, value) in [("pointer", address), ("length", length_bytes)] {
        if value % alignment_bytes != 0 {
            let why = format!("the {what} {value:#x} is not a multiple of {alignment_bytes:#x}");
            return Err(Error::new(Kind::InvalidInput, tried, why)
                .next("map memory at the device's minImportedHostPointerAlignment"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointer_and_length_obey_the_devices_alignment() {
        assert!(check_alignment("test", 0x20000, 0x10000, 0x10000).is_ok());
        let why = |address, length| check_alignment("test", address, length, 0x10000).unwrap_err();
        assert!(why(0x21000, 0x10000).why().contains("pointer 0x21000"));
        assert!(why(0x20000, 0x1000).why().contains("length 0x1000"));
    }
}
