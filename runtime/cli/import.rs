//! `peervram import`: attach another device to memory, and look at it through that device.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use peervram::backends::drm::{self, ScanOut};
use peervram::backends::vulkan::{Buffer, Engine, Instance, Selector};
use peervram::backends::{Aperture, DmaBuf, ImageLayout, Importer, PciAddress, RawBytes};
use peervram::verify::Figure;
use peervram::{Attachment, Direction, Error, Kind, Lender, Mover, Path, Result, Trust};
use peervram_programs::{bytes, note, say};
use serde::Serialize;

use super::arguments::{MemoryArguments, PictureSize};
use super::ending::{ErrorReport, print_json};
use super::opened::Opened;
use super::picture::{of_bytes, save};

/// How long a device may take for one piece of work before it counts as hung.
pub const DEVICE_LIMIT: Duration = Duration::from_secs(60);

/// Import memory of a VFIO device into Vulkan or a DRM node.
///
/// Says which path the bytes take and why the others were refused. Without --verified nothing has tested it:
/// --checksum and --picture read the memory by the importing device, so that you can compare.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram import 01:00.0 --range 0+4M --checksum                      by Vulkan compute\n  \
    peervram import 01:00.0 --range 0+4M --picture out.png --size 640x480\n  \
    peervram import 01:00.0 --to /dev/dri/card0 --show 640x480           on its screen")]
pub struct Arguments {
    /// Whose memory: a VFIO device's PCI address, or fd:N for an inherited dma-buf.
    source: Source,

    #[command(flatten)]
    memory: MemoryArguments,

    /// Who imports: `vulkan`, a Vulkan device's PCI address, part of its name or its render node as
    /// `vulkan:WHICH`, or a DRM card node like /dev/dri/card0.
    #[arg(long, default_value = "vulkan", value_name = "IMPORTER")]
    to: Target,

    /// Take a path only if bytes arrive by it in this direction: read, write or both, as the importer sees it. A
    /// certificate says so, or a test that is made now; else the bytes are copied.
    #[arg(long, value_name = "DIRECTION", value_parser = direction)]
    verified: Option<Direction>,

    /// Read all of it by a compute shader and print the position-dependent sum of its words.
    #[arg(long)]
    checksum: bool,

    /// Copy a picture out of it by the importing device and save it as PNG. Needs --size.
    #[arg(long, value_name = "FILE", requires = "size")]
    picture: Option<PathBuf>,

    /// The size of the picture that the memory begins with: XRGB8888, rows without gaps.
    #[arg(long, value_name = "WIDTHxHEIGHT", requires = "picture")]
    size: Option<PictureSize>,

    /// Show the picture that the memory begins with on the DRM node's screen, until Enter is pressed
    /// (or for the time of --seconds).
    #[arg(long, value_name = "WIDTHxHEIGHT")]
    show: Option<PictureSize>,

    /// How long to show it.
    #[arg(long, requires = "show")]
    seconds: Option<u64>,
}

/// `0000:01:00.0` or `fd:3`.
#[derive(Debug, Clone)]
enum Source {
    Device(PciAddress),
    Inherited(i32),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.strip_prefix("fd:") {
            Some(number) => match number.parse() {
                Ok(number) if number >= 0 => Ok(Self::Inherited(number)),
                _ => Err(format!("{number:?} is no file descriptor; write fd:3")),
            },
            None => text.parse().map(Self::Device).map_err(|error: Error| error.to_string()),
        }
    }
}

/// `vulkan`, `vulkan:WHICH`, or a path below /dev.
#[derive(Debug, Clone)]
pub enum Target {
    Vulkan(Selector),
    Drm(PathBuf),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let which = match text.split_once(':') {
            Some(("vulkan", which)) => which,
            _ if text == "vulkan" => "",
            _ if text.starts_with('/') => return Ok(Self::Drm(text.into())),
            _ => {
                return Err(format!(
                    "{text:?} is neither vulkan, vulkan:WHICH, nor a path like /dev/dri/card0"
                ));
            }
        };
        let Ok(selector) = which.parse();
        Ok(Self::Vulkan(selector))
    }
}

fn direction(text: &str) -> std::result::Result<Direction, String> {
    let all = [Direction::Read, Direction::Write, Direction::Both];
    let found = all.into_iter().find(|direction| direction.name() == text);
    found.ok_or_else(|| format!("{text:?} is none of read, write and both"))
}

