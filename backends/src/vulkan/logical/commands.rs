//! `Commands`: one command buffer, its fence, and what it uses while it runs.
//!
//! Order of calls: [`run`](Commands::run) records, submits and waits, as often as wanted. Work that
//! misses its deadline cannot be called off: what it uses stays alive, and the next call waits for
//! it first. If it has not ended when the value is dropped, everything it uses is leaked, since
//! freeing it would let the device write into memory of somebody else.
#![expect(unsafe_code, reason = "recording and submitting commands")]

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ash::vk;

use super::device::LogicalDevice;
use crate::vulkan::failure::failure;
use crate::{Error, Kind, Result};

/// How long a drop waits for work that missed its deadline.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// Something that running commands use.
pub(crate) type Used = Arc<dyn Send + Sync>;

pub(crate) struct Commands {
    device: LogicalDevice,
    only_transfers: bool,
    pool: vk::CommandPool,
    commands: vk::CommandBuffer,
    fence: vk::Fence,
    /// Not empty exactly while a submission may be running.
    in_flight: Vec<Used>,
}

impl Commands {
    /// For the queue that the device was made with, or for its transfer queue.
    pub(crate) fn new(device: &LogicalDevice, only_transfers: bool) -> Result<Self> {
        const TRIED: &str = "prepare Vulkan commands";
        device.queue(only_transfers).check(TRIED)?;
        let failed = |result| failure(TRIED, result);
        let mut made = Self {
            device: device.clone(),
            only_transfers,
            pool: vk::CommandPool::null(),
            commands: vk::CommandBuffer::null(),
            fence: vk::Fence::null(),
            in_flight: Vec::new(),
        };
        let pool = vk::CommandPoolCreateInfo::default()
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER)
            .queue_family_index(device.queue(only_transfers).family_index);
        // SAFETY: a plain structure, and a family that the device was made with. What was made
        // before a failure is undone by dropping `made`.
        made.pool = unsafe { device.ash().create_command_pool(&pool, None) }.map_err(failed)?;
        let buffers = vk::CommandBufferAllocateInfo::default()
            .command_pool(made.pool)
            .level(vk::CommandBufferLevel::PRIMARY)
            .command_buffer_count(1);
        // SAFETY: the pool was made above and is used by this value only.
        made.commands = unsafe { device.ash().allocate_command_buffers(&buffers) }.map_err(failed)?[0];
        // SAFETY: a plain structure.
        made.fence =
            unsafe { device.ash().create_fence(&vk::FenceCreateInfo::default(), None) }.map_err(failed)?;
        Ok(made)
    }

    /// Records with `record`, submits, and waits until it is done. `used` is kept until then.
    ///
    /// `record` is called when nothing is in flight any more. It may only record, outside render
    /// passes, commands whose objects are in `used`.
    ///
    /// # Errors
    /// [`Kind::TimedOut`] at the deadline, whether before or after submission; what the driver says.
    pub(crate) fn run(
        &mut self,
        tried: &'static str,
        deadline: Instant,
        used: Vec<Used>,
        record: impl FnOnce(&ash::Device, vk::CommandBuffer),
    ) -> Result<()> {
        let failed = |result| failure(tried, result);
        self.settle(tried, deadline)?;
        let Self { device, only_transfers, commands, fence, .. } = self;
        let (ash, commands, fence) = (device.ash(), *commands, *fence);
        let begin = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: nothing is in flight (VUID-vkBeginCommandBuffer-commandBuffer-00049,
        // VUID-vkResetFences-pFences-01123), and `&mut self` excludes other threads.
        unsafe { ash.begin_command_buffer(commands, &begin) }.map_err(failed)?;
        record(ash, commands);
        // SAFETY: it is being recorded, and outside a render pass.
        unsafe { ash.end_command_buffer(commands) }.map_err(failed)?;
        // SAFETY: as above.
        unsafe { ash.reset_fences(&[fence]) }.map_err(failed)?;
        let buffers = [commands];
        device.queue(*only_transfers).submit(tried, |queue| {
            let submit = vk::SubmitInfo::default().command_buffers(&buffers);
            // SAFETY: this is called while nobody else uses the queue, which is the external synchronisation that
            // vkQueueSubmit demands; the command buffer is complete, and all that it uses is kept from here on.
            unsafe { ash.queue_submit(queue, &[submit], fence) }
        })?;
        self.in_flight = used;
        self.settle(tried, deadline)
    }

    /// Waits for what is in flight, if anything is.
    pub(crate) fn finish(&mut self, tried: &'static str, deadline: Instant) -> Result<()> {
        self.settle(tried, deadline)
    }

    /// Waits for what is in flight, and lets go of what it used.
    fn settle(&mut self, tried: &'static str, deadline: Instant) -> Result<()> {
        if self.in_flight.is_empty() {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left_ns = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
        // SAFETY: the fence was submitted, or nothing would be in flight.
        match unsafe { self.device.ash().wait_for_fences(&[self.fence], true, left_ns) } {
            Ok(()) => {
                self.in_flight.clear();
                Ok(())
            }
            Err(vk::Result::TIMEOUT) => {
                Err(Error::new(Kind::TimedOut, tried, "the device had not finished at the deadline")
                    .next("the work goes on and keeps its buffers; see dmesg for a hung GPU"))
            }
            Err(result) => {
                // A lost device runs nothing any more (specification, "Lost Device").
                if result == vk::Result::ERROR_DEVICE_LOST {
                    self.in_flight.clear();
                }
                Err(failure(tried, result))
            }
        }
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        if let Err(error) = self.settle("finish Vulkan commands", Instant::now() + LAST_WAIT)
            && !self.in_flight.is_empty()
        {
            tracing::error!(%error, "work is still running: its buffers are leaked");
            mem::forget(mem::take(&mut self.in_flight));
            mem::forget(self.device.clone());
            return;
        }
        let device = self.device.ash();
        // SAFETY: nothing is in flight, and both handles are null or were made from this device;
        // the command buffer goes with its pool.
        unsafe {
            device.destroy_fence(self.fence, None);
            device.destroy_command_pool(self.pool, None);
        }
    }
}
