//! Imports: a dma-buf or a mapping becomes a `VkBuffer` with `VkDeviceMemory`.
//!
//! Both go the same way: create the buffer for external memory, ask what it requires, choose a
//! memory type that buffer and handle allow, allocate by import, bind. Only the allocation proves
//! that the driver can: `vkGetMemoryFdPropertiesKHR` says yes to memory that cannot be mapped.
//! Whatever was made before a failure is undone by dropping the [`Allocation`].
#![expect(unsafe_code, reason = "creating Vulkan objects, and handing a descriptor to the driver")]

use std::os::fd::{AsRawFd, IntoRawFd};
use std::sync::Arc;

use ash::vk;

use super::buffer::{Allocation, Origin};
use super::failure::failure;
use super::physical_device::external_features;
use super::{Buffer, Device, ImportOptions, memory_type};
use crate::{DmaBuf, Error, Kind, Mapping, Result};

pub(super) fn dma_buf(device: &Device, dma_buf: &DmaBuf, options: &ImportOptions) -> Result<Buffer> {
    const TRIED: &str = "import a dma-buf";
    const HANDLE: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
    let Some(memory_fd) = device.dma_buf_functions() else {
        let why = "VK_KHR_external_memory_fd or VK_EXT_external_memory_dma_buf is not enabled";
        return Err(Error::new(Kind::VulkanMissing, TRIED, why)
            .next("enable what required_extensions() lists; Mesa's lavapipe has it from version 25 on"));
    };
    let size_bytes = checked_size(TRIED, options, dma_buf.size_bytes())?;
    // VUID-VkImportMemoryFdInfoKHR-handleType-00667: the handle type must be importable.
    let (instance, physical) = device.ash_instance();
    let features = external_features(instance, physical, options.usage.flags(), HANDLE);
    if !features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE) {
        return Err(Error::new(Kind::ImporterCannot, TRIED, "the driver imports none for a buffer's usage"));
    }

    let (mut allocation, needs) =
        create_buffer(TRIED, device, options, HANDLE, size_bytes, dma_buf.size_bytes(), Origin::DmaBuf)?;
    let fd = dma_buf.duplicate()?;
    let mut fd_properties = vk::MemoryFdPropertiesKHR::default();
    // SAFETY: `fd` is open, and stays ours here. VUID-vkGetMemoryFdPropertiesKHR-handleType-00674:
    // the handle type is not OPAQUE_FD.
    unsafe { memory_fd.get_memory_fd_properties(HANDLE, fd.as_raw_fd(), &mut fd_properties) }
        .map_err(|result| failure(TRIED, result))?;
    // VUID-VkMemoryAllocateInfo-memoryTypeIndex-00648 and VUID-vkBindBufferMemory-memory-01035.
    let memory_type = choose_type(TRIED, device, fd_properties.memory_type_bits & needs.memory_type_bits)?;

    let mut import = vk::ImportMemoryFdInfoKHR::default().handle_type(HANDLE).fd(fd.as_raw_fd());
    let mut dedicate = vk::MemoryDedicatedAllocateInfo::default().buffer(allocation.buffer);
    // VUID-VkMemoryDedicatedAllocateInfo-buffer-02965: exactly the size that the buffer requires.
    let mut info = vk::MemoryAllocateInfo::default()
        .allocation_size(needs.size_bytes)
        .memory_type_index(memory_type)
        .push_next(&mut import);
    let dedicated = options.dedicated
        || needs.dedicated
        || features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY);
    if dedicated {
        info = info.push_next(&mut dedicate);
    }
    // SAFETY: the chain is initialised and outlives the call; `fd` is open and a duplicate that
    // nobody else knows.
    allocation.memory =
        unsafe { device.ash().allocate_memory(&info, None) }.map_err(|result| failure(TRIED, result))?;
    // Only now is the descriptor the driver's; on failure it was ours, and dropping it closed it.
    let _ = fd.into_raw_fd();
    bind(TRIED, &allocation)?;
    Ok(Buffer(Arc::new(allocation)))
}

