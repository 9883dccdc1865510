//! `ModelGpu`: the device as its driver sees it, and the owner of its memory.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use peervram::backends::{DmaRange, DmaRanges, Engine, Exporter, Owner, Region, vfio};
use peervram::{Error, Kind, Result};
use peervram_model::registers::{
    COPY_ENGINE, DESCRIPTOR_BYTES, DRAW_ENGINE, Descriptor, IDENTITY, IDENTITY_VALUE, flags,
};

use crate::copy_engine::CopyEngine;
use crate::reached::Reached;
use crate::ring::{Ring, RingMemory};

/// The BAR with the registers.
pub const REGISTER_BAR: u32 = 0;
/// The BAR that shows VRAM.
pub const VRAM_BAR: u32 = 2;

/// Descriptors of each engine.
const ENTRIES: u32 = 64;
/// The rings lie in the last page of VRAM, which is therefore not to be lent.
const RING_BYTES: u64 = ENTRIES as u64 * DESCRIPTOR_BYTES;

/// How long an owner's hook may wait for work that is under way.
const HOOK_TIMEOUT: Duration = Duration::from_secs(10);

/// A running model GPU. Keeps its device open by the mappings that it holds; drop it before the device is
/// closed, or [retire](peervram::backends::Exporter::retire_mappings) them. After a reset of the device that no lender
/// made, [`restart`](ModelGpu::restart) it; a lender calls [`resume`](Owner::resume).
pub struct ModelGpu {
    copy: CopyEngine,
    draw: Mutex<Ring>,
    /// VRAM that may be lent, in bytes from its start.
    lendable_bytes: u64,
}

impl ModelGpu {
    /// Takes `device` over: checks that it is a model GPU, lets it do DMA, and starts its engines.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the device is another one; else what mapping its BARs says.
    pub fn new(device: &vfio::Device) -> Result<Self> {
        Self::with_memory(device, device.region(VRAM_BAR)?)
    }

    /// The same where another region shows VRAM, from its start on, as of a GPU whose memory is coherent.
    ///
    /// # Errors
    /// As [`ModelGpu::new`].
    pub fn with_memory(device: &vfio::Device, vram: &Region) -> Result<Self> {
        let registers = device.map(&DmaRanges::whole(device.region(REGISTER_BAR)?)?)?;
        let identity = registers.load_u32(IDENTITY as usize)?;
        if identity != IDENTITY_VALUE {
            let why = format!("its identity register says {identity:#x}, not {IDENTITY_VALUE:#x}");
            return Err(Error::new(Kind::Unsupported, "drive a model GPU", why).on(device.address()));
        }
        device.set_bus_master(true)?;

        let rings = DmaRange::new(vram.size_bytes - 2 * RING_BYTES, 2 * RING_BYTES);
        let view = device.map(&DmaRanges::new(vram, &[rings])?)?;
        let ring = |block: u32, index: u64| {
            let place = RingMemory {
                view: Arc::clone(&view),
                view_offset_bytes: (index * RING_BYTES) as usize,
                vram_offset_bytes: rings.offset_bytes + index * RING_BYTES,
                entries: ENTRIES,
            };
            Ring::start(device.address().to_string(), Arc::clone(&registers), block, place).map(Mutex::new)
        };
        Ok(Self {
            copy: CopyEngine::new(
                ring(COPY_ENGINE, 0)?,
                vram.index,
                Reached::new(device.address_space().cloned()),
            ),
            draw: ring(DRAW_ENGINE, 1)?,
            lendable_bytes: rings.offset_bytes,
        })
    }

    /// Starts the engines again after a reset of `device`, or after they halted, and lets it do DMA, whoever
    /// reset it and how.
    ///
    /// # Errors
    /// What the device's registers or configuration space say.
    pub fn restart(&self, device: &vfio::Device) -> Result<()> {
        device.set_bus_master(true)?;
        self.each_ring(Ring::restart)
    }

