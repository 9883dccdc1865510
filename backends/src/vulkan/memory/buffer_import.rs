//! Imports of buffers: a dma-buf or a mapping becomes a `VkBuffer` with `VkDeviceMemory`.
//!
//! Create the buffer for external memory, ask what it requires, import memory for it, bind. Whatever was made before a
//! failure is undone by dropping the [`RawBuffer`].

use std::sync::Arc;

use ash::vk;

use super::import::{self, DMA_BUF, HOST_POINTER};
use super::raw_buffer::RawBuffer;
use super::resource::{Needs, Origin};
use crate::vulkan::discovery::physical_device::external_features;
use crate::vulkan::logical::device::LogicalDevice;
use crate::vulkan::usage::BufferUsage;
use crate::{DmaBuf, Error, Kind, Mapping, Result};

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

/// A dma-buf as a buffer.
pub(crate) fn dma_buf(
    device: &LogicalDevice,
    dma_buf: &DmaBuf,
    options: &ImportOptions,
) -> Result<RawBuffer> {
    const TRIED: &str = "import a dma-buf";
    import::for_dma_bufs(TRIED, device)?;
    let available_bytes = dma_buf.size_bytes();
    let size_bytes = checked_size(TRIED, options, available_bytes)?;
    let features = importable(TRIED, device, options, DMA_BUF)?;
    let mut buffer = RawBuffer::new(TRIED, device, options.usage, DMA_BUF, size_bytes, Origin::DmaBuf)?;
    let needs = checked_needs(TRIED, &buffer, available_bytes)?;
    let is_dedicated = options.dedicated || needs.is_dedicated(features);
    // VUID-VkMemoryDedicatedAllocateInfo-buffer-02965: exactly the size that the buffer requires.
    buffer.resource.import_dma_buf(TRIED, dma_buf, needs.size_bytes, &needs, is_dedicated, 0)?;
    Ok(buffer)
}

/// Mapped memory as a buffer, which keeps the mapping.
pub(crate) fn host_pointer(
    device: &LogicalDevice,
    mapping: Arc<Mapping>,
    options: &ImportOptions,
) -> Result<RawBuffer> {
    const TRIED: &str = "import a host pointer";
    import::for_host_pointers(TRIED, device, &mapping)?;
    let available_bytes = mapping.len() as u64;
    let size_bytes = checked_size(TRIED, options, available_bytes)?;
    let features = importable(TRIED, device, options, HOST_POINTER)?;
    let origin = Origin::HostPointer(mapping);
    let mut buffer = RawBuffer::new(TRIED, device, options.usage, HOST_POINTER, size_bytes, origin)?;
    let needs = checked_needs(TRIED, &buffer, available_bytes)?;
    buffer.resource.import_mapping(TRIED, &needs, features, 0)?;
    Ok(buffer)
}

/// VUID-VkImportMemoryFdInfoKHR-handleType-00667 and VUID-VkImportMemoryHostPointerInfoEXT-handleType-01747:
/// the handle type must be importable.
fn importable(
    tried: &'static str,
    device: &LogicalDevice,
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

/// What memory the buffer wants. VUID-vkBindBufferMemory-size-01037: the memory must be as large as that.
fn checked_needs(tried: &'static str, buffer: &RawBuffer, available_bytes: u64) -> Result<Needs> {
    let needs = buffer.needs();
    if needs.size_bytes > available_bytes {
        let why = format!("the driver needs {:#x} bytes, there are {available_bytes:#x}", needs.size_bytes);
        return Err(Error::new(Kind::InvalidInput, tried, why).next("import a smaller buffer"));
    }
    Ok(needs)
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
