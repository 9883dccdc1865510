//! `Device`: a Vulkan device that imports, the application's or our own.
//!
//! Of an application's device only the handles are borrowed: nothing of it is destroyed here, and
//! it must outlive every clone of the [`Device`] and everything made from it. Our own device is
//! destroyed with the last of them.
#![expect(unsafe_code, reason = "functions of Vulkan, found by name and called on raw handles")]

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::sync::Arc;

use ash::vk::{self, Handle};
use ash::{ext, khr};

use super::copy_engine::{CopyEngine, Means};
use super::import;
use super::queue::{Families, Queue};
use super::{Buffer, ImportOptions, Instance, PhysicalDevice};
use crate::{DmaBuf, Engine, Error, Importer, Kind, Mapping, OnRevoke, PciAddress, Result};

/// `PFN_vkGetInstanceProcAddr`: how every function of Vulkan is found.
pub type GetInstanceProcAddr = unsafe extern "system" fn(
    instance: *mut c_void,
    name: *const c_char,
) -> Option<unsafe extern "system" fn()>;

/// An application's Vulkan device, by handles as `vulkan.h` has them; pointers as numbers.
#[derive(Debug, Clone, Copy)]
pub struct RawDevice<'a> {
    /// The loader's `vkGetInstanceProcAddr`.
    pub get_instance_proc_addr: GetInstanceProcAddr,
    /// `VkInstance`, made for Vulkan 1.1 or later.
    pub instance: u64,
    /// `VkPhysicalDevice`.
    pub physical_device: u64,
    /// `VkDevice`.
    pub device: u64,
    /// `VkQueue`; nothing is submitted to it without [`Device::with_queue_lock`].
    pub queue: u64,
    /// The family of `queue`, and the one that imported memory is handed to and from.
    pub queue_family_index: u32,
    /// The device extensions that were enabled: Vulkan cannot be asked.
    pub enabled_extensions: &'a [&'a CStr],
}

/// A Vulkan device that imports dma-bufs and host pointers. Clones share it.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
    /// Where this library may submit. They hold the device without engines.
    engines: Option<Arc<[CopyEngine]>>,
}

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

impl Device {
    /// Takes an application's device for importing. Nothing of it is owned or destroyed here.
    ///
    /// # Errors
    /// [`Kind::VulkanMissing`] where instance or device are older than Vulkan 1.1, or an extension
    /// that is said to be enabled is not; [`Kind::InvalidInput`] for a queue family that the device does not have.
    /// Without the extensions for dma-bufs or host pointers the call succeeds, and the imports that want them fail.
    ///
    /// # Safety
    /// The handles are valid, belong together, and outlive every clone of the device and every
    /// buffer and engine made from it.
    pub unsafe fn from_raw(raw: &RawDevice<'_>) -> Result<Self> {
        const TRIED: &str = "use an application's Vulkan device";
        let missing = |why: String| Error::new(Kind::VulkanMissing, TRIED, why);
        // SAFETY: both are `PFN_vkGetInstanceProcAddr`; a `VkInstance` is a pointer.
        let get_instance_proc_addr = unsafe {
            std::mem::transmute::<GetInstanceProcAddr, vk::PFN_vkGetInstanceProcAddr>(
                raw.get_instance_proc_addr,
            )
        };
        let instance = vk::Instance::from_raw(raw.instance);
        // Of Vulkan 1.1 and called without further check below, so it has to be there.
        // SAFETY: the caller vouches for the function and the instance.
        if unsafe { get_instance_proc_addr(instance, c"vkGetPhysicalDeviceProperties2".as_ptr()) }.is_none() {
            return Err(missing("its instance was made for Vulkan 1.0".into())
                .next("set VkApplicationInfo::apiVersion to VK_API_VERSION_1_1 or later"));
        }
        // SAFETY: as above.
        let instance = unsafe { ash::Instance::load(&ash::StaticFn { get_instance_proc_addr }, instance) };
        let physical = vk::PhysicalDevice::from_raw(raw.physical_device);
        let description = PhysicalDevice::describe(&instance, physical)?;
        if description.api_version < (1, 1, 0) {
            return Err(missing("the device is older than Vulkan 1.1".into()).on(&description.name));
        }
        let handle = vk::Device::from_raw(raw.device);
        for (extension, function) in [
            (khr::external_memory_fd::NAME, c"vkGetMemoryFdPropertiesKHR"),
            (ext::external_memory_host::NAME, c"vkGetMemoryHostPointerPropertiesEXT"),
            (ext::image_drm_format_modifier::NAME, c"vkGetImageDrmFormatModifierPropertiesEXT"),
        ] {
            // SAFETY: the caller vouches for the device.
            let found = unsafe { instance.get_device_proc_addr(handle, function.as_ptr()) }.is_some();
            if raw.enabled_extensions.contains(&extension) && !found {
                let why = format!("{} is not enabled on it", extension.to_string_lossy());
                return Err(missing(why).on(&description.name).next("enable it in vkCreateDevice"));
            }
        }
        // SAFETY: the caller vouches for the device.
        let device = unsafe { ash::Device::load(instance.fp_v1_0(), handle) };
        // SAFETY: the physical device is one of the instance.
        let families = unsafe { instance.get_physical_device_queue_family_properties(physical) };
        let index = raw.queue_family_index;
        let Some(&family) = families.get(index as usize) else {
            let why = format!("it has {} queue families, and none of number {index}", families.len());
            return Err(Error::new(Kind::InvalidInput, TRIED, why).on(&description.name));
        };
        let queue = Queue::of_application(vk::Queue::from_raw(raw.queue), index, family);
        Ok(Self::build(None, instance, device, physical, queue, raw.enabled_extensions, description))
    }

