//! `VkResult`s in words: a [`Kind`], the name that the specification gives it, and the next step.

use ash::vk;

use crate::{Error, Kind};

/// The error of a call that answered `result`, which is none of the successes.
pub(crate) fn failure(tried: &'static str, result: vk::Result) -> Error {
    let name = format!("VK_{result:?}");
    let (kind, meaning, next) = match result {
        vk::Result::ERROR_INVALID_EXTERNAL_HANDLE => (
            Kind::ImporterCannot,
            "the driver cannot map this memory",
            Some("see dmesg; a driver that is a CPU may still take a host pointer"),
        ),
        vk::Result::ERROR_OUT_OF_DEVICE_MEMORY => (Kind::Vulkan, "no device memory is left", None),
        vk::Result::ERROR_OUT_OF_HOST_MEMORY => (Kind::Vulkan, "no host memory is left", None),
        vk::Result::ERROR_DEVICE_LOST => {
            (Kind::Vulkan, "the device was lost", Some("see dmesg, then make a new VkDevice"))
        }
        vk::Result::ERROR_INCOMPATIBLE_DRIVER => {
            (Kind::VulkanMissing, "no Vulkan driver is installed", Some(INSTALL_A_DRIVER))
        }
        vk::Result::ERROR_EXTENSION_NOT_PRESENT => (Kind::VulkanMissing, "an extension is not there", None),
        vk::Result::TIMEOUT => (Kind::TimedOut, "the deadline passed", None),
        _ => (Kind::Vulkan, "the driver refused", None),
    };
    let error = Error::new(kind, tried, format!("{meaning} ({name})"));
    match next {
        Some(next) => error.next(next),
        None => error,
    }
}

/// The next step where there is no driver.
pub(crate) const INSTALL_A_DRIVER: &str =
    "install a driver: mesa-vulkan-drivers on Debian, Ubuntu and Fedora has one for every CPU, too";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_named_as_in_the_specification() {
        let error = failure("import a dma-buf", vk::Result::ERROR_INVALID_EXTERNAL_HANDLE);
        assert_eq!(error.kind(), Kind::ImporterCannot);
        assert!(error.why().contains("VK_ERROR_INVALID_EXTERNAL_HANDLE"), "{error}");
        let error = failure("submit", vk::Result::ERROR_UNKNOWN);
        assert_eq!((error.kind(), error.why()), (Kind::Vulkan, "the driver refused (VK_ERROR_UNKNOWN)"));
    }
}
