//! `Image`: a `VkImage` bound to imported `VkDeviceMemory`, with its pixels where the lender has them.
//!
//! Made by the imports of [`ImageDevice`](super::ImageDevice). Between uses it belongs to the outside, in
//! `VK_IMAGE_LAYOUT_GENERAL`: record [`Device::record_acquire_image`] before, and
//! [`Device::record_release_image`] after the application's own work on it. It holds its device, and its mapping
//! where it was imported by host pointer; dropping it destroys the `VkImage` and frees the memory, after which
//! the application's views and descriptor sets of it are dead. The application must have finished by then; an
//! [`Engine`](super::Engine) sees to its own work.
//!
//! Absent: views and samplers, which are the application's to make.
#![expect(unsafe_code, reason = "destroying Vulkan objects")]

use std::fmt;
use std::ops::BitOr;
use std::sync::Arc;

use ash::vk::{self, Handle};

use super::Device;
use super::buffer::Origin;
use crate::{Error, ImageLayout, Kind, Mapping, Result};

/// What an image will be used for: `VkImageUsageFlags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ImageUsage(pub u32);

impl ImageUsage {
    /// The source of copies.
    pub const TRANSFER_SRC: Self = Self(vk::ImageUsageFlags::TRANSFER_SRC.as_raw());
    /// The target of copies.
    pub const TRANSFER_DST: Self = Self(vk::ImageUsageFlags::TRANSFER_DST.as_raw());
    /// Read through a sampler.
    pub const SAMPLED: Self = Self(vk::ImageUsageFlags::SAMPLED.as_raw());
    /// Read and written by shaders, pixel by pixel.
    pub const STORAGE: Self = Self(vk::ImageUsageFlags::STORAGE.as_raw());
    /// Drawn to.
    pub const COLOR_ATTACHMENT: Self = Self(vk::ImageUsageFlags::COLOR_ATTACHMENT.as_raw());

    /// Whether all of `other` is in it.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub(super) fn flags(self) -> vk::ImageUsageFlags {
        vk::ImageUsageFlags::from_raw(self.0)
    }
}

impl fmt::Display for ImageUsage {
    /// "samplers and copies from": what it is, as far as it has a name here.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::TRANSFER_SRC, "copies from"),
            (Self::TRANSFER_DST, "copies to"),
            (Self::SAMPLED, "samplers"),
            (Self::STORAGE, "storage"),
            (Self::COLOR_ATTACHMENT, "drawing"),
        ];
        let mut words: Vec<String> =
            names.iter().filter(|(one, _)| self.0 & one.0 != 0).map(|(_, name)| (*name).to_owned()).collect();
        let others = names.iter().fold(self.0, |rest, (one, _)| rest & !one.0);
        if others != 0 {
            words.push(format!("{others:#x}"));
        }
        f.write_str(&words.join(", "))
    }
}

impl Default for ImageUsage {
    /// What showing somebody else's picture takes: copies both ways, and samplers.
    fn default() -> Self {
        Self::TRANSFER_SRC | Self::TRANSFER_DST | Self::SAMPLED
    }
}

impl BitOr for ImageUsage {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

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

    pub(super) fn vk(self) -> vk::Format {
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

    pub(super) fn vk(self) -> vk::ImageTiling {
        match self {
            Self::Linear => vk::ImageTiling::LINEAR,
            Self::Explicit { .. } => vk::ImageTiling::DRM_FORMAT_MODIFIER_EXT,
        }
    }

    /// Which part of an image `vkGetImageSubresourceLayout` can be asked about
    /// (VUID-vkGetImageSubresourceLayout-tiling-09433).
    pub(super) fn aspect(self) -> vk::ImageAspectFlags {
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
pub struct Image(pub(super) Arc<Imported>);

/// The `VkImage` and its memory. Work that is in flight holds it beside its [`Image`].
pub(super) struct Imported {
    pub(super) device: Device,
    pub(super) image: vk::Image,
    pub(super) memory: vk::DeviceMemory,
    pub(super) layout: ImageLayout,
    pub(super) options: ImageOptions,
    pub(super) origin: Origin,
}

impl Drop for Imported {
    fn drop(&mut self) {
        let device = self.device.ash();
        // SAFETY: both handles are null or were made from `device`, here only; no work of ours is in flight, since
        // that would hold `self`, and the application has finished with them, as the module says
        // (VUID-vkDestroyImage-image-01000, VUID-vkFreeMemory-memory-00677). The fields that the memory rests on are
        // dropped later.
        unsafe {
            device.destroy_image(self.image, None);
            device.free_memory(self.memory, None);
        }
    }
}

impl Image {
    /// `VkImage`: of two dimensions, with one level, one layer and one sample. Valid until the image is dropped or
    /// released.
    pub fn raw_image(&self) -> u64 {
        self.0.image.as_raw()
    }

    /// `VkDeviceMemory`. Valid until the image is dropped or released.
    pub fn raw_memory(&self) -> u64 {
        self.0.memory.as_raw()
    }

    /// Where its pixels lie in the lent memory.
    pub fn layout(&self) -> ImageLayout {
        self.0.layout
    }

    /// What it was made for.
    pub fn options(&self) -> ImageOptions {
        self.0.options
    }

    /// The device that it is of.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Whether it was imported by host pointer rather than as a dma-buf.
    pub fn is_host_pointer(&self) -> bool {
        self.mapping().is_some()
    }

    /// The memory behind it, where it was imported by host pointer.
    pub(super) fn mapping(&self) -> Option<&Arc<Mapping>> {
        match &self.0.origin {
            Origin::HostPointer(mapping) => Some(mapping),
            _ => None,
        }
    }

    /// Frees it now.
    pub(super) fn release(self) -> Result<()> {
        match Arc::try_unwrap(self.0) {
            Ok(imported) => {
                drop(imported);
                Ok(())
            }
            Err(_in_flight) => {
                let why = "work that missed its deadline still runs on it";
                Err(Error::new(Kind::StillInUse, "free an imported image", why)
                    .next("it is freed when that work ends"))
            }
        }
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("image", &self.0.image)
            .field("layout", &self.0.layout)
            .field("options", &self.0.options)
            .field("device", &self.0.device)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usages_are_said_in_words() {
        assert_eq!(ImageUsage::default().to_string(), "copies from, copies to, samplers");
        assert_eq!((ImageUsage::STORAGE | ImageUsage(0x100)).to_string(), "storage, 0x100");
        assert_eq!(Tiling::EXPLICIT_LINEAR.to_string(), "modifier 0x0");
    }
}
