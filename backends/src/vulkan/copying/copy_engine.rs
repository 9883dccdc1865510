//! `CopyEngine`: a Vulkan device's engines as verification and staged copies use them.
//!
//! There are two on the one queue, since a device may reach memory by the one and not by the other: copy
//! commands (`vkCmdCopyBuffer`), and a compute shader that copies words. A device of our own that has a family of queues
//! that only transfer has a third, and first: copy commands on one of those. Host memory is imported by host pointer where
//! the device can and stays so for as long as anybody else has it; else bytes go over staging memory of the
//! device's own. Between two buffers of the device nothing is staged, and the device's own clock says how long
//! that took, where it has one.
//!
//! Absent: an engine of an application's queue without its lock. [`Device::with_queue_lock`](crate::vulkan::Device::with_queue_lock) takes that.
#![expect(unsafe_code, reason = "recording copies")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use ash::vk;
use parking_lot::Mutex;

use super::lazy::Lazy;
use super::pipeline::{Bound, Pipeline};
use super::staging::Staging;
use super::stopwatch::Stopwatch;
use crate::vulkan::logical::commands::{Commands, Used};
use crate::vulkan::logical::device::LogicalDevice;
use crate::vulkan::memory::buffer_import;
use crate::vulkan::memory::handover::{self, Use};
use crate::vulkan::memory::raw_buffer::RawBuffer;
use crate::vulkan::usage::BufferUsage;
use crate::{Error, HostSlice, Kind, Mapping, Result};

const TRIED: &str = "copy by a Vulkan device";
const SPIRV: &[u8] = include_bytes!("../shaders/copy.spv");

/// Also in `shaders/copy.comp`.
const BYTES_PER_GROUP: u64 = 256 * 64 * 4;
/// What one dispatch copies at most: every device binds more (maxStorageBufferRange) and has more groups.
const DISPATCH_BYTES: u64 = 64 << 20;
/// The staging memory, where host memory cannot be imported.
const STAGING_BYTES: u64 = 4 << 20;

/// What does the copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CopyMethod {
    /// Copy commands on the queue that only transfers.
    TransferQueue,
    /// Copy commands on the queue that the device was made with.
    Commands,
    Shader,
}

/// One of a device's engines. Its objects are made at first use.
pub(crate) struct CopyEngine {
    device: LogicalDevice,
    method: CopyMethod,
    at_work: Mutex<Option<AtWork>>,
}

struct AtWork {
    device: LogicalDevice,
    method: CopyMethod,
    commands: Commands,
    pipeline: Lazy<Pipeline>,
    staging: Lazy<Staging>,
    /// None where the queue has no clock.
    stopwatch: Option<Arc<Stopwatch>>,
    /// Host memory that was imported.
    reached: Vec<Arc<RawBuffer>>,
}

/// Bytes of a buffer from an offset on.
pub(crate) type Side<'a> = (&'a Arc<RawBuffer>, u64);

impl CopyEngine {
    pub(crate) fn new(device: LogicalDevice, method: CopyMethod) -> Self {
        Self { device, method, at_work: Mutex::default() }
    }

    /// The device that it is of.
    pub(crate) fn device(&self) -> &LogicalDevice {
        &self.device
    }

