//! A Vulkan layer that makes a driver seem to be another one, so that what lavapipe never asks for is asked for:
//!
//! - `transfer-queue`: a second family of queues, which only transfers, as the copy engines of many GPUs are. Its one queue is
//!   the driver's first, and like AMD's it copies images in steps of 16 pixels.
//! - `dedicated-only`: external memory by descriptor must be dedicated to the buffer or image that it is for. Memory that is
//!   not is refused.
//!
//! It is loaded by name ([`NAME`]) by way of a [`manifest`], and [`VARIABLE`] says which of the two it does, or both with a
//! comma between. The folder of the manifest comes last in `VK_LAYER_PATH`: the loader puts what it finds last nearest to the
//! driver, whatever the order in `VK_INSTANCE_LAYERS`, and Khronos' validation layers take what is shown here for the driver's
//! word only if they come before.
//!
//! What it does not do: rewrite the families in barriers, which drivers for CPUs do not read; sparse binding and presenting
//! on its queue; instances made for Vulkan 1.0. It is for tests, on such drivers.

mod chain;
mod device;
mod instance;
mod pretence;

use std::ffi::{CStr, OsString, c_char};
use std::path::Path;

use ash::vk;

use chain::NegotiateLayerInterface;

/// The layer's name.
pub const NAME: &str = "VK_LAYER_PEERVRAM_pretend";

/// Where the loader looks for layers on Debian, and then in `folder`: a `VK_LAYER_PATH`.
pub fn layer_path(folder: &Path) -> OsString {
    let mut path = OsString::from("/etc/vulkan/explicit_layer.d:/usr/local/share/vulkan/explicit_layer.d:");
    path.push("/usr/share/vulkan/explicit_layer.d:");
    path.push(folder);
    path
}

/// The environment variable that says what is pretended: `transfer-queue`, `dedicated-only`.
pub const VARIABLE: &str = "PEERVRAM_PRETEND";

/// What the loader is to read, in a file `*.json` of a folder of `VK_LAYER_PATH`: the layer lies at `library`.
pub fn manifest(library: &Path) -> String {
    let library = library.display();
    format!(
        r#"{{
    "file_format_version": "1.2.0",
    "layer": {{
        "name": "{NAME}",
        "type": "INSTANCE",
        "library_path": "{library}",
        "api_version": "1.4.0",
        "implementation_version": "1",
        "description": "a driver that seems to be another one, for peervram's tests"
    }}
}}
"#
    )
}

/// How the loader finds the layer's functions: version 2 of its interface with layers.
///
/// # Safety
/// Called by the loader, with its structure.
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "a function of the loader's interface")]
pub unsafe extern "system" fn vkNegotiateLoaderLayerInterfaceVersion(
    interface: *mut NegotiateLayerInterface,
) -> vk::Result {
    // SAFETY: the loader gives a structure that is valid for the call.
    let interface = unsafe { &mut *interface };
    if interface.version < 2 {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    }
    interface.version = 2;
    interface.get_instance_proc_addr = Some(get_instance_proc_addr);
    interface.get_device_proc_addr = Some(device::get_device_proc_addr);
    interface.get_physical_device_proc_addr = None;
    vk::Result::SUCCESS
}

/// # Safety
/// As for vkGetInstanceProcAddr.
#[expect(unsafe_code, reason = "a function of Vulkan")]
unsafe extern "system" fn get_instance_proc_addr(
    instance: vk::Instance,
    name: *const c_char,
) -> vk::PFN_vkVoidFunction {
    // SAFETY: the caller gives a name that ends with a zero.
    let word = unsafe { CStr::from_ptr(name) };
    // Made here, whether or not what is below has them.
    if let Some(function) = instance::always(word) {
        return Some(function);
    }
    if instance == vk::Instance::null() {
        return None;
    }
    // SAFETY: the instance is valid, and so was made by this layer.
    let state = unsafe { instance::of(instance) }?;
    // SAFETY: as above; the function below says whether there is one of that name.
    let below = unsafe { (state.get_proc_addr)(instance, name) }?;
    instance::ours(word).or_else(|| device::ours(word)).or(Some(below))
}
