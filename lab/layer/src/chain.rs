//! Structures of the loader's interface with layers (`vk_layer.h` of Vulkan-Headers), and walks along `pNext`.
#![expect(unsafe_code, reason = "structures that others made, by pointer")]

use std::ffi::c_void;

use ash::vk;

/// `VkNegotiateLayerInterface`.
#[repr(C)]
#[derive(Debug)]
pub struct NegotiateLayerInterface {
    s_type: i32,
    next: *mut c_void,
    pub(crate) version: u32,
    pub(crate) get_instance_proc_addr: Option<vk::PFN_vkGetInstanceProcAddr>,
    pub(crate) get_device_proc_addr: Option<vk::PFN_vkGetDeviceProcAddr>,
    pub(crate) get_physical_device_proc_addr: Option<unsafe extern "system" fn()>,
}

/// `VkLayerInstanceLink`: what is below a layer.
#[repr(C)]
pub struct InstanceLink {
    next: *mut InstanceLink,
    pub get_instance_proc_addr: vk::PFN_vkGetInstanceProcAddr,
    get_physical_device_proc_addr: *const c_void,
}

/// `VkLayerDeviceLink`.
#[repr(C)]
pub struct DeviceLink {
    next: *mut DeviceLink,
    get_instance_proc_addr: vk::PFN_vkGetInstanceProcAddr,
    pub get_device_proc_addr: vk::PFN_vkGetDeviceProcAddr,
}

/// `PFN_vkSetDeviceLoaderData`: makes an object of a layer's one that the loader can call by.
pub type SetDeviceLoaderData = unsafe extern "system" fn(vk::Device, *mut c_void) -> vk::Result;

/// `VkLayerInstanceCreateInfo` and `VkLayerDeviceCreateInfo`, which differ in what `of` is.
#[repr(C)]
struct LayerCreateInfo {
    s_type: vk::StructureType,
    next: *const c_void,
    function: i32,
    of: *mut c_void,
}

/// `VK_LAYER_LINK_INFO`.
const LINK_INFO: i32 = 0;
/// `VK_LOADER_DATA_CALLBACK`.
const DATA_CALLBACK: i32 = 1;

/// What is below this layer, from the chain of a `VkInstanceCreateInfo`. The next layer finds its own there then.
///
/// # Safety
/// `chain` is the loader's.
pub unsafe fn take_instance_link<'a>(chain: *const c_void) -> Option<&'a InstanceLink> {
    // SAFETY: as the caller vouches.
    let info = unsafe { find_function(chain, vk::StructureType::LOADER_INSTANCE_CREATE_INFO, LINK_INFO) }?;
    // SAFETY: with this function it is a pointer to a link, which the loader keeps for the call.
    let link = unsafe { &*info.of.cast::<InstanceLink>() };
    info.of = link.next.cast();
    Some(link)
}

/// What is below this layer, from the chain of a `VkDeviceCreateInfo`.
///
/// # Safety
/// `chain` is the loader's.
pub unsafe fn take_device_link<'a>(chain: *const c_void) -> Option<&'a DeviceLink> {
    // SAFETY: as the caller vouches.
    let info = unsafe { find_function(chain, vk::StructureType::LOADER_DEVICE_CREATE_INFO, LINK_INFO) }?;
    // SAFETY: with this function it is a pointer to a link, which the loader keeps for the call.
    let link = unsafe { &*info.of.cast::<DeviceLink>() };
    info.of = link.next.cast();
    Some(link)
}

/// The function that makes objects of a layer's the loader's, from the chain of a `VkDeviceCreateInfo`.
///
/// # Safety
/// `chain` is the loader's.
pub unsafe fn set_loader_data(chain: *const c_void) -> Option<SetDeviceLoaderData> {
    // SAFETY: as the caller vouches.
    let info = unsafe { find_function(chain, vk::StructureType::LOADER_DEVICE_CREATE_INFO, DATA_CALLBACK) }?;
    // SAFETY: with this function it is a pointer to a function of this type, or null.
    unsafe { std::mem::transmute::<*mut c_void, Option<SetDeviceLoaderData>>(info.of) }
}

unsafe fn find_function<'a>(
    mut chain: *const c_void,
    s_type: vk::StructureType,
    function: i32,
) -> Option<&'a mut LayerCreateInfo> {
    loop {
        // SAFETY: the caller vouches for the chain.
        let found = unsafe { find(chain, s_type) }?.cast::<LayerCreateInfo>();
        // SAFETY: the structure has that type; the loader means layers to write to it, one after the other.
        let info = unsafe { &mut *found };
        if info.function == function {
            return Some(info);
        }
        chain = info.next;
    }
}

/// The first structure of that type in a chain of `pNext`.
///
/// # Safety
/// Each structure in the chain begins as every Vulkan structure does, and is valid.
pub unsafe fn find(mut chain: *const c_void, s_type: vk::StructureType) -> Option<*mut c_void> {
    while !chain.is_null() {
        // SAFETY: as the caller vouches.
        let structure = unsafe { &*chain.cast::<vk::BaseInStructure<'_>>() };
        if structure.s_type == s_type {
            return Some(chain.cast_mut());
        }
        chain = structure.p_next.cast();
    }
    None
}