    /// Gives the lock under which the application submits to the queue, so that this library may submit as well: the device
    /// has engines then, for verification and for staged copies, and [`Engine`](super::Engine) works on it. A device that
    /// [`Instance::open_device`] made has them from the start.
    ///
    /// `lock` calls what it is given, once, while nobody else uses the queue:
    ///
    /// ```
    /// # use std::sync::{Arc, Mutex, PoisonError};
    /// # use peervram_backends::{Result, vulkan::Device};
    /// # fn take(device: Device, queue_lock: &Arc<Mutex<()>>) -> Result<Device> {
    /// let queue_lock = Arc::clone(queue_lock);
    /// // SAFETY: all of the application's submissions are made with `queue_lock` held.
    /// unsafe {
    ///     device.with_queue_lock(move |submit| {
    ///         let _held = queue_lock.lock().unwrap_or_else(PoisonError::into_inner);
    ///         submit();
    ///     })
    /// }
    /// # }
    /// ```
    /// An application that submits on one thread only can hand the call to that thread and wait for it. Where the queue is
    /// used by nobody else, `|submit| submit()` will do.
    ///
    /// It is called for each piece of work, on whatever thread copies, verifies or enters a staged access, and is held for
    /// one `vkQueueSubmit`, not until the work is done. Time that is spent waiting for it is not bounded by the work's
    /// deadline. Do not enter, attach or verify with the lock held.
    ///
    /// A lock that panics before it calls, or does not call, fails that piece of work with [`Kind::InvalidInput`].
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for a device that peervram opened, and for a queue that has a lock.
    ///
    /// # Safety
    /// While `lock` calls what it is given, nobody else submits to the queue, presents on it or waits for it
    /// (`vkQueueWaitIdle`, and `vkDeviceWaitIdle`, which waits for all): the specification demands that access to a queue is
    /// externally synchronised ("Host Synchronization" of each of these calls).
    pub unsafe fn with_queue_lock(
        self,
        lock: impl Fn(&mut (dyn FnMut() + Send)) + Send + Sync + 'static,
    ) -> Result<Self> {
        self.inner.queue.set_lock(Box::new(lock)).map_err(|error| error.on(self.name()))?;
        Ok(self.with_engines())
    }

    /// As [`Device::from_raw`], with ash's types.
    ///
    /// # Errors
    /// As [`Device::from_raw`].
    ///
    /// # Safety
    /// As [`Device::from_raw`].
    #[cfg(feature = "ash")]
    pub unsafe fn from_ash(
        entry: &ash::Entry,
        instance: &ash::Instance,
        physical_device: vk::PhysicalDevice,
        device: &ash::Device,
        (queue, queue_family_index): (vk::Queue, u32),
        enabled_extensions: &[&CStr],
    ) -> Result<Self> {
        // SAFETY: both are `PFN_vkGetInstanceProcAddr`; a `VkInstance` is a pointer.
        let get_instance_proc_addr = unsafe {
            std::mem::transmute::<vk::PFN_vkGetInstanceProcAddr, GetInstanceProcAddr>(
                entry.static_fn().get_instance_proc_addr,
            )
        };
        let raw = RawDevice {
            get_instance_proc_addr,
            instance: instance.handle().as_raw(),
            physical_device: physical_device.as_raw(),
            device: device.handle().as_raw(),
            queue: queue.as_raw(),
            queue_family_index,
            enabled_extensions,
        };
        // SAFETY: the caller vouches as `from_raw` demands.
        unsafe { Self::from_raw(&raw) }
    }