pub(super) fn host_pointer(
    device: &Device,
    mapping: Arc<Mapping>,
    options: &ImportOptions,
) -> Result<Buffer> {
    const TRIED: &str = "import a host pointer";
    const HANDLE: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;
    let (Some(functions), Some(alignment_bytes)) =
        (device.host_pointer(), device.host_pointer_alignment_bytes())
    else {
        let why = "VK_EXT_external_memory_host is not enabled, or imports no buffers";
        return Err(Error::new(Kind::Unsupported, TRIED, why).next("export a dma-buf and import that"));
    };
    let (pointer, length_bytes) = (mapping.as_ptr(), mapping.len() as u64);
    let size_bytes = checked_size(TRIED, options, length_bytes)?;
    check_alignment(TRIED, pointer.addr() as u64, length_bytes, alignment_bytes)?;

    // VUID-VkImportMemoryHostPointerInfoEXT-handleType-01747: the handle type must be importable.
    let (instance, physical) = device.ash_instance();
    let features = external_features(instance, physical, options.usage.flags(), HANDLE);
    if !features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE) {
        return Err(Error::new(Kind::ImporterCannot, TRIED, "the driver imports none for a buffer's usage"));
    }

    let origin = Origin::HostPointer(mapping);
    let (mut allocation, needs) =
        create_buffer(TRIED, device, options, HANDLE, size_bytes, length_bytes, origin)?;
    let mut pointer_properties = vk::MemoryHostPointerPropertiesEXT::default();
    // SAFETY: the extension is enabled, and the pointer is aligned
    // (VUID-vkGetMemoryHostPointerPropertiesEXT-pHostPointer-01753) and mapped, by `allocation`.
    unsafe {
        (functions.fp().get_memory_host_pointer_properties_ext)(
            functions.device(),
            HANDLE,
            pointer.cast(),
            &mut pointer_properties,
        )
    }
    .result()
    .map_err(|result| failure(TRIED, result))?;
    let bits = pointer_properties.memory_type_bits & needs.memory_type_bits;
    let memory_type = choose_type(TRIED, device, bits)?;

    let mut import =
        vk::ImportMemoryHostPointerInfoEXT::default().handle_type(HANDLE).host_pointer(pointer.cast());
    let info = vk::MemoryAllocateInfo::default()
        .allocation_size(length_bytes)
        .memory_type_index(memory_type)
        .push_next(&mut import);
    // SAFETY: pointer and length are aligned (VUID-VkImportMemoryHostPointerInfoEXT-pHostPointer-01749,
    // VUID-VkMemoryAllocateInfo-allocationSize-01745), and the mapping outlives the memory.
    allocation.memory =
        unsafe { device.ash().allocate_memory(&info, None) }.map_err(|result| failure(TRIED, result))?;
    bind(TRIED, &allocation)?;
    Ok(Buffer(Arc::new(allocation)))
}

/// What the driver requires of the memory of a buffer.
pub(super) struct Needs {
    pub(super) size_bytes: u64,
    pub(super) memory_type_bits: u32,
    pub(super) dedicated: bool,
}

