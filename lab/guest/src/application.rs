//! An application with a Vulkan device of its own, whose buffers have addresses (`bufferDeviceAddress`): a device that
//! peervram opens has none.
#![expect(unsafe_code, reason = "the application's side of Vulkan")]

use std::ffi::{CStr, c_char, c_void};

use anyhow::{Context, Result};
use ash::vk::{self, Handle};
use peervram::backends::vulkan::{Device, GetInstanceProcAddr, RawDevice, required_extensions};

/// The device, and peervram's view of it, which goes first.
pub struct Application {
    importer: Option<Device>,
    device: ash::Device,
    instance: ash::Instance,
}

impl Application {
    /// Opens the first device that there is, with a queue of its first family.
    pub fn open() -> Result<Self> {
        // SAFETY: the loader's initialisers only read its environment variables.
        let library = unsafe { libloading::Library::new("libvulkan.so.1") }.context("loading Vulkan")?;
        // SAFETY: the loader's ABI fixes the type of this symbol.
        let found = unsafe { library.get::<vk::PFN_vkGetInstanceProcAddr>(b"vkGetInstanceProcAddr\0") };
        let loader = *found.context("finding Vulkan's first function")?;
        // Drivers leave threads behind.
        std::mem::forget(library);
        // SAFETY: one function type, spelt twice.
        let get_instance_proc_addr = unsafe {
            std::mem::transmute::<
                vk::PFN_vkGetInstanceProcAddr,
                unsafe extern "system" fn(*mut c_void, *const c_char) -> vk::PFN_vkVoidFunction,
            >(loader)
        };
        Self::with(loader, get_instance_proc_addr)
    }

    fn with(loader: vk::PFN_vkGetInstanceProcAddr, get: GetInstanceProcAddr) -> Result<Self> {
        const FAMILY: u32 = 0;
        let enabled: Vec<&CStr> = required_extensions().collect();
        let names: Vec<_> = enabled.iter().map(|name| name.as_ptr()).collect();
        // SAFETY: plain structures that outlive their calls; the extensions are those that peervram's own devices have
        // under this driver, and every driver of Vulkan 1.3 has the feature.
        let (instance, physical, device, queue) = unsafe {
            let entry = ash::Entry::from_static_fn(ash::StaticFn { get_instance_proc_addr: loader });
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&info, None).context("vkCreateInstance")?;
            let all = instance.enumerate_physical_devices().context("vkEnumeratePhysicalDevices")?;
            let physical = *all.first().context("there is no Vulkan device")?;
            let queues =
                [vk::DeviceQueueCreateInfo::default().queue_family_index(FAMILY).queue_priorities(&[1.0])];
            let mut addresses =
                vk::PhysicalDeviceBufferDeviceAddressFeatures::default().buffer_device_address(true);
            let info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queues)
                .enabled_extension_names(&names)
                .push_next(&mut addresses);
            let device = instance.create_device(physical, &info, None).context("vkCreateDevice")?;
            let queue = device.get_device_queue(FAMILY, 0);
            (instance, physical, device, queue)
        };
        let raw = RawDevice {
            get_instance_proc_addr: get,
            instance: instance.handle().as_raw(),
            physical_device: physical.as_raw(),
            device: device.handle().as_raw(),
            queue: queue.as_raw(),
            queue_family_index: FAMILY,
            enabled_extensions: &enabled,
        };
        // SAFETY: `self` keeps all of it until the importer is dropped, and submits nothing itself.
        let importer =
            unsafe { Device::from_raw(&raw).and_then(|device| device.with_queue_lock(|submit| submit())) };
        Ok(Self { importer: Some(importer?), device, instance })
    }

    /// What imports with it. What was made from it is dropped before the application.
    pub fn importer(&self) -> &Device {
        self.importer.as_ref().expect("it is there until the application goes")
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        drop(self.importer.take());
        // SAFETY: whoever has the importer drops what it made first, as it is asked to.
        unsafe {
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}
