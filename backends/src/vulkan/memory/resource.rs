//! `Resource`: a `VkBuffer` or a `VkImage`, with the `VkDeviceMemory` that it is bound to.
//!
//! Order of calls: [`Resource::new`] takes what was created, [`Resource::needs`] asks the driver what memory it wants, and
//! [`Resource::allocate`] allocates that and binds it; how the memory is come by (imported, exported, the device's own) is
//! what the files beside this one add. Dropping a resource destroys the object, frees the memory, and only then lets go of
//! the device, and of the mapping that the memory rests on. Work that is in flight holds the resource.
//!
//! Freeing unmaps the memory in the kernel and closes the driver's descriptor. Where that is the
//! last one of a VFIO dma-buf whose device is being reset, it waits until the reset is over.
#![expect(unsafe_code, reason = "creating and destroying Vulkan objects")]

use std::sync::Arc;

use ash::prelude::VkResult;
use ash::vk;

use crate::vulkan::failure::failure;
use crate::vulkan::logical::device::LogicalDevice;
use crate::{Error, Kind, Mapping, Result};

/// What memory can be bound to: `VkBuffer` and `VkImage`.
pub(crate) trait Handle: Copy + Send + Sync + 'static {
    /// # Safety
    /// It was made from `device`, nothing uses it any more, and nobody else destroys it
    /// (VUID-vkDestroyBuffer-buffer-00922, VUID-vkDestroyImage-image-01000).
    unsafe fn destroy(self, device: &ash::Device);

    /// What memory it wants.
    ///
    /// # Safety
    /// It was made from `device`.
    unsafe fn needs(self, device: &ash::Device) -> Needs;

    /// # Safety
    /// Both were made from `device`, and it was never bound (VUID-vkBindBufferMemory-buffer-07459,
    /// VUID-vkBindImageMemory-image-07460); the memory is of a type and a size that it needs, from `offset_bytes` on.
    unsafe fn bind(self, device: &ash::Device, memory: vk::DeviceMemory, offset_bytes: u64) -> VkResult<()>;

    /// For memory that is dedicated to it.
    fn dedicate(self) -> vk::MemoryDedicatedAllocateInfo<'static>;
}

impl Handle for vk::Buffer {
    unsafe fn destroy(self, device: &ash::Device) {
        // SAFETY: the caller vouches for it.
        unsafe { device.destroy_buffer(self, None) };
    }

    unsafe fn needs(self, device: &ash::Device) -> Needs {
        let mut dedicated = vk::MemoryDedicatedRequirements::default();
        let mut needs = vk::MemoryRequirements2::default().push_next(&mut dedicated);
        let asked = vk::BufferMemoryRequirementsInfo2::default().buffer(self);
        // SAFETY: the caller vouches for the buffer; the chain is initialised and outlives the call.
        unsafe { device.get_buffer_memory_requirements2(&asked, &mut needs) };
        Needs::new(needs.memory_requirements, dedicated)
    }

    unsafe fn bind(self, device: &ash::Device, memory: vk::DeviceMemory, offset_bytes: u64) -> VkResult<()> {
        // SAFETY: the caller vouches for it.
        unsafe { device.bind_buffer_memory(self, memory, offset_bytes) }
    }

    fn dedicate(self) -> vk::MemoryDedicatedAllocateInfo<'static> {
        vk::MemoryDedicatedAllocateInfo::default().buffer(self)
    }
}

impl Handle for vk::Image {
    unsafe fn destroy(self, device: &ash::Device) {
        // SAFETY: the caller vouches for it.
        unsafe { device.destroy_image(self, None) };
    }

    unsafe fn needs(self, device: &ash::Device) -> Needs {
        let mut dedicated = vk::MemoryDedicatedRequirements::default();
        let mut needs = vk::MemoryRequirements2::default().push_next(&mut dedicated);
        let asked = vk::ImageMemoryRequirementsInfo2::default().image(self);
        // SAFETY: the caller vouches for the image; the chain is initialised and outlives the call.
        unsafe { device.get_image_memory_requirements2(&asked, &mut needs) };
        Needs::new(needs.memory_requirements, dedicated)
    }

    unsafe fn bind(self, device: &ash::Device, memory: vk::DeviceMemory, offset_bytes: u64) -> VkResult<()> {
        // SAFETY: the caller vouches for it.
        unsafe { device.bind_image_memory(self, memory, offset_bytes) }
    }

    fn dedicate(self) -> vk::MemoryDedicatedAllocateInfo<'static> {
        vk::MemoryDedicatedAllocateInfo::default().image(self)
    }
}

/// Where the memory of a resource came from, which decides how it is handed over.
pub(crate) enum Origin {
    /// Of a dma-buf, imported or exported: owned by the outside's queue family between uses.
    DmaBuf,
    /// Shared with another device of the same driver, which owns it between uses.
    SameDriver,
    /// Of this process's address space, which the mapping keeps.
    HostPointer(Arc<Mapping>),
    /// Allocated here.
    Own,
}

