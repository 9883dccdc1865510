//! Imported `VkDeviceMemory`: of a dma-buf or of a mapping, for a buffer or an image that says what it needs.
//!
//! Both go the same way: what was made for external memory says what it requires, a memory type is chosen that
//! it and the handle allow, and the memory is allocated by import. Only the allocation proves that the driver
//! can: `vkGetMemoryFdPropertiesKHR` says yes to memory that cannot be mapped. Binding is the caller's.
#![expect(unsafe_code, reason = "handing a descriptor or a pointer to the driver")]

use std::os::fd::{AsRawFd, IntoRawFd};

use ash::{ext, khr, vk};

use super::failure::failure;
use super::{Device, memory_type};
use crate::{DmaBuf, Error, Kind, Mapping, Result};

pub(super) const DMA_BUF: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
pub(super) const HOST_POINTER: vk::ExternalMemoryHandleTypeFlags =
    vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;

/// What the driver requires of the memory of a buffer or an image.
pub(super) struct Needs {
    pub(super) size_bytes: u64,
    pub(super) memory_type_bits: u32,
    pub(super) alignment_bytes: u64,
    pub(super) dedicated: bool,
    /// Shaders see it by an address: a buffer of that usage.
    pub(super) has_address: bool,
}

impl Needs {
    pub(super) fn new(of: vk::MemoryRequirements, dedicated: vk::MemoryDedicatedRequirements<'_>) -> Self {
        Self {
            size_bytes: of.size,
            memory_type_bits: of.memory_type_bits,
            alignment_bytes: of.alignment,
            dedicated: dedicated.requires_dedicated_allocation != 0,
            has_address: false,
        }
    }

    /// Whether the driver demands memory that is dedicated: of what was made for it (VUID-vkBindBufferMemory-buffer-01444,
    /// VUID-vkBindImageMemory-image-01445), or of the kind of handle (`VK_EXTERNAL_MEMORY_FEATURE_DEDICATED_ONLY_BIT`).
    pub(super) fn is_dedicated(&self, features: vk::ExternalMemoryFeatureFlags) -> bool {
        self.dedicated || features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY)
    }

    /// VUID-vkBindBufferMemory-bufferDeviceAddress-03339: memory of a buffer that has an address is allocated for it.
    pub(super) fn flags(&self) -> vk::MemoryAllocateFlagsInfo<'static> {
        let flags = if self.has_address {
            vk::MemoryAllocateFlags::DEVICE_ADDRESS
        } else {
            vk::MemoryAllocateFlags::empty()
        };
        vk::MemoryAllocateFlagsInfo::default().flags(flags)
    }
}

/// What memory is dedicated to.
#[derive(Clone, Copy)]
pub(super) enum Whole {
    Buffer(vk::Buffer),
    Image(vk::Image),
}

impl Whole {
    fn info(self) -> vk::MemoryDedicatedAllocateInfo<'static> {
        let info = vk::MemoryDedicatedAllocateInfo::default();
        match self {
            Self::Buffer(buffer) => info.buffer(buffer),
            Self::Image(image) => info.image(image),
        }
    }
}

/// The functions for dma-bufs.
pub(super) fn for_dma_bufs<'a>(
    tried: &'static str,
    device: &'a Device,
) -> Result<&'a khr::external_memory_fd::Device> {
    device.dma_buf_functions().ok_or_else(|| {
        let why = "VK_KHR_external_memory_fd or VK_EXT_external_memory_dma_buf is not enabled";
        Error::new(Kind::VulkanMissing, tried, why)
            .next("enable what required_extensions() lists; Mesa's lavapipe has it from version 25 on")
    })
}