    /// Takes over a device that `owner` made, of Vulkan 1.1 or later, with `enabled` extensions.
    /// It is destroyed with the last clone.
    pub(super) fn own(
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
        let mut device = Self::build(Some(owner), instance, device, physical, main, enabled, description);
        let inner = Arc::get_mut(&mut device.inner).expect("nobody else has it yet");
        inner.resets_queries = resets_queries;
        if let Some(queue) = transfers {
            inner.sharing_families = vec![families.computes, queue.family_index];
            inner.transfer_queue = Some(queue);
        }
        device.with_engines()
    }

    fn build(
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
            engines: None,
            inner: Arc::new(Inner {
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
            }),
        }
    }

    fn with_engines(self) -> Self {
        let device = Self { inner: self.inner, engines: None };
        // Every family that draws or computes copies, too.
        let computes = device.inner.queue.family.queue_flags.contains(vk::QueueFlags::COMPUTE);
        let has = |means: &Means| match means {
            Means::TransferQueue => device.inner.transfer_queue.is_some(),
            Means::Commands => true,
            Means::Shader => computes,
        };
        // The one for bulk copies first: staged copies and verification take it.
        let means = [Means::TransferQueue, Means::Commands, Means::Shader].into_iter().filter(has);
        let engines = means.map(|means| CopyEngine::new(device.clone(), means)).collect();
        Self { engines: Some(engines), ..device }
    }

    /// What its driver says of it.
    pub fn description(&self) -> &PhysicalDevice {
        &self.inner.description
    }

    /// Whether dma-bufs can be tried: the driver says so, and the extensions are enabled.
    pub fn imports_dma_bufs(&self) -> bool {
        self.inner.description.can_import_dma_buf && self.dma_buf_functions().is_some()
    }

    /// What host pointers must be aligned to, if they can be imported: the driver says so, and the
    /// extension is enabled.
    pub fn host_pointer_alignment_bytes(&self) -> Option<u64> {
        self.inner.description.host_pointer_alignment_bytes.filter(|_| self.inner.host_pointer.is_some())
    }

    /// `VkDevice`, for the application's own calls. Valid as long as the device is.
    pub fn raw_device(&self) -> u64 {
        self.inner.device.handle().as_raw()
    }

    /// Imports `dma_buf` as a buffer. The descriptor stays the caller's: the driver gets a
    /// duplicate, which it owns if the import succeeds and which is closed if it fails.
    ///
    /// Blocks for as long as the kernel driver needs to map the memory.
    ///
    /// # Errors
    /// [`Kind::VulkanMissing`] without the extensions; [`Kind::InvalidInput`] for a buffer larger
    /// than the dma-buf; [`Kind::ImporterCannot`] where the driver cannot map this exporter's
    /// memory; [`Kind::Vulkan`] for anything else. Nothing is left imported.
    pub fn import_dma_buf(&self, dma_buf: &DmaBuf, options: &ImportOptions) -> Result<Buffer> {
        import::dma_buf(self, dma_buf, options).map_err(|error| {
            let error = error.on(self.name());
            if error.kind() != Kind::ImporterCannot || self.description().imports_foreign_dma_bufs() {
                return error;
            }
            error.next("Venus takes its own renderer's memory alone: let it lend and the other driver import, or copy")
        })
    }

    /// Imports mapped memory as a buffer, which keeps the mapping.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the device imports no host pointers; [`Kind::InvalidInput`] for
    /// a pointer or length off the device's alignment, or a buffer larger than the mapping;
    /// [`Kind::ImporterCannot`] or [`Kind::Vulkan`] where the driver refuses. Nothing is left imported.
    pub fn import_mapping(&self, mapping: Arc<Mapping>, options: &ImportOptions) -> Result<Buffer> {
        import::host_pointer(self, mapping, options).map_err(|error| error.on(self.name()))
    }

    pub(super) fn ash(&self) -> &ash::Device {
        &self.inner.device
    }

    pub(super) fn ash_instance(&self) -> (&ash::Instance, vk::PhysicalDevice) {
        (&self.inner.instance, self.inner.physical)
    }

    pub(super) fn limits(&self) -> &vk::PhysicalDeviceLimits {
        &self.inner.limits
    }

    pub(super) fn memory_types(&self) -> &[vk::MemoryType] {
        &self.inner.memory_types
    }

    pub(super) fn memory_fd(&self) -> Option<&khr::external_memory_fd::Device> {
        self.inner.memory_fd.as_ref()
    }

    /// The same, where they may be asked for dma-bufs.
    pub(super) fn dma_buf_functions(&self) -> Option<&khr::external_memory_fd::Device> {
        self.memory_fd().filter(|_| self.inner.has_dma_bufs)
    }

    pub(super) fn host_pointer(&self) -> Option<&ext::external_memory_host::Device> {
        self.inner.host_pointer.as_ref()
    }

    pub(super) fn has_modifiers(&self) -> bool {
        self.inner.has_modifiers
    }

    /// The queue that the device was made with, or the one that only transfers, where it has that.
    pub(super) fn queue(&self, only_transfers: bool) -> &Queue {
        self.inner.transfer_queue.as_ref().filter(|_| only_transfers).unwrap_or(&self.inner.queue)
    }

    /// The families that share its buffers; none where there is one family.
    pub(super) fn sharing_families(&self) -> &[u32] {
        &self.inner.sharing_families
    }

    /// The family that memory of the outside is handed to. Buffers that families share are nobody's in particular.
    pub(super) fn inside_family_index(&self) -> u32 {
        if self.sharing_families().is_empty() {
            self.inner.queue.family_index
        } else {
            vk::QUEUE_FAMILY_IGNORED
        }
    }

    /// Whether its buffers may have addresses: an application's device may have been made with the feature, one of our
    /// own was not.
    pub(super) fn may_have_addresses(&self) -> bool {
        self.inner.owner.is_none()
    }

    /// Whether the CPU can reset queries.
    pub(super) fn resets_queries(&self) -> bool {
        self.inner.resets_queries
    }

    pub(super) fn outside_family_index(&self) -> u32 {
        self.inner.outside_family_index
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl Importer for Device {
    type Memory = Buffer;

    fn name(&self) -> String {
        let description = self.description();
        match description.pci_address {
            Some(address) => format!("{} at {address}", description.name),
            None => description.name.clone(),
        }
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.description().pci_address
    }

    fn driver(&self) -> Option<String> {
        let description = self.description();
        let text = format!("{} {}", description.driver_name, description.driver_version);
        (!text.trim().is_empty()).then(|| text.trim().to_owned())
    }

    fn on_revoke(&self) -> OnRevoke {
        self.description().on_revoke()
    }

    fn governed_by_p2pdma(&self) -> bool {
        !self.description().is_cpu
    }

    fn import(&self, dma_buf: &DmaBuf) -> Result<Buffer> {
        self.import_dma_buf(dma_buf, &ImportOptions::default())
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<Buffer> {
        self.import_mapping(mapping, &ImportOptions::default())
    }

    /// Memory of the device's own, where it has engines to fill it; host memory for a CPU, which has no other,
    /// and for an application's device without a [lock](Device::with_queue_lock) for its queue.
    fn stage(&self, size_bytes: u64) -> Result<Buffer> {
        if self.engines.is_some() && !self.description().is_cpu {
            return Buffer::own(self, size_bytes).map_err(|error| error.on(self.name()));
        }
        let length_bytes = usize::try_from(size_bytes).map_err(|_| {
            Error::new(Kind::InvalidInput, "make staging memory", "it is larger than the address space")
        })?;
        self.import_host_pointer(Arc::new(Mapping::of_host_memory(length_bytes)?))
    }

    fn host_memory(&self, memory: &Buffer) -> Option<Arc<Mapping>> {
        memory.mapping().cloned()
    }

    fn engines(&self) -> Vec<&dyn Engine<Buffer>> {
        let engines = self.engines.iter().flat_map(|engines| engines.iter());
        engines.map(|engine| engine as &dyn Engine<Buffer>).collect()
    }

    /// An application's queue has engines, too, where nobody here may submit to it.
    fn engine_names(&self) -> Vec<String> {
        let device = if self.engines.is_some() { self.clone() } else { self.clone().with_engines() };
        device.engines().iter().map(|engine| engine.name().to_owned()).collect()
    }

    /// [`Kind::StillInUse`] where work that missed its deadline still runs on the buffer: it is
    /// freed when that work ends.
    fn release(&self, memory: Buffer) -> Result<()> {
        memory.release().map_err(|error| error.on(self.name()))
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.name()).finish()
    }
}
