//! `Instance`: a Vulkan instance of our own, for programs that have none.
//!
//! Order of calls: [`Instance::open`], [`physical_devices`](Instance::physical_devices),
//! [`open_device`](Instance::open_device). An application with an instance of its own needs none of
//! this: see [`Device::from_raw`].
#![expect(unsafe_code, reason = "loading libvulkan and calling it")]

use std::error::Error as _;
use std::fmt;
use std::sync::{Arc, OnceLock};

use ash::{khr, vk};
use libloading::Library;

use super::device::Device;
use super::failure::{INSTALL_A_DRIVER, failure};
use super::queue::Families;
use super::{EXTENSIONS, PhysicalDevice, Selector};
use crate::{Error, Kind, Result};

const LIBRARY: &str = "libvulkan.so.1";

/// A Vulkan instance that this library made. Clones share it; the last one destroys it.
#[derive(Clone)]
pub struct Instance(Arc<Inner>);

struct Inner(ash::Instance);

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: devices made from the instance hold it, so none is left
        // (VUID-vkDestroyInstance-instance-00629).
        unsafe { self.0.destroy_instance(None) };
    }
}

impl Instance {
    /// Loads `libvulkan.so.1` and makes an instance, without layers or extensions.
    ///
    /// Blocks for as long as the loader needs to read every installed driver.
    ///
    /// # Errors
    /// [`Kind::VulkanMissing`] without a loader or a driver, with the package to install;
    /// [`Kind::Vulkan`] for anything else.
    pub fn open() -> Result<Self> {
        const TRIED: &str = "open Vulkan";
        let get_instance_proc_addr = load()?;
        // SAFETY: the function is the loader's own, and the loader is never unloaded.
        let entry = unsafe { ash::Entry::from_static_fn(ash::StaticFn { get_instance_proc_addr }) };
        // SAFETY: no argument; loaders before Vulkan 1.1 lack the function, which ash sees.
        let version = unsafe { entry.try_enumerate_instance_version() }
            .map_err(|result| failure(TRIED, result))?
            .unwrap_or(vk::API_VERSION_1_0);
        if version < vk::API_VERSION_1_1 {
            return Err(Error::new(Kind::VulkanMissing, TRIED, "the loader is older than Vulkan 1.1")
                .next("install a newer libvulkan1"));
        }
        // A promise to use no more than this; the drivers' own versions may be lower or higher.
        let application =
            vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_2).engine_name(c"peervram");
        let info = vk::InstanceCreateInfo::default().application_info(&application);
        // SAFETY: `info` and what it points to are initialised and outlive the call.
        let instance =
            unsafe { entry.create_instance(&info, None) }.map_err(|result| failure(TRIED, result))?;
        Ok(Self(Arc::new(Inner(instance))))
    }

    /// The devices of all drivers, in the loader's order.
    ///
    /// # Errors
    /// [`Kind::VulkanMissing`] without a driver; [`Kind::Vulkan`] where one does not answer.
    pub fn physical_devices(&self) -> Result<Vec<PhysicalDevice>> {
        self.handles()?.into_iter().map(|physical| PhysicalDevice::describe(self.ash(), physical)).collect()
    }

    /// Makes a device with one queue that computes, of the physical device that is meant, and with one that only transfers
    /// if it has such and `VK_KHR_synchronization2`; with every extension of [`EXTENSIONS`] that it has, with timeline
    /// semaphores, and with queries that the CPU resets, if it has those.
    ///
    /// # Errors
    /// As [`Selector::choose`]; [`Kind::VulkanMissing`] for a device before Vulkan 1.1 or without
    /// a queue that computes; [`Kind::Vulkan`] where the driver refuses.
    pub fn open_device(&self, selector: &Selector) -> Result<Device> {
        const TRIED: &str = "open a Vulkan device";
        let handles = self.handles()?;
        let mut described = handles
            .iter()
            .map(|&physical| PhysicalDevice::describe(self.ash(), physical))
            .collect::<Result<Vec<_>>>()?;
        let index = selector.choose(&described)?;
        let (physical, description) = (handles[index], described.swap_remove(index));
        let missing = |why: &'static str| Error::new(Kind::VulkanMissing, TRIED, why).on(&description.name);
        if description.api_version < (1, 1, 0) {
            return Err(missing("it is older than Vulkan 1.1"));
        }

        let instance = self.ash();
        // SAFETY: `physical` is a physical device of this instance.
        let families = unsafe { instance.get_physical_device_queue_family_properties(physical) };
        let features = self.features(physical, description.api_version)?;
        let families = Families::choose(&families, features.synchronization2)
            .ok_or_else(|| missing("it has no queue that computes"))?;
        let mut enabled: Vec<_> = EXTENSIONS
            .into_iter()
            .filter(|extension| !description.missing_extensions.contains(extension))
            .map(|extension| extension.name)
            .collect();
        // VUID-VkBufferMemoryBarrier-None-09050 and -09051: without this, buffers that two families share are handed to
        // and from no family outside of Vulkan.
        let shares = families.only_transfers.is_some();
        enabled.extend(shares.then_some(khr::synchronization2::NAME));
        let names: Vec<_> = enabled.iter().map(|name| name.as_ptr()).collect();
        let queue =
            |family| vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0]);
        let queues: Vec<_> =
            [Some(families.computes), families.only_transfers].into_iter().flatten().map(queue).collect();
        let mut timeline = vk::PhysicalDeviceTimelineSemaphoreFeatures::default()
            .timeline_semaphore(features.timeline_semaphore);
        let mut reset =
            vk::PhysicalDeviceHostQueryResetFeatures::default().host_query_reset(features.host_query_reset);
        let mut synchronization =
            vk::PhysicalDeviceSynchronization2Features::default().synchronization2(true);
        let mut info =
            vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&names);
        // A device before Vulkan 1.2 knows neither structure.
        if description.api_version >= (1, 2, 0) {
            info = info.push_next(&mut timeline).push_next(&mut reset);
        }
        if shares {
            info = info.push_next(&mut synchronization);
        }
        // SAFETY: the families are of this device's and different, the extensions are ones that it lists, and
        // everything that `info` points to outlives the call.
        let device = unsafe { instance.create_device(physical, &info, None) }
            .map_err(|result| failure(TRIED, result).on(&description.name))?;
        let queues = (families, features.host_query_reset);
        Ok(Device::own(self.clone(), device, physical, queues, &enabled, description))
    }

    /// What the device has of the features that are enabled where they are there.
    fn features(&self, physical: vk::PhysicalDevice, api_version: (u32, u32, u32)) -> Result<Features> {
        // SAFETY: `physical` is a physical device of this instance.
        let extensions = unsafe { self.ash().enumerate_device_extension_properties(physical) }
            .map_err(|result| failure("list a Vulkan device's extensions", result))?;
        let knows_synchronization2 = extensions
            .iter()
            .any(|extension| extension.extension_name_as_c_str() == Ok(khr::synchronization2::NAME));
        let mut timeline = vk::PhysicalDeviceTimelineSemaphoreFeatures::default();
        let mut reset = vk::PhysicalDeviceHostQueryResetFeatures::default();
        let mut synchronization = vk::PhysicalDeviceSynchronization2Features::default();
        let mut all = vk::PhysicalDeviceFeatures2::default();
        // A driver may be asked only for structures that it knows.
        if api_version >= (1, 2, 0) {
            all = all.push_next(&mut timeline).push_next(&mut reset);
        }
        if knows_synchronization2 {
            all = all.push_next(&mut synchronization);
        }
        // SAFETY: the device is of Vulkan 1.1, which has the call, and it knows the structures, which outlive the call.
        unsafe { self.ash().get_physical_device_features2(physical, &mut all) };
        Ok(Features {
            timeline_semaphore: timeline.timeline_semaphore != 0,
            host_query_reset: reset.host_query_reset != 0,
            synchronization2: synchronization.synchronization2 != 0,
        })
    }

    pub(super) fn ash(&self) -> &ash::Instance {
        &self.0.0
    }

    fn handles(&self) -> Result<Vec<vk::PhysicalDevice>> {
        // SAFETY: the instance lives as long as `self`.
        let handles = unsafe { self.ash().enumerate_physical_devices() };
        handles.map_err(|result| failure("list Vulkan devices", result).next(INSTALL_A_DRIVER))
    }
}