/// A buffer for memory of `handle` (VUID-vkBindBufferMemory-memory-02985), still without it.
pub(super) fn create_buffer(
    tried: &'static str,
    device: &Device,
    options: &ImportOptions,
    handle: vk::ExternalMemoryHandleTypeFlags,
    size_bytes: u64,
    available_bytes: u64,
    origin: Origin,
) -> Result<(Allocation, Needs)> {
    let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(handle);
    let info = vk::BufferCreateInfo::default()
        .size(size_bytes)
        .usage(options.usage.flags())
        .sharing_mode(vk::SharingMode::EXCLUSIVE)
        .push_next(&mut external);
    // SAFETY: the chain is initialised and outlives the call; the size is not zero
    // (VUID-VkBufferCreateInfo-size-00912).
    let buffer =
        unsafe { device.ash().create_buffer(&info, None) }.map_err(|result| failure(tried, result))?;
    let allocation = Allocation {
        device: device.clone(),
        buffer,
        memory: vk::DeviceMemory::null(),
        size_bytes,
        usage: options.usage,
        origin,
    };
    let mut dedicated = vk::MemoryDedicatedRequirements::default();
    let mut needs = vk::MemoryRequirements2::default().push_next(&mut dedicated);
    let asked = vk::BufferMemoryRequirementsInfo2::default().buffer(buffer);
    // SAFETY: the buffer was made above; the chain is initialised and outlives the call.
    unsafe { device.ash().get_buffer_memory_requirements2(&asked, &mut needs) };
    let needs = needs.memory_requirements;
    // VUID-vkBindBufferMemory-size-01037: the memory must be as large as the requirements say.
    if needs.size > available_bytes {
        let why = format!("the driver needs {:#x} bytes, there are {available_bytes:#x}", needs.size);
        return Err(Error::new(Kind::InvalidInput, tried, why).next("import a smaller buffer"));
    }
    let dedicated = dedicated.requires_dedicated_allocation != 0;
    let needs = Needs { size_bytes: needs.size, memory_type_bits: needs.memory_type_bits, dedicated };
    Ok((allocation, needs))
}

fn choose_type(tried: &'static str, device: &Device, allowed_bits: u32) -> Result<u32> {
    memory_type::for_import(device.memory_types(), allowed_bits).ok_or_else(|| {
        let why = "no memory type suits both the memory and the buffer";
        Error::new(Kind::ImporterCannot, tried, why).next("ask for fewer usages of the buffer")
    })
}

pub(super) fn bind(tried: &'static str, allocation: &Allocation) -> Result<()> {
    let Allocation { device, buffer, memory, .. } = allocation;
    // SAFETY: both were made from this device and never bound (VUID-vkBindBufferMemory-buffer-07459);
    // offset zero suits every alignment; the size was compared with the requirements.
    unsafe { device.ash().bind_buffer_memory(*buffer, *memory, 0) }.map_err(|result| failure(tried, result))
}

/// The size of the buffer: what was asked for, or all there is.
fn checked_size(tried: &'static str, options: &ImportOptions, available_bytes: u64) -> Result<u64> {
    match options.size_bytes.unwrap_or(available_bytes) {
        0 => Err(Error::new(Kind::InvalidInput, tried, "a buffer of no bytes was asked for")),
        size if size > available_bytes => {
            let why = format!("a buffer of {size:#x} bytes is larger than the memory, {available_bytes:#x}");
            Err(Error::new(Kind::InvalidInput, tried, why).next("import a smaller buffer, or lend more"))
        }
        size => Ok(size),
    }
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
    fn a_buffer_is_at_most_as_large_as_its_memory() {
        let size =
            |size_bytes| checked_size("test", &ImportOptions { size_bytes, ..Default::default() }, 4096);
        assert_eq!(size(None).unwrap(), 4096);
        assert_eq!(size(Some(100)).unwrap(), 100);
        assert_eq!(size(Some(0)).unwrap_err().kind(), Kind::InvalidInput);
        assert_eq!(size(Some(4097)).unwrap_err().kind(), Kind::InvalidInput);
    }

    #[test]
    fn pointer_and_length_obey_the_devices_alignment() {
        assert!(check_alignment("test", 0x20000, 0x10000, 0x10000).is_ok());
        let why = |address, length| check_alignment("test", address, length, 0x10000).unwrap_err();
        assert!(why(0x21000, 0x10000).why().contains("pointer 0x21000"));
        assert!(why(0x20000, 0x1000).why().contains("length 0x1000"));
    }
}