/// A `VkBuffer` or a `VkImage`, and its memory.
pub(crate) struct Resource<H: Handle> {
    device: LogicalDevice,
    handle: H,
    memory: vk::DeviceMemory,
    origin: Origin,
}

impl<H: Handle> Resource<H> {
    /// Takes `handle`, which has no memory yet.
    ///
    /// # Safety
    /// It was made from `device` just now, and nobody else knows it.
    pub(crate) unsafe fn new(device: &LogicalDevice, handle: H, origin: Origin) -> Self {
        Self { device: device.clone(), handle, memory: vk::DeviceMemory::null(), origin }
    }

    /// The device that it is of.
    pub(crate) fn device(&self) -> &LogicalDevice {
        &self.device
    }

    /// The `VkBuffer` or `VkImage`.
    pub(crate) fn handle(&self) -> H {
        self.handle
    }

    /// Its memory; null before [`Resource::allocate`].
    pub(crate) fn memory(&self) -> vk::DeviceMemory {
        self.memory
    }

    /// Where its memory comes from.
    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The memory behind it, where it was imported by host pointer.
    pub(crate) fn mapping(&self) -> Option<&Arc<Mapping>> {
        match &self.origin {
            Origin::HostPointer(mapping) => Some(mapping),
            _ => None,
        }
    }

    /// What memory it wants.
    pub(crate) fn needs(&self) -> Needs {
        // SAFETY: the handle was made from the device.
        unsafe { self.handle.needs(self.device.ash()) }
    }

    /// Allocates memory as `info` says, and binds it, from `offset_bytes` on. `taken` is called between the two: what was
    /// imported is the driver's then.
    ///
    /// # Safety
    /// `info`, and what it points to, is initialised; type and size are what the resource needs from the offset on; what is
    /// imported by it is valid and, where the driver takes it over, nobody else's.
    pub(crate) unsafe fn allocate(
        &mut self,
        tried: &'static str,
        info: &vk::MemoryAllocateInfo<'_>,
        offset_bytes: u64,
        taken: impl FnOnce(),
    ) -> Result<()> {
        assert!(self.memory == vk::DeviceMemory::null(), "a resource gets its memory once");
        let ash = self.device.ash();
        // SAFETY: the caller vouches for it.
        self.memory = unsafe { ash.allocate_memory(info, None) }.map_err(|result| failure(tried, result))?;
        taken();
        // SAFETY: both were made from this device and never bound; the caller vouches for type and size.
        unsafe { self.handle.bind(ash, self.memory, offset_bytes) }.map_err(|result| failure(tried, result))
    }
}

impl<H: Handle> Drop for Resource<H> {
    fn drop(&mut self) {
        let device = self.device.ash();
        // SAFETY: the handle was made from `device`, and the memory is null or was; no work of ours is in flight, since
        // that would hold `self`, and the application has finished with both, as `Buffer` and `Image` ask
        // (VUID-vkFreeMemory-memory-00677). The fields that the memory rests on are dropped later.
        unsafe {
            self.handle.destroy(device);
            device.free_memory(self.memory, None);
        }
    }
}

/// Frees now what `shared` is the last to hold.
///
/// # Errors
/// [`Kind::StillInUse`] where work holds it.
pub(crate) fn release<T>(tried: &'static str, shared: Arc<T>) -> Result<()> {
    match Arc::try_unwrap(shared) {
        Ok(last) => {
            drop(last);
            Ok(())
        }
        Err(_in_flight) => {
            let why = "work that missed its deadline still runs on it";
            Err(Error::new(Kind::StillInUse, tried, why).next("it is freed when that work ends"))
        }
    }
}

/// What the driver requires of the memory of a buffer or an image.
pub(crate) struct Needs {
    pub(crate) size_bytes: u64,
    pub(crate) memory_type_bits: u32,
    pub(crate) alignment_bytes: u64,
    pub(crate) dedicated: bool,
    /// Shaders see it by an address: a buffer of that usage.
    pub(crate) has_address: bool,
}

impl Needs {
    fn new(of: vk::MemoryRequirements, dedicated: vk::MemoryDedicatedRequirements<'_>) -> Self {
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
    pub(crate) fn is_dedicated(&self, features: vk::ExternalMemoryFeatureFlags) -> bool {
        self.dedicated || features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY)
    }

    /// VUID-vkBindBufferMemory-bufferDeviceAddress-03339: memory of a buffer that has an address is allocated for it.
    pub(crate) fn flags(&self) -> vk::MemoryAllocateFlagsInfo<'static> {
        let flags = if self.has_address {
            vk::MemoryAllocateFlags::DEVICE_ADDRESS
        } else {
            vk::MemoryAllocateFlags::empty()
        };
        vk::MemoryAllocateFlagsInfo::default().flags(flags)
    }
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
    fn what_somebody_holds_is_released_later() {
        let shared = Arc::new(());
        let held = Arc::clone(&shared);
        assert_eq!(release("test", shared).unwrap_err().kind(), Kind::StillInUse);
        release("test", held).unwrap();
    }
}
