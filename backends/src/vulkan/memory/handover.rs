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

use ash::vk;

use super::resource::{Origin, Resource};

/// What the device does with a buffer or an image: pipeline stages, and kinds of access.
#[derive(Clone, Copy)]
pub(crate) struct Use {
    pub(crate) stage: vk::PipelineStageFlags,
    pub(crate) access: vk::AccessFlags,
}

impl Use {
    /// Of `VkPipelineStageFlags` and `VkAccessFlags`, as an application gives them.
    pub(crate) fn from_raw(stage: u32, access: u32) -> Self {
        Self { stage: vk::PipelineStageFlags::from_raw(stage), access: vk::AccessFlags::from_raw(access) }
    }

    pub(crate) const SHADER: Self = Self {
        stage: vk::PipelineStageFlags::COMPUTE_SHADER,
        access: vk::AccessFlags::from_raw(
            vk::AccessFlags::SHADER_READ.as_raw() | vk::AccessFlags::SHADER_WRITE.as_raw(),
        ),
    };
    pub(crate) const COPY: Self = Self {
        stage: vk::PipelineStageFlags::TRANSFER,
        access: vk::AccessFlags::from_raw(
            vk::AccessFlags::TRANSFER_READ.as_raw() | vk::AccessFlags::TRANSFER_WRITE.as_raw(),
        ),
    };
}

/// Records the hand-over to the device, into `layout`.
///
/// # Safety
/// As [`Device::record_acquire_image`](crate::vulkan::Device::record_acquire_image).
pub(crate) unsafe fn acquire_image(
    commands: vk::CommandBuffer,
    image: &Resource<vk::Image>,
    layout: vk::ImageLayout,
    next: Use,
) {
    let device = image.device();
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
/// As [`Device::record_acquire_image`](crate::vulkan::Device::record_acquire_image).
pub(crate) unsafe fn release_image(
    commands: vk::CommandBuffer,
    image: &Resource<vk::Image>,
    layout: vk::ImageLayout,
    last: Use,
) {
    let device = image.device();
    let barrier = whole_image(image)
        .src_queue_family_index(device.queue(false).family_index)
        .dst_queue_family_index(device.outside_family_index())
        .old_layout(layout)
        .new_layout(vk::ImageLayout::GENERAL)
        .src_access_mask(last.access);
    let is_mapped = matches!(image.origin(), Origin::HostPointer(_));
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
fn whole_image(image: &Resource<vk::Image>) -> vk::ImageMemoryBarrier<'static> {
    let all = vk::ImageSubresourceRange::default()
        .aspect_mask(vk::ImageAspectFlags::COLOR)
        .level_count(1)
        .layer_count(1);
    vk::ImageMemoryBarrier::default().image(image.handle()).subresource_range(all)
}

/// Records the hand-over to the device.
///
/// # Safety
/// As [`Device::record_acquire`](crate::vulkan::Device::record_acquire).
pub(crate) unsafe fn acquire(commands: vk::CommandBuffer, buffer: &Resource<vk::Buffer>, next: Use) {
    let barrier = whole(buffer).dst_access_mask(next.access);
    let (before, barrier) = match families(buffer) {
        // The access mask of the releasing side is not ours to give.
        Some((outside, ours)) => (
            vk::PipelineStageFlags::TOP_OF_PIPE,
            barrier.src_queue_family_index(outside).dst_queue_family_index(ours),
        ),
        None => (vk::PipelineStageFlags::HOST, barrier.src_access_mask(vk::AccessFlags::HOST_WRITE)),
    };
    // SAFETY: the caller vouches for `commands`, and that the buffer lives long enough.
    unsafe { record(commands, buffer, before, next.stage, barrier) };
}

/// Records the hand-over to the outside.
///
/// # Safety
/// As [`Device::record_acquire`](crate::vulkan::Device::record_acquire).
pub(crate) unsafe fn release(commands: vk::CommandBuffer, buffer: &Resource<vk::Buffer>, last: Use) {
    let barrier = whole(buffer).src_access_mask(last.access);
    let (after, barrier) = match families(buffer) {
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
    unsafe { record(commands, buffer, last.stage, after, barrier) };
}

/// Records that what was written is there for the CPU when the commands have completed, and that it may write then.
///
/// # Safety
/// `commands` is being recorded, by nobody else, and outside a render pass.
pub(crate) unsafe fn show_host(ash: &ash::Device, commands: vk::CommandBuffer, last: Use) {
    let barrier = [vk::MemoryBarrier::default()
        .src_access_mask(last.access)
        .dst_access_mask(vk::AccessFlags::HOST_READ | vk::AccessFlags::HOST_WRITE)];
    let (after, none) = (vk::PipelineStageFlags::HOST, vk::DependencyFlags::empty());
    // SAFETY: the caller vouches for `commands`.
    unsafe { ash.cmd_pipeline_barrier(commands, last.stage, after, none, &barrier, &[], &[]) };
}

/// A barrier on all of the buffer that transfers nothing yet.
fn whole(buffer: &Resource<vk::Buffer>) -> vk::BufferMemoryBarrier<'static> {
    vk::BufferMemoryBarrier::default()
        .buffer(buffer.handle())
        .size(vk::WHOLE_SIZE)
        .src_queue_family_index(vk::QUEUE_FAMILY_IGNORED)
        .dst_queue_family_index(vk::QUEUE_FAMILY_IGNORED)
}

/// The outside's family and ours, where ownership moves between them. A buffer that families of ours share is handed to
/// none of them by name (VUID-VkBufferMemoryBarrier-None-09049, -09050 and -09051).
fn families(buffer: &Resource<vk::Buffer>) -> Option<(u32, u32)> {
    let device = buffer.device();
    match buffer.origin() {
        Origin::DmaBuf => Some((device.outside_family_index(), device.inside_family_index())),
        Origin::SameDriver => Some((vk::QUEUE_FAMILY_EXTERNAL, device.inside_family_index())),
        Origin::HostPointer(_) | Origin::Own => None,
    }
}

unsafe fn record(
    commands: vk::CommandBuffer,
    buffer: &Resource<vk::Buffer>,
    before: vk::PipelineStageFlags,
    after: vk::PipelineStageFlags,
    barrier: vk::BufferMemoryBarrier<'_>,
) {
    let none = vk::DependencyFlags::empty();
    // SAFETY: the caller vouches for `commands`, and that the buffer lives long enough.
    unsafe {
        buffer.device().ash().cmd_pipeline_barrier(commands, before, after, none, &[], &[barrier], &[]);
    }
}
