//! Functions of devices: the queue that seems to be another one, and memory that must be dedicated.
#![expect(unsafe_code, reason = "functions of Vulkan, called by the loader")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, c_char, c_void};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ash::vk::{self, Handle};

use crate::chain;
use crate::instance::{self, HOST_POINTERS, function, key};
use crate::pretence::Pretence;

/// A device, and what is below this layer.
struct Device {
    ash: ash::Device,
    get_proc_addr: vk::PFN_vkGetDeviceProcAddr,
    submit_2: Option<vk::PFN_vkQueueSubmit2>,
    /// The family that is shown and is none of the driver's.
    family: u32,
    /// Its queue, where the device was made with it.
    queue: Option<Box<Queue>>,
    /// Two queues of the application's are one of the driver's, which is used by one thread at a time.
    submitting: Mutex<()>,
    /// Buffers and images for external memory.
    external: Mutex<BTreeSet<u64>>,
}

/// A queue of this layer's own, which stands for the driver's first.
#[repr(C)]
struct Queue {
    /// The loader's word.
    loader: *const c_void,
    real: vk::Queue,
}

// SAFETY: the loader's word is set once, and nothing is written afterwards.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

static DEVICES: Mutex<BTreeMap<usize, Arc<Device>>> = Mutex::new(BTreeMap::new());

fn devices() -> MutexGuard<'static, BTreeMap<usize, Arc<Device>>> {
    DEVICES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device that `object` is, or is of.
///
/// # Safety
/// `object` is a valid one, and so of a device that was made by way of this layer.
unsafe fn of(object: impl Handle) -> Arc<Device> {
    // SAFETY: as the caller vouches.
    let key = unsafe { key(object) };
    Arc::clone(&devices()[&key])
}

impl Device {
    /// The driver's family that stands behind one that is shown.
    fn real_family(&self, family: u32) -> u32 {
        if family == self.family { 0 } else { family }
    }

    fn is_ours(&self, queue: vk::Queue) -> Option<&Queue> {
        self.queue.as_deref().filter(|ours| std::ptr::from_ref(*ours).addr() as u64 == queue.as_raw())
    }

    fn real_queue(&self, queue: vk::Queue) -> vk::Queue {
        self.is_ours(queue).map_or(queue, |ours| ours.real)
    }

