//! Vulkan images on lent memory: what the device takes for a pixel is the owner's pixel, with the driver's row pitch
//! and with the lender's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peervram::backends::host::HostMemory;
use peervram::backends::vulkan::{
    Device, Engine, Image, ImageOptions, ImageUsage, Instance, PixelFormat, Selector, Tiling,
};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, ImageLayout, Mapping, RawBytes, page_size_bytes,
};
use peervram::{Direction, Kind, Lender, Outcome, Path, Trust};
use peervram_programs::picture::Picture;

use crate::crossing::{PATIENCE, VRAM, open_device, refused};
use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("images/linear-by-host-pointer-is-the-owners-picture", linear_in_vram)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("images/explicit-layout-of-a-dma-buf-is-the-owners-picture", explicit_in_host_memory)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("images/explicit-layout-by-host-pointer-is-the-owners-picture", explicit_in_vram)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("images/certificate-of-the-device-counts", certificate_counts)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("images/memory-that-nobody-answers-for-is-staged", staged)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("images/explicit-layout-takes-an-extension", without_modifiers)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("images/what-would-be-read-askew-is-refused", refusals)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
];

/// A driver that is a CPU that is itself emulated.
const SLOW: Duration = Duration::from_secs(50);

/// Room behind a picture: drivers want more than its pixels.
const ROOM_BYTES: u64 = 1 << 20;

fn open() -> Result<Device> {
    Ok(Instance::open()?.open_device(&Selector::Any)?)
}

/// An exporter's memory with a picture in it, lent.
struct Lent<E: Exporter + 'static> {
    view: Arc<Mapping>,
    card: Picture,
    layout: ImageLayout,
    lender: Lender<E>,
    export: peervram::Export,
}

impl<E: Exporter + 'static> Lent<E> {
    /// Lends `ranges` of `exporter`, with a test card at `layout` and garbage around its pixels.
    fn new(exporter: E, ranges: DmaRanges, layout: ImageLayout) -> Result<Self> {
        let card = Picture::test_card(layout.width, layout.height);
        let view = exporter.map(&ranges)?;
        let mut bytes: Vec<u8> = (0..layout.end_bytes()).map(|at| (at * 7 + 3) as u8).collect();
        for (y, row) in card.bytes().chunks(layout.width as usize * 4).enumerate() {
            bytes[place_of(&layout, y)..][..row.len()].copy_from_slice(row);
        }
        view.write(0, &bytes)?;
        let lender = Lender::new(exporter);
        let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
        Ok(Self { view, card, layout, lender, export })
    }

    /// All that the owner sees, from the start to the last pixel.
    fn seen(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.layout.end_bytes() as usize];
        self.view.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Compares the picture as the device has it with the owner's, has the device change it, and compares anew.
    fn cross(&self, options: ImageOptions, path: Path) -> Verdict {
        let device = Arc::new(open()?.for_images(self.layout, options));
        let attachment = self.export.attach(Arc::clone(&device), Trust::Unverified)?;
        ensure!(attachment.path() == path, "by {}: {:?}", attachment.path(), attachment.refused());
        let access = attachment.enter(Direction::Both)?;
        let image: &Image = access.memory();
        ensure!(image.is_host_pointer() == (path == Path::HostPointer), "{image:?} came by another path");
        let mut engine = Engine::new(device.device())?;
        let mut pixels = vec![0; self.card.bytes().len()];
        engine.read_image(image, &mut pixels, Instant::now() + SLOW)?;
        let wrong = pixels.chunks(4).zip(self.card.bytes().chunks(4)).filter(|(a, b)| a != b).count();
        ensure!(wrong == 0, "{wrong} of {} pixels differ in the image", pixels.len() / 4);

        let before = self.seen()?;
        pixels.iter_mut().for_each(|byte| *byte = !*byte);
        engine.write_image(image, &pixels, Instant::now() + SLOW)?;
        let mut expected = before;
        for (y, row) in pixels.chunks(self.layout.width as usize * 4).enumerate() {
            expected[place_of(&self.layout, y)..][..row.len()].copy_from_slice(row);
        }
        let seen = self.seen()?;
        let wrong = seen.iter().zip(&expected).filter(|(a, b)| a != b).count();
        ensure!(wrong == 0, "the owner sees {wrong} other bytes than the image was given");
        ensure!(access.finish() == Outcome::Ok, "the access is torn");
        attachment.detach()?;
        Ok(())
    }
}

