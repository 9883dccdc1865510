//! `LogicalDevice`: a `VkDevice`, the functions that were found for it, its queues, and what is known of its memory.
//!
//! Of an application's device only the handles are borrowed, and the application keeps them valid. Our own device is
//! destroyed with the last clone.
#![expect(unsafe_code, reason = "functions of Vulkan, called on raw handles")]

use std::ffi::CStr;
use std::sync::Arc;

use ash::vk;
use ash::{ext, khr};

use super::families::Families;
use super::queue::Queue;
use crate::vulkan::discovery::instance::Instance;
use crate::vulkan::discovery::physical_device::PhysicalDevice;

/// A `VkDevice`. Clones share it; everything that is made from it holds one.
#[derive(Clone)]
pub(crate) struct LogicalDevice(Arc<Inner>);

struct Inner {
    device: ash::Device,
    instance: ash::Instance,
    physical: vk::PhysicalDevice,
    description: PhysicalDevice,
    limits: vk::PhysicalDeviceLimits,
    memory_types: Vec<vk::MemoryType>,
    memory_fd: Option<khr::external_memory_fd::Device>,
    /// Whether descriptors may be dma-bufs.
    has_dma_bufs: bool,
    host_pointer: Option<ext::external_memory_host::Device>,
    /// Images can have layouts of other drivers: VK_EXT_image_drm_format_modifier is enabled.
    has_modifiers: bool,
    /// The queue family that stands for everybody outside this device.
    outside_family_index: u32,
    queue: Queue,
    /// One that only transfers, of another family, on devices of our own that have such.
    transfer_queue: Option<Queue>,
    /// The families of both queues; none where there is one.
    sharing_families: Vec<u32>,
    /// Whether queries can be reset by the CPU (hostQueryReset).
    resets_queries: bool,
    /// There for our own device only, which is then destroyed here, before its instance.
    owner: Option<Instance>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.owner.is_some() {
            // SAFETY: everything made from the device holds it, so nothing is left
            // (VUID-vkDestroyDevice-device-05137) and no other thread uses it.
            unsafe { self.device.destroy_device(None) };
        }
    }
}

impl LogicalDevice {
    /// An application's device, with `enabled` extensions.
    pub(crate) fn of_application(
        instance: ash::Instance,
        device: ash::Device,
        physical: vk::PhysicalDevice,
        queue: Queue,
        enabled: &[&CStr],
        description: PhysicalDevice,
    ) -> Self {
        Self(Arc::new(Inner::new(None, instance, device, physical, queue, enabled, description)))
    }

    /// Takes over a device that `owner` made, of Vulkan 1.1 or later, with `enabled` extensions.
    pub(crate) fn own(
        owner: Instance,
        device: ash::Device,
        physical: vk::PhysicalDevice,
        (families, resets_queries): (Families, bool),
        enabled: &[&CStr],
        description: PhysicalDevice,
    ) -> Self {
        let instance = owner.ash().clone();
        // SAFETY: the physical device is one of the instance.
        let known = unsafe { instance.get_physical_device_queue_family_properties(physical) };
        let queue = |family| {
            // SAFETY: the device was made with a queue of each of these families.
            let handle = unsafe { device.get_device_queue(family, 0) };
            Queue::own(handle, family, known[family as usize])
        };
        let (main, transfers) = (queue(families.computes), families.only_transfers.map(queue));
        let mut inner = Inner::new(Some(owner), instance, device, physical, main, enabled, description);
        inner.resets_queries = resets_queries;
        if let Some(queue) = transfers {
            inner.sharing_families = vec![families.computes, queue.family_index];
            inner.transfer_queue = Some(queue);
        }
        Self(Arc::new(inner))
    }

    /// What its driver says of it.
    pub(crate) fn description(&self) -> &PhysicalDevice {
        &self.0.description
    }

    /// Its name, with its PCI address where it has one: how errors name it.
    pub(crate) fn name(&self) -> String {
        let description = self.description();
        match description.pci_address {
            Some(address) => format!("{} at {address}", description.name),
            None => description.name.clone(),
        }
    }

