//! The device extensions that imports need, and what is lost without each.
//!
//! To ask before a `VkDevice` is made; nothing here calls Vulkan. Beside them a device of Vulkan
//! 1.1 is needed, in an instance made for 1.1 or later, and no feature.

use std::ffi::CStr;

use ash::{ext, khr};

/// What an extension is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Need {
    /// Importing dma-bufs is impossible without it.
    DmaBuf,
    /// Importing host pointers is impossible without it.
    HostPointer,
    /// Everything works without it, but something is lost.
    Optional,
}

/// A device extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extension {
    /// Its name, as `VkDeviceCreateInfo::ppEnabledExtensionNames` wants it.
    pub name: &'static CStr,
    /// What it is needed for.
    pub need: Need,
    /// What is lost without it.
    pub without: &'static str,
}

/// Every device extension that this module can use.
pub const EXTENSIONS: [Extension; 8] = [
    Extension {
        name: khr::external_memory_fd::NAME,
        need: Need::DmaBuf,
        without: "dma-bufs cannot be imported",
    },
    Extension {
        name: ext::external_memory_dma_buf::NAME,
        need: Need::DmaBuf,
        without: "dma-bufs cannot be imported",
    },
    Extension {
        name: ext::external_memory_host::NAME,
        need: Need::HostPointer,
        without: "mapped memory cannot be imported by its host pointer",
    },
    Extension {
        name: ext::queue_family_foreign::NAME,
        need: Need::Optional,
        without: "memory is handed over as if another Vulkan device had it (VK_QUEUE_FAMILY_EXTERNAL)",
    },
    Extension {
        name: ext::image_drm_format_modifier::NAME,
        need: Need::Optional,
        without: "an image has the driver's own stride (no explicit layout)",
    },
    Extension {
        name: khr::image_format_list::NAME,
        need: Need::Optional,
        without: "VK_EXT_image_drm_format_modifier cannot be enabled before Vulkan 1.2",
    },
    Extension {
        name: ext::pci_bus_info::NAME,
        need: Need::Optional,
        without: "the device cannot be found by its PCI address",
    },
    Extension {
        name: ext::physical_device_drm::NAME,
        need: Need::Optional,
        without: "the device cannot be found by its DRM node",
    },
];

/// The device extensions to enable for importing dma-bufs.
pub fn required_extensions() -> impl Iterator<Item = &'static CStr> {
    EXTENSIONS.iter().filter(|extension| extension.need == Need::DmaBuf).map(|extension| extension.name)
}

/// The device extensions to enable where the device has them.
pub fn optional_extensions() -> impl Iterator<Item = &'static Extension> {
    EXTENSIONS.iter().filter(|extension| extension.need != Need::DmaBuf)
}

/// Those of [`EXTENSIONS`] that a device with `available` does not have, with what that costs.
pub fn missing_extensions<'a>(available: impl IntoIterator<Item = &'a CStr>) -> Vec<Extension> {
    let available: Vec<_> = available.into_iter().collect();
    EXTENSIONS.into_iter().filter(|extension| !available.contains(&extension.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_any_lacks_all() {
        assert_eq!(missing_extensions([]), EXTENSIONS);
    }

    #[test]
    fn what_is_missing_says_what_that_costs() {
        // Mesa 22.3's lavapipe: host pointers, no dma-bufs.
        let missing = missing_extensions([
            c"VK_KHR_external_memory_fd",
            c"VK_EXT_external_memory_host",
            c"VK_EXT_queue_family_foreign",
            c"VK_KHR_image_format_list",
            c"VK_KHR_swapchain",
        ]);
        let names: Vec<_> = missing.iter().map(|extension| extension.name).collect();
        assert_eq!(
            names,
            [
                c"VK_EXT_external_memory_dma_buf",
                c"VK_EXT_image_drm_format_modifier",
                c"VK_EXT_pci_bus_info",
                c"VK_EXT_physical_device_drm"
            ]
        );
        assert_eq!(missing[0].without, "dma-bufs cannot be imported");
    }

    #[test]
    fn required_and_optional_are_all_of_them() {
        assert_eq!(required_extensions().count() + optional_extensions().count(), EXTENSIONS.len());
    }
}