    /// Whether nobody else uses the driver's queue from now on until the guard goes.
    fn alone(&self) -> MutexGuard<'_, ()> {
        self.submitting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn external(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.external.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a resource whose memory is external, by another handle than a pointer.
    fn note_external(&self, handles: Option<vk::ExternalMemoryHandleTypeFlags>, resource: u64) {
        if handles.is_some_and(|handles| !handles.intersects(HOST_POINTERS)) {
            self.external().insert(resource);
        }
    }

    fn is_dedicated(&self, resource: u64) -> bool {
        Pretence::get().dedicated_only && self.external().contains(&resource)
    }
}

/// The functions that this layer replaces if the layer or driver below has them.
pub fn ours(name: &CStr) -> vk::PFN_vkVoidFunction {
    match name.to_bytes() {
        b"vkDestroyDevice" => function!(destroy_device as vk::PFN_vkDestroyDevice),
        b"vkGetDeviceQueue" => function!(get_device_queue as vk::PFN_vkGetDeviceQueue),
        b"vkGetDeviceQueue2" => function!(get_device_queue_2 as vk::PFN_vkGetDeviceQueue2),
        b"vkQueueSubmit" => function!(queue_submit as vk::PFN_vkQueueSubmit),
        b"vkQueueSubmit2" | b"vkQueueSubmit2KHR" => function!(queue_submit_2 as vk::PFN_vkQueueSubmit2),
        b"vkQueueWaitIdle" => function!(queue_wait_idle as vk::PFN_vkQueueWaitIdle),
        b"vkCreateCommandPool" => function!(create_command_pool as vk::PFN_vkCreateCommandPool),
        b"vkCreateBuffer" => function!(create_buffer as vk::PFN_vkCreateBuffer),
        b"vkDestroyBuffer" => function!(destroy_buffer as vk::PFN_vkDestroyBuffer),
        b"vkCreateImage" => function!(create_image as vk::PFN_vkCreateImage),
        b"vkDestroyImage" => function!(destroy_image as vk::PFN_vkDestroyImage),
        b"vkGetBufferMemoryRequirements2" | b"vkGetBufferMemoryRequirements2KHR" => {
            function!(buffer_needs as vk::PFN_vkGetBufferMemoryRequirements2)
        }
        b"vkGetImageMemoryRequirements2" | b"vkGetImageMemoryRequirements2KHR" => {
            function!(image_needs as vk::PFN_vkGetImageMemoryRequirements2)
        }
        b"vkAllocateMemory" => function!(allocate_memory as vk::PFN_vkAllocateMemory),
        _ => None,
    }
}

/// # Safety
/// As for vkGetDeviceProcAddr.
pub unsafe extern "system" fn get_device_proc_addr(
    device: vk::Device,
    name: *const c_char,
) -> vk::PFN_vkVoidFunction {
    // SAFETY: the caller gives a valid device and a name that ends with a zero.
    let (state, word) = unsafe { (of(device), CStr::from_ptr(name)) };
    if word == c"vkGetDeviceProcAddr" {
        return function!(get_device_proc_addr as vk::PFN_vkGetDeviceProcAddr);
    }
    // SAFETY: as above; the function below says whether there is one of that name.
    let below = unsafe { (state.get_proc_addr)(device, name) }?;
    ours(word).or(Some(below))
}

/// # Safety
/// As for vkCreateDevice.
pub unsafe extern "system" fn create_device(
    physical: vk::PhysicalDevice,
    info: *const vk::DeviceCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    device: *mut vk::Device,
) -> vk::Result {
    const FAILED: vk::Result = vk::Result::ERROR_INITIALIZATION_FAILED;
    // SAFETY: the physical device is valid; the loader gives a structure with its own in the chain.
    let (known, link, set_loader_data) = unsafe {
        let chain = (*info).p_next;
        let set = chain::set_loader_data(chain);
        (instance::of(physical), chain::take_device_link(chain), set)
    };
    let (Some(known), Some(link), Some(set_loader_data)) = (known, link, set_loader_data) else {
        return FAILED;
    };
    let get_proc_addr = link.get_device_proc_addr;
    // SAFETY: as above.
    let families = unsafe { known.ash.get_physical_device_queue_family_properties(physical) };
    let family = if Pretence::get().transfer_queue { families.len() as u32 } else { u32::MAX };
    // SAFETY: the structure has as many as it says.
    let wanted = unsafe { slice((*info).p_queue_create_infos, (*info).queue_create_info_count) };
    let mut queues: Vec<_> =
        wanted.iter().filter(|queue| queue.queue_family_index != family).copied().collect();
    let has_ours = queues.len() < wanted.len();
    if has_ours && !queues.iter().any(|queue| queue.queue_family_index == 0) {
        queues.push(vk::DeviceQueueCreateInfo::default().queue_family_index(0).queue_priorities(&[1.0]));
    }
    // SAFETY: a copy of a valid structure, which lives as long as it for the call.
    let info = unsafe { *info }.queue_create_infos(&queues);
    // SAFETY: the queues are of families of the driver's; the rest is handed on as it came.
    let result = unsafe { (known.ash.fp_v1_0().create_device)(physical, &info, allocator, device) };
    if result != vk::Result::SUCCESS {
        return result;
    }
    // SAFETY: the device was made just now. Its functions are looked up below this layer, each by its name, and its first
    // queue is one that it was made with.
    let made = unsafe {
        let handle = *device;
        let find = |name: &CStr| get_proc_addr(handle, name.as_ptr());
        let ash = ash::Device::load_with(
            |name| find(name).map_or(std::ptr::null(), |found| found as *const c_void),
            handle,
        );
        let submit_2 = find(c"vkQueueSubmit2")
            .or_else(|| find(c"vkQueueSubmit2KHR"))
            .map(|found| mem::transmute::<unsafe extern "system" fn(), vk::PFN_vkQueueSubmit2>(found));
        let queue = has_ours.then(|| {
            let real = ash.get_device_queue(0, 0);
            let queue = Box::new(Queue { loader: std::ptr::null(), real });
            // An object of this layer's, and one of the driver's that the loader has not seen: both get its word.
            let _ = set_loader_data(handle, real.as_raw() as *mut c_void);
            let _ = set_loader_data(handle, std::ptr::from_ref(&*queue).cast_mut().cast());
            queue
        });
        Device {
            ash,
            get_proc_addr,
            submit_2,
            family,
            queue,
            submitting: Mutex::default(),
            external: Mutex::default(),
        }
    };
    // SAFETY: as above.
    let key = unsafe { key(*device) };
    devices().insert(key, Arc::new(made));
    result
}

unsafe extern "system" fn destroy_device(device: vk::Device, allocator: *const vk::AllocationCallbacks<'_>) {
    if device == vk::Device::null() {
        return;
    }
    // SAFETY: the device is valid until it is destroyed below.
    let key = unsafe { key(device) };
    let known = devices().remove(&key);
    if let Some(known) = known {
        // SAFETY: handed on as it came; our queue goes after it.
        unsafe { (known.ash.fp_v1_0().destroy_device)(device, allocator) };
    }
}

unsafe extern "system" fn get_device_queue(
    device: vk::Device,
    family: u32,
    index: u32,
    queue: *mut vk::Queue,
) {
    // SAFETY: the caller gives a valid device, and a place for the queue.
    unsafe {
        let known = of(device);
        match &known.queue {
            Some(ours) if family == known.family => {
                *queue = vk::Queue::from_raw(std::ptr::from_ref(&**ours).addr() as u64);
            }
            _ => (known.ash.fp_v1_0().get_device_queue)(device, family, index, queue),
        }
    }
}

unsafe extern "system" fn get_device_queue_2(
    device: vk::Device,
    info: *const vk::DeviceQueueInfo2<'_>,
    queue: *mut vk::Queue,
) {
    // SAFETY: the caller gives a valid device and structure, and a place for the queue.
    unsafe {
        let known = of(device);
        if (*info).queue_family_index == known.family {
            get_device_queue(device, known.family, 0, queue);
        } else {
            (known.ash.fp_v1_1().get_device_queue2)(device, info, queue);
        }
    }
}

unsafe extern "system" fn queue_submit(
    queue: vk::Queue,
    count: u32,
    submits: *const vk::SubmitInfo<'_>,
    fence: vk::Fence,
) -> vk::Result {
    // SAFETY: the queue is valid; the rest is handed on as it came.
    unsafe {
        let known = of(queue);
        let _alone = known.alone();
        (known.ash.fp_v1_0().queue_submit)(known.real_queue(queue), count, submits, fence)
    }
}

unsafe extern "system" fn queue_submit_2(
    queue: vk::Queue,
    count: u32,
    submits: *const vk::SubmitInfo2<'_>,
    fence: vk::Fence,
) -> vk::Result {
    // SAFETY: the queue is valid; the rest is handed on as it came.
    unsafe {
        let known = of(queue);
        let _alone = known.alone();
        match known.submit_2 {
            Some(below) => below(known.real_queue(queue), count, submits, fence),
            None => vk::Result::ERROR_UNKNOWN,
        }
    }
}

unsafe extern "system" fn queue_wait_idle(queue: vk::Queue) -> vk::Result {
    // SAFETY: the queue is valid.
    unsafe {
        let known = of(queue);
        let _alone = known.alone();
        (known.ash.fp_v1_0().queue_wait_idle)(known.real_queue(queue))
    }
}

unsafe extern "system" fn create_command_pool(
    device: vk::Device,
    info: *const vk::CommandPoolCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    pool: *mut vk::CommandPool,
) -> vk::Result {
    // SAFETY: the device is valid; but for the family, all is handed on as it came.
    unsafe {
        let known = of(device);
        let info = (*info).queue_family_index(known.real_family((*info).queue_family_index));
        (known.ash.fp_v1_0().create_command_pool)(device, &info, allocator, pool)
    }
}

/// An array of a structure's.
///
/// # Safety
/// `first` points to `count` elements that outlive the slice.
unsafe fn slice<'a, T>(first: *const T, count: u32) -> &'a [T] {
    if first.is_null() {
        return &[];
    }
    // SAFETY: as the caller vouches.
    unsafe { std::slice::from_raw_parts(first, count as usize) }
}

/// How families share something in the driver, which has fewer of them. What is not shared names families that count for
/// nothing.
fn sharing(known: &Device, mode: vk::SharingMode, families: &[u32]) -> (vk::SharingMode, Vec<u32>) {
    if mode != vk::SharingMode::CONCURRENT {
        return (mode, Vec::new());
    }
    let real: BTreeSet<u32> = families.iter().map(|&family| known.real_family(family)).collect();
    match real.len() {
        0 | 1 => (vk::SharingMode::EXCLUSIVE, Vec::new()),
        _ => (mode, real.into_iter().collect()),
    }
}

unsafe extern "system" fn create_buffer(
    device: vk::Device,
    info: *const vk::BufferCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    buffer: *mut vk::Buffer,
) -> vk::Result {
    // SAFETY: the device and the structure are valid; but for the families, all is handed on as it came.
    unsafe {
        let known = of(device);
        let info = *info;
        let families = slice(info.p_queue_family_indices, info.queue_family_index_count);
        let (mode, families) = sharing(&known, info.sharing_mode, families);
        let info = info.sharing_mode(mode).queue_family_indices(&families);
        let result = (known.ash.fp_v1_0().create_buffer)(device, &info, allocator, buffer);
        let external = chain::find(info.p_next, vk::StructureType::EXTERNAL_MEMORY_BUFFER_CREATE_INFO)
            .map(|found| (*found.cast::<vk::ExternalMemoryBufferCreateInfo<'_>>()).handle_types);
        if result == vk::Result::SUCCESS {
            known.note_external(external, (*buffer).as_raw());
        }
        result
    }
}

unsafe extern "system" fn destroy_buffer(
    device: vk::Device,
    buffer: vk::Buffer,
    allocator: *const vk::AllocationCallbacks<'_>,
) {
    // SAFETY: the device is valid; handed on as it came.
    unsafe {
        let known = of(device);
        known.external().remove(&buffer.as_raw());
        (known.ash.fp_v1_0().destroy_buffer)(device, buffer, allocator);
    }
}

unsafe extern "system" fn create_image(
    device: vk::Device,
    info: *const vk::ImageCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    image: *mut vk::Image,
) -> vk::Result {
    // SAFETY: the device and the structure are valid; but for the families, all is handed on as it came.
    unsafe {
        let known = of(device);
        let info = *info;
        let families = slice(info.p_queue_family_indices, info.queue_family_index_count);
        let (mode, families) = sharing(&known, info.sharing_mode, families);
        let info = info.sharing_mode(mode).queue_family_indices(&families);
        let result = (known.ash.fp_v1_0().create_image)(device, &info, allocator, image);
        let external = chain::find(info.p_next, vk::StructureType::EXTERNAL_MEMORY_IMAGE_CREATE_INFO)
            .map(|found| (*found.cast::<vk::ExternalMemoryImageCreateInfo<'_>>()).handle_types);
        if result == vk::Result::SUCCESS {
            known.note_external(external, (*image).as_raw());
        }
        result
    }
}

unsafe extern "system" fn destroy_image(
    device: vk::Device,
    image: vk::Image,
    allocator: *const vk::AllocationCallbacks<'_>,
) {
    // SAFETY: the device is valid; handed on as it came.
    unsafe {
        let known = of(device);
        known.external().remove(&image.as_raw());
        (known.ash.fp_v1_0().destroy_image)(device, image, allocator);
    }
}

/// Says that memory must be dedicated, where somebody asked.
///
/// # Safety
/// The structure and its chain are valid.
unsafe fn demand(needs: *mut vk::MemoryRequirements2<'_>) {
    // SAFETY: as the caller vouches; the structure that is found has the type that it says.
    unsafe {
        if let Some(found) = chain::find((*needs).p_next, vk::StructureType::MEMORY_DEDICATED_REQUIREMENTS) {
            let found = found.cast::<vk::MemoryDedicatedRequirements<'_>>();
            (*found).requires_dedicated_allocation = vk::TRUE;
            (*found).prefers_dedicated_allocation = vk::TRUE;
        }
    }
}

unsafe extern "system" fn buffer_needs(
    device: vk::Device,
    asked: *const vk::BufferMemoryRequirementsInfo2<'_>,
    needs: *mut vk::MemoryRequirements2<'_>,
) {
    // SAFETY: the device and the structures are valid; handed on as they came.
    unsafe {
        let known = of(device);
        (known.ash.fp_v1_1().get_buffer_memory_requirements2)(device, asked, needs);
        if known.is_dedicated((*asked).buffer.as_raw()) {
            demand(needs);
        }
    }
}

unsafe extern "system" fn image_needs(
    device: vk::Device,
    asked: *const vk::ImageMemoryRequirementsInfo2<'_>,
    needs: *mut vk::MemoryRequirements2<'_>,
) {
    // SAFETY: the device and the structures are valid; handed on as they came.
    unsafe {
        let known = of(device);
        (known.ash.fp_v1_1().get_image_memory_requirements2)(device, asked, needs);
        if known.is_dedicated((*asked).image.as_raw()) {
            demand(needs);
        }
    }
}

unsafe extern "system" fn allocate_memory(
    device: vk::Device,
    info: *const vk::MemoryAllocateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    memory: *mut vk::DeviceMemory,
) -> vk::Result {
    // SAFETY: the device and the structure are valid; handed on as they came.
    unsafe {
        let known = of(device);
        let has = |s_type| chain::find((*info).p_next, s_type).is_some();
        let is_external = has(vk::StructureType::IMPORT_MEMORY_FD_INFO_KHR)
            || has(vk::StructureType::EXPORT_MEMORY_ALLOCATE_INFO);
        let is_dedicated = has(vk::StructureType::MEMORY_DEDICATED_ALLOCATE_INFO);
        if Pretence::get().dedicated_only && is_external && !is_dedicated {
            return vk::Result::ERROR_INVALID_EXTERNAL_HANDLE;
        }
        (known.ash.fp_v1_0().allocate_memory)(device, info, allocator, memory)
    }
}