    /// What host pointers must be aligned to, if they can be imported: the driver says so, and the
    /// extension is enabled.
    pub(crate) fn host_pointer_alignment_bytes(&self) -> Option<u64> {
        self.0.description.host_pointer_alignment_bytes.filter(|_| self.0.host_pointer.is_some())
    }

    pub(crate) fn ash(&self) -> &ash::Device {
        &self.0.device
    }

    pub(crate) fn ash_instance(&self) -> (&ash::Instance, vk::PhysicalDevice) {
        (&self.0.instance, self.0.physical)
    }

    pub(crate) fn limits(&self) -> &vk::PhysicalDeviceLimits {
        &self.0.limits
    }

    pub(crate) fn memory_types(&self) -> &[vk::MemoryType] {
        &self.0.memory_types
    }

    pub(crate) fn memory_fd(&self) -> Option<&khr::external_memory_fd::Device> {
        self.0.memory_fd.as_ref()
    }

    /// The same, where they may be asked for dma-bufs.
    pub(crate) fn dma_buf_functions(&self) -> Option<&khr::external_memory_fd::Device> {
        self.memory_fd().filter(|_| self.0.has_dma_bufs)
    }

    pub(crate) fn host_pointer(&self) -> Option<&ext::external_memory_host::Device> {
        self.0.host_pointer.as_ref()
    }

    pub(crate) fn has_modifiers(&self) -> bool {
        self.0.has_modifiers
    }

    /// The queue that the device was made with, or the one that only transfers, where it has that.
    pub(crate) fn queue(&self, only_transfers: bool) -> &Queue {
        self.0.transfer_queue.as_ref().filter(|_| only_transfers).unwrap_or(&self.0.queue)
    }

    /// The families that share its buffers; none where there is one family.
    pub(crate) fn sharing_families(&self) -> &[u32] {
        &self.0.sharing_families
    }

    /// The family that memory of the outside is handed to. Buffers that families share are nobody's in particular.
    pub(crate) fn inside_family_index(&self) -> u32 {
        if self.sharing_families().is_empty() { self.0.queue.family_index } else { vk::QUEUE_FAMILY_IGNORED }
    }

    /// Whether its buffers may have addresses: an application's device may have been made with the feature, one of our
    /// own was not.
    pub(crate) fn may_have_addresses(&self) -> bool {
        self.0.owner.is_none()
    }

    /// Whether the CPU can reset queries.
    pub(crate) fn resets_queries(&self) -> bool {
        self.0.resets_queries
    }

    pub(crate) fn outside_family_index(&self) -> u32 {
        self.0.outside_family_index
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether it has a queue that only transfers.
    pub(crate) fn has_transfer_queue(&self) -> bool {
        self.0.transfer_queue.is_some()
    }
}

impl Inner {
    fn new(
        owner: Option<Instance>,
        instance: ash::Instance,
        device: ash::Device,
        physical: vk::PhysicalDevice,
        queue: Queue,
        enabled: &[&CStr],
        description: PhysicalDevice,
    ) -> Self {
        let has = |name: &CStr| enabled.contains(&name);
        // SAFETY: `physical` is a physical device of `instance`; both are valid here.
        let (limits, memory) = unsafe {
            (
                instance.get_physical_device_properties(physical).limits,
                instance.get_physical_device_memory_properties(physical),
            )
        };
        let memory_fd = has(khr::external_memory_fd::NAME)
            .then(|| khr::external_memory_fd::Device::new(&instance, &device));
        let host_pointer = has(ext::external_memory_host::NAME)
            .then(|| ext::external_memory_host::Device::new(&instance, &device));
        let outside_family_index = if has(ext::queue_family_foreign::NAME) {
            vk::QUEUE_FAMILY_FOREIGN_EXT
        } else {
            vk::QUEUE_FAMILY_EXTERNAL
        };
        Self {
            memory_types: memory.memory_types_as_slice().to_vec(),
            device,
            instance,
            physical,
            description,
            limits,
            memory_fd,
            has_dma_bufs: has(ext::external_memory_dma_buf::NAME),
            host_pointer,
            has_modifiers: has(ext::image_drm_format_modifier::NAME),
            outside_family_index,
            queue,
            transfer_queue: None,
            sharing_families: Vec::new(),
            resets_queries: false,
            owner,
        }
    }
}
