//! What most tests begin with: the machine's lender, opened by peervram, and a picture in its VRAM.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, ImageLayout, Mapping, Owner, RawBytes, Region, drm,
    page_size_bytes, vfio,
};
use peervram::{Error, Export, Kind, Lender};
use peervram_programs::picture::Picture;

use crate::guest::Guest;

/// The BAR that is VRAM.
pub const VRAM: u32 = 2;

/// Long enough for anything that does not hang.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The lender of this machine.
pub fn open_device(guest: &Guest) -> Result<vfio::Device> {
    Ok(vfio::Device::open(guest.lender()?.parse()?)?)
}

/// The importing GPU of this machine.
pub fn open_node(guest: &Guest) -> Result<Arc<drm::Node>> {
    Ok(Arc::new(drm::Node::open(&guest.virtio_gpu_node()?)?))
}

/// `count` ranges of a page or more, scattered over VRAM in an order that is not theirs, which
/// together hold `size_bytes`.
pub fn scattered(device: &vfio::Device, size_bytes: u64, count: u64) -> Result<DmaRanges> {
    scattered_in(device.region(VRAM)?, size_bytes, count)
}

fn scattered_in(region: &Region, size_bytes: u64, count: u64) -> Result<DmaRanges> {
    let page = page_size_bytes();
    let each = size_bytes.div_ceil(count).next_multiple_of(page);
    let mut ranges: Vec<DmaRange> = (0..count).map(|i| DmaRange::new(i * (each + 3 * page), each)).collect();
    ranges.reverse();
    Ok(DmaRanges::new(region, &ranges)?)
}

/// A VFIO device, or one of a family that is more than that.
pub trait Lends: Exporter + AsRef<vfio::Device> + 'static {
    /// The region at `index`, with the length that it has.
    fn memory_region(&self, index: u32) -> Result<&Region> {
        let region = self.regions().iter().find(|region| region.index == index);
        region.with_context(|| format!("{} has no region {index}", self.name()))
    }
}

impl<D: Exporter + AsRef<vfio::Device> + 'static> Lends for D {}

/// A picture in VRAM, exported.
pub struct Crossing<D: Lends = vfio::Device> {
    /// The owner's view of the memory.
    pub view: Arc<Mapping>,
    /// What was written into it.
    pub card: Picture,
    /// The memory, exported.
    pub export: Export,
    /// Last: everything above goes before the device.
    pub lender: Lender<D>,
}

impl Crossing {
    /// Writes a test card into `count` ranges of the lender's VRAM and exports them.
    pub fn new(guest: &Guest, count: u64) -> Result<Crossing> {
        Self::lend(open_device(guest)?, VRAM, count, Arc::new(RawBytes))
    }
}

impl<D: Lends> Crossing<D> {
    /// The same for any device, whose memory is a region that `owner` answers for.
    pub fn lend(device: D, region: u32, count: u64, owner: Arc<dyn Owner>) -> Result<Self> {
        let card = Picture::test_card(640, 480);
        let ranges = scattered_in(
            device.memory_region(region)?,
            ImageLayout::packed(card.width(), card.height()).end_bytes(),
            count,
        )?;
        let view = device.map(&ranges)?;
        view.write(0, card.bytes())?;
        let lender = Lender::new(device);
        let export = lender.export(Aperture::owned(ranges, owner))?;
        Ok(Crossing { view, card, export, lender })
    }

    /// Where the picture lies in the memory.
    pub fn layout(&self) -> ImageLayout {
        ImageLayout::packed(self.card.width(), self.card.height())
    }

    /// What the owner sees in the memory now.
    pub fn seen(&self) -> Result<Picture> {
        let mut bytes = vec![0; self.card.bytes().len()];
        self.view.read(0, &mut bytes)?;
        Ok(Picture::new(self.card.width(), self.card.height(), bytes)?)
    }

    /// Ends it and expects the device to be closed.
    pub fn close(self) -> Result<()> {
        drop((self.view, self.export));
        self.lender.close(PATIENCE)?;
        Ok(())
    }
}

/// Compares a screendump with a picture, pixel by pixel.
pub fn check_screen(screen: &Picture, picture: &Picture) -> Result<()> {
    let (width, height) = (picture.width(), picture.height());
    ensure!(
        (screen.width(), screen.height()) == (width, height),
        "the screen is {screen:?}, the picture {picture:?}"
    );
    let wrong = screen.count_differing(picture);
    ensure!(wrong == 0, "{wrong} of {} pixels on the screen differ from what was written", width * height);
    Ok(())
}

/// Expects an error of a kind, and that its words name the device.
pub fn refused<T>(result: Result<T, impl Into<Error>>, kind: Kind) -> Result<Error> {
    let error: Error = result
        .err()
        .map(Into::into)
        .with_context(|| format!("it worked, and should have been refused as {kind:?}"))?;
    ensure!(error.kind() == kind, "refused as {:?}, not {kind:?}: {error}", error.kind());
    ensure!(error.device().is_some(), "the error names no device: {error}");
    Ok(error)
}

/// Runs `work` twice and expects the second run to leave no file descriptor behind. (The first
/// may leave what a process opens once: a reaper's thread, a driver's node.)
pub fn leaks_nothing(work: impl Fn() -> Result<()>) -> Result<()> {
    let open = || -> Result<Vec<String>> {
        // A dropped dma-buf is closed by another thread.
        std::thread::sleep(Duration::from_millis(50));
        let mut open = Vec::new();
        for entry in std::fs::read_dir("/proc/self/fd")? {
            // The descriptor that lists the folder is gone by now.
            let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
            open.push(target.display().to_string());
        }
        open.retain(|target| !target.starts_with("/proc/"));
        open.sort();
        Ok(open)
    };
    work()?;
    let before = open()?;
    work()?;
    let after = open()?;
    ensure!(before == after, "file descriptors before {before:?}, after {after:?}");
    Ok(())
}
