//! `Instance`: a Vulkan instance of our own, for programs that have none.
//!
//! Order of calls: [`Instance::open`], [`physical_devices`](Instance::physical_devices),
//! [`open_device`](Instance::open_device). An application with an instance of its own needs none of
//! this: see [`Device::from_raw`](crate::vulkan::Device::from_raw).
#![expect(unsafe_code, reason = "loading libvulkan and calling it")]

use std::error::Error as _;
use std::fmt;
use std::sync::{Arc, OnceLock};

use ash::vk;
use libloading::Library;

use super::physical_device::PhysicalDevice;
use crate::vulkan::failure::{INSTALL_A_DRIVER, failure};
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

    pub(crate) fn ash(&self) -> &ash::Instance {
        &self.0.0
    }

    /// The devices as Vulkan has them, in the order of [`Instance::physical_devices`].
    pub(crate) fn handles(&self) -> Result<Vec<vk::PhysicalDevice>> {
        // SAFETY: the instance lives as long as `self`.
        let handles = unsafe { self.ash().enumerate_physical_devices() };
        handles.map_err(|result| failure("list Vulkan devices", result).next(INSTALL_A_DRIVER))
    }
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
