//! Functions of instances: the queue families and what external memory needs, as they are to seem.
#![expect(unsafe_code, reason = "functions of Vulkan, called by the loader")]

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};

use ash::vk::{self, Handle};

use crate::pretence::{Pretence, transfer_family};
use crate::{chain, device, get_instance_proc_addr};

/// Handles that are pointers of this process.
pub const HOST_POINTERS: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::from_raw(
    vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT.as_raw()
        | vk::ExternalMemoryHandleTypeFlags::HOST_MAPPED_FOREIGN_MEMORY_EXT.as_raw(),
);

/// An instance, and what is below this layer.
pub struct Instance {
    pub ash: ash::Instance,
    pub get_proc_addr: vk::PFN_vkGetInstanceProcAddr,
}

/// By the pointer with which each object of an instance begins.
static INSTANCES: Mutex<BTreeMap<usize, Arc<Instance>>> = Mutex::new(BTreeMap::new());

/// The first word of a dispatchable object, which all objects of an instance, or of a device, have in common.
///
/// # Safety
/// `object` is a valid object of that kind.
pub unsafe fn key(object: impl Handle) -> usize {
    // SAFETY: such a handle is a pointer to the loader's word ("Dispatchable and non-dispatchable handles").
    unsafe { *(object.as_raw() as *const usize) }
}

/// The layer's data of the instance that `object` is, or whose physical device it is.
///
/// # Safety
/// `object` is a valid one.
pub unsafe fn of(object: impl Handle) -> Option<Arc<Instance>> {
    // SAFETY: as the caller vouches.
    let key = unsafe { key(object) };
    INSTANCES.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned()
}

macro_rules! function {
    ($name:path as $kind:ty) => {
        // SAFETY: a function by another type; whoever asked for the name calls it by its own.
        Some(unsafe { mem::transmute::<$kind, unsafe extern "system" fn()>($name as $kind) })
    };
}
pub(crate) use function;

/// The functions that exist before there is an instance, or whatever is below.
pub fn always(name: &CStr) -> vk::PFN_vkVoidFunction {
    match name.to_bytes() {
        b"vkGetInstanceProcAddr" => function!(get_instance_proc_addr as vk::PFN_vkGetInstanceProcAddr),
        b"vkGetDeviceProcAddr" => function!(device::get_device_proc_addr as vk::PFN_vkGetDeviceProcAddr),
        b"vkCreateInstance" => function!(create_instance as vk::PFN_vkCreateInstance),
        b"vkDestroyInstance" => function!(destroy_instance as vk::PFN_vkDestroyInstance),
        b"vkCreateDevice" => function!(device::create_device as vk::PFN_vkCreateDevice),
        _ => None,
    }
}

/// The functions that this layer replaces if the layer or driver below has them.
pub fn ours(name: &CStr) -> vk::PFN_vkVoidFunction {
    match name.to_bytes() {
        b"vkGetPhysicalDeviceQueueFamilyProperties" => {
            function!(queue_families as vk::PFN_vkGetPhysicalDeviceQueueFamilyProperties)
        }
        b"vkGetPhysicalDeviceQueueFamilyProperties2" | b"vkGetPhysicalDeviceQueueFamilyProperties2KHR" => {
            function!(queue_families_2 as vk::PFN_vkGetPhysicalDeviceQueueFamilyProperties2)
        }
        b"vkGetPhysicalDeviceExternalBufferProperties"
        | b"vkGetPhysicalDeviceExternalBufferPropertiesKHR" => {
            function!(external_buffers as vk::PFN_vkGetPhysicalDeviceExternalBufferProperties)
        }
        b"vkGetPhysicalDeviceImageFormatProperties2" | b"vkGetPhysicalDeviceImageFormatProperties2KHR" => {
            function!(image_formats as vk::PFN_vkGetPhysicalDeviceImageFormatProperties2)
        }
        _ => None,
    }
}

unsafe extern "system" fn create_instance(
    info: *const vk::InstanceCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    instance: *mut vk::Instance,
) -> vk::Result {
    // SAFETY: the loader gives a structure with its own in the chain.
    let Some(link) = (unsafe { chain::take_instance_link((*info).p_next) }) else {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    };
    let get_proc_addr = link.get_instance_proc_addr;
    // SAFETY: what is below makes this without an instance.
    let Some(below) = (unsafe { get_proc_addr(vk::Instance::null(), c"vkCreateInstance".as_ptr()) }) else {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    };
    // SAFETY: it was asked for by that name.
    let below = unsafe { mem::transmute::<unsafe extern "system" fn(), vk::PFN_vkCreateInstance>(below) };
    // SAFETY: handed on as it came, with the chain for what is below.
    let result = unsafe { below(info, allocator, instance) };
    if result == vk::Result::SUCCESS {
        // SAFETY: it was made just now, and its functions are looked up below this layer.
        unsafe {
            let static_fn = ash::StaticFn { get_instance_proc_addr: get_proc_addr };
            let known = Instance { ash: ash::Instance::load(&static_fn, *instance), get_proc_addr };
            let mut instances = INSTANCES.lock().unwrap_or_else(PoisonError::into_inner);
            instances.insert(key(*instance), Arc::new(known));
        }
    }
    result
}

