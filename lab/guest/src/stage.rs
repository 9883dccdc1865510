//! `Stage`: two model GPUs as lender and importer, for tests of copies and of trust.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use peervram::backends::vfio::{Device, Interface, IoAddressSpace};
use peervram::backends::vulkan::checksum;
use peervram::backends::{Aperture, DmaRange, DmaRanges, Importer, Mapping, Owner};
use peervram::verify::{Limits, Store};
use peervram::{AttachOptions, Attachment, Direction, Export, Kind, Lender, Trust};
use peervram_lab::machine::Iommu;
use peervram_model_driver::{GpuMemory, ImportingGpu, ModelGpu, VRAM_BAR};

use crate::blocks;
use crate::crossing::PATIENCE;
use crate::guest::Guest;
use crate::model::Model;

/// The length of a piece of lent VRAM. One piece is lent, or two with the later one first.
pub const PIECE_BYTES: u64 = 3 << 20;
/// Where the importer has room of its own.
pub const SCRATCH: u64 = 8 << 20;
/// The seed of what lies in the importer's room before something is loaded there.
const POISON: u32 = 0xEEEE;
/// The part of the importer's VRAM that is copied to.
pub const STAGES: Range<u64> = 64 << 20..96 << 20;

/// The lender with its driver, and another GPU that imports.
pub struct Stage<'guest> {
    pub lender_model: Model<'guest>,
    pub other_model: Model<'guest>,
    pub ranges: DmaRanges,
    // Fields drop in this order: exports, drivers, devices.
    pub export: Export,
    pub importer: Arc<ImportingGpu>,
    pub owner: Arc<ModelGpu>,
    _other_device: Device,
    pub lender: Lender<Device>,
}

impl<'guest> Stage<'guest> {
    /// `pieces` of VRAM lent by their driver, to an importer that copies to `stages`.
    pub fn new(guest: &'guest Guest, pieces: &[u64], stages: Range<u64>) -> Result<Self> {
        Self::owned_by(guest, pieces, stages, |driver| driver)
    }

    /// As [`Stage::new`], with somebody else who answers for the memory.
    pub fn owned_by(
        guest: &'guest Guest,
        pieces: &[u64],
        stages: Range<u64>,
        owner: impl FnOnce(Arc<dyn Owner>) -> Arc<dyn Owner>,
    ) -> Result<Self> {
        let (lender_model, other_model) = (Model::new(guest, 0)?, Model::new(guest, 1)?);
        let space = || match IoAddressSpace::new(Interface::Cdev) {
            // QEMU's virtio-iommu keeps iommufd's mappings of BARs from vfio-user devices; see `peer`.
            Ok(space) if guest.facts().iommu != Iommu::Virtio => Ok(space),
            Err(error) if error.kind() != Kind::NotFound => Err(error),
            _ => IoAddressSpace::new(Interface::Group),
        };
        let device = Device::open_into(&space()?, lender_model.address())?;
        let driver = Arc::new(ModelGpu::new(&device)?);
        let ranges: Vec<DmaRange> =
            pieces.iter().map(|piece| DmaRange::new(piece * PIECE_BYTES, PIECE_BYTES)).collect();
        let ranges = DmaRanges::new(device.region(VRAM_BAR)?, &ranges)?;
        let lender = Lender::new(device);
        let export = lender.export(Aperture::owned(ranges.clone(), owner(Arc::clone(&driver) as _)))?;
        let other_device = Device::open_into(&space()?, other_model.address())?;
        let importer = ImportingGpu::new(&other_device, Arc::new(ModelGpu::new(&other_device)?), stages)?;
        let (importer, owner) = (Arc::new(importer), driver);
        Ok(Self {
            lender_model,
            other_model,
            ranges,
            export,
            importer,
            owner,
            _other_device: other_device,
            lender,
        })
    }

