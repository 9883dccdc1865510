//! `Stopwatch`: how long a device worked, by its own clock.
//!
//! Order of calls: [`start`](Stopwatch::start) and [`stop`](Stopwatch::stop) are recorded around the work; when
//! that is over, [`elapsed`](Stopwatch::elapsed). What submitting and waiting take is not in it.
#![expect(unsafe_code, reason = "recording and reading timestamps")]

use std::time::Duration;

use ash::vk;

use crate::Result;
use crate::vulkan::failure::failure;
use crate::vulkan::logical::device::LogicalDevice;

const TRIED: &str = "time work of a Vulkan device";

/// Two timestamps of a device.
pub(crate) struct Stopwatch {
    device: LogicalDevice,
    pool: vk::QueryPool,
    tick_ns: f64,
    /// The bits of a timestamp that mean something.
    mask: u64,
}

impl Stopwatch {
    /// Of the queue that the device was made with, or of its transfer queue; none where that has no clock.
    pub fn new(device: &LogicalDevice, only_transfers: bool) -> Result<Option<Self>> {
        let family = &device.queue(only_transfers).family;
        // Commands reset queries on queues that compute or draw only (VUID-vkCmdResetQueryPool-commandBuffer-cmdpool).
        let by_commands = family.queue_flags.intersects(vk::QueueFlags::COMPUTE | vk::QueueFlags::GRAPHICS);
        let bits = family.timestamp_valid_bits;
        if bits == 0 || !(device.resets_queries() || by_commands) {
            return Ok(None);
        }
        let info = vk::QueryPoolCreateInfo::default().query_type(vk::QueryType::TIMESTAMP).query_count(2);
        // SAFETY: a plain structure.
        let pool = unsafe { device.ash().create_query_pool(&info, None) }
            .map_err(|result| failure(TRIED, result))?;
        let tick_ns = f64::from(device.limits().timestamp_period);
        let mask = u64::MAX >> (64 - bits.min(64));
        Ok(Some(Self { device: device.clone(), pool, tick_ns, mask }))
    }

    /// Records the first look at the clock.
    ///
    /// # Safety
    /// `commands` is being recorded, outside a render pass, for the queue family that it was made for, whoever submits it
    /// keeps `self` until it is done, and nothing that uses it is in flight (VUID-vkCmdResetQueryPool-commandBuffer-recording,
    /// VUID-vkResetQueryPool-firstQuery-02741, VUID-vkCmdWriteTimestamp-timestampValidBits-00829).
    pub unsafe fn start(&self, commands: vk::CommandBuffer) {
        let ash = self.device.ash();
        // SAFETY: as the caller vouches; the pool has two queries.
        unsafe {
            if self.device.resets_queries() {
                // VUID-vkResetQueryPool-None-02665: the feature is enabled.
                ash.reset_query_pool(self.pool, 0, 2);
            } else {
                ash.cmd_reset_query_pool(commands, self.pool, 0, 2);
            }
            ash.cmd_write_timestamp(commands, vk::PipelineStageFlags::TOP_OF_PIPE, self.pool, 0);
        }
    }

    /// Records the second.
    ///
    /// # Safety
    /// As [`Stopwatch::start`], which was recorded before.
    pub unsafe fn stop(&self, commands: vk::CommandBuffer) {
        // SAFETY: as the caller vouches.
        unsafe {
            self.device.ash().cmd_write_timestamp(
                commands,
                vk::PipelineStageFlags::BOTTOM_OF_PIPE,
                self.pool,
                1,
            );
        }
    }

    /// The time between the two, when what they were recorded in is done.
    pub fn elapsed(&self) -> Result<Duration> {
        let mut ticks = [0_u64; 2];
        // SAFETY: two queries of 64 bits each fit (VUID-vkGetQueryPoolResults-flags-00815).
        unsafe {
            self.device.ash().get_query_pool_results(
                self.pool,
                0,
                &mut ticks,
                vk::QueryResultFlags::TYPE_64 | vk::QueryResultFlags::WAIT,
            )
        }
        .map_err(|result| failure(TRIED, result))?;
        let ticks = ticks[1].wrapping_sub(ticks[0]) & self.mask;
        Ok(Duration::from_nanos((ticks as f64 * self.tick_ns) as u64))
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        // SAFETY: made from this device, and commands that use it hold it while they run.
        unsafe { self.device.ash().destroy_query_pool(self.pool, None) };
    }
}
