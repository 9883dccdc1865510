//! `ImportingGpu`: the device as an importer, whose engine works on what it imports.
//!
//! Importing itself is its IO address space's: that puts memory of others where the device's DMA reaches it.
//! What the driver adds is an [`Engine`], so that the path can be verified and copies can be staged, and
//! memory to stage them in.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use peervram::backends::vfio::{Device, IoAddressSpace, IovaMapping};
use peervram::backends::{DmaBuf, Engine, Importer, Mapping, OnRevoke, PciAddress};
use peervram::{Error, Kind, Result};
use peervram_model::registers::{Descriptor, flags};

use crate::gpu::ModelGpu;
use crate::span::Span;
use crate::vram_room::{VramPiece, VramRoom};

/// A model GPU that imports.
pub struct ImportingGpu {
    gpu: Arc<ModelGpu>,
    space: IoAddressSpace,
    address: PciAddress,
    room: Arc<VramRoom>,
    /// Whether imports of other devices' memory are refused.
    without_peers: bool,
}

/// Memory as an [`ImportingGpu`] has it.
#[derive(Debug)]
pub enum GpuMemory {
    /// At a DMA address: memory of another device, or of the host.
    Dma(IovaMapping),
    /// A piece of its own VRAM, that lent memory is staged in.
    Vram(VramPiece),
}

impl ImportingGpu {
    /// `gpu`, which drives `device`. `stages` is the part of its VRAM, in bytes from the start, that lent
    /// memory may be copied to where the GPU cannot reach it; where that is empty, host memory takes its place.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where another process opened the device: nothing can be mapped for its DMA.
    pub fn new(device: &Device, gpu: Arc<ModelGpu>, stages: Range<u64>) -> Result<Self> {
        const TRIED: &str = "import by a model GPU";
        let Some(space) = device.address_space().cloned() else {
            let why = "another process opened it: nothing can be mapped for its DMA";
            return Err(Error::new(Kind::Unsupported, TRIED, why).on(device.address()));
        };
        if stages.end > gpu.lendable_bytes() {
            let why = format!("{:#x} is beyond the VRAM that it can spare", stages.end);
            return Err(Error::new(Kind::InvalidInput, TRIED, why).on(device.address()));
        }
        Ok(Self { gpu, space, address: device.address(), room: VramRoom::new(stages), without_peers: false })
    }

    /// From now on it is as if nothing led from other devices to it: it imports nothing, and what is lent to it
    /// is staged.
    pub fn forget_peers(&mut self) {
        self.without_peers = true;
    }

    fn check_reaches_peers(&self) -> Result<()> {
        if self.without_peers {
            let why = "it is used without peers";
            return Err(
                Error::new(Kind::RouteRefused, "import memory of another device", why).on(self.name())
            );
        }
        Ok(())
    }

    /// Its driver, for work of its own.
    pub fn gpu(&self) -> &Arc<ModelGpu> {
        &self.gpu
    }

    /// Copies `length_bytes` of `memory`, from `offset_bytes` on, to `vram`, and waits for it: what work of
    /// the GPU's own sees there.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] beyond the memory's end; else as [`ModelGpu::read_dma`].
    pub fn load(
        &self,
        memory: &GpuMemory,
        offset_bytes: u64,
        vram: u64,
        length_bytes: u64,
        timeout: Duration,
    ) -> Result<()> {
        let from = memory.span(offset_bytes, length_bytes)?;
        self.gpu.copy(from.copied_to(Span::vram(vram, length_bytes)), timeout)
    }

    /// Copies `length_bytes` from `vram` to `memory`, at `offset_bytes`, and waits for it.
    ///
    /// # Errors
    /// As [`ImportingGpu::load`].
    pub fn store(
        &self,
        vram: u64,
        memory: &GpuMemory,
        offset_bytes: u64,
        length_bytes: u64,
        timeout: Duration,
    ) -> Result<()> {
        let to = memory.span(offset_bytes, length_bytes)?;
        self.gpu.copy(Span::vram(vram, length_bytes).copied_to(to), timeout)
    }

    /// Draws `frame`, of [`Descriptor::draw`], into `memory` at `offset_bytes`, wherever it says, and waits for it.
    ///
    /// # Errors
    /// As [`ImportingGpu::load`].
    pub fn draw(
        &self,
        memory: &GpuMemory,
        offset_bytes: u64,
        frame: Descriptor,
        timeout: Duration,
    ) -> Result<()> {
        let [_, height, stride_bytes, _] = frame.parameters;
        let to = memory.span(offset_bytes, u64::from(height) * u64::from(stride_bytes))?;
        let frame = Descriptor { destination: to.start, ..frame };
        let place = if to.is_dma { flags::DESTINATION_DMA } else { 0 };
        self.gpu.draw(frame.with_flags(place), timeout)
    }
}

impl GpuMemory {
    /// Its length in bytes.
    pub fn length_bytes(&self) -> u64 {
        match self {
            Self::Dma(mapping) => mapping.len(),
            Self::Vram(piece) => piece.length_bytes(),
        }
    }

    pub(crate) fn span(&self, offset_bytes: u64, length_bytes: u64) -> Result<Span> {
        let size_bytes = self.length_bytes();
        if offset_bytes.checked_add(length_bytes).is_none_or(|end| end > size_bytes) {
            let why = format!("{length_bytes:#x} bytes from {offset_bytes:#x} on are not in {size_bytes:#x}");
            return Err(Error::new(Kind::InvalidInput, "copy by an engine", why));
        }
        Ok(match self {
            Self::Dma(mapping) => Span::dma(mapping.iova() + offset_bytes, length_bytes),
            Self::Vram(piece) => Span::vram(piece.start() + offset_bytes, length_bytes),
        })
    }
}

impl Importer for ImportingGpu {
    type Memory = GpuMemory;

    fn name(&self) -> String {
        format!("model GPU at {} by {}", self.address, self.space.interface().name())
    }

    fn pci_address(&self) -> Option<PciAddress> {
        Some(self.address)
    }

    fn on_revoke(&self) -> OnRevoke {
        self.space.on_revoke()
    }

    fn governed_by_p2pdma(&self) -> bool {
        self.space.governed_by_p2pdma()
    }

    fn import(&self, dma_buf: &DmaBuf) -> Result<GpuMemory> {
        self.check_reaches_peers()?;
        self.space.import(dma_buf).map(GpuMemory::Dma)
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<GpuMemory> {
        self.check_reaches_peers()?;
        self.space.import_host_pointer(mapping).map(GpuMemory::Dma)
    }

    fn stage(&self, size_bytes: u64) -> Result<GpuMemory> {
        if self.room.is_empty() {
            return self.space.stage(size_bytes).map(GpuMemory::Dma);
        }
        self.room.take(size_bytes).map(GpuMemory::Vram).ok_or_else(|| {
            let why = format!("the part of VRAM for it has no {size_bytes:#x} bytes left");
            Error::new(Kind::Busy, "make staging memory", why)
                .on(self.name())
                .next("give it more VRAM, or none, for host memory instead")
        })
    }

    fn host_memory(&self, memory: &GpuMemory) -> Option<Arc<Mapping>> {
        match memory {
            GpuMemory::Dma(mapping) => self.space.host_memory(mapping),
            GpuMemory::Vram(_) => None,
        }
    }

    fn engines(&self) -> Vec<&dyn Engine<GpuMemory>> {
        vec![self.gpu.copy_engine()]
    }

    fn release(&self, memory: GpuMemory) -> Result<()> {
        drop(memory);
        Ok(())
    }
}
