//! [`Instance::open_device`]: a device of our own, with the queues, extensions and features that help.
#![expect(unsafe_code, reason = "queries to the Vulkan driver, and making a VkDevice")]

use ash::{khr, vk};

use super::Device;
use crate::vulkan::discovery::extensions::EXTENSIONS;
use crate::vulkan::discovery::instance::Instance;
use crate::vulkan::discovery::physical_device::PhysicalDevice;
use crate::vulkan::discovery::selector::Selector;
use crate::vulkan::failure::failure;
use crate::vulkan::logical::device::LogicalDevice;
use crate::vulkan::logical::families::Families;
use crate::{Error, Kind, Result};

impl Instance {
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
        let logical = LogicalDevice::own(self.clone(), device, physical, queues, &enabled, description);
        Ok(Device::own(logical))
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
}

/// Features of a device.
struct Features {
    /// For [`TimelineSignal`](crate::vulkan::TimelineSignal).
    timeline_semaphore: bool,
    /// For the clock of a transfer queue.
    host_query_reset: bool,
    /// For a transfer queue beside the other.
    synchronization2: bool,
}
