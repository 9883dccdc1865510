//! `BufferUsage` and `ImageUsage`: what a buffer or an image will be used for, in Vulkan's bits.

use std::fmt;
use std::ops::BitOr;

use ash::vk;

/// What a buffer will be used for: `VkBufferUsageFlags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferUsage(pub u32);

impl BufferUsage {
    /// The source of copies.
    pub const TRANSFER_SRC: Self = Self(vk::BufferUsageFlags::TRANSFER_SRC.as_raw());
    /// The target of copies.
    pub const TRANSFER_DST: Self = Self(vk::BufferUsageFlags::TRANSFER_DST.as_raw());
    /// Read and written by shaders.
    pub const STORAGE_BUFFER: Self = Self(vk::BufferUsageFlags::STORAGE_BUFFER.as_raw());
    /// Found by shaders at an address (`vkGetBufferDeviceAddress`). Only of an application's device, made with the feature
    /// `bufferDeviceAddress` (VUID-VkMemoryAllocateInfo-flags-03331): whether it has that, nobody can ask here. The
    /// next import of the memory is another buffer, at another address.
    pub const SHADER_DEVICE_ADDRESS: Self = Self(vk::BufferUsageFlags::SHADER_DEVICE_ADDRESS.as_raw());

    pub(crate) fn flags(self) -> vk::BufferUsageFlags {
        vk::BufferUsageFlags::from_raw(self.0)
    }
}

impl Default for BufferUsage {
    /// What [`Engine`](super::Engine) needs: copies both ways, and shaders.
    fn default() -> Self {
        Self::TRANSFER_SRC | Self::TRANSFER_DST | Self::STORAGE_BUFFER
    }
}

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

    pub(crate) fn flags(self) -> vk::ImageUsageFlags {
        vk::ImageUsageFlags::from_raw(self.0)
    }
}

impl Default for ImageUsage {
    /// What showing somebody else's picture takes: copies both ways, and samplers.
    fn default() -> Self {
        Self::TRANSFER_SRC | Self::TRANSFER_DST | Self::SAMPLED
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

/// Sets of bits: what is in them, and both of two.
macro_rules! set_of_bits {
    ($usage:ty) => {
        impl $usage {
            /// Whether all of `other` is in it.
            pub fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }
        }

        impl BitOr for $usage {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }
    };
}

set_of_bits!(BufferUsage);
set_of_bits!(ImageUsage);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usages_are_said_in_words() {
        assert_eq!(ImageUsage::default().to_string(), "copies from, copies to, samplers");
        assert_eq!((ImageUsage::STORAGE | ImageUsage(0x100)).to_string(), "storage, 0x100");
    }
}
