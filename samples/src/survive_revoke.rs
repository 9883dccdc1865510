//! Frames keep coming while the memory that they are in is taken back ten times.
//!
//! ```text
//! survive_revoke 0000:01:00.0 /dev/dri/card0
//! ```
//! One thread draws into a VFIO device's memory and shows it on another GPU's screen. Another resets the VFIO
//! device. Neither knows of the other: a reset waits until the frame is done, and the frame after it is drawn
//! into memory that was imported anew. The bar moves with each frame; each reset lights a lamp.
#![expect(clippy::print_stdout, reason = "a sample prints as a program of its reader's would")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use peervram::backends::drm::{Node, ScanOut};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, ImageLayout, Mapping, RawBytes, page_size_bytes, vfio,
};
use peervram::{Attachment, Direction, Lender, Outcome, Trust};
use peervram_programs::picture::Picture;
use peervram_samples::screendump;

const RESETS: u64 = 10;
/// How long frames come undisturbed before each reset.
const UNDISTURBED: Duration = Duration::from_millis(150);
/// How long a reset waits for the frame that is being drawn; one that is being looked at takes longest.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is lent: a picture, row after row.
const SIZE: ImageLayout = ImageLayout::packed(640, 480);

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: survive_revoke ADDRESS DRM-NODE";
    let (address, node) = (arguments.next().context(usage)?, arguments.next().context(usage)?);

    // Lent: a picture's worth of the device's largest BAR.
    let device = vfio::Device::open(address.parse()?)?;
    let bars = device.regions().iter().filter(|region| region.index < 6);
    let bar = bars.max_by_key(|region| region.size_bytes).context("the device has no memory BAR")?;
    let card = Picture::test_card(SIZE.width, SIZE.height);
    let size_bytes = SIZE.end_bytes().next_multiple_of(page_size_bytes());
    let ranges = DmaRanges::new(bar, &[DmaRange::new(0, size_bytes)])?;
    let memory = device.map(&ranges)?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let screen = export.attach(Arc::new(Node::open(Path::new(&node))?), Trust::Unverified)?;

    // Taken back, again and again.
    let shown = AtomicU64::new(0);
    thread::scope(|scope| {
        let resets = scope.spawn(|| -> Result<()> {
            for reset in 1..=RESETS {
                // Not before the last one was survived.
                while shown.load(Ordering::SeqCst) < reset {
                    thread::sleep(Duration::from_millis(1));
                }
                thread::sleep(UNDISTURBED);
                lender.reset(PATIENCE)?;
            }
            Ok(())
        });
        let drawn = draw(&screen, &memory, &card, &shown, || resets.is_finished());
        let reset = resets.join().map_err(|_| anyhow!("the thread that resets panicked"))?;
        reset.and(drawn)
    })
}

/// Draws frame after frame, in each generation of the memory, until all resets are over.
fn draw(
    screen: &Attachment<Node>,
    memory: &Mapping,
    card: &Picture,
    shown: &AtomicU64,
    is_over: impl Fn() -> bool,
) -> Result<()> {
    let (mut frame, mut last_frame, mut longest_gap) = (0, Instant::now(), Duration::ZERO);
    // Ends early only where the resets do.
    while !is_over() || screen.generation() == RESETS {
        // The memory as it is now. While it is away there is none, and later there is.
        let Ok(import) = screen.current() else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        // All that was made of the old import goes; the framebuffer is all there is here.
        let scan_out = ScanOut::start(import.memory(), SIZE)?;
        while let Ok(access) = screen.enter(Direction::Read) {
            let generation = access.generation();
            memory.write(0, &picture(card, frame, generation))?;
            scan_out.flush()?;
            longest_gap = longest_gap.max(last_frame.elapsed());
            if frame == 8 {
                screendump("before")?;
            }
            let is_last = generation == RESETS && frame % 8 == 0;
            if is_last {
                screendump("after")?;
            }
            ensure!(access.finish() == Outcome::Ok, "frame {frame} is torn");
            (frame, last_frame) = (frame + 1, Instant::now());
            if shown.swap(generation + 1, Ordering::SeqCst) == generation && generation > 0 {
                println!("reset {generation} survived, {frame} frames so far");
            }
            if is_last {
                println!("{RESETS} resets, {frame} frames, the longest gap {} ms", longest_gap.as_millis());
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The test card with a bar that moves and a lamp for each reset.
fn picture(card: &Picture, frame: usize, resets: u64) -> Vec<u8> {
    const BAR: [u8; 4] = [0x00, 0xC0, 0xFF, 0xFF];
    const LIT: [u8; 4] = [0x30, 0xE0, 0x30, 0xFF];
    const DARK: [u8; 4] = [0x20, 0x20, 0x20, 0xFF];
    let (width, mut bytes) = (SIZE.width as usize, card.bytes().to_vec());
    let mut fill = |left: usize, top: usize, size: (usize, usize), pixel: [u8; 4]| {
        for y in top..top + size.1 {
            for x in left..left + size.0 {
                bytes[(y * width + x) * 4..][..4].copy_from_slice(&pixel);
            }
        }
    };
    fill(frame * 8 % (width - 16), 0, (16, 400), BAR);
    for lamp in 0..RESETS {
        let color = if lamp < resets { LIT } else { DARK };
        fill(32 + lamp as usize * 58, 424, (40, 40), color);
    }
    bytes
}