    /// What does the copying, in words.
    pub(crate) fn name(&self) -> &'static str {
        match self.method {
            CopyMethod::TransferQueue => "transfer queue",
            CopyMethod::Commands => "copy commands",
            CopyMethod::Shader => "compute shader",
        }
    }

    /// Copies between host memory and the buffer, from an offset on.
    pub(crate) fn carry(
        &self,
        side: Side<'_>,
        host: &HostSlice,
        way: HostCopy,
        deadline: Instant,
    ) -> Result<()> {
        let (buffer, offset_bytes) = side;
        let length_bytes = host.length_bytes() as u64;
        check_inside(side, length_bytes)?;
        self.check_words(offset_bytes | length_bytes | host.offset_bytes() as u64)?;
        buffer.check(TRIED, &self.device, BufferUsage::default())?;
        let mut at_work = self.at_work.lock();
        let at_work = self.at_work(&mut at_work)?;
        match at_work.reach(host.mapping())? {
            Some(memory) => {
                let (from, to) = way.order(side, (&memory, host.offset_bytes() as u64));
                at_work.between(from, to, length_bytes, deadline).map(|_| ())
            }
            None => at_work.by_staging(way, side, host, deadline),
        }
    }

    /// Copies between two buffers of the device, and says how long it worked, where it has a clock.
    pub(crate) fn copy_within(
        &self,
        from: Side<'_>,
        to: Side<'_>,
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        for side in [from, to] {
            check_inside(side, length_bytes)?;
        }
        // VUID-vkCmdCopyBuffer-size-01988: a copy within one buffer must not overlap itself.
        if Arc::ptr_eq(from.0, to.0) && from.1.abs_diff(to.1) < length_bytes {
            let why = "the two pieces overlap in one buffer";
            return Err(Error::new(Kind::InvalidInput, TRIED, why));
        }
        self.check_words(from.1 | to.1 | length_bytes)?;
        for (buffer, _) in [from, to] {
            buffer.check(TRIED, &self.device, BufferUsage::default())?;
        }
        let mut at_work = self.at_work.lock();
        let at_work = self.at_work(&mut at_work)?;
        at_work.between(from, to, length_bytes, deadline)
    }

    /// What the engine works with, made at its first use.
    fn at_work<'a>(&self, at_work: &'a mut Option<AtWork>) -> Result<&'a mut AtWork> {
        match at_work {
            Some(at_work) => Ok(at_work),
            None => Ok(at_work.insert(AtWork {
                device: self.device.clone(),
                method: self.method,
                commands: Commands::new(&self.device, self.only_transfers())?,
                pipeline: Lazy::new(),
                staging: Lazy::new(),
                stopwatch: Stopwatch::new(&self.device, self.only_transfers())?.map(Arc::new),
                reached: Vec::new(),
            })),
        }
    }

    fn only_transfers(&self) -> bool {
        self.method == CopyMethod::TransferQueue
    }

    fn check_words(&self, all_bytes: u64) -> Result<()> {
        if self.method == CopyMethod::Shader && !all_bytes.is_multiple_of(4) {
            let why = "a shader copies words: offsets and length are multiples of four";
            return Err(Error::new(Kind::InvalidInput, TRIED, why));
        }
        Ok(())
    }
}

/// VUID-vkCmdCopyBuffer-size-00115 and -00116.
fn check_inside((buffer, start_bytes): Side<'_>, length_bytes: u64) -> Result<()> {
    if length_bytes == 0 || start_bytes.checked_add(length_bytes).is_none_or(|end| end > buffer.size_bytes) {
        let why =
            format!("{start_bytes:#x} + {length_bytes:#x} is beyond its {:#x} bytes", buffer.size_bytes);
        return Err(Error::new(Kind::InvalidInput, TRIED, why));
    }
    Ok(())
}

/// Which way bytes are carried.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostCopy {
    ToHost,
    ToDevice,
}

impl HostCopy {
    /// The side that is read, and the one that is written.
    fn order<T>(self, device_side: T, host_side: T) -> (T, T) {
        match self {
            Self::ToHost => (device_side, host_side),
            Self::ToDevice => (host_side, device_side),
        }
    }
}

impl AtWork {
    /// `mapping` as a buffer; none where the device cannot import it.
    fn reach(&mut self, mapping: &Arc<Mapping>) -> Result<Option<Arc<RawBuffer>>> {
        // One owner of the memory is the import.
        self.reached
            .retain(|one| one.resource.mapping().is_some_and(|mapping| Arc::strong_count(mapping) > 1));
        let is_it =
            |one: &&Arc<RawBuffer>| one.resource.mapping().is_some_and(|known| Arc::ptr_eq(known, mapping));
        if let Some(found) = self.reached.iter().find(is_it) {
            return Ok(Some(Arc::clone(found)));
        }
        let Some(alignment) = self.device.host_pointer_alignment_bytes() else { return Ok(None) };
        let is_aligned = (mapping.as_ptr().addr() as u64 | mapping.len() as u64).is_multiple_of(alignment);
        if !is_aligned {
            return Ok(None);
        }
        let buffer = match buffer_import::host_pointer(&self.device, Arc::clone(mapping), &Default::default())
        {
            Ok(buffer) => Arc::new(buffer),
            // Some drivers take no memory with a file behind it.
            Err(error) => {
                tracing::debug!(%error, "host memory is reached by staging memory");
                return Ok(None);
            }
        };
        self.reached.push(Arc::clone(&buffer));
        Ok(Some(buffer))
    }

    /// Over staging memory, part by part.
    fn by_staging(
        &mut self,
        way: HostCopy,
        (buffer, offset_bytes): Side<'_>,
        host: &HostSlice,
        deadline: Instant,
    ) -> Result<()> {
        let staging = self.staging.get(|| Staging::new(&self.device, STAGING_BYTES))?;
        let mut bytes = vec![0; host.length_bytes().min(STAGING_BYTES as usize)];
        for at in (0..host.length_bytes()).step_by(bytes.len()) {
            let length = bytes.len().min(host.length_bytes() - at);
            let (part, in_host) = (&mut bytes[..length], host.offset_bytes() + at);
            if way == HostCopy::ToDevice {
                host.mapping().read(in_host, part)?;
                // Before commands touch it, and after those of the call before have ended.
                self.commands.finish(TRIED, deadline)?;
                // SAFETY: a part is at most as large as the staging memory, and nothing is in flight.
                unsafe { staging.write(part) };
            }
            let (from, to) = way.order((buffer, offset_bytes + at as u64), (staging.raw(), 0));
            self.between(from, to, length as u64, deadline)?;
            if way == HostCopy::ToHost {
                // SAFETY: as above; the copy has ended.
                unsafe { staging.read(part) };
                host.mapping().write(in_host, part)?;
            }
        }
        Ok(())
    }

