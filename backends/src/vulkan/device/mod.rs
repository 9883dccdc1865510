//! `Device`: a Vulkan device that imports, the application's or our own.
//!
//! Of an application's device only the handles are borrowed: nothing of it is destroyed here, and
//! it must outlive every clone of the [`Device`] and everything made from it. Our own device is
//! destroyed with the last of them.
#![expect(unsafe_code, reason = "functions of Vulkan, found by name and called on raw handles")]

mod open;

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::sync::Arc;

use ash::vk::{self, Handle};
use ash::{ext, khr};

use crate::vulkan::copying::copy_engine::{CopyEngine, CopyMethod};
use crate::vulkan::discovery::physical_device::PhysicalDevice;
use crate::vulkan::logical::device::LogicalDevice;
use crate::vulkan::logical::queue::Queue;
use crate::{Error, Kind, Result};

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
    logical: LogicalDevice,
    /// Where this library may submit.
    engines: Option<Arc<[CopyEngine]>>,
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
        let logical = LogicalDevice::of_application(
            instance,
            device,
            physical,
            queue,
            raw.enabled_extensions,
            description,
        );
        Ok(Self { logical, engines: None })
    }

    /// Gives the lock under which the application submits to the queue, so that this library may submit as well: the device
    /// has engines then, for verification and for staged copies, and [`Engine`](super::Engine) works on it. A device that
    /// [`Instance::open_device`](crate::vulkan::Instance::open_device) made has them from the start.
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
        self.logical.queue(false).set_lock(Box::new(lock)).map_err(|error| error.on(self.logical.name()))?;
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

    /// A device that this library opened, which may submit to it.
    fn own(logical: LogicalDevice) -> Self {
        Self { logical, engines: None }.with_engines()
    }

    /// The same, with engines: where it is known how to submit, or to say which there would be.
    pub(crate) fn with_engines(self) -> Self {
        let logical = self.logical;
        // Every family that draws or computes copies, too.
        let computes = logical.queue(false).family.queue_flags.contains(vk::QueueFlags::COMPUTE);
        let has = |method: &CopyMethod| match method {
            CopyMethod::TransferQueue => logical.has_transfer_queue(),
            CopyMethod::Commands => true,
            CopyMethod::Shader => computes,
        };
        // The one for bulk copies first: staged copies and verification take it.
        let methods =
            [CopyMethod::TransferQueue, CopyMethod::Commands, CopyMethod::Shader].into_iter().filter(has);
        let engines = methods.map(|method| CopyEngine::new(logical.clone(), method)).collect();
        Self { engines: Some(engines), logical }
    }

    /// What its driver says of it.
    pub fn description(&self) -> &PhysicalDevice {
        self.logical.description()
    }

    /// Whether dma-bufs can be tried: the driver says so, and the extensions are enabled.
    pub fn imports_dma_bufs(&self) -> bool {
        self.description().can_import_dma_buf && self.logical.dma_buf_functions().is_some()
    }

    /// What host pointers must be aligned to, if they can be imported: the driver says so, and the
    /// extension is enabled.
    pub fn host_pointer_alignment_bytes(&self) -> Option<u64> {
        self.logical.host_pointer_alignment_bytes()
    }

    /// `VkDevice`, for the application's own calls. Valid as long as the device is.
    pub fn raw_device(&self) -> u64 {
        self.logical.ash().handle().as_raw()
    }

    /// What everything that is made from it stands on.
    pub(crate) fn logical(&self) -> &LogicalDevice {
        &self.logical
    }

    /// Its engines; none where this library may not submit.
    pub(crate) fn copy_engines(&self) -> Option<&[CopyEngine]> {
        self.engines.as_deref()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.logical.name()).finish()
    }
}
