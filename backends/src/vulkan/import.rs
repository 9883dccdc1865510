//! Imports of buffers: a dma-buf or a mapping becomes a `VkBuffer` with `VkDeviceMemory`.
//!
//! Create the buffer for external memory, ask what it requires, import [`memory`] for it, bind. Whatever was
//! made before a failure is undone by dropping the [`Allocation`].
#![expect(unsafe_code, reason = "creating Vulkan objects")]

use std::sync::Arc;

use ash::vk;

use super::buffer::{Allocation, Origin, buffer_info};
use super::failure::failure;
use super::memory::{self, DMA_BUF, HOST_POINTER, Needs, Whole};
use super::physical_device::external_features;
use super::{Buffer, BufferUsage, Device, ImportOptions};
use crate::{DmaBuf, Error, Kind, Mapping, Result};

pub(super) fn dma_buf(device: &Device, dma_buf: &DmaBuf, options: &ImportOptions) -> Result<Buffer> {
    const TRIED: &str = "import a dma-buf";
    memory::for_dma_bufs(TRIED, device)?;
    let size_bytes = checked_size(TRIED, options, dma_buf.size_bytes())?;
    let features = importable(TRIED, device, options, DMA_BUF)?;
    let (mut allocation, needs) =
        create_buffer(TRIED, device, options, DMA_BUF, size_bytes, dma_buf.size_bytes(), Origin::DmaBuf)?;
    let whole =
        (options.dedicated || needs.is_dedicated(features)).then_some(Whole::Buffer(allocation.buffer));
    // VUID-VkMemoryDedicatedAllocateInfo-buffer-02965: exactly the size that the buffer requires.
    allocation.memory = memory::of_dma_buf(TRIED, device, dma_buf, needs.size_bytes, &needs, whole)?;
    bind(TRIED, &allocation)?;
    Ok(Buffer(Arc::new(allocation)))
}

pub(super) fn host_pointer(
    device: &Device,
    mapping: Arc<Mapping>,
    options: &ImportOptions,
) -> Result<Buffer> {
    const TRIED: &str = "import a host pointer";
    memory::for_host_pointers(TRIED, device, &mapping)?;
    let length_bytes = mapping.len() as u64;
    let size_bytes = checked_size(TRIED, options, length_bytes)?;
    let features = importable(TRIED, device, options, HOST_POINTER)?;
    // The mapping outlives the memory: the allocation holds both.
    let origin = Origin::HostPointer(Arc::clone(&mapping));
    let (mut allocation, needs) =
        create_buffer(TRIED, device, options, HOST_POINTER, size_bytes, length_bytes, origin)?;
    allocation.memory = memory::of_mapping(TRIED, device, &mapping, &needs, features)?;
    bind(TRIED, &allocation)?;
    Ok(Buffer(Arc::new(allocation)))
}

/// VUID-VkImportMemoryFdInfoKHR-handleType-00667 and VUID-VkImportMemoryHostPointerInfoEXT-handleType-01747:
/// the handle type must be importable.
fn importable(
    tried: &'static str,
    device: &Device,
    options: &ImportOptions,
    handle: vk::ExternalMemoryHandleTypeFlags,
) -> Result<vk::ExternalMemoryFeatureFlags> {
    let (instance, physical) = device.ash_instance();
    let features = external_features(instance, physical, options.usage.flags(), handle);
    if features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE) {
        return Ok(features);
    }
    Err(Error::new(Kind::ImporterCannot, tried, "the driver imports none for a buffer's usage"))
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
    let has_address = options.usage.contains(BufferUsage::SHADER_DEVICE_ADDRESS);
    if has_address && !device.may_have_addresses() {
        let why = "peervram opens devices without bufferDeviceAddress, so no buffer of theirs has an address";
        return Err(Error::new(Kind::Unsupported, tried, why)
            .next("import by a device of yours that has the feature: Device::from_raw"));
    }
    let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(handle);
    let info = buffer_info(device, size_bytes, options.usage).push_next(&mut external);
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
    let needs = Needs { has_address, ..Needs::new(needs.memory_requirements, dedicated) };
    // VUID-vkBindBufferMemory-size-01037: the memory must be as large as the requirements say.
    if needs.size_bytes > available_bytes {
        let why = format!("the driver needs {:#x} bytes, there are {available_bytes:#x}", needs.size_bytes);
        return Err(Error::new(Kind::InvalidInput, tried, why).next("import a smaller buffer"));
    }
    Ok((allocation, needs))
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
}
