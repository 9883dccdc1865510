//! What a gbm device does with lent memory, for the lab's tests of that name.
//!
//! ```text
//! peervram-lab-gbm CASE LENDER DRM-NODE
//! ```
//! A program of its own because it is linked against libgbm, which the guest's private root has and a host need not
//! have: the agent is run on the host, too. It ends with 0, or says what was wrong.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use peervram::backends::drm::{Node, ScanOut};
use peervram::backends::gbm::Device;
use peervram::backends::host::{Backing, HostMemory};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, ImageLayout, Importer, Mapping, OnRevoke, RawBytes,
    page_size_bytes, vfio,
};
use peervram::{Direction, Error, Export, Kind, Lender, Outcome, Trust};
use peervram_lab::link::Link;
use peervram_programs::picture::Picture;

/// The BAR that is VRAM.
const VRAM: u32 = 2;

const PATIENCE: Duration = Duration::from_secs(10);

/// Rows that are further apart than pixels want.
const PADDED: ImageLayout = ImageLayout { offset_bytes: 0, width: 640, height: 480, stride_bytes: 2816 };

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [case, lender, node] = &arguments[..] else {
        bail!("usage: peervram-lab-gbm CASE LENDER DRM-NODE");
    };
    let (lender, node) = (lender.as_str(), Path::new(node));
    match case.as_str() {
        "scan-out" => scan_out(lender, node),
        "compositor" => compositor(lender, node),
        "revoke" => revoke(lender, node),
        "refusals" => refusals(lender, node),
        "importer-that-cannot" => importer_that_cannot(lender, node),
        "no-route" => no_route(lender, node),
        other => bail!("no case {other}"),
    }
}

/// VRAM with a test card in it, lent.
struct Lent {
    view: Arc<Mapping>,
    export: Export,
    lender: Lender<vfio::Device>,
}

impl Lent {
    fn new(address: &str) -> Result<Lent> {
        let device = vfio::Device::open(address.parse()?)?;
        let size_bytes = PADDED.end_bytes().next_multiple_of(page_size_bytes());
        let ranges = DmaRanges::new(device.region(VRAM)?, &[DmaRange::new(0, size_bytes)])?;
        let view = device.map(&ranges)?;
        let lender = Lender::new(device);
        let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
        Ok(Lent { view, export, lender })
    }

    /// Writes a picture to its place.
    fn show(&self, picture: &Picture) -> Result<()> {
        for (y, row) in (0..).zip(picture.bytes().chunks(PADDED.width as usize * 4)) {
            self.view.write(PADDED.offset_bytes as usize + y * PADDED.stride_bytes as usize, row)?;
        }
        Ok(())
    }
}

/// The test card, and the same upside down.
fn pictures() -> Result<[Picture; 2]> {
    let card = Picture::test_card(PADDED.width, PADDED.height);
    let mut rows: Vec<&[u8]> = card.bytes().chunks(PADDED.width as usize * 4).collect();
    rows.reverse();
    let turned = Picture::new(PADDED.width, PADDED.height, rows.concat())?;
    Ok([card, turned])
}

/// Compares the screen with a picture, pixel by pixel.
fn check_screen(link: &Link, picture: &Picture) -> Result<()> {
    let screen = link.screendump()?;
    let size = (picture.width(), picture.height());
    ensure!((screen.width(), screen.height()) == size, "the screen is {screen:?}, the picture {picture:?}");
    let wrong = screen.count_differing(picture);
    ensure!(wrong == 0, "{wrong} of {} pixels on the screen are others", size.0 * size.1);
    Ok(())
}

/// A picture in VRAM is a gbm buffer object on the screen, and changes with the memory.
fn scan_out(lender: &str, node: &Path) -> Result<()> {
    let [card, turned] = pictures()?;
    let (lent, link) = (Lent::new(lender)?, Link::connect()?);
    lent.show(&card)?;
    let screen = Arc::new(Device::open(node)?.for_images(PADDED));
    ensure!(screen.governed_by_p2pdma(), "nobody would ask the kernel about {}", screen.name());
    let attachment = lent.export.attach(screen, Trust::Unverified)?;
    ensure!(attachment.path() == peervram::Path::Peer, "by {}", attachment.path());
    let access = attachment.enter(Direction::Read)?;
    let shown = ScanOut::start(access.memory(), PADDED)?;
    check_screen(&link, &card)?;
    lent.show(&turned)?;
    shown.flush()?;
    check_screen(&link, &turned)?;
    drop(shown);
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    attachment.detach()?;
    let Lent { view, export, lender } = lent;
    drop((view, export));
    lender.close(PATIENCE)?;
    Ok(())
}

