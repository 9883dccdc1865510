//! Memory that shows which generation it is of: its owner paints it anew whenever it was taken back.
//!
//! Whoever reads it in generation *g* must see the picture of *g*: bytes that are left over from before a
//! revoke are as wrong as any others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use peervram::backends::{Aperture, DmaRange, DmaRanges, ImageLayout, Mapping, Owner, page_size_bytes, vfio};
use peervram::{Export, Lender};
use peervram_model_driver::{ModelGpu, VRAM_BAR};
use peervram_programs::picture::Picture;

use crate::card::{CardDriver, MEMORY};
use crate::crossing::Lends;
use crate::guest::Guest;

/// What is lent: a picture of this size.
pub const LAYOUT: ImageLayout =
    ImageLayout { width: 640, height: 480, stride_bytes: 640 * 4, offset_bytes: 0 };

/// A lender, and its painted memory.
pub struct Painted<D: Lends = vfio::Device> {
    /// What is lent.
    pub export: Export,
    /// Last: the export goes before the device.
    pub lender: Lender<D>,
}

/// The owner of painted memory: another one, and the brush.
pub struct Painter {
    device: Arc<dyn Owner>,
    ranges: DmaRanges,
    view: Arc<Mapping>,
    /// How many exports there are of it: each revoke asks the owner once for each.
    exports: u64,
    taken: AtomicU64,
}

impl Painted {
    /// Lends the card's memory: QEMU can show it to its other devices, and the card has every kind of reset
    /// and sleep.
    pub fn card(guest: &Guest) -> Result<Painted> {
        let device = guest.card()?.open()?;
        let driver = Arc::new(CardDriver::start(&device)?);
        Painted::lend(device, MEMORY, driver)
    }

    /// Lends the first model GPU's memory: an engine is behind it, which rests and starts anew.
    pub fn model(guest: &Guest) -> Result<Painted> {
        let device = guest.model(0)?.open()?;
        let driver = Arc::new(ModelGpu::new(&device)?);
        Painted::lend(device, VRAM_BAR, driver)
    }
}

impl<D: Lends> Painted<D> {
    /// Lends the start of that region, for which `owner` answers.
    pub fn lend(device: D, region: u32, owner: Arc<dyn Owner>) -> Result<Self> {
        let painter = Painter::new(&device, region, owner, 1)?;
        painter.paint()?;
        let lender = Lender::new(device);
        let export = lender.export(painter.aperture())?;
        Ok(Painted { export, lender })
    }
}

impl Painter {
    /// Of the start of that region of `device`, for which `owner` answers; to be exported that often. Nothing is painted yet.
    pub fn new<D: Lends>(device: &D, region: u32, owner: Arc<dyn Owner>, exports: u64) -> Result<Arc<Self>> {
        let size_bytes = LAYOUT.end_bytes().next_multiple_of(page_size_bytes());
        let ranges = DmaRanges::new(device.memory_region(region)?, &[DmaRange::new(0, size_bytes)])?;
        let view = device.map(&ranges)?;
        Ok(Arc::new(Painter { device: owner, ranges, view, exports, taken: AtomicU64::new(0) }))
    }

    /// The memory that it answers for.
    pub fn aperture(self: &Arc<Self>) -> Aperture {
        Aperture::owned(self.ranges.clone(), Arc::clone(self) as _)
    }

    /// Paints the picture of the generation that it is in.
    pub fn paint(&self) -> peervram::Result<()> {
        self.view.write(0, &bytes_of(self.taken.load(Ordering::SeqCst) / self.exports))
    }
}

impl Owner for Painter {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn flush(&self, ranges: &DmaRanges) -> peervram::Result<()> {
        self.device.flush(ranges)
    }

    fn invalidate(&self, ranges: &DmaRanges) -> peervram::Result<()> {
        self.device.invalidate(ranges)
    }

    fn quiesce(&self, ranges: &DmaRanges) -> peervram::Result<()> {
        self.taken.fetch_add(1, Ordering::SeqCst);
        self.device.quiesce(ranges)
    }

    fn resume(&self, ranges: &DmaRanges) -> peervram::Result<()> {
        self.device.resume(ranges)?;
        self.paint()
    }
}

/// What the memory holds in that generation.
pub fn bytes_of(generation: u64) -> Vec<u8> {
    let pixels = LAYOUT.width * LAYOUT.height;
    let seed = (generation as u32).wrapping_mul(0x9E37_79B9) | 1;
    (0..pixels).flat_map(|pixel| (pixel.wrapping_mul(0x0101_0101) ^ seed).to_le_bytes()).collect()
}

/// The same as a picture.
pub fn picture_of(generation: u64) -> Result<Picture> {
    Ok(Picture::new(LAYOUT.width, LAYOUT.height, bytes_of(generation))?)
}