/// Features of a device.
struct Features {
    /// For [`TimelineSignal`](super::TimelineSignal).
    timeline_semaphore: bool,
    /// For the clock of a transfer queue.
    host_query_reset: bool,
    /// For a transfer queue beside the other.
    synchronization2: bool,
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Instance").field(&self.ash().handle()).finish()
    }
}

/// The loader's first function. The loader stays loaded for the life of the process: drivers leave
/// threads and thread-local destructors behind that outlive their instance.
fn load() -> Result<vk::PFN_vkGetInstanceProcAddr> {
    static LOADED: OnceLock<Library> = OnceLock::new();
    let missing = |error: libloading::Error| {
        // What the dynamic linker said is in the source: "cannot open shared object file".
        let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        Error::new(Kind::VulkanMissing, "load Vulkan", why)
            .on(LIBRARY)
            .next("install the Vulkan loader: libvulkan1 on Debian and Ubuntu, vulkan-loader on Fedora")
    };
    let library = match LOADED.get() {
        Some(library) => library,
        None => {
            // SAFETY: the loader's initialisers only read its environment variables.
            let library = unsafe { Library::new(LIBRARY) }.map_err(missing)?;
            LOADED.get_or_init(|| library)
        }
    };
    // SAFETY: the loader's ABI fixes the type of this symbol.
    let symbol = unsafe { library.get::<vk::PFN_vkGetInstanceProcAddr>(b"vkGetInstanceProcAddr\0") };
    Ok(*symbol.map_err(missing)?)
}
