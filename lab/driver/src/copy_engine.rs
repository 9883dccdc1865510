//! `CopyEngine`: the engine that moves bytes, for whoever owns VRAM and for whoever imports.
//!
//! The other end is host memory, which it reaches by DMA: no CPU and no BAR take part.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use peervram::backends::{DmaRanges, Engine, HostSlice};
use peervram::{Error, Kind, Result};

use crate::gpu::run;
use crate::importing_gpu::GpuMemory;
use crate::reached::Reached;
use crate::ring::Ring;
use crate::span::Span;

/// The copy engine with its ring, and the host memory that it reaches.
pub(crate) struct CopyEngine {
    ring: Mutex<Ring>,
    /// The region that shows VRAM.
    vram_region: u32,
    reached: Reached,
}

impl CopyEngine {
    /// On `ring`, which is running, of a device whose VRAM that region shows.
    pub fn new(ring: Mutex<Ring>, vram_region: u32, reached: Reached) -> Self {
        Self { ring, vram_region, reached }
    }

    /// Its ring.
    pub fn ring(&self) -> &Mutex<Ring> {
        &self.ring
    }

    /// Copies from `device`, spans one after the other, to `host`, or the other way.
    fn carry(&self, device: &[Span], host: &HostSlice, way: HostCopy, deadline: Instant) -> Result<()> {
        let (mut address, _mapped) = self.reached.address_of(host)?;
        let mut descriptors = Vec::with_capacity(device.len());
        for &span in device {
            let other = Span::dma(address, span.length_bytes);
            address += span.length_bytes;
            descriptors.push(match way {
                HostCopy::ToHost => span.copied_to(other),
                HostCopy::ToDevice => other.copied_to(span),
            });
        }
        run(&self.ring, &descriptors, left_until(deadline))
    }
}

#[derive(Clone, Copy)]
enum HostCopy {
    ToHost,
    ToDevice,
}

/// The engine of an owner, working on its own memory.
impl Engine<DmaRanges> for CopyEngine {
    fn name(&self) -> &str {
        NAME
    }

    fn read(&self, ranges: &DmaRanges, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        let spans = vram_spans(self.vram_region, ranges, offset_bytes, host.length_bytes() as u64)?;
        self.carry(&spans, host, HostCopy::ToHost, deadline)
    }

    fn write(
        &self,
        ranges: &DmaRanges,
        offset_bytes: u64,
        host: &HostSlice,
        deadline: Instant,
    ) -> Result<()> {
        let spans = vram_spans(self.vram_region, ranges, offset_bytes, host.length_bytes() as u64)?;
        self.carry(&spans, host, HostCopy::ToDevice, deadline)
    }
}

/// The engine of an importer.
impl Engine<GpuMemory> for CopyEngine {
    fn name(&self) -> &str {
        NAME
    }

    fn read(&self, memory: &GpuMemory, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        let span = memory.span(offset_bytes, host.length_bytes() as u64)?;
        self.carry(&[span], host, HostCopy::ToHost, deadline)
    }

    fn write(
        &self,
        memory: &GpuMemory,
        offset_bytes: u64,
        host: &HostSlice,
        deadline: Instant,
    ) -> Result<()> {
        let span = memory.span(offset_bytes, host.length_bytes() as u64)?;
        self.carry(&[span], host, HostCopy::ToDevice, deadline)
    }

    /// The model has no clock that it shows: how long it worked is not known.
    fn copy(
        &self,
        (from, from_bytes): (&GpuMemory, u64),
        (to, to_bytes): (&GpuMemory, u64),
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        let (from, to) = (from.span(from_bytes, length_bytes)?, to.span(to_bytes, length_bytes)?);
        run(&self.ring, &[from.copied_to(to)], left_until(deadline)).map(|()| None)
    }
}

const NAME: &str = "copy engine";

fn left_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Where `length_bytes` from `offset_bytes` on lie in VRAM, in a buffer made of `ranges`.
fn vram_spans(
    vram_region: u32,
    ranges: &DmaRanges,
    offset_bytes: u64,
    length_bytes: u64,
) -> Result<Vec<Span>> {
    if ranges.region_index() != vram_region {
        let why = format!("region {} is not VRAM", ranges.region_index());
        return Err(Error::new(Kind::InvalidInput, "copy by an engine", why));
    }
    let pieces = ranges.pieces(offset_bytes, length_bytes)?;
    Ok(pieces.iter().map(|piece| Span::vram(piece.offset_bytes, piece.length_bytes)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::VRAM_BAR;
    use peervram::backends::{DmaRange, Region, RegionFlags};

    #[test]
    fn a_buffer_of_several_ranges_is_one_after_the_other() {
        let region = Region {
            index: VRAM_BAR,
            size_bytes: 1 << 20,
            file_offset_bytes: 0,
            flags: RegionFlags { read: true, write: true, mmap: true },
            capabilities: Vec::new(),
        };
        let ranges =
            DmaRanges::new(&region, &[DmaRange::new(0x8000, 0x2000), DmaRange::new(0x1000, 0x1000)]).unwrap();
        let spans = |offset, length| vram_spans(VRAM_BAR, &ranges, offset, length).unwrap();
        assert_eq!(spans(0, 0x3000), [Span::vram(0x8000, 0x2000), Span::vram(0x1000, 0x1000)]);
        assert!(vram_spans(VRAM_BAR, &ranges, 0x2000, 0x1001).is_err());
        assert!(vram_spans(VRAM_BAR, &ranges, u64::MAX, 2).is_err());
        assert!(vram_spans(4, &ranges, 0, 0x10).is_err());
    }
}
