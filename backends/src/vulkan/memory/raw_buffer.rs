//! `RawBuffer`: a `VkBuffer` with its memory, and what is known of it.
#![expect(unsafe_code, reason = "creating Vulkan objects")]

use ash::vk;

use super::resource::{Handle, Needs, Origin, Resource};
use crate::vulkan::failure::failure;
use crate::vulkan::logical::device::LogicalDevice;
use crate::vulkan::usage::BufferUsage;
use crate::{Error, Kind, Result};

/// A buffer with its memory. Work that is in flight holds it.
pub(crate) struct RawBuffer {
    pub(crate) resource: Resource<vk::Buffer>,
    pub(crate) size_bytes: u64,
    pub(crate) usage: BufferUsage,
}

impl RawBuffer {
    /// A buffer of `size_bytes`, which are not zero, for memory of `handle` (VUID-vkBindBufferMemory-memory-02985) or
    /// of this process's alone, still without it.
    pub(crate) fn new(
        tried: &'static str,
        device: &LogicalDevice,
        usage: BufferUsage,
        handle: vk::ExternalMemoryHandleTypeFlags,
        size_bytes: u64,
        origin: Origin,
    ) -> Result<Self> {
        if usage.contains(BufferUsage::SHADER_DEVICE_ADDRESS) && !device.may_have_addresses() {
            let why =
                "peervram opens devices without bufferDeviceAddress, so no buffer of theirs has an address";
            return Err(Error::new(Kind::Unsupported, tried, why)
                .next("import by a device of yours that has the feature: Device::from_raw"));
        }
        let families = device.sharing_families();
        // VUID-VkBufferCreateInfo-sharingMode-00914: at least two, and different ones.
        let sharing =
            if families.is_empty() { vk::SharingMode::EXCLUSIVE } else { vk::SharingMode::CONCURRENT };
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(handle);
        let mut info = vk::BufferCreateInfo::default()
            .size(size_bytes)
            .usage(usage.flags())
            .sharing_mode(sharing)
            .queue_family_indices(families);
        if !handle.is_empty() {
            info = info.push_next(&mut external);
        }
        // SAFETY: the chain is initialised and outlives the call; the size is not zero
        // (VUID-VkBufferCreateInfo-size-00912).
        let buffer =
            unsafe { device.ash().create_buffer(&info, None) }.map_err(|result| failure(tried, result))?;
        // SAFETY: made above.
        Ok(Self { resource: unsafe { Resource::new(device, buffer, origin) }, size_bytes, usage })
    }

    /// A buffer for the default usage, in memory of the device's own of a type that `choose` picks.
    pub(crate) fn own(
        tried: &'static str,
        device: &LogicalDevice,
        size_bytes: u64,
        choose: fn(&[vk::MemoryType], u32) -> Option<u32>,
    ) -> Result<Self> {
        let (none, usage) = (vk::ExternalMemoryHandleTypeFlags::empty(), BufferUsage::default());
        let mut buffer = Self::new(tried, device, usage, none, size_bytes, Origin::Own)?;
        let needs = buffer.needs();
        let memory_type = choose(device.memory_types(), needs.memory_type_bits)
            .ok_or_else(|| Error::new(Kind::Vulkan, tried, "no memory type suits it"))?;
        let mut dedicate = needs.dedicated.then(|| buffer.handle().dedicate());
        let mut info = vk::MemoryAllocateInfo::default()
            .allocation_size(needs.size_bytes)
            .memory_type_index(memory_type);
        if let Some(dedicate) = &mut dedicate {
            info = info.push_next(dedicate);
        }
        // SAFETY: size and type are what the buffer requires.
        unsafe { buffer.resource.allocate(tried, &info, 0, || ()) }?;
        Ok(buffer)
    }

    /// What memory it wants.
    pub(crate) fn needs(&self) -> Needs {
        let has_address = self.usage.contains(BufferUsage::SHADER_DEVICE_ADDRESS);
        Needs { has_address, ..self.resource.needs() }
    }

    /// The `VkBuffer`.
    pub(crate) fn handle(&self) -> vk::Buffer {
        self.resource.handle()
    }

    /// Whether it is of `device`, and was made for `usage`.
    pub(crate) fn check(
        &self,
        tried: &'static str,
        device: &LogicalDevice,
        usage: BufferUsage,
    ) -> Result<()> {
        let why = if !device.is_same(self.resource.device()) {
            "the buffer is of another Vulkan device"
        } else if !self.usage.contains(usage) {
            "the buffer was imported without the usage for it"
        } else {
            return Ok(());
        };
        Err(Error::new(Kind::InvalidInput, tried, why))
    }
}