#[derive(Serialize)]
struct Report {
    exporter: String,
    importer: String,
    path: &'static str,
    verified: bool,
    size_bytes: u64,
    attach_us: f64,
    refused: Vec<Refusal>,
    /// Who copies, where bytes are.
    #[serde(skip_serializing_if = "Option::is_none")]
    copied: Option<Copied>,
    /// What the path is trusted for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tests: Vec<Passed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    picture: Option<PathBuf>,
}

#[derive(Serialize)]
struct Copied {
    pull: &'static str,
    push: Option<&'static str>,
    in_host_memory: bool,
    why_cpu: Option<String>,
}

#[derive(Serialize)]
struct Passed {
    direction: Direction,
    engine: String,
    observer: &'static str,
    when: String,
    mb_per_s: Option<f64>,
}

#[derive(Serialize)]
struct Refusal {
    path: &'static str,
    error: ErrorReport,
}

impl Arguments {
    /// Refuses what would have no effect on a dma-buf that somebody else made.
    fn check_source(&self) -> Result<()> {
        let Source::Inherited(_) = self.source else { return Ok(()) };
        if self.verified.is_some() {
            let why = "--verified is about a lender's memory, and of an inherited dma-buf no lender is known";
            return Err(unfit(why, "leave --verified out, and compare by --checksum; or name the device"));
        }
        match self.memory.given() {
            Some(option) => {
                let why = format!(
                    "{option} chooses from a device's memory, and an inherited dma-buf is taken whole"
                );
                Err(unfit(why, "give the ranges to peervram export"))
            }
            None => Ok(()),
        }
    }
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    arguments.check_source()?;
    match &arguments.to {
        Target::Vulkan(selector) => {
            if arguments.show.is_some() {
                return Err(unfit("--show needs a DRM node", "add --to /dev/dri/card0").into());
            }
            let device = Arc::new(Instance::open()?.open_device(selector)?);
            attach(arguments, device, json, |buffer, report| look(arguments, buffer, report))
        }
        Target::Drm(path) => {
            if arguments.checksum || arguments.picture.is_some() {
                let why = "--checksum and --picture need a Vulkan device";
                return Err(unfit(why, "leave --to out; a DRM node can only show a picture").into());
            }
            let node = Arc::new(drm::Node::open(path)?);
            attach(arguments, node, json, |buffer_object, _| show(arguments, buffer_object))
        }
    }
}

fn unfit(why: impl Into<Cow<'static, str>>, next: &'static str) -> Error {
    Error::new(Kind::InvalidInput, "import memory", why).next(next)
}

/// Attaches `importer` to the source, lets `work` use the import, and prints what came of it.
fn attach<I: Importer>(
    arguments: &Arguments,
    importer: Arc<I>,
    json: bool,
    work: impl FnOnce(&I::Memory, &mut Report) -> Result<()>,
) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    let mut report = Report {
        exporter: String::new(),
        importer: importer.name(),
        path: Path::Peer.name(),
        verified: false,
        size_bytes: 0,
        attach_us: 0.0,
        refused: Vec::new(),
        copied: None,
        tests: Vec::new(),
        checksum: None,
        picture: None,
    };
    match arguments.source {
        Source::Device(address) => {
            let device = Opened::open(address)?;
            let ranges = arguments.memory.ranges(&device)?;
            let lender = Lender::new(device);
            let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
            let start = Instant::now();
            let attachment: Attachment<I> =
                export.attach(importer, arguments.verified.map_or(Trust::Unverified, Trust::Verified))?;
            report.attach_us = start.elapsed().as_secs_f64() * 1e6;
            report.exporter = address.to_string();
            report.path = attachment.path().name();
            report.size_bytes = export.size_bytes();
            report.copied = attachment.staging().map(|how| Copied {
                pull: how.pull.name(),
                push: how.push.map(Mover::name),
                in_host_memory: how.in_host_memory,
                why_cpu: how.why_cpu,
            });
            let tests = attachment.certificate().map(|certificate| certificate.tests).unwrap_or_default();
            report.tests = (tests.into_iter().filter(|test| test.passed()))
                .map(|test| Passed {
                    direction: test.direction,
                    observer: test.observer.name(),
                    mb_per_s: test.figure.as_ref().map(Figure::mb_per_s),
                    engine: test.engine,
                    when: test.when,
                })
                .collect();
            report.verified = !report.tests.is_empty();
            report.refused = (attachment.refused().iter())
                .map(|(path, error)| Refusal { path: path.name(), error: error.into() })
                .collect();
            // Whoever looks reads. Who does not is inside for what was asked to be tested.
            let reads = arguments.checksum || arguments.picture.is_some() || arguments.show.is_some();
            let asked = arguments.verified.filter(|_| !reads).unwrap_or(Direction::Read);
            let access = attachment.enter(asked)?;
            work(access.memory(), &mut report)?;
            access.finish().check()?;
            attachment.detach()?;
        }
        Source::Inherited(number) => {
            let dma_buf = DmaBuf::inherited(number)?;
            let memory = importer.import(&dma_buf)?;
            report.attach_us = start.elapsed().as_secs_f64() * 1e6;
            report.exporter = format!("descriptor {number}");
            report.size_bytes = dma_buf.size_bytes();
            work(&memory, &mut report)?;
            importer.release(memory)?;
        }
    }
    if json {
        print_json(&report)?;
    } else {
        print(&report);
    }
    Ok(ExitCode::SUCCESS)
}