unsafe extern "system" fn destroy_instance(
    instance: vk::Instance,
    allocator: *const vk::AllocationCallbacks<'_>,
) {
    if instance == vk::Instance::null() {
        return;
    }
    // SAFETY: the instance is valid until it is destroyed below.
    let key = unsafe { key(instance) };
    let known = INSTANCES.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    if let Some(known) = known {
        // SAFETY: handed on as it came.
        unsafe { (known.ash.fp_v1_0().destroy_instance)(instance, allocator) };
    }
}

unsafe extern "system" fn queue_families(
    physical: vk::PhysicalDevice,
    count: *mut u32,
    into: *mut vk::QueueFamilyProperties,
) {
    // SAFETY: the physical device is valid, and so of an instance that is known.
    let Some(known) = (unsafe { of(physical) }) else { return };
    // SAFETY: as above.
    let mut families = unsafe { known.ash.get_physical_device_queue_family_properties(physical) };
    if Pretence::get().transfer_queue {
        families.extend(families.first().map(transfer_family));
    }
    // SAFETY: the caller gives a count, and room for as many where it gives any.
    unsafe {
        if into.is_null() {
            *count = families.len() as u32;
        } else {
            *count = (*count).min(families.len() as u32);
            into.copy_from_nonoverlapping(families.as_ptr(), *count as usize);
        }
    }
}

unsafe extern "system" fn queue_families_2(
    physical: vk::PhysicalDevice,
    count: *mut u32,
    into: *mut vk::QueueFamilyProperties2<'_>,
) {
    // SAFETY: the physical device is valid, and so of an instance that is known.
    let Some(known) = (unsafe { of(physical) }) else { return };
    let below = known.ash.fp_v1_1().get_physical_device_queue_family_properties2;
    // SAFETY: as above; without room it says how many there are.
    let real = unsafe { known.ash.get_physical_device_queue_family_properties(physical) };
    let shown = real.len() as u32 + u32::from(Pretence::get().transfer_queue && !real.is_empty());
    // SAFETY: the caller gives a count, and as many structures where it gives any; the driver fills those of its own.
    unsafe {
        if into.is_null() {
            *count = shown;
            return;
        }
        let room = (*count).min(shown);
        *count = room.min(real.len() as u32);
        below(physical, count, into);
        if room > *count {
            (*into.add(*count as usize)).queue_family_properties = transfer_family(&real[0]);
            *count = room;
        }
    }
}

/// What a driver says of external memory, as one that wants it dedicated. Never of memory by host pointer, which must not
/// be (VUID-VkMemoryAllocateInfo-pNext-02806).
fn dedicated(of: &mut vk::ExternalMemoryProperties) {
    let is_mapped = of.compatible_handle_types.intersects(HOST_POINTERS);
    if Pretence::get().dedicated_only && !of.external_memory_features.is_empty() && !is_mapped {
        of.external_memory_features |= vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY;
    }
}

unsafe extern "system" fn external_buffers(
    physical: vk::PhysicalDevice,
    asked: *const vk::PhysicalDeviceExternalBufferInfo<'_>,
    answer: *mut vk::ExternalBufferProperties<'_>,
) {
    // SAFETY: the physical device is valid, and so of an instance that is known; the rest is handed on as it came.
    unsafe {
        let Some(known) = of(physical) else { return };
        (known.ash.fp_v1_1().get_physical_device_external_buffer_properties)(physical, asked, answer);
        dedicated(&mut (*answer).external_memory_properties);
    }
}

unsafe extern "system" fn image_formats(
    physical: vk::PhysicalDevice,
    asked: *const vk::PhysicalDeviceImageFormatInfo2<'_>,
    answer: *mut vk::ImageFormatProperties2<'_>,
) -> vk::Result {
    // SAFETY: the physical device is valid, and so of an instance that is known; the rest is handed on as it came, and the
    // structure that is found has the type that it says.
    unsafe {
        let Some(known) = of(physical) else { return vk::Result::ERROR_INITIALIZATION_FAILED };
        let below = known.ash.fp_v1_1().get_physical_device_image_format_properties2;
        let result = below(physical, asked, answer);
        let external = vk::StructureType::EXTERNAL_IMAGE_FORMAT_PROPERTIES;
        if let Some(found) = chain::find((*answer).p_next, external) {
            dedicated(
                &mut (*found.cast::<vk::ExternalImageFormatProperties<'_>>()).external_memory_properties,
            );
        }
        result
    }
}
