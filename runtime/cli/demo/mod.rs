//! `peervram demo`: a picture is lent, and another device reads, shows and changes it.
//!
//! The main job from end to end, on whatever there is: without `--lender` on host memory, so that
//! it runs on any machine; with it on a VFIO device's VRAM. With `--broker` between processes: [`brokered`] starts
//! them, [`client`] is the one that borrows.

mod brokered;
mod client;
mod other_user;
mod owner;
mod process;
mod told;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use peervram::backends::drm::{Node, ScanOut};
use peervram::backends::host::HostMemory;
use peervram::backends::vulkan::{self, Engine, Instance, Selector};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, Mapping, PciAddress, RawBytes, page_size_bytes, vfio,
};
use peervram::{Attachment, Direction, Error, Export, Kind, Lender, Outcome, Result, Trust};
use peervram_programs::{Table, columns, say};
use serde::{Deserialize, Serialize};

use crate::arguments::PictureSize;
use crate::ending::print_json;
use crate::import::{DEVICE_LIMIT, wait_for_enter};
use crate::picture::{Picture, layout_of, of_bytes, save};

/// Moves the rings of the painted picture to where they look well.
const PAINT_PARAMETER: u32 = 64;

/// Lend a picture, and let another device read, show and change it.
///
/// A test card is written into the lender's memory. A Vulkan compute shader reads it (a checksum) and
/// paints it over in place; the lender sees the result without any copy. Every step is checked
/// against a computation by the CPU. The picture that the lender sees in the end is saved as PNG.
///
/// With --broker the lender is `peervram serve`, and who draws is another process, of user nobody where root runs this:
/// it borrows the memory, draws, is told that an operator takes the memory back, stops, and draws again in the next
/// generation. `peervram status` shows meanwhile who has what, and every byte is compared.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram demo --lender 0000:01:00.0 --show /dev/dri/card0   on a VFIO device, with a second GPU's screen\n  \
    sudo peervram demo --broker                                 between two processes of two users\n\n\
Exit codes: 0 every byte was right; 1 not, or something ended in the middle; 2 wrong usage; 4 cannot run here.")]
pub struct Arguments {
    /// Lend by a broker, to another process and user.
    #[arg(long)]
    broker: bool,

    /// Be the client of --broker, of the broker that listens there.
    #[arg(long, value_name = "SOCKET", hide = true, conflicts_with = "broker")]
    client: Option<PathBuf>,

    /// Lend memory of this VFIO device. Its contents are lost. Without it, host memory stands in.
    #[arg(long, value_name = "ADDRESS")]
    lender: Option<PciAddress>,

    /// Which Vulkan device reads and paints: PCI address, part of its name, or render node.
    #[arg(long, value_name = "WHICH", default_value = "")]
    vulkan: String,

    /// Show the picture on this DRM node's screen as well, out of the lender's memory.
    #[arg(long, value_name = "NODE", requires = "lender")]
    show: Option<PathBuf>,

    /// Wait for Enter after each picture that is shown, or drawn into borrowed memory.
    #[arg(long)]
    step: bool,

    /// The size of the picture.
    #[arg(long, value_name = "WIDTHxHEIGHT", default_value = "640x480")]
    size: PictureSize,

    /// Where to save the picture that the lender sees in the end.
    #[arg(long, short, value_name = "FILE", default_value = "peervram-demo.png")]
    output: PathBuf,

    /// Where to save the picture as it was written in the beginning.
    #[arg(long, value_name = "FILE")]
    card: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    lender: String,
    steps: Vec<Step>,
    refused: Vec<String>,
    picture: PathBuf,
    passed: bool,
}

#[derive(Serialize)]
struct Step {
    what: String,
    path: Option<&'static str>,
    time_us: f64,
    check: Check,
}

/// What was compared, and whether it was equal.
#[derive(Debug, Serialize, Deserialize)]
struct Check {
    passed: bool,
    what: String,
}

impl Check {
    fn equal<T: PartialEq>(a: &T, b: &T, what: impl Into<String>) -> Self {
        Self { passed: a == b, what: what.into() }
    }

