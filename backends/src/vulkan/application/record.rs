//! [`Device::record_acquire`] and its kind: the barriers around an application's own work.
#![expect(unsafe_code, reason = "recording into a command buffer")]

use ash::vk::{self, Handle};

use crate::vulkan::buffers::buffer::Buffer;
use crate::vulkan::device::Device;
use crate::vulkan::images::image::Image;
use crate::vulkan::memory::handover::{Use, acquire, acquire_image, release, release_image};

impl Device {
    /// Records the hand-over of `buffer` to this device, before commands of `stage`
    /// (`VkPipelineStageFlags`) that make `access` (`VkAccessFlags`) to it.
    ///
    /// # Safety
    /// `command_buffer` is a `VkCommandBuffer` of this device, of a pool of the queue family that
    /// the device was made with, being recorded outside a render pass and by no other thread;
    /// `buffer` is of this device and lives until the commands have completed; `stage` and
    /// `access` go together (VUID-vkCmdPipelineBarrier-pBufferMemoryBarriers-02818, -02817).
    pub unsafe fn record_acquire(&self, command_buffer: u64, buffer: &Buffer, stage: u32, access: u32) {
        let next = Use::from_raw(stage, access);
        // SAFETY: the caller vouches for it.
        unsafe { acquire(vk::CommandBuffer::from_raw(command_buffer), &buffer.raw().resource, next) };
    }

    /// Records the hand-over of `buffer` back to the outside, after commands of `stage` that made
    /// `access` to it.
    ///
    /// # Safety
    /// As [`Device::record_acquire`].
    pub unsafe fn record_release(&self, command_buffer: u64, buffer: &Buffer, stage: u32, access: u32) {
        let last = Use::from_raw(stage, access);
        // SAFETY: the caller vouches for it.
        unsafe { release(vk::CommandBuffer::from_raw(command_buffer), &buffer.raw().resource, last) };
    }

    /// Records the hand-over of `image` to this device, and its transition from the outside's layout,
    /// `VK_IMAGE_LAYOUT_GENERAL`, to `image_layout` (`VkImageLayout`), before commands of `stage` that make
    /// `access` to it. What the outside wrote is kept.
    ///
    /// # Safety
    /// As [`Device::record_acquire`]; and `image_layout` is one that the image's usage allows
    /// (VUID-VkImageMemoryBarrier-oldLayout-01208 and those beside it).
    pub unsafe fn record_acquire_image(
        &self,
        command_buffer: u64,
        image: &Image,
        image_layout: i32,
        stage: u32,
        access: u32,
    ) {
        let next = Use::from_raw(stage, access);
        let commands = vk::CommandBuffer::from_raw(command_buffer);
        // SAFETY: the caller vouches for it.
        unsafe { acquire_image(commands, image.resource(), vk::ImageLayout::from_raw(image_layout), next) };
    }

    /// Records the hand-over of `image`, which is in `image_layout`, back to the outside and its layout, after
    /// commands of `stage` that made `access` to it.
    ///
    /// # Safety
    /// As [`Device::record_acquire_image`].
    pub unsafe fn record_release_image(
        &self,
        command_buffer: u64,
        image: &Image,
        image_layout: i32,
        stage: u32,
        access: u32,
    ) {
        let last = Use::from_raw(stage, access);
        let commands = vk::CommandBuffer::from_raw(command_buffer);
        // SAFETY: the caller vouches for it.
        unsafe { release_image(commands, image.resource(), vk::ImageLayout::from_raw(image_layout), last) };
    }
}