/// Memory of a dma-buf, of `size_bytes`, for what says `needs`.
pub(super) fn of_dma_buf(
    tried: &'static str,
    device: &Device,
    dma_buf: &DmaBuf,
    size_bytes: u64,
    needs: &Needs,
    dedicated_to: Option<Whole>,
) -> Result<vk::DeviceMemory> {
    let memory_fd = for_dma_bufs(tried, device)?;
    let fd = dma_buf.duplicate()?;
    let mut fd_properties = vk::MemoryFdPropertiesKHR::default();
    // SAFETY: `fd` is open, and stays ours here. VUID-vkGetMemoryFdPropertiesKHR-handleType-00674:
    // the handle type is not OPAQUE_FD.
    unsafe { memory_fd.get_memory_fd_properties(DMA_BUF, fd.as_raw_fd(), &mut fd_properties) }
        .map_err(|result| failure(tried, result))?;
    // VUID-VkMemoryAllocateInfo-memoryTypeIndex-00648, VUID-vkBindBufferMemory-memory-01035 and
    // VUID-vkBindImageMemory-memory-01047.
    let memory_type = choose_type(tried, device, fd_properties.memory_type_bits & needs.memory_type_bits)?;

    let mut import = vk::ImportMemoryFdInfoKHR::default().handle_type(DMA_BUF).fd(fd.as_raw_fd());
    let (mut flags, mut dedicate) = (needs.flags(), dedicated_to.map(Whole::info));
    let mut info = vk::MemoryAllocateInfo::default()
        .allocation_size(size_bytes)
        .memory_type_index(memory_type)
        .push_next(&mut import)
        .push_next(&mut flags);
    if let Some(dedicate) = &mut dedicate {
        info = info.push_next(dedicate);
    }
    // SAFETY: the chain is initialised and outlives the call; `fd` is open and a duplicate that
    // nobody else knows.
    let memory =
        unsafe { device.ash().allocate_memory(&info, None) }.map_err(|result| failure(tried, result))?;
    // Only now is the descriptor the driver's; on failure it was ours, and dropping it closed it.
    let _ = fd.into_raw_fd();
    Ok(memory)
}

/// The functions for host pointers, for a mapping that is aligned as the device wants it.
pub(super) fn for_host_pointers<'a>(
    tried: &'static str,
    device: &'a Device,
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

/// Memory that is all of `mapping`, for what says `needs`. The mapping must outlive it.
pub(super) fn of_mapping(
    tried: &'static str,
    device: &Device,
    mapping: &Mapping,
    needs: &Needs,
    features: vk::ExternalMemoryFeatureFlags,
) -> Result<vk::DeviceMemory> {
    let functions = for_host_pointers(tried, device, mapping)?;
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
    let memory_type = choose_type(tried, device, bits)?;

    let mut import =
        vk::ImportMemoryHostPointerInfoEXT::default().handle_type(HOST_POINTER).host_pointer(pointer.cast());
    let mut flags = needs.flags();
    let info = vk::MemoryAllocateInfo::default()
        .allocation_size(mapping.len() as u64)
        .memory_type_index(memory_type)
        .push_next(&mut import)
        .push_next(&mut flags);
    // SAFETY: pointer and length are aligned (VUID-VkImportMemoryHostPointerInfoEXT-pHostPointer-01749,
    // VUID-VkMemoryAllocateInfo-allocationSize-01745), and the caller keeps the mapping.
    unsafe { device.ash().allocate_memory(&info, None) }.map_err(|result| failure(tried, result))
}

fn choose_type(tried: &'static str, device: &Device, allowed_bits: u32) -> Result<u32> {
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
    fn either_the_handle_or_what_is_made_demands_dedicated_memory() {
        let of = |dedicated: bool, features| {
            let demand = vk::MemoryDedicatedRequirements::default().requires_dedicated_allocation(dedicated);
            Needs::new(vk::MemoryRequirements::default(), demand).is_dedicated(features)
        };
        let (importable, only) =
            (vk::ExternalMemoryFeatureFlags::IMPORTABLE, vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY);
        assert!(of(true, importable) && of(false, importable | only));
        assert!(!of(false, importable));
    }

    #[test]
    fn pointer_and_length_obey_the_devices_alignment() {
        assert!(check_alignment("test", 0x20000, 0x10000, 0x10000).is_ok());
        let why = |address, length| check_alignment("test", address, length, 0x10000).unwrap_err();
        assert!(why(0x21000, 0x10000).why().contains("pointer 0x21000"));
        assert!(why(0x20000, 0x1000).why().contains("length 0x1000"));
    }
}