    /// Copies between two buffers, and says how long the device worked, where it has a clock.
    fn between(
        &mut self,
        from: Side<'_>,
        to: Side<'_>,
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        match self.method {
            CopyMethod::TransferQueue | CopyMethod::Commands => {
                self.by_command(from, to, length_bytes, deadline)
            }
            CopyMethod::Shader => self.by_shader(from, to, length_bytes, deadline),
        }
    }

    /// What a copy uses while it runs.
    fn used(&self, from: &Arc<RawBuffer>, to: &Arc<RawBuffer>) -> Vec<Used> {
        let mut used: Vec<Used> = vec![Arc::clone(from) as _, Arc::clone(to) as _];
        used.extend(self.stopwatch.clone().map(|stopwatch| stopwatch as _));
        used
    }

    fn by_command(
        &mut self,
        (from, from_at): Side<'_>,
        (to, to_at): Side<'_>,
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        let (used, stopwatch) = (self.used(from, to), self.stopwatch.clone());
        self.commands.run(TRIED, deadline, used, |ash, commands| {
            let region = [vk::BufferCopy { src_offset: from_at, dst_offset: to_at, size: length_bytes }];
            // SAFETY: nothing is in flight when this is called, both buffers are in the list above and have
            // the usage, and the bounds were checked (VUID-vkCmdCopyBuffer-size-00115, -00116).
            unsafe {
                for side in [from, to] {
                    handover::acquire(commands, &side.resource, Use::COPY);
                }
                stopwatch.iter().for_each(|stopwatch| stopwatch.start(commands));
                ash.cmd_copy_buffer(commands, from.handle(), to.handle(), &region);
                stopwatch.iter().for_each(|stopwatch| stopwatch.stop(commands));
                for side in [from, to] {
                    handover::release(commands, &side.resource, Use::COPY);
                }
            }
        })?;
        stopwatch.map(|stopwatch| stopwatch.elapsed()).transpose()
    }

    /// Part by part, as large as one dispatch sees.
    fn by_shader(
        &mut self,
        (from, from_at): Side<'_>,
        (to, to_at): Side<'_>,
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        let (mut used, stopwatch) = (self.used(from, to), self.stopwatch.clone());
        let pipeline = self.pipeline.get(|| Pipeline::new(&self.device, SPIRV, 2, 3))?;
        used.push(Arc::clone(&pipeline) as _);
        let alignment = self.device.limits().min_storage_buffer_offset_alignment.max(4);
        let mut worked = stopwatch.as_ref().map(|_| Duration::ZERO);
        for at in (0..length_bytes).step_by(DISPATCH_BYTES as usize) {
            let part_bytes = DISPATCH_BYTES.min(length_bytes - at);
            let bound = |side: &Arc<RawBuffer>, start: u64| {
                let bound_start = start / alignment * alignment;
                let bound = Bound {
                    buffer: side.handle(),
                    offset_bytes: bound_start,
                    length_bytes: start + part_bytes - bound_start,
                };
                (bound, ((start - bound_start) / 4) as u32)
            };
            let ((from_bound, from_word), (to_bound, to_word)) =
                (bound(from, from_at + at), bound(to, to_at + at));
            let constants = [from_word, to_word, (part_bytes / 4) as u32];
            let groups = part_bytes.div_ceil(BYTES_PER_GROUP) as u32;
            self.commands.run(TRIED, deadline, used.clone(), |_, commands| {
                // SAFETY: nothing is in flight when this is called, all that is recorded is in the list above, and
                // the part lies inside both buffers and the device's limits.
                unsafe {
                    for side in [from, to] {
                        handover::acquire(commands, &side.resource, Use::SHADER);
                    }
                    stopwatch.iter().for_each(|stopwatch| stopwatch.start(commands));
                    pipeline.record(commands, &[from_bound, to_bound], &constants, [groups, 1]);
                    stopwatch.iter().for_each(|stopwatch| stopwatch.stop(commands));
                    for side in [from, to] {
                        handover::release(commands, &side.resource, Use::SHADER);
                    }
                }
            })?;
            if let (Some(stopwatch), Some(worked)) = (&stopwatch, &mut worked) {
                *worked += stopwatch.elapsed()?;
            }
        }
        Ok(worked)
    }
}