    /// Attaches by tests of now, whatever was tested before.
    pub fn attach(&self, direction: Direction) -> Result<Attachment<ImportingGpu>> {
        let mut limits = Limits::default();
        // A fence that is stuck is waited for as long.
        limits.copy_timeout = Duration::from_secs(2);
        let folder = std::env::temp_dir().join(format!("certificates-{}", std::process::id()));
        std::fs::remove_dir_all(&folder).ok();
        let store = Arc::new(Store::at(&folder));
        let options = AttachOptions::new(Trust::Verified(direction)).with_limits(limits).with_store(store);
        let attachment = self.export.attach(Arc::clone(&self.importer), options);
        std::fs::remove_dir_all(&folder).ok();
        Ok(attachment?)
    }

    /// The owner's device puts the [blocks] of `seed` in the lent memory, in the order in which it is lent.
    pub fn fill(&self, seed: u32) -> Result<()> {
        let mut at = 0;
        for range in self.ranges.as_slice() {
            blocks::fill(&self.owner, seed, at, range.length_bytes, range.offset_bytes)?;
            at += range.length_bytes;
        }
        Ok(())
    }

    /// The other GPU puts the same in `memory`.
    pub fn store(&self, memory: &GpuMemory, seed: u32) -> Result<()> {
        store(&self.importer, &self.ranges, memory, seed)
    }

    /// Whether the other GPU finds them in `memory`: by its engine, and the host looks at what it got.
    pub fn finds(&self, memory: &GpuMemory, seed: u32) -> Result<()> {
        let size_bytes = self.ranges.size_bytes();
        blocks::fill(self.importer.gpu(), POISON, 0, size_bytes, SCRATCH)?;
        self.importer.load(memory, 0, SCRATCH, size_bytes, PATIENCE)?;
        are_blocks(&self.other_model, &[DmaRange::new(SCRATCH, size_bytes)], seed)
    }

    /// Whether the host finds them in the lent memory.
    pub fn is_lent(&self, seed: u32) -> Result<()> {
        are_blocks(&self.lender_model, self.ranges.as_slice(), seed)
    }

    /// Whether `memory`, which is host memory, has that pattern, as this process sees it.
    pub fn host_has(&self, memory: &GpuMemory, seed: u32) -> Result<()> {
        let mapping: Arc<Mapping> = self
            .importer
            .host_memory(memory)
            .ok_or_else(|| anyhow::anyhow!("what is staged is not in host memory"))?;
        let mut seen = vec![0; self.ranges.size_bytes() as usize];
        mapping.read(0, &mut seen)?;
        let right = blocks::bytes(seed, 0, self.ranges.size_bytes());
        let first = seen.iter().zip(&right).position(|(seen, right)| seen != right);
        ensure!(first.is_none(), "it has other bytes from {first:?} on");
        Ok(())
    }
}

/// Whether the host finds the blocks of `seed` in these places of a model's VRAM, one place after the other.
fn are_blocks(model: &Model, places: &[DmaRange], seed: u32) -> Result<()> {
    let mut at = 0;
    for place in places {
        for piece in (0..place.length_bytes).step_by(PIECE_BYTES as usize) {
            let (offset_bytes, length_bytes) =
                (place.offset_bytes + piece, PIECE_BYTES.min(place.length_bytes - piece));
            let sum = model.host_checksum(offset_bytes, length_bytes)?;
            let first = model.host_bytes(offset_bytes, 4)?;
            ensure!(
                sum == checksum(&blocks::bytes(seed, at, length_bytes)),
                "at {offset_bytes:#x} are other bytes than those of {seed:02x}; they begin with {first:02x?}"
            );
            at += length_bytes;
        }
    }
    ensure!(at > 0, "nothing was looked at");
    Ok(())
}

/// `importer` puts the blocks of `seed` in `memory`, which is of `ranges`: for threads, which a stage stays off.
pub fn store(importer: &ImportingGpu, ranges: &DmaRanges, memory: &GpuMemory, seed: u32) -> Result<()> {
    let size_bytes = ranges.size_bytes();
    blocks::fill(importer.gpu(), seed, 0, size_bytes, SCRATCH)?;
    Ok(importer.store(SCRATCH, memory, 0, size_bytes, PATIENCE)?)
}
