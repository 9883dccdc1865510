//! Handing imported memory over: from the outside to our queue family before use, and back after.
//!
//! A dma-buf's memory belongs to whoever is outside of Vulkan (`VK_QUEUE_FAMILY_FOREIGN_EXT`), so
//! that a driver knows when to bring its caches in line. Without that extension it is treated as
//! another Vulkan device's (`VK_QUEUE_FAMILY_EXTERNAL`). Host memory stays ours, and needs a
//! barrier between host and device instead.
//!
//! Images belong to the outside in every case, in `VK_IMAGE_LAYOUT_GENERAL`: an image on imported memory begins in
//! no layout (VUID-VkImageCreateInfo-pNext-01443), and out of that one the contents survive only by an acquire.
//!
//! These are barriers inside a command buffer. That the other side has finished before the command
//! buffer is submitted, and does not begin before it has completed, is the caller's to see to.
#![expect(unsafe_code, reason = "recording into a command buffer")]

use ash::vk::{self, Handle};

use super::buffer::{Allocation, Origin};
use super::image::Imported;
use super::{Buffer, Device, Image};

/// What the device does with a buffer or an image: pipeline stages, and kinds of access.
#[derive(Clone, Copy)]
pub(super) struct Use {
    pub(super) stage: vk::PipelineStageFlags,
    pub(super) access: vk::AccessFlags,
}

impl Use {
    pub(super) const SHADER: Self = Self {
        stage: vk::PipelineStageFlags::COMPUTE_SHADER,
        access: vk::AccessFlags::from_raw(
            vk::AccessFlags::SHADER_READ.as_raw() | vk::AccessFlags::SHADER_WRITE.as_raw(),
        ),
    };
    pub(super) const COPY: Self = Self {
        stage: vk::PipelineStageFlags::TRANSFER,
        access: vk::AccessFlags::from_raw(
            vk::AccessFlags::TRANSFER_READ.as_raw() | vk::AccessFlags::TRANSFER_WRITE.as_raw(),
        ),
    };
}

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
        let next =
            Use { stage: vk::PipelineStageFlags::from_raw(stage), access: vk::AccessFlags::from_raw(access) };
        // SAFETY: the caller vouches for it.
        unsafe { acquire(vk::CommandBuffer::from_raw(command_buffer), &buffer.0, next) };
    }

    /// Records the hand-over of `buffer` back to the outside, after commands of `stage` that made
    /// `access` to it.
    ///
    /// # Safety
    /// As [`Device::record_acquire`].
    pub unsafe fn record_release(&self, command_buffer: u64, buffer: &Buffer, stage: u32, access: u32) {
        let last =
            Use { stage: vk::PipelineStageFlags::from_raw(stage), access: vk::AccessFlags::from_raw(access) };
        // SAFETY: the caller vouches for it.
        unsafe { release(vk::CommandBuffer::from_raw(command_buffer), &buffer.0, last) };
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
        let next =
            Use { stage: vk::PipelineStageFlags::from_raw(stage), access: vk::AccessFlags::from_raw(access) };
        let commands = vk::CommandBuffer::from_raw(command_buffer);
        // SAFETY: the caller vouches for it.
        unsafe { acquire_image(commands, &image.0, vk::ImageLayout::from_raw(image_layout), next) };
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
        let last =
            Use { stage: vk::PipelineStageFlags::from_raw(stage), access: vk::AccessFlags::from_raw(access) };
        let commands = vk::CommandBuffer::from_raw(command_buffer);
        // SAFETY: the caller vouches for it.
        unsafe { release_image(commands, &image.0, vk::ImageLayout::from_raw(image_layout), last) };
    }
}

/// Records the hand-over to the device, into `layout`.
///
/// # Safety
/// As [`Device::record_acquire_image`].
pub(super) unsafe fn acquire_image(
    commands: vk::CommandBuffer,
    image: &Imported,
    layout: vk::ImageLayout,
    next: Use,
) {
    let device = &image.device;
    let barrier = whole_image(image)
        .src_queue_family_index(device.outside_family_index())
        .dst_queue_family_index(device.queue(false).family_index)
        .old_layout(vk::ImageLayout::GENERAL)
        .new_layout(layout)
        .dst_access_mask(next.access);
    let (before, none) = (vk::PipelineStageFlags::TOP_OF_PIPE, vk::DependencyFlags::empty());
    // Writes by the host reach the device with the submission itself (vkQueueSubmit).
    // SAFETY: the caller vouches for `commands`, and that the image lives long enough.
    unsafe {
        device.ash().cmd_pipeline_barrier(commands, before, next.stage, none, &[], &[], &[barrier]);
    }
}