/// Where row `y` begins.
fn place_of(layout: &ImageLayout, y: usize) -> usize {
    layout.offset_bytes as usize + y * layout.stride_bytes as usize
}

fn vram(guest: &Guest, layout: ImageLayout) -> Result<Lent<peervram::backends::vfio::Device>> {
    let device = open_device(guest)?;
    let size_bytes = layout.end_bytes().next_multiple_of(page_size_bytes()) + ROOM_BYTES;
    let ranges = DmaRanges::new(device.region(VRAM)?, &[DmaRange::new(0, size_bytes)])?;
    Lent::new(device, ranges, layout)
}

fn host(layout: ImageLayout) -> Result<Lent<HostMemory>> {
    let memory = HostMemory::new(layout.end_bytes().next_multiple_of(page_size_bytes()) + ROOM_BYTES)?;
    let ranges = DmaRanges::whole(memory.region())?;
    Lent::new(memory, ranges, layout)
}

/// Rows that are further apart than pixels want, and a picture that does not begin at the start.
const PADDED: ImageLayout = ImageLayout { offset_bytes: 8192, width: 640, height: 480, stride_bytes: 2816 };

const EXPLICIT: ImageOptions = ImageOptions {
    usage: ImageUsage(ImageUsage::TRANSFER_SRC.0 | ImageUsage::TRANSFER_DST.0),
    format: PixelFormat::R32Uint,
    tiling: Tiling::EXPLICIT_LINEAR,
};

fn linear_in_vram(guest: &Guest) -> Verdict {
    let lent = vram(guest, ImageLayout { offset_bytes: 4096, ..ImageLayout::packed(640, 480) })?;
    lent.cross(ImageOptions::default(), Path::HostPointer)?;
    drop((lent.view, lent.export));
    lent.lender.close(PATIENCE)?;
    Ok(())
}

fn explicit_in_host_memory(_: &Guest) -> Verdict {
    host(PADDED)?.cross(EXPLICIT, Path::Peer)
}

fn explicit_in_vram(guest: &Guest) -> Verdict {
    vram(guest, PADDED)?.cross(EXPLICIT, Path::HostPointer)
}

/// An image has no engine: without a certificate that a buffer earned, it would be copied.
fn certificate_counts(guest: &Guest) -> Verdict {
    let lent = vram(guest, PADDED)?;
    let device = Arc::new(open()?);
    let trust = Trust::Verified(Direction::Both);
    let buffer = lent.export.attach(Arc::clone(&device), trust)?;
    ensure!(buffer.path() == Path::HostPointer, "by {}: {:?}", buffer.path(), buffer.refused());
    buffer.detach()?;
    let image = lent.export.attach(Arc::new(device.for_images(PADDED, EXPLICIT)), trust)?;
    ensure!(image.path() == Path::HostPointer, "by {}: {:?}", image.path(), image.refused());
    let access = image.enter(Direction::Read)?;
    let mut pixels = vec![0; lent.card.bytes().len()];
    Engine::new(&device)?.read_image(access.memory(), &mut pixels, Instant::now() + SLOW)?;
    ensure!(pixels == lent.card.bytes(), "the image has other pixels");
    Ok(())
}

/// Nobody answers for the memory, so no path is trusted: what the image shows is a copy, and goes back.
fn staged(guest: &Guest) -> Verdict {
    let Lent { view, card, layout, lender, export } = vram(guest, PADDED)?;
    let ranges = export.aperture().ranges().clone();
    drop(export);
    let export = lender.export(Aperture::unowned(ranges))?;
    let device = Arc::new(open()?);
    let importer = Arc::new(device.for_images(layout, EXPLICIT));
    let image = export.attach(importer, Trust::Verified(Direction::Both))?;
    ensure!(
        image.staging().is_some_and(|how| how.in_host_memory),
        "by {}: {:?}",
        image.path(),
        image.refused()
    );
    let mut engine = Engine::new(&device)?;
    let access = image.enter(Direction::Both)?;
    let mut pixels = vec![0; card.bytes().len()];
    engine.read_image(access.memory(), &mut pixels, Instant::now() + SLOW)?;
    ensure!(pixels == card.bytes(), "the image has other pixels");
    let given: Vec<u8> = (0..pixels.len()).map(|at| (at ^ at >> 9) as u8).collect();
    pixels.copy_from_slice(&given);
    engine.write_image(access.memory(), &pixels, Instant::now() + SLOW)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    let mut row = [0; 640 * 4];
    for (y, expected) in given.chunks(row.len()).enumerate() {
        view.read(place_of(&layout, y), &mut row)?;
        ensure!(row == expected, "row {y} of what the image was given is not copied back");
    }
    Ok(())
}