fn look(arguments: &Arguments, buffer: &Buffer, report: &mut Report) -> Result<()> {
    let mut engine = Engine::new(buffer.device())?;
    if arguments.checksum {
        let sum = engine.checksum(buffer, 0..buffer.size_bytes(), Instant::now() + DEVICE_LIMIT)?;
        report.checksum = Some(format!("{sum:08x}"));
    }
    if let (Some(file), Some(size)) = (&arguments.picture, arguments.size) {
        let layout = ImageLayout::packed(size.width, size.height);
        layout.check(buffer.size_bytes())?;
        let mut bytes = vec![0; layout.end_bytes() as usize];
        engine.read_back(buffer, 0, &mut bytes, Instant::now() + DEVICE_LIMIT)?;
        save(&of_bytes(layout, bytes)?, file)?;
        report.picture = Some(file.clone());
    }
    Ok(())
}

fn show(arguments: &Arguments, buffer_object: &drm::BufferObject) -> Result<()> {
    let Some(size) = arguments.show else { return Ok(()) };
    let _scan_out = ScanOut::start(buffer_object, ImageLayout::packed(size.width, size.height))?;
    match arguments.seconds {
        Some(seconds) => std::thread::sleep(Duration::from_secs(seconds)),
        None => wait_for_enter(&format!("{}x{} is on the screen", size.width, size.height))?,
    }
    Ok(())
}

/// Says `what` and waits for a line on standard input, or its end.
pub fn wait_for_enter(what: &str) -> Result<()> {
    if std::io::stdin().is_terminal() {
        note!("{what}; press Enter to go on");
    }
    let read = std::io::stdin().read_line(&mut String::new());
    read.map(drop).map_err(|error| Error::os("wait for Enter", error))
}

fn print(report: &Report) {
    say!(
        "{} of {} imported by {} in {:.0} us",
        bytes::in_words(report.size_bytes),
        report.exporter,
        report.importer,
        report.attach_us
    );
    match (&report.copied, report.verified) {
        (Some(copied), _) => {
            let memory = if copied.in_host_memory { "host memory" } else { "the importer's own memory" };
            let push = copied.push.map_or_else(String::new, |push| format!(", back by {push}"));
            say!("path      {} in {memory}: there by {}{push}", report.path, copied.pull);
            if let Some(why) = &copied.why_cpu {
                say!("          {why}");
            }
        }
        (None, true) => say!("path      {} (verified)", report.path),
        (None, false) => say!("path      {} (unverified)", report.path),
    }
    for test in &report.tests {
        let speed = test.mb_per_s.map_or_else(String::new, |speed| format!(", {speed:.0} MB/s"));
        say!(
            "tested    {} by {} at {}, seen by {}{speed}",
            test.direction,
            test.engine,
            test.when,
            test.observer
        );
    }
    for refusal in &report.refused {
        say!("refused   {}: {}", refusal.path, refusal.error.message());
    }
    if let Some(checksum) = &report.checksum {
        say!("checksum  {checksum}");
    }
    if let Some(picture) = &report.picture {
        say!("picture   {}", picture.display());
    }
}