/// Records the hand-over to the outside, out of `layout`.
///
/// # Safety
/// As [`Device::record_acquire_image`].
pub(super) unsafe fn release_image(
    commands: vk::CommandBuffer,
    image: &Imported,
    layout: vk::ImageLayout,
    last: Use,
) {
    let device = &image.device;
    let barrier = whole_image(image)
        .src_queue_family_index(device.queue(false).family_index)
        .dst_queue_family_index(device.outside_family_index())
        .old_layout(layout)
        .new_layout(vk::ImageLayout::GENERAL)
        .src_access_mask(last.access);
    let is_mapped = matches!(image.origin, Origin::HostPointer(_));
    let (all, end) = (vk::PipelineStageFlags::ALL_COMMANDS, vk::PipelineStageFlags::BOTTOM_OF_PIPE);
    let (after, none) = (if is_mapped { all } else { end }, vk::DependencyFlags::empty());
    // SAFETY: the caller vouches for `commands`, and that the image lives long enough.
    unsafe { device.ash().cmd_pipeline_barrier(commands, last.stage, after, none, &[], &[], &[barrier]) };
    if is_mapped {
        // A release makes nothing visible, and the owner may look at the mapping by CPU. In a barrier of its own: one with
        // the host in it hands nothing over (VUID-vkCmdPipelineBarrier-srcStageMask-09633). The change of the layout
        // writes, too, and all commands are before it.
        let written = Use { stage: all, access: vk::AccessFlags::MEMORY_WRITE };
        // SAFETY: as above.
        unsafe { show_host(device.ash(), commands, written) };
    }
}

/// A barrier on all of the image that transfers nothing yet.
fn whole_image(image: &Imported) -> vk::ImageMemoryBarrier<'static> {
    let all = vk::ImageSubresourceRange::default()
        .aspect_mask(vk::ImageAspectFlags::COLOR)
        .level_count(1)
        .layer_count(1);
    vk::ImageMemoryBarrier::default().image(image.image).subresource_range(all)
}

/// Records the hand-over to the device.
///
/// # Safety
/// As [`Device::record_acquire`].
pub(super) unsafe fn acquire(commands: vk::CommandBuffer, allocation: &Allocation, next: Use) {
    let barrier = whole(allocation).dst_access_mask(next.access);
    let (before, barrier) = match families(allocation) {
        // The access mask of the releasing side is not ours to give.
        Some((outside, ours)) => (
            vk::PipelineStageFlags::TOP_OF_PIPE,
            barrier.src_queue_family_index(outside).dst_queue_family_index(ours),
        ),
        None => (vk::PipelineStageFlags::HOST, barrier.src_access_mask(vk::AccessFlags::HOST_WRITE)),
    };
    // SAFETY: the caller vouches for `commands`, and that the buffer lives long enough.
    unsafe { record(commands, allocation, before, next.stage, barrier) };
}

/// Records the hand-over to the outside.
///
/// # Safety
/// As [`Device::record_acquire`].
pub(super) unsafe fn release(commands: vk::CommandBuffer, allocation: &Allocation, last: Use) {
    let barrier = whole(allocation).src_access_mask(last.access);
    let (after, barrier) = match families(allocation) {
        Some((outside, ours)) => (
            vk::PipelineStageFlags::BOTTOM_OF_PIPE,
            barrier.src_queue_family_index(ours).dst_queue_family_index(outside),
        ),
        None => {
            let host = vk::AccessFlags::HOST_READ | vk::AccessFlags::HOST_WRITE;
            (vk::PipelineStageFlags::HOST, barrier.dst_access_mask(host))
        }
    };
    // SAFETY: the caller vouches for `commands`, and that the buffer lives long enough.
    unsafe { record(commands, allocation, last.stage, after, barrier) };
}

/// Records that what was written is there for the CPU when the commands have completed, and that it may write then.
///
/// # Safety
/// `commands` is being recorded, by nobody else, and outside a render pass.
pub(super) unsafe fn show_host(ash: &ash::Device, commands: vk::CommandBuffer, last: Use) {
    let barrier = [vk::MemoryBarrier::default()
        .src_access_mask(last.access)
        .dst_access_mask(vk::AccessFlags::HOST_READ | vk::AccessFlags::HOST_WRITE)];
    let (after, none) = (vk::PipelineStageFlags::HOST, vk::DependencyFlags::empty());
    // SAFETY: the caller vouches for `commands`.
    unsafe { ash.cmd_pipeline_barrier(commands, last.stage, after, none, &barrier, &[], &[]) };
}

/// A barrier on all of the buffer that transfers nothing yet.
fn whole(allocation: &Allocation) -> vk::BufferMemoryBarrier<'static> {
    vk::BufferMemoryBarrier::default()
        .buffer(allocation.buffer)
        .size(vk::WHOLE_SIZE)
        .src_queue_family_index(vk::QUEUE_FAMILY_IGNORED)
        .dst_queue_family_index(vk::QUEUE_FAMILY_IGNORED)
}

/// The outside's family and ours, where ownership moves between them. A buffer that families of ours share is handed to
/// none of them by name (VUID-VkBufferMemoryBarrier-None-09049, -09050 and -09051).
fn families(allocation: &Allocation) -> Option<(u32, u32)> {
    let device = &allocation.device;
    match allocation.origin {
        Origin::DmaBuf => Some((device.outside_family_index(), device.inside_family_index())),
        Origin::SameDriver => Some((vk::QUEUE_FAMILY_EXTERNAL, device.inside_family_index())),
        Origin::HostPointer(_) | Origin::Own => None,
    }
}

unsafe fn record(
    commands: vk::CommandBuffer,
    allocation: &Allocation,
    before: vk::PipelineStageFlags,
    after: vk::PipelineStageFlags,
    barrier: vk::BufferMemoryBarrier<'_>,
) {
    let none = vk::DependencyFlags::empty();
    // SAFETY: the caller vouches for `commands`, and that the buffer lives long enough.
    unsafe {
        allocation.device.ash().cmd_pipeline_barrier(commands, before, after, none, &[], &[barrier], &[]);
    }
}
