//! The smallest program that lends a buffer: memory of a VFIO device, made a dma-buf, imported by another
//! device.
//!
//! ```text
//! share_buffer 0000:01:00.0 /dev/dri/card0    to a GPU's driver, which shows it on a screen
//! share_buffer 0000:01:00.0                   to Vulkan, which reads it
//! ```
//! What the buffer's memory held is lost.
#![expect(clippy::print_stdout, reason = "a sample prints as a program of its reader's would")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peervram::backends::drm::{Node, ScanOut};
use peervram::backends::vulkan::{Engine, Instance, Selector, checksum};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, ImageLayout, RawBytes, page_size_bytes, vfio,
};
use peervram::{Direction, Export, Lender, Trust};
use peervram_programs::picture::Picture;
use peervram_samples::screendump;

/// What is lent: a picture, row after row.
const SIZE: ImageLayout = ImageLayout::packed(640, 480);

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().context("usage: share_buffer ADDRESS [DRM NODE]")?;
    let node = arguments.next().map(PathBuf::from);

    // The lender: a range of its largest BAR, with a picture in it.
    let device = vfio::Device::open(address.parse()?)?;
    let bars = device.regions().iter().filter(|region| region.index < 6);
    let bar = bars.max_by_key(|region| region.size_bytes).context("the device has no memory BAR")?;
    let picture = Picture::test_card(SIZE.width, SIZE.height);
    let size_bytes = SIZE.end_bytes().next_multiple_of(page_size_bytes());
    let ranges = DmaRanges::new(bar, &[DmaRange::new(0, size_bytes)])?;
    device.map(&ranges)?.write(0, picture.bytes())?;

    // Lent. That these are bytes and nothing else is what this program says of its device.
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    match node {
        Some(node) => show(&export, Node::open(&node)?),
        None => read(&export, &picture),
    }
}

/// The importer is a GPU with a screen.
fn show(export: &Export, node: Node) -> Result<()> {
    let attachment = export.attach(Arc::new(node), Trust::Unverified)?;
    println!("the bytes go by {}", attachment.path());
    let access = attachment.enter(Direction::Read)?;
    let scan_out = ScanOut::start(access.memory(), SIZE)?;
    screendump("card")?;
    drop(scan_out);
    access.finish().check()?;
    attachment.detach()?;
    Ok(())
}

/// The importer is a Vulkan device.
fn read(export: &Export, picture: &Picture) -> Result<()> {
    let device = Instance::open()?.open_device(&Selector::Any)?;
    let attachment = export.attach(Arc::new(device), Trust::Unverified)?;
    println!("the bytes go by {}", attachment.path());
    let access = attachment.enter(Direction::Read)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let bytes = 0..SIZE.end_bytes();
    let seen = Engine::new(attachment.importer())?.checksum(access.memory(), bytes, deadline)?;
    access.finish().check()?;
    attachment.detach()?;
    ensure!(seen == checksum(picture.bytes()), "Vulkan sees other bytes than were written");
    println!("Vulkan sees what was written");
    Ok(())
}
