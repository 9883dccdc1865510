//! An application with a Vulkan instance and device of its own, given to the importer by handles, and working beside it.
#![expect(unsafe_code, reason = "the application's side of Vulkan")]

use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use ash::vk::{self, Handle};
use peervram_backends::host::HostMemory;
use peervram_backends::vulkan::{
    BufferUsage, Device, Engine, GetInstanceProcAddr, ImportOptions, RawDevice, checksum, missing_extensions,
};
use peervram_backends::{Exporter, HostSlice, Importer, Kind, Mapping};

use crate::machine::{MIB, host_pointer_device, noise, skip, soon, whole};
use crate::pretended::in_pretence;

pub const HOST_POINTER: &CStr = c"VK_EXT_external_memory_host";
const ADDRESSES: &CStr = c"VK_KHR_buffer_device_address";

/// The application's Vulkan, with no extension for dma-bufs enabled.
pub struct Application {
    get_instance_proc_addr: GetInstanceProcAddr,
    pub instance: ash::Instance,
    pub physical: vk::PhysicalDevice,
    pub device: ash::Device,
    queue: vk::Queue,
    family: u32,
    has_addresses: bool,
}

impl Application {
    /// Opens the device of that name, with a queue of its first family.
    fn open(name: &str) -> Self {
        Self::with_queue_of(name, 0)
    }

    /// The same, of another family.
    pub fn with_queue_of(name: &str, family: u32) -> Self {
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
            let families = instance.get_physical_device_queue_family_properties(physical).len();
            assert!((family as usize) < families, "the driver has {families} families");
            let queues =
                [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
            let available = instance.enumerate_device_extension_properties(physical).unwrap();
            let has =
                |name| available.iter().any(|extension| extension.extension_name_as_c_str() == Ok(name));
            // What the second needs at Vulkan 1.1.
            let has_addresses = has(ADDRESSES) && has(c"VK_KHR_device_group");
            let mut names = vec![HOST_POINTER.as_ptr()];
            names.extend(has_addresses.then_some(ADDRESSES.as_ptr()));
            let mut addresses =
                vk::PhysicalDeviceBufferDeviceAddressFeatures::default().buffer_device_address(true);
            let mut info =
                vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&names);
            if has_addresses {
                info = info.push_next(&mut addresses);
            }
            let device = instance.create_device(physical, &info, None).unwrap();
            let queue = device.get_device_queue(family, 0);
            Self { get_instance_proc_addr, instance, physical, device, queue, family, has_addresses }
        }
    }

    pub fn raw<'a>(&self, enabled_extensions: &'a [&'a CStr]) -> RawDevice<'a> {
        RawDevice {
            get_instance_proc_addr: self.get_instance_proc_addr,
            instance: self.instance.handle().as_raw(),
            physical_device: self.physical.as_raw(),
            device: self.device.handle().as_raw(),
            queue: self.queue.as_raw(),
            queue_family_index: self.family,
            enabled_extensions,
        }
    }

    /// Runs `record` to its end.
    fn run(&self, record: impl FnOnce(vk::CommandBuffer)) {
        // SAFETY: handles of this device, each used by this thread only and destroyed when idle.
        unsafe {
            let info = vk::CommandPoolCreateInfo::default().queue_family_index(self.family);
            let pool = self.device.create_command_pool(&info, None).unwrap();
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
    // SAFETY: `application` outlives everything below, and submits nothing while engines work.
    let device = unsafe {
        let device = Device::from_raw(&application.raw(&[HOST_POINTER])).unwrap();
        device.with_queue_lock(|submit| submit()).unwrap()
    };
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

/// The application's thread never stops to submit, and every engine of the library's moves bytes beside it. One queue is
/// all that most software drivers have.
#[test]
fn engines_work_beside_the_applications_own_submissions() {
    const TEST: &str = "engines_work_beside_the_applications_own_submissions";
    let Some(found) = host_pointer_device(TEST) else { return };
    let application = Application::open(&found.description().name);
    let (queue_lock, ours) = (Arc::new(Mutex::new(())), Arc::new(AtomicUsize::new(0)));
    let (lock, counted) = (Arc::clone(&queue_lock), Arc::clone(&ours));
    // SAFETY: `application` outlives everything below, and submits and waits under the same lock.
    let device = unsafe {
        let device = Device::from_raw(&application.raw(&[HOST_POINTER])).unwrap();
        device.with_queue_lock(move |submit| {
            let _held = lock.lock().unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            submit();
        })
    }
    .unwrap();
    let names: Vec<_> = device.engines().iter().map(|engine| engine.name()).collect();
    assert_eq!(names, ["copy commands", "compute shader"]);

    let memory = device.stage(4 * MIB).unwrap();
    let behind = device.host_memory(&memory).unwrap();
    let host = Arc::new(Mapping::of_host_memory(4 * MIB as usize).unwrap());
    let (over, theirs) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let _held = queue_lock.lock().unwrap();
                application.run(|_| ());
                theirs.fetch_add(1, Ordering::Relaxed);
            }
        });
        // Ends the other thread, whatever fails here.
        let _ends = Ends(&over);
        let mut engine = Engine::new(&device).unwrap();
        let mut seen = vec![0; 4 * MIB as usize];
        for round in 1_u32.. {
            let (bytes, other) = (noise(seen.len(), round), noise(seen.len(), !round));
            for moved in device.engines() {
                behind.write(0, &bytes).unwrap();
                let slice = HostSlice::new(Arc::clone(&host), 0, seen.len()).unwrap();
                moved.read(&memory, 0, &slice, soon()).unwrap();
                host.read(0, &mut seen).unwrap();
                assert!(seen == bytes, "{} reads", moved.name());
                host.write(0, &other).unwrap();
                moved.write(&memory, 0, &slice, soon()).unwrap();
                behind.read(0, &mut seen).unwrap();
                assert!(seen == other, "{} writes", moved.name());
            }
            assert_eq!(engine.checksum(&memory, 0..4 * MIB, soon()).unwrap(), checksum(&other));
            if theirs.load(Ordering::Relaxed) >= 20 && ours.load(Ordering::Relaxed) >= 20 {
                break;
            }
        }
    });
    device.release(memory).unwrap();
    drop(device);
    application.run(|_| ());
}

