//! `CopyEngine`: a Vulkan device's engines as verification and staged copies use them.
//!
//! There are two on the one queue, since a device may reach memory by the one and not by the other: copy
//! commands (`vkCmdCopyBuffer`), and a compute shader that copies words. A device of our own that has a family of queues
//! that only transfer has a third, and first: copy commands on one of those. Host memory is imported by host pointer where
//! the device can and stays so for as long as anybody else has it; else bytes go over staging memory of the
//! device's own. Between two buffers of the device nothing is staged, and the device's own clock says how long
//! that took, where it has one.
//!
//! Absent: an engine of an application's queue without its lock. [`Device::with_queue_lock`] takes that.
#![expect(unsafe_code, reason = "recording copies")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use ash::vk;
use parking_lot::Mutex;

use super::buffer::Allocation;
use super::engine::{Engine as Work, made};
use super::ownership::{self, Use};
use super::pipeline::{Bound, Pipeline};
use super::staging::Staging;
use super::stopwatch::Stopwatch;
use super::{Buffer, BufferUsage, Device};
use crate::{Engine, Error, HostSlice, Kind, Mapping, Result};

const TRIED: &str = "copy by a Vulkan device";
const SPIRV: &[u8] = include_bytes!("shaders/copy.spv");

/// Also in `shaders/copy.comp`.
const BYTES_PER_GROUP: u64 = 256 * 64 * 4;
/// What one dispatch copies at most: every device binds more (maxStorageBufferRange) and has more groups.
const DISPATCH_BYTES: u64 = 64 << 20;
/// The staging memory, where host memory cannot be imported.
const STAGING_BYTES: u64 = 4 << 20;

/// What does the copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// Copy commands on the queue that only transfers.
    TransferQueue,
    /// Copy commands on the queue that the device was made with.
    Commands,
    Shader,
}

/// One of a device's engines. Its objects are made at first use.
pub(super) struct CopyEngine {
    /// Without engines, or it would hold itself.
    device: Device,
    means: Means,
    at_work: Mutex<Option<AtWork>>,
}

struct AtWork {
    work: Work,
    pipeline: Option<Arc<Pipeline>>,
    staging: Option<Arc<Staging>>,
    /// None where the queue has no clock.
    stopwatch: Option<Arc<Stopwatch>>,
    /// Host memory that was imported.
    reached: Vec<Buffer>,
}

/// Bytes of a buffer from an offset on.
type Side<'a> = (&'a Arc<Allocation>, u64);

impl CopyEngine {
    /// Of `device`, which must have no engines itself.
    pub(super) fn new(device: Device, means: Means) -> Self {
        Self { device, means, at_work: Mutex::default() }
    }

    fn carry(
        &self,
        buffer: &Buffer,
        offset_bytes: u64,
        host: &HostSlice,
        way: Way,
        deadline: Instant,
    ) -> Result<()> {
        let length_bytes = host.length_bytes() as u64;
        check_inside(buffer, offset_bytes, length_bytes)?;
        self.check_words(offset_bytes | length_bytes | host.offset_bytes() as u64)?;
        let mut at_work = self.at_work.lock();
        let at_work = self.at_work(&mut at_work)?;
        at_work.work.check(TRIED, buffer, BufferUsage::default())?;
        match at_work.reach(&self.device, host.mapping())? {
            Some(memory) => {
                let side = (&memory, host.offset_bytes() as u64);
                at_work.between(self.means, way, (&buffer.0, offset_bytes), side, length_bytes, deadline)?;
                Ok(())
            }
            None => {
                at_work.by_staging(&self.device, self.means, way, (&buffer.0, offset_bytes), host, deadline)
            }
        }
    }

    fn copy_within(
        &self,
        (from, from_bytes): (&Buffer, u64),
        (to, to_bytes): (&Buffer, u64),
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        for (buffer, start) in [(from, from_bytes), (to, to_bytes)] {
            check_inside(buffer, start, length_bytes)?;
        }
        // VUID-vkCmdCopyBuffer-size-01988: a copy within one buffer must not overlap itself.
        if Arc::ptr_eq(&from.0, &to.0) && from_bytes.abs_diff(to_bytes) < length_bytes {
            let why = "the two pieces overlap in one buffer";
            return Err(Error::new(Kind::InvalidInput, TRIED, why));
        }
        self.check_words(from_bytes | to_bytes | length_bytes)?;
        let mut at_work = self.at_work.lock();
        let at_work = self.at_work(&mut at_work)?;
        for buffer in [from, to] {
            at_work.work.check(TRIED, buffer, BufferUsage::default())?;
        }
        let sides = ((&from.0, from_bytes), (&to.0, to_bytes));
        at_work.between(self.means, Way::ToHost, sides.0, sides.1, length_bytes, deadline)
    }