    /// How much of VRAM may be lent, from its start: the rings lie behind it.
    pub fn lendable_bytes(&self) -> u64 {
        self.lendable_bytes
    }

    /// Copies `length_bytes` from VRAM to a DMA address, and waits for it: a peer-to-peer *write* where the
    /// address is another device's memory.
    ///
    /// # Errors
    /// [`Kind::TimedOut`], or the device's own error.
    pub fn write_dma(&self, vram: u64, dma: u64, length_bytes: u64, timeout: Duration) -> Result<()> {
        self.copy(Descriptor::copy(vram, dma, length_bytes, 0).with_flags(flags::DESTINATION_DMA), timeout)
    }

    /// Copies `length_bytes` from a DMA address to VRAM, and waits for it: a peer-to-peer *read*.
    ///
    /// # Errors
    /// As [`ModelGpu::write_dma`].
    pub fn read_dma(&self, dma: u64, vram: u64, length_bytes: u64, timeout: Duration) -> Result<()> {
        self.copy(Descriptor::copy(dma, vram, length_bytes, 0).with_flags(flags::SOURCE_DMA), timeout)
    }

    /// Gives the copy engine one descriptor and waits for it. Its fence is set here.
    ///
    /// # Errors
    /// As [`ModelGpu::write_dma`].
    pub fn copy(&self, descriptor: Descriptor, timeout: Duration) -> Result<()> {
        self.copy_all(&[descriptor], timeout)
    }

    /// Gives the copy engine several descriptors, one after the other, and waits for the last.
    ///
    /// # Errors
    /// As [`ModelGpu::write_dma`].
    pub fn copy_all(&self, descriptors: &[Descriptor], timeout: Duration) -> Result<()> {
        run(self.copy.ring(), descriptors, timeout)
    }

    /// Gives the draw engine one descriptor and waits for it. As [`ModelGpu::copy`].
    ///
    /// # Errors
    /// As [`ModelGpu::write_dma`].
    pub fn draw(&self, descriptor: Descriptor, timeout: Duration) -> Result<()> {
        run(&self.draw, &[descriptor], timeout)
    }

    /// Its copy engine.
    pub(crate) fn copy_engine(&self) -> &CopyEngine {
        &self.copy
    }

    fn each_ring(&self, hook: impl Fn(&mut Ring) -> Result<()>) -> Result<()> {
        for ring in [self.copy.ring(), &self.draw] {
            hook(&mut ring.lock().unwrap_or_else(PoisonError::into_inner))?;
        }
        Ok(())
    }
}

/// Gives a ring work and waits for it.
pub(crate) fn run(ring: &Mutex<Ring>, descriptors: &[Descriptor], timeout: Duration) -> Result<()> {
    let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
    ring.submit(descriptors, timeout)?;
    ring.finish(timeout)
}

impl Owner for ModelGpu {
    fn name(&self) -> &str {
        "model GPU driver"
    }

    /// Waits for the engines' fences: after them their work is in VRAM.
    fn flush(&self, _: &DmaRanges) -> Result<()> {
        self.each_ring(|ring| ring.finish(HOOK_TIMEOUT))
    }

    /// The model caches nothing.
    fn invalidate(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    /// Lets what is under way end, then takes the rings away: no engine writes after this. Each export of the memory asks
    /// for it, and all but the first for nothing.
    fn quiesce(&self, _: &DmaRanges) -> Result<()> {
        self.each_ring(|ring| {
            if ring.is_stopped() {
                return Ok(());
            }
            ring.finish(HOOK_TIMEOUT).and_then(|()| ring.stop())
        })
    }

    /// Gives the engines empty rings again. That the device may do DMA is in its configuration space, which
    /// the kernel keeps over a reset and over sleep.
    fn resume(&self, _: &DmaRanges) -> Result<()> {
        self.each_ring(Ring::restart)
    }

    fn engine(&self) -> Option<&dyn Engine<DmaRanges>> {
        Some(&self.copy)
    }
}
