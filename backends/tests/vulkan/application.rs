//! An application with a Vulkan instance and device of its own, given to the importer by handles.
#![expect(unsafe_code, reason = "the application's side of Vulkan")]

use std::ffi::{CStr, c_char, c_void};

use ash::vk::{self, Handle};
use peervram_backends::host::HostMemory;
use peervram_backends::vulkan::{
    Device, Engine, GetInstanceProcAddr, RawDevice, checksum, missing_extensions,
};
use peervram_backends::{Exporter, Importer, Kind};

use crate::machine::{MIB, host_pointer_device, noise, soon, whole};

const HOST_POINTER: &CStr = c"VK_EXT_external_memory_host";

/// The application's Vulkan, with no extension for dma-bufs enabled.
struct Application {
    get_instance_proc_addr: GetInstanceProcAddr,
    instance: ash::Instance,
    physical: vk::PhysicalDevice,
    device: ash::Device,
    queue: vk::Queue,
}

impl Application {
    /// Opens the device of that name.
    fn open(name: &str) -> Self {
        // SAFETY: the loader's initialisers only read its environment variables.
        let library = unsafe { libloading::Library::new("libvulkan.so.1") }.unwrap();
        // SAFETY: the loader's ABI fixes the type of this symbol.
        let loader =
            *unsafe { library.get::<vk::PFN_vkGetInstanceProcAddr>(b"vkGetInstanceProcAddr\0") }.unwrap();
        // Drivers leave threads behind.
        std::mem::forget(library);
        // SAFETY: one function type, spelt twice.
        let get_instance_proc_addr = unsafe {
            std::mem::transmute::<
                vk::PFN_vkGetInstanceProcAddr,
                unsafe extern "system" fn(*mut c_void, *const c_char) -> vk::PFN_vkVoidFunction,
            >(loader)
        };
        // SAFETY: plain structures that outlive their calls; the queue family and the extension
        // are ones that the device has, as the caller found out.
        unsafe {
            let entry = ash::Entry::from_static_fn(ash::StaticFn { get_instance_proc_addr: loader });
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&info, None).unwrap();
            let physical = instance
                .enumerate_physical_devices()
                .unwrap()
                .into_iter()
                .find(|&physical| {
                    let properties = instance.get_physical_device_properties(physical);
                    properties.device_name_as_c_str().unwrap().to_string_lossy() == name
                })
                .unwrap();
            let queues =
                [vk::DeviceQueueCreateInfo::default().queue_family_index(0).queue_priorities(&[1.0])];
            let names = [HOST_POINTER.as_ptr()];
            let info =
                vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&names);
            let device = instance.create_device(physical, &info, None).unwrap();
            let queue = device.get_device_queue(0, 0);
            Self { get_instance_proc_addr, instance, physical, device, queue }
        }
    }

    fn raw<'a>(&self, enabled_extensions: &'a [&'a CStr]) -> RawDevice<'a> {
        RawDevice {
            get_instance_proc_addr: self.get_instance_proc_addr,
            instance: self.instance.handle().as_raw(),
            physical_device: self.physical.as_raw(),
            device: self.device.handle().as_raw(),
            queue: self.queue.as_raw(),
            queue_family_index: 0,
            enabled_extensions,
        }
    }

    /// Runs `record` to its end.
    fn run(&self, record: impl FnOnce(vk::CommandBuffer)) {
        // SAFETY: handles of this device, each used by this thread only and destroyed when idle.
        unsafe {
            let pool = self.device.create_command_pool(&vk::CommandPoolCreateInfo::default(), None).unwrap();
            let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
            let commands = self.device.allocate_command_buffers(&info).unwrap();
            self.device.begin_command_buffer(commands[0], &vk::CommandBufferBeginInfo::default()).unwrap();
            record(commands[0]);
            self.device.end_command_buffer(commands[0]).unwrap();
            let submit = [vk::SubmitInfo::default().command_buffers(&commands)];
            self.device.queue_submit(self.queue, &submit, vk::Fence::null()).unwrap();
            self.device.queue_wait_idle(self.queue).unwrap();
            self.device.destroy_command_pool(pool, None);
        }
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        // SAFETY: the tests drop what they made of the device first.
        unsafe {
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}

#[test]
fn an_applications_device_imports_and_stays_the_applications() {
    const TEST: &str = "an_applications_device_imports_and_stays_the_applications";
    let Some(found) = host_pointer_device(TEST) else { return };
    let application = Application::open(&found.description().name);
    // SAFETY: `application` outlives everything below, and submits nothing meanwhile.
    let device = unsafe { Device::from_raw(&application.raw(&[HOST_POINTER])) }.unwrap();
    assert_eq!(device.raw_device(), application.device.handle().as_raw());
    assert!(!device.imports_dma_bufs(), "what the driver has is not enabled on this device");

    let memory = HostMemory::new(MIB).unwrap();
    let view = memory.map(&whole(&memory)).unwrap();
    let bytes = noise(view.len(), 5);
    view.write(0, &bytes).unwrap();
    let buffer = device.import_host_pointer(memory.map(&whole(&memory)).unwrap()).unwrap();
    let mut engine = Engine::new(&device).unwrap();
    assert_eq!(engine.checksum(&buffer, 0..MIB, soon()).unwrap(), checksum(&bytes));

    // The application's own work on the raw handle, between acquire and release.
    application.run(|commands| {
        let stage = vk::PipelineStageFlags::TRANSFER.as_raw();
        let access = vk::AccessFlags::TRANSFER_WRITE.as_raw();
        // SAFETY: the command buffer is being recorded, and the buffer lives until it has run.
        unsafe {
            device.record_acquire(commands.as_raw(), &buffer, stage, access);
            let raw = vk::Buffer::from_raw(buffer.raw_buffer());
            application.device.cmd_fill_buffer(commands, raw, 4096, 8, 0x0102_0304);
            device.record_release(commands.as_raw(), &buffer, stage, access);
        }
    });
    let mut seen = [0; 8];
    view.read(4096, &mut seen).unwrap();
    assert_eq!(seen, [4, 3, 2, 1, 4, 3, 2, 1]);

    let refused = device.import(&memory.export(&whole(&memory)).unwrap()).unwrap_err();
    assert_eq!(refused.kind(), Kind::VulkanMissing, "{refused}");
    assert!(refused.to_string().contains("VK_EXT_external_memory_dma_buf"), "{refused}");
    drop((engine, buffer, device));
    application.run(|_| ());
}

#[test]
fn an_extension_that_is_not_enabled_is_named() {
    let Some(found) = host_pointer_device("an_extension_that_is_not_enabled_is_named") else { return };
    let application = Application::open(&found.description().name);
    let claimed = [c"VK_KHR_external_memory_fd", c"VK_EXT_external_memory_dma_buf"];
    // SAFETY: `application` outlives the call.
    let error = unsafe { Device::from_raw(&application.raw(&claimed)) }.unwrap_err();
    assert_eq!(error.kind(), Kind::VulkanMissing);
    assert!(error.to_string().contains("VK_KHR_external_memory_fd"), "{error}");
}

#[test]
fn what_a_device_lacks_can_be_asked_first() {
    let Some(found) = host_pointer_device("what_a_device_lacks_can_be_asked_first") else { return };
    let lacks = missing_extensions([HOST_POINTER]);
    assert!(lacks.iter().any(|extension| extension.name == c"VK_KHR_external_memory_fd"));
    assert!(!found.description().missing_extensions.iter().any(|extension| extension.name == HOST_POINTER));
}

#[cfg(feature = "ash")]
#[test]
fn ashs_types_do_as_well() {
    let Some(found) = host_pointer_device("ashs_types_do_as_well") else { return };
    let application = Application::open(&found.description().name);
    // SAFETY: one function type, spelt twice.
    let get_instance_proc_addr = unsafe {
        std::mem::transmute::<GetInstanceProcAddr, vk::PFN_vkGetInstanceProcAddr>(
            application.get_instance_proc_addr,
        )
    };
    // SAFETY: the function is the loader's; `application` outlives the device.
    let device = unsafe {
        let entry = ash::Entry::from_static_fn(ash::StaticFn { get_instance_proc_addr });
        let Application { instance, physical, device, queue, .. } = &application;
        Device::from_ash(&entry, instance, *physical, device, (*queue, 0), &[HOST_POINTER])
    };
    assert_eq!(device.unwrap().name(), found.name());
}