/// Who has the screen shows a buffer object by its own open file, and nobody else can.
fn compositor(lender: &str, node: &Path) -> Result<()> {
    let [card, _] = pictures()?;
    let (lent, link) = (Lent::new(lender)?, Link::connect()?);
    lent.show(&card)?;
    // The first to open a node is DRM master there.
    let compositor = File::options().read(true).write(true).open(node)?;
    let other = Arc::new(Device::open(node)?.for_images(PADDED));
    let attachment = lent.export.attach(other, Trust::Unverified)?;
    let access = attachment.enter(Direction::Read)?;
    refused(
        ScanOut::start(access.memory(), PADDED).map(drop),
        Kind::PermissionDenied,
        &["end the compositor"],
    )?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");

    let shared = Node::from_fd(compositor.as_fd().try_clone_to_owned()?)?;
    ensure!(shared.path() == node, "it is said to be {}", shared.path().display());
    let ours = Arc::new(Device::on(shared)?.for_images(PADDED));
    let attachment = lent.export.attach(ours, Trust::Unverified)?;
    let access = attachment.enter(Direction::Read)?;
    let _shown = ScanOut::start(access.memory(), PADDED)?;
    check_screen(&link, &card)?;
    // Its handle is gbm's in this open file: a node would close it under gbm.
    let node_of_file = Node::from_fd(compositor.as_fd().try_clone_to_owned()?)?;
    refused(
        node_of_file.import(lent.export.dma_buf().map_err(|error| anyhow!("{error}"))?).map(drop),
        Kind::Busy,
        &["a gbm device has imported it"],
    )?;
    check_screen(&link, &card)?;
    let null = File::open("/dev/null")?.into();
    refused(Node::from_fd(null).map(drop), Kind::InvalidInput, &["/dev/null", "no DRM node"])
}

/// After a reset a buffer object is made again, by the same gbm device, and shown.
fn revoke(lender: &str, node: &Path) -> Result<()> {
    let [card, turned] = pictures()?;
    let (lent, link) = (Lent::new(lender)?, Link::connect()?);
    lent.show(&card)?;
    let screen = Arc::new(Device::open(node)?.for_images(PADDED));
    ensure!(screen.on_revoke() == OnRevoke::Reimport, "virtio-gpu needs {:?}", screen.on_revoke());
    let attachment = lent.export.attach(screen, Trust::Unverified)?;
    let before = attachment.enter(Direction::Read)?;
    drop(ScanOut::start(before.memory(), PADDED)?);
    ensure!(before.finish() == Outcome::Ok, "the first access is torn");
    lent.lender.reset(PATIENCE)?;
    refused(attachment.enter(Direction::Read).map(drop), Kind::Revoked, &[])?;
    lent.show(&turned)?;
    attachment.current()?;
    let access = attachment.enter(Direction::Read)?;
    let _shown = ScanOut::start(access.memory(), PADDED)?;
    check_screen(&link, &turned)
}

fn refusals(lender: &str, node: &Path) -> Result<()> {
    // libgbm takes it for a device; it is not asked.
    let null = Device::open(Path::new("/dev/null")).map(drop);
    refused(null, Kind::InvalidInput, &["/dev/null", "no DRM node"])?;
    refused(Device::open(Path::new("/dev/dri/card9")).map(drop), Kind::NotFound, &["card9"])?;

    let lent = Lent::new(lender)?;
    let device = Device::open(node)?;
    let attach =
        |layout| lent.export.attach(Arc::new(device.for_images(layout)), Trust::Unverified).map(drop);
    let tall = ImageLayout { height: 4000, ..PADDED };
    refused(attach(tall), Kind::InvalidInput, &["larger than the buffer"])?;

    // Mesa's driver for GPUs that only show says 0 of every offset: whoever believes it shows the picture askew.
    let later = ImageLayout { offset_bytes: 8192, height: 400, ..PADDED };
    refused(attach(later), Kind::InvalidInput, &["gbm has the picture at 0x0", "the lender at 0x2000"])?;

    // Memory that is no dma-buf: what the kernel says, and not what libgbm says.
    let memory = HostMemory::with_backing(1 << 21, Backing::Memfd)?;
    let whole = DmaRanges::whole(memory.region())?;
    let memory = Lender::new(memory);
    let export = memory.export(Aperture::owned(whole, Arc::new(RawBytes)))?;
    let attached = export.attach(Arc::new(device.for_images(PADDED)), Trust::Unverified).map(drop);
    refused(attached, Kind::RouteRefused, &["is no dma-buf"])
}

/// A driver that takes no memory of other devices: its name is given, and not libgbm's words.
fn importer_that_cannot(lender: &str, node: &Path) -> Result<()> {
    let lent = Lent::new(lender)?;
    let screen = Arc::new(Device::open(node)?.for_images(PADDED));
    let driver = screen.device().node().driver().to_owned();
    let attached = lent.export.attach(screen, Trust::Unverified).map(drop);
    refused(attached, Kind::ImporterCannot, &[&driver])
}

/// Where the kernel allows no peers, its reason is given and not libgbm's.
fn no_route(lender: &str, node: &Path) -> Result<()> {
    let lent = Lent::new(lender)?;
    let screen = Arc::new(Device::open(node)?.for_images(PADDED));
    let attached = lent.export.attach(screen, Trust::Unverified).map(drop);
    refused(attached, Kind::RouteRefused, &["peervram route"])
}

/// Expects an error of that kind, with these words in it.
fn refused(result: Result<(), impl Into<Error>>, kind: Kind, words: &[&str]) -> Result<()> {
    let error: Error =
        result.err().map(Into::into).with_context(|| format!("it is not refused as {kind:?}"))?;
    ensure!(error.kind() == kind, "refused as {:?}, not {kind:?}: {error}", error.kind());
    ensure!(words.iter().all(|word| error.to_string().contains(word)), "{error} does not say {words:?}");
    Ok(())
}