/// lavapipe has explicit layouts where it can open /dev/udmabuf.
fn without_modifiers(_: &Guest) -> Verdict {
    const UDMABUF: &str = "/dev/udmabuf";
    const AWAY: &str = "/dev/udmabuf-away";
    std::fs::rename(UDMABUF, AWAY).with_context(|| format!("hiding {UDMABUF}"))?;
    let opened = open();
    std::fs::rename(AWAY, UDMABUF).with_context(|| format!("putting {UDMABUF} back"))?;
    let device = opened?;
    let missing = &device.description().missing_extensions;
    ensure!(
        missing.iter().any(|extension| extension.without.contains("no explicit layout")),
        "it lacks {missing:?}"
    );
    let lent = host(PADDED)?;
    let explicit = Arc::new(device.for_images(PADDED, EXPLICIT));
    let error = refused(lent.export.attach(explicit, Trust::Unverified).map(drop), Kind::VulkanMissing)?;
    let error = error.to_string();
    ensure!(
        error.contains("has no VK_EXT_image_drm_format_modifier") && error.contains("Tiling::Linear"),
        "{error}"
    );
    Ok(())
}

fn refusals(_: &Guest) -> Verdict {
    let lent = host(PADDED)?;
    let device = open()?;
    let says = |layout, options, kind, words: &[&str]| -> Verdict {
        let importer = Arc::new(device.for_images(layout, options));
        let error = refused(lent.export.attach(importer, Trust::Unverified).map(drop), kind)?.to_string();
        ensure!(words.iter().all(|word| error.contains(word)), "{error} does not say {words:?}");
        Ok(())
    };
    let linear = ImageOptions::default();
    let rows = "the driver has the rows of 640 pixels 2560 bytes apart, the lender 2816";
    says(PADDED, linear, Kind::InvalidInput, &[rows, "Tiling::EXPLICIT_LINEAR"])?;
    // Intel's X tiling (I915_FORMAT_MOD_X_TILED), which a CPU has no use for.
    let tiled = ImageOptions { tiling: Tiling::Explicit { modifier: 1 << 56 | 1 }, ..EXPLICIT };
    says(PADDED, tiled, Kind::Unsupported, &["no modifier 0x100000000000001", "it has 0x0"])?;
    let depth = ImageOptions { usage: ImageUsage(0x20), ..linear };
    says(PADDED, depth, Kind::Unsupported, &["makes no images of Bgra8Unorm for 0x20 (linear)"])?;
    let tall = ImageLayout { height: 4000, ..PADDED };
    says(tall, EXPLICIT, Kind::InvalidInput, &["larger than the buffer"])?;
    let wide = ImageLayout { width: 30_000, height: 8, stride_bytes: 120_000, offset_bytes: 0 };
    says(wide, EXPLICIT, Kind::InvalidInput, &["larger than the driver's images"])?;
    let odd = ImageLayout { offset_bytes: 4, ..ImageLayout::packed(640, 480) };
    says(odd, linear, Kind::InvalidInput, &["the picture is at 0x4, and the driver wants multiples of"])?;
    let device = Arc::new(device);
    let attachment = lent.export.attach(Arc::new(device.for_images(PADDED, EXPLICIT)), Trust::Unverified)?;
    let access = attachment.enter(Direction::Both)?;
    let mut engine = Engine::new(&device)?;
    let short = engine.read_image(access.memory(), &mut [0; 4096], Instant::now() + SLOW);
    let error = short.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(error.contains("a picture of 640x480 has 0x12c000 bytes, not 0x1000"), "{error:?}");
    Ok(())
}
