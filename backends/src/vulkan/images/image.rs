//! `Image`: a `VkImage` bound to imported `VkDeviceMemory`, with its pixels where the lender has them.
//!
//! Made by the imports of [`ImageDevice`](super::image_device::ImageDevice). Between uses it belongs to the outside, in
//! `VK_IMAGE_LAYOUT_GENERAL`: record [`Device::record_acquire_image`] before, and
//! [`Device::record_release_image`] after the application's own work on it. It holds its device, and its mapping
//! where it was imported by host pointer; dropping it destroys the `VkImage` and frees the memory, after which
//! the application's views and descriptor sets of it are dead. The application must have finished by then; an
//! [`Engine`](crate::Engine) sees to its own work.
//!
//! Absent: views and samplers, which are the application's to make.

use std::fmt;
use std::sync::Arc;

use ash::vk::{self, Handle};

use crate::vulkan::device::Device;
use crate::vulkan::memory::resource::{Resource, release};
use crate::vulkan::usage::ImageUsage;
use crate::{ImageLayout, Mapping, Result};

/// How the device is to take the four bytes of a pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum PixelFormat {
    /// `VK_FORMAT_B8G8R8A8_UNORM`: colours, as a [layout](ImageLayout) has them.
    #[default]
    Bgra8Unorm,
    /// `VK_FORMAT_R32_UINT`: one word. Shaders of every device can load and store these.
    R32Uint,
}

impl PixelFormat {
    /// `VkFormat`, for views of the image.
    pub fn raw(self) -> i32 {
        self.vk().as_raw()
    }

    pub(crate) fn vk(self) -> vk::Format {
        match self {
            Self::Bgra8Unorm => vk::Format::B8G8R8A8_UNORM,
            Self::R32Uint => vk::Format::R32_UINT,
        }
    }
}

/// Who decides where the pixels of an image lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Tiling {
    /// The driver, row by row (`VK_IMAGE_TILING_LINEAR`). Where its rows are not as far apart as the lender's, the
    /// import is refused, for the bytes would be read askew.
    #[default]
    Linear,
    /// The lender: the driver is told offset and stride, and how pixels are ordered between them
    /// (`VK_EXT_image_drm_format_modifier`).
    Explicit {
        /// One of the kernel's `DRM_FORMAT_MOD_*`.
        modifier: u64,
    },
}

impl Tiling {
    /// Row by row with the lender's stride: `DRM_FORMAT_MOD_LINEAR`.
    pub const EXPLICIT_LINEAR: Self = Self::Explicit { modifier: 0 };

    pub(crate) fn vk(self) -> vk::ImageTiling {
        match self {
            Self::Linear => vk::ImageTiling::LINEAR,
            Self::Explicit { .. } => vk::ImageTiling::DRM_FORMAT_MODIFIER_EXT,
        }
    }

    /// Which part of an image `vkGetImageSubresourceLayout` can be asked about
    /// (VUID-vkGetImageSubresourceLayout-tiling-09433).
    pub(crate) fn aspect(self) -> vk::ImageAspectFlags {
        match self {
            Self::Linear => vk::ImageAspectFlags::COLOR,
            Self::Explicit { .. } => vk::ImageAspectFlags::MEMORY_PLANE_0_EXT,
        }
    }
}

impl fmt::Display for Tiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linear => f.write_str("linear"),
            Self::Explicit { modifier } => write!(f, "modifier {modifier:#x}"),
        }
    }
}

/// How to import images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ImageOptions {
    /// What they will be used for.
    pub usage: ImageUsage,
    /// How the device takes a pixel.
    pub format: PixelFormat,
    /// Who decides where the pixels lie.
    pub tiling: Tiling,
}

/// A `VkImage` on imported memory.
pub struct Image {
    device: Device,
    resource: Arc<Resource<vk::Image>>,
    layout: ImageLayout,
    options: ImageOptions,
}

impl Image {
    pub(crate) fn new(
        device: &Device,
        resource: Resource<vk::Image>,
        layout: ImageLayout,
        options: ImageOptions,
    ) -> Self {
        Self { device: device.clone(), resource: Arc::new(resource), layout, options }
    }

    /// What work in flight holds.
    pub(crate) fn resource(&self) -> &Arc<Resource<vk::Image>> {
        &self.resource
    }

    /// `VkImage`: of two dimensions, with one level, one layer and one sample. Valid until the image is dropped or
    /// released.
    pub fn raw_image(&self) -> u64 {
        self.resource.handle().as_raw()
    }

    /// `VkDeviceMemory`. Valid until the image is dropped or released.
    pub fn raw_memory(&self) -> u64 {
        self.resource.memory().as_raw()
    }

    /// Where its pixels lie in the lent memory.
    pub fn layout(&self) -> ImageLayout {
        self.layout
    }

    /// What it was made for.
    pub fn options(&self) -> ImageOptions {
        self.options
    }

    /// The device that it is of.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether it was imported by host pointer rather than as a dma-buf.
    pub fn is_host_pointer(&self) -> bool {
        self.mapping().is_some()
    }

    /// The memory behind it, where it was imported by host pointer.
    pub(crate) fn mapping(&self) -> Option<&Arc<Mapping>> {
        self.resource.mapping()
    }

    /// Frees it now.
    pub(crate) fn release(self) -> Result<()> {
        release("free an imported image", self.resource)
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("image", &self.resource.handle())
            .field("layout", &self.layout)
            .field("options", &self.options)
            .field("device", &self.device)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tilings_are_said_in_words() {
        assert_eq!(Tiling::EXPLICIT_LINEAR.to_string(), "modifier 0x0");
        assert_eq!(Tiling::Linear.to_string(), "linear");
    }
}