/// Ends a thread's loop when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn without_a_lock_nothing_is_submitted() {
    let Some(found) = host_pointer_device("without_a_lock_nothing_is_submitted") else { return };
    let application = Application::open(&found.description().name);
    // SAFETY: `application` outlives everything below.
    let device = unsafe { Device::from_raw(&application.raw(&[HOST_POINTER])) }.unwrap();
    assert!(device.engines().is_empty());
    let refused = Engine::new(&device).unwrap_err();
    assert_eq!(refused.kind(), Kind::Unsupported);
    assert!(refused.to_string().contains("with_queue_lock"), "{refused}");
    // It still imports, and what is staged for it is host memory.
    let memory = device.stage(MIB).unwrap();
    assert!(memory.is_host_pointer());
    drop(memory);

    // SAFETY: nobody else submits.
    let again = unsafe { device.clone().with_queue_lock(|submit| submit()) }.unwrap();
    assert_eq!(again.engines().len(), 2);
    // SAFETY: as above.
    let twice = unsafe { device.with_queue_lock(|submit| submit()) }.unwrap_err();
    assert_eq!(twice.kind(), Kind::InvalidInput, "{twice}");
    // SAFETY: as above.
    let owned = unsafe { found.with_queue_lock(|submit| submit()) }.unwrap_err();
    assert_eq!(owned.kind(), Kind::InvalidInput, "{owned}");
}

#[test]
fn a_queue_family_that_is_not_there_is_refused() {
    let Some(found) = host_pointer_device("a_queue_family_that_is_not_there_is_refused") else { return };
    let application = Application::open(&found.description().name);
    let raw = RawDevice { queue_family_index: 77, ..application.raw(&[HOST_POINTER]) };
    // SAFETY: `application` outlives the call.
    let refused = unsafe { Device::from_raw(&raw) }.unwrap_err();
    assert_eq!(refused.kind(), Kind::InvalidInput);
    assert!(refused.to_string().contains("77"), "{refused}");
}

/// The validation layers say so otherwise: VUID-vkBindBufferMemory-bufferDeviceAddress-03339.
#[test]
fn a_buffer_with_an_address_has_memory_that_is_allocated_for_one() {
    const TEST: &str = "a_buffer_with_an_address_has_memory_that_is_allocated_for_one";
    let Some(found) = host_pointer_device(TEST) else { return };
    let application = Application::open(&found.description().name);
    let memory = HostMemory::new(MIB).unwrap();
    let usage = BufferUsage::STORAGE_BUFFER | BufferUsage::SHADER_DEVICE_ADDRESS;
    let options = ImportOptions { usage, ..Default::default() };
    let ours = found.import_mapping(memory.map(&whole(&memory)).unwrap(), &options).unwrap_err();
    assert_eq!(ours.kind(), Kind::Unsupported, "peervram enables no addresses: {ours}");
    if !application.has_addresses {
        return skip(TEST, "the driver has no addresses").unwrap_or_default();
    }
    // SAFETY: `application` outlives everything below.
    let device = unsafe { Device::from_raw(&application.raw(&[HOST_POINTER])) }.unwrap();
    let buffer = device.import_mapping(memory.map(&whole(&memory)).unwrap(), &options).unwrap();
    let addresses = ash::khr::buffer_device_address::Device::new(&application.instance, &application.device);
    let info = vk::BufferDeviceAddressInfo::default().buffer(vk::Buffer::from_raw(buffer.raw_buffer()));
    // SAFETY: the buffer is this device's, and was made for it.
    assert_ne!(unsafe { addresses.get_buffer_device_address(&info) }, 0);
}

/// VUID-vkCmdResetQueryPool-commandBuffer-cmdpool: such a queue resets no queries, so it is not timed.
#[test]
fn a_queue_that_only_transfers_copies_and_is_not_timed() {
    const TEST: &str = "application::a_queue_that_only_transfers_copies_and_is_not_timed";
    if !in_pretence("transfer-queue", TEST) {
        return;
    }
    let Some(found) = host_pointer_device(TEST) else { return };
    let application = Application::with_queue_of(&found.description().name, 1);
    // SAFETY: `application` outlives everything below, and submits nothing.
    let device = unsafe {
        let device = Device::from_raw(&application.raw(&[HOST_POINTER])).unwrap();
        device.with_queue_lock(|submit| submit()).unwrap()
    };
    let engines = device.engines();
    let [engine] = engines[..] else { panic!("{} engines", engines.len()) };
    assert_eq!(engine.name(), "copy commands");
    let (from, to) = (device.stage(4 * MIB).unwrap(), device.stage(4 * MIB).unwrap());
    let (source, target) = (device.host_memory(&from).unwrap(), device.host_memory(&to).unwrap());
    let bytes = noise(source.len(), 11);
    source.write(0, &bytes).unwrap();
    assert_eq!(engine.copy((&from, 100), (&to, 8), MIB, soon()).unwrap(), None);
    let mut seen = vec![0; MIB as usize];
    target.read(8, &mut seen).unwrap();
    assert!(seen == bytes[100..][..MIB as usize]);
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