    /// What the engine works with, made at its first use.
    fn at_work<'a>(&self, at_work: &'a mut Option<AtWork>) -> Result<&'a mut AtWork> {
        match at_work {
            Some(at_work) => Ok(at_work),
            None => Ok(at_work.insert(AtWork {
                work: Work::on_queue(&self.device, self.only_transfers())?,
                pipeline: None,
                staging: None,
                stopwatch: Stopwatch::new(&self.device, self.only_transfers())?.map(Arc::new),
                reached: Vec::new(),
            })),
        }
    }

    fn only_transfers(&self) -> bool {
        self.means == Means::TransferQueue
    }

    fn check_words(&self, all_bytes: u64) -> Result<()> {
        if self.means == Means::Shader && !all_bytes.is_multiple_of(4) {
            let why = "a shader copies words: offsets and length are multiples of four";
            return Err(Error::new(Kind::InvalidInput, TRIED, why));
        }
        Ok(())
    }
}

/// VUID-vkCmdCopyBuffer-size-00115 and -00116.
fn check_inside(buffer: &Buffer, start_bytes: u64, length_bytes: u64) -> Result<()> {
    if length_bytes == 0 || start_bytes.checked_add(length_bytes).is_none_or(|end| end > buffer.size_bytes())
    {
        let why =
            format!("{start_bytes:#x} + {length_bytes:#x} is beyond its {:#x} bytes", buffer.size_bytes());
        return Err(Error::new(Kind::InvalidInput, TRIED, why));
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    ToHost,
    ToDevice,
}

impl AtWork {
    /// `mapping` as a buffer; none where the device cannot import it.
    fn reach(&mut self, device: &Device, mapping: &Arc<Mapping>) -> Result<Option<Arc<Allocation>>> {
        // One owner of the memory is the import.
        self.reached.retain(|one| one.mapping().is_some_and(|mapping| Arc::strong_count(mapping) > 1));
        let is_it = |one: &&Buffer| one.mapping().is_some_and(|known| Arc::ptr_eq(known, mapping));
        if let Some(found) = self.reached.iter().find(is_it) {
            return Ok(Some(Arc::clone(&found.0)));
        }
        let Some(alignment) = device.host_pointer_alignment_bytes() else { return Ok(None) };
        let is_aligned = (mapping.as_ptr().addr() as u64 | mapping.len() as u64).is_multiple_of(alignment);
        if !is_aligned {
            return Ok(None);
        }
        let buffer = match device.import_mapping(Arc::clone(mapping), &Default::default()) {
            Ok(buffer) => buffer,
            // Some drivers take no memory with a file behind it.
            Err(error) => {
                tracing::debug!(%error, "host memory is reached by staging memory");
                return Ok(None);
            }
        };
        let memory = Arc::clone(&buffer.0);
        self.reached.push(buffer);
        Ok(Some(memory))
    }

    /// Over staging memory, part by part.
    fn by_staging(
        &mut self,
        device: &Device,
        means: Means,
        way: Way,
        (buffer, offset_bytes): Side<'_>,
        host: &HostSlice,
        deadline: Instant,
    ) -> Result<()> {
        let staging = made(&mut self.staging, || Staging::new(device, STAGING_BYTES))?;
        let mut bytes = vec![0; host.length_bytes().min(STAGING_BYTES as usize)];
        for at in (0..host.length_bytes()).step_by(bytes.len()) {
            let length = bytes.len().min(host.length_bytes() - at);
            let (part, in_host) = (&mut bytes[..length], host.offset_bytes() + at);
            if way == Way::ToDevice {
                host.mapping().read(in_host, part)?;
                // Before commands touch it, and after those of the call before have ended.
                self.work.commands.finish(TRIED, deadline)?;
                // SAFETY: a part is at most as large as the staging memory, and nothing is in flight.
                unsafe { staging.write(part) };
            }
            let (device_side, staged) = ((buffer, offset_bytes + at as u64), (staging.allocation(), 0));
            self.between(means, way, device_side, staged, length as u64, deadline)?;
            if way == Way::ToHost {
                // SAFETY: as above; the copy has ended.
                unsafe { staging.read(part) };
                host.mapping().write(in_host, part)?;
            }
        }
        Ok(())
    }

    fn between(
        &mut self,
        means: Means,
        way: Way,
        device_side: Side<'_>,
        host_side: Side<'_>,
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        let ((from, from_at), (to, to_at)) = match way {
            Way::ToHost => (device_side, host_side),
            Way::ToDevice => (host_side, device_side),
        };
        let mut used = vec![Arc::clone(from) as _, Arc::clone(to) as _];
        let stopwatch = self.stopwatch.clone();
        used.extend(stopwatch.clone().map(|stopwatch| stopwatch as _));
        if means != Means::Shader {
            self.work.commands.run(TRIED, deadline, used, |ash, commands| {
                let region = [vk::BufferCopy { src_offset: from_at, dst_offset: to_at, size: length_bytes }];
                // SAFETY: nothing is in flight when this is called, both buffers are in the list above and have
                // the usage, and the bounds were checked (VUID-vkCmdCopyBuffer-size-00115, -00116).
                unsafe {
                    for side in [from, to] {
                        ownership::acquire(commands, side, Use::COPY);
                    }
                    stopwatch.iter().for_each(|stopwatch| stopwatch.start(commands));
                    ash.cmd_copy_buffer(commands, from.buffer, to.buffer, &region);
                    stopwatch.iter().for_each(|stopwatch| stopwatch.stop(commands));
                    for side in [from, to] {
                        ownership::release(commands, side, Use::COPY);
                    }
                }
            })?;
            return stopwatch.map(|stopwatch| stopwatch.elapsed()).transpose();
        }
        let device = self.work.device().clone();
        let pipeline = made(&mut self.pipeline, || Pipeline::new(&device, SPIRV, 2, 3))?;
        used.push(Arc::clone(&pipeline) as _);
        let alignment = device.limits().min_storage_buffer_offset_alignment.max(4);
        let mut worked = stopwatch.as_ref().map(|_| Duration::ZERO);
        for at in (0..length_bytes).step_by(DISPATCH_BYTES as usize) {
            let part_bytes = DISPATCH_BYTES.min(length_bytes - at);
            let bound = |side: &Arc<Allocation>, start: u64| {
                let bound_start = start / alignment * alignment;
                let bound = Bound {
                    buffer: side.buffer,
                    offset_bytes: bound_start,
                    length_bytes: start + part_bytes - bound_start,
                };
                (bound, ((start - bound_start) / 4) as u32)
            };
            let ((from_bound, from_word), (to_bound, to_word)) =
                (bound(from, from_at + at), bound(to, to_at + at));
            let constants = [from_word, to_word, (part_bytes / 4) as u32];
            let groups = part_bytes.div_ceil(BYTES_PER_GROUP) as u32;
            self.work.commands.run(TRIED, deadline, used.clone(), |_, commands| {
                // SAFETY: nothing is in flight when this is called, all that is recorded is in the list above, and
                // the part lies inside both buffers and the device's limits.
                unsafe {
                    for side in [from, to] {
                        ownership::acquire(commands, side, Use::SHADER);
                    }
                    stopwatch.iter().for_each(|stopwatch| stopwatch.start(commands));
                    pipeline.record(commands, &[from_bound, to_bound], &constants, [groups, 1]);
                    stopwatch.iter().for_each(|stopwatch| stopwatch.stop(commands));
                    for side in [from, to] {
                        ownership::release(commands, side, Use::SHADER);
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

impl Engine<Buffer> for CopyEngine {
    fn name(&self) -> &str {
        match self.means {
            Means::TransferQueue => "transfer queue",
            Means::Commands => "copy commands",
            Means::Shader => "compute shader",
        }
    }

    fn read(&self, memory: &Buffer, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.carry(memory, offset_bytes, host, Way::ToHost, deadline)
            .map_err(|error| error.on(crate::Importer::name(&self.device)))
    }

    fn write(&self, memory: &Buffer, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.carry(memory, offset_bytes, host, Way::ToDevice, deadline)
            .map_err(|error| error.on(crate::Importer::name(&self.device)))
    }

    fn copy(
        &self,
        from: (&Buffer, u64),
        to: (&Buffer, u64),
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        self.copy_within(from, to, length_bytes, deadline)
            .map_err(|error| error.on(crate::Importer::name(&self.device)))
    }
}