    /// Every byte, each in its place.
    fn of_bytes(seen: &[u8], expected: &[u8]) -> Self {
        let right = seen.iter().zip(expected).filter(|(seen, expected)| seen == expected).count();
        let passed = right == expected.len() && seen.len() == expected.len();
        let count = if passed { "all".to_owned() } else { format!("{right} of") };
        Self { passed, what: format!("{count} {} bytes right", expected.len()) }
    }
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    if json && arguments.step {
        let why = "--step talks to somebody at a terminal, and --json prints one value and nothing else";
        let next = "leave --step or --json out";
        return Err(Error::new(Kind::InvalidInput, "run the demo", why).next(next).into());
    }
    if let Some(socket) = &arguments.client {
        return Ok(client::run(socket, arguments));
    }
    if arguments.step && arguments.show.is_none() && !arguments.broker {
        let why = "--step waits for somebody who looks at a picture, and none is shown";
        let next = "add --show NODE or --broker, or leave --step out";
        return Err(Error::new(Kind::InvalidInput, "run the demo", why).next(next).into());
    }
    if arguments.broker {
        return brokered::run(arguments, json);
    }
    let Ok(selector) = arguments.vulkan.parse::<Selector>();
    let importer = Arc::new(Instance::open()?.open_device(&selector)?);
    let card = card_of(arguments);
    let size_bytes = size_in_memory(arguments);
    let report = match arguments.lender {
        Some(address) => {
            let device = vfio::Device::open(address)?;
            let region = crate::arguments::largest_memory(&device)?;
            let ranges = DmaRanges::new(region, &[DmaRange::new(0, size_bytes)])?;
            lend(arguments, Lender::new(device), ranges, &card, importer)?
        }
        None => {
            let memory = HostMemory::new(size_bytes)?;
            let ranges = DmaRanges::whole(memory.region())?;
            lend(arguments, Lender::new(memory), ranges, &card, importer)?
        }
    };
    if json {
        print_json(&report)?;
    } else {
        print(&report)?;
    }
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The test card, in the size that was asked for.
fn card_of(arguments: &Arguments) -> Picture {
    Picture::test_card(arguments.size.width, arguments.size.height)
}

/// What is lent for it: whole pages.
fn size_in_memory(arguments: &Arguments) -> u64 {
    layout_of(&card_of(arguments)).end_bytes().next_multiple_of(page_size_bytes())
}

/// The card painted over, by the CPU.
fn painted_of(card: &Picture) -> Result<Picture> {
    let mut bytes = card.bytes().to_vec();
    vulkan::paint(&mut bytes, &layout_of(card), PAINT_PARAMETER)?;
    of_bytes(layout_of(card), bytes)
}

fn lend<E: Exporter>(
    arguments: &Arguments,
    lender: Lender<E>,
    ranges: DmaRanges,
    card: &Picture,
    importer: Arc<vulkan::Device>,
) -> Result<Report> {
    let mut steps = Steps::default();
    let mut refused = Vec::new();

    // The lender's own view: it writes the picture here and looks at it here in the end.
    let view = steps.take("lender writes a test card", || {
        let view = lender.device().map(&ranges)?;
        view.write(0, card.bytes())?;
        let back = read(&view, card)?;
        let check = Check::equal(&back, card, "reads back equal");
        Ok((view, None, check))
    })?;
    if let Some(path) = &arguments.card {
        save(card, path)?;
    }

    let export = steps.take("export", || {
        let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
        let what = match export.dma_buf() {
            Ok(dma_buf) => format!("a dma-buf of {} bytes", dma_buf.size_bytes()),
            Err(error) => format!("no dma-buf: {}", error.why()),
        };
        Ok((export, None, Check { passed: true, what }))
    })?;

    let screen = arguments.show.as_deref().map(Node::open).transpose()?.map(Arc::new);
    let shown =
        screen.map(|node| attach(&mut steps, &mut refused, &export, node, "display attaches")).transpose()?;
    let shown = shown.as_ref().map(|screen| screen.enter(Direction::Read)).transpose()?;
    let scan_out = match &shown {
        Some(access) => Some(steps.take("display shows it", || {
            let scan_out = ScanOut::start(access.memory(), layout_of(card))?;
            let check = Check { passed: true, what: "accepted by the driver".into() };
            Ok((scan_out, Some("peer"), check))
        })?),
        None => None,
    };
    pause(arguments, "the test card is on the screen")?;

    let attachment = attach(&mut steps, &mut refused, &export, importer, "Vulkan attaches")?;
    let access = attachment.enter(Direction::Both)?;
    let path = Some(attachment.path().name());
    let mut engine = Engine::new(attachment.importer())?;
    steps.take("Vulkan reads: checksum", || {
        let end = layout_of(card).end_bytes();
        let seen = engine.checksum(access.memory(), 0..end, Instant::now() + DEVICE_LIMIT)?;
        let expected = vulkan::checksum(card.bytes());
        Ok(((), path, Check::equal(&seen, &expected, format!("{seen:08x}, CPU says {expected:08x}"))))
    })?;

    let painted = steps.take("Vulkan paints over it", || {
        let deadline = Instant::now() + DEVICE_LIMIT;
        engine.paint(access.memory(), &layout_of(card), PAINT_PARAMETER, deadline)?;
        let seen = read(&view, card)?;
        let check = Check::equal(&seen, &painted_of(card)?, "the lender sees what the CPU computes");
        Ok((seen, path, check))
    })?;
    if access.finish() != Outcome::Ok {
        return Err(Error::new(Kind::Revoked, "run the demo", "the memory was taken back in the middle"));
    }
    if let Some(scan_out) = &scan_out {
        scan_out.flush()?;
    }
    pause(arguments, "the painted picture is on the screen")?;

    save(&painted, &arguments.output)?;
    drop(scan_out);
    drop(shown);
    attachment.detach()?;
    let passed = steps.0.iter().all(|step| step.check.passed);
    let picture = arguments.output.clone();
    Ok(Report { lender: lender.device().name(), steps: steps.0, refused, picture, passed })
}

fn read(view: &Mapping, like: &Picture) -> Result<Picture> {
    let mut bytes = vec![0; like.bytes().len()];
    view.read(0, &mut bytes)?;
    of_bytes(layout_of(like), bytes)
}

fn attach<I: peervram::backends::Importer>(
    steps: &mut Steps,
    refused: &mut Vec<String>,
    export: &Export,
    importer: Arc<I>,
    what: &str,
) -> Result<Attachment<I>> {
    steps.take(what, || {
        let name = importer.name();
        let attachment = export.attach(importer, Trust::Unverified)?;
        refused.extend(
            attachment.refused().iter().map(|(path, error)| format!("{what} by {path}: {}", error.why())),
        );
        let path = attachment.path().name();
        Ok((attachment, Some(path), Check { passed: true, what: name }))
    })
}

fn pause(arguments: &Arguments, what: &str) -> Result<()> {
    if !arguments.step {
        return Ok(());
    }
    say!("{what}");
    wait_for_enter(what)
}

/// The rows of the table, in order.
#[derive(Default)]
struct Steps(Vec<Step>);

impl Steps {
    fn take<T>(
        &mut self,
        what: &str,
        step: impl FnOnce() -> Result<(T, Option<&'static str>, Check)>,
    ) -> Result<T> {
        let start = Instant::now();
        let (value, path, check) = step()?;
        let time_us = start.elapsed().as_secs_f64() * 1e6;
        self.0.push(Step { what: what.to_owned(), path, time_us, check });
        Ok(value)
    }
}

fn print(report: &Report) -> anyhow::Result<()> {
    let mut output = peervram_programs::output();
    let mut table = Table::new(&["step", "path", "time", "check"]);
    for step in &report.steps {
        let verdict = if step.check.passed { "ok" } else { "WRONG" };
        table.row([
            step.what.clone(),
            step.path.unwrap_or("-").to_owned(),
            format!("{:.2} ms", step.time_us / 1e3),
            format!("{verdict}: {}", step.check.what),
        ]);
    }
    writeln!(output, "Lender: {}\n", report.lender)?;
    table.print(&mut output, columns())?;
    for refused in &report.refused {
        writeln!(output, "\nRefused: {refused}")?;
    }
    writeln!(output, "\nPicture: {}", report.picture.display())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_that_is_wrong_or_missing_is_seen() {
        let card = Picture::test_card(16, 16);
        let right = Check::of_bytes(card.bytes(), card.bytes());
        assert!(right.passed && right.what == "all 1024 bytes right", "{right:?}");
        let mut bytes = card.bytes().to_vec();
        bytes[77] ^= 1;
        let wrong = Check::of_bytes(&bytes, card.bytes());
        assert!(!wrong.passed && wrong.what == "1023 of 1024 bytes right", "{wrong:?}");
        assert!(!Check::of_bytes(&card.bytes()[..1020], card.bytes()).passed);
        assert!(!Check::of_bytes(&[card.bytes(), &[0]].concat(), card.bytes()).passed);
        assert!(!Check::of_bytes(painted_of(&card).unwrap().bytes(), card.bytes()).passed);
    }
}
