//! `peervram verify`: whether bytes arrive, tested, and the certificates that such tests left.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use peervram::backends::host::HostMemory;
use peervram::backends::vulkan::{Instance, Selector};
use peervram::backends::{Aperture, DmaRanges, Exporter, PciAddress, RawBytes};
use peervram::verify::{Certificate, Faults, Limits, Listing, Observer, Progress, Store};
use peervram::{Attachment, Direction, Error, Kind, Lender, Result, Trust, backends};
use peervram_programs::{Table, bytes, columns};
use serde::Serialize;

use super::arguments::{MemoryArguments, parse_bytes};
use super::ending::{ErrorReport, print_json};
use super::import::Target;
use super::opened::Opened;

/// How much host memory is lent by --host.
const HOST_BYTES: u64 = 64 << 20;
/// Between two lines of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Test whether bytes really arrive at an importing device, and keep the result as a certificate.
///
/// The lender's side writes bytes that say where they belong, and each engine of the importer reads them; the
/// engine writes, and the lender's side looks. Start, middle, end and what lies across 4 KiB, 64 KiB, 2 MiB
/// and 4 GiB are tested, or everything with --full, while the kernel's log is watched for IOMMU faults. What was
/// in the tested places is put back.
///
/// Who looks for the lender decides what it proves. Its own engine sees what the device has; that takes a
/// driver of the lender, in a program of yours (docs/verify.md). This command has none for any device: it
/// looks by the CPU, through the same BAR as the importer. That is marked "window only" and cannot see a device
/// whose engines work on other memory than the BAR shows.
///
/// A certificate is void as soon as anything that the path depends on changes: kernel, boot, command line,
/// microcode, drivers, BARs, links, IOMMU mode, bridges and their ACS control.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram verify 01:00.0 vulkan            both directions, some places of the largest BAR\n  \
    peervram verify 01:00.0 vulkan:03:00.0 --range 0+64M --full\n  \
    peervram verify --host                    host memory to Vulkan: how it works, on any machine\n  \
    peervram verify --list                    what was tested before, and whether it still counts\n\n\
Exit codes: 0 bytes arrived (also by the window only: the output says so); 1 bytes were wrong, or an engine\n\
failed; 2 wrong usage; 4 cannot run on this machine.")]
pub struct Arguments {
    /// Whose memory: the PCI address of a device that is bound to vfio-pci. Left out with --host.
    #[arg(value_name = "LENDER", required_unless_present_any = ["host", "list"], conflicts_with = "list")]
    first: Option<Named>,

    /// Who imports: `vulkan`, or a Vulkan device's PCI address, part of its name or its render node as
    /// `vulkan:WHICH`. `vulkan` where it is left out.
    #[arg(value_name = "IMPORTER", conflicts_with = "list")]
    second: Option<Named>,

    #[command(flatten)]
    memory: MemoryArguments,

    /// Lend host memory instead of a device's. Shows the test on any machine with Vulkan.
    #[arg(long, conflicts_with = "list")]
    host: bool,

    /// Which way bytes go, as the importer sees it.
    #[arg(long, value_enum, default_value = "both", conflicts_with = "list")]
    direction: DirectionArgument,

    /// Test everything, not some places. Content that changes meanwhile is lost.
    #[arg(long, conflicts_with_all = ["bytes", "list"])]
    full: bool,

    /// How much is tested without --full, like 2M: more gives a better figure of the speed.
    #[arg(long, value_name = "BYTES", default_value = "2M", value_parser = parse_bytes, conflicts_with = "list")]
    bytes: u64,

    /// Make the same bytes as a test before.
    #[arg(long, value_name = "NUMBER", conflicts_with = "list")]
    seed: Option<u64>,

    /// Let the certificate outlive reboots, if nothing else changes. What firmware sets up cannot be read.
    #[arg(long, conflicts_with_all = ["host", "list"])]
    outlives_reboots: bool,

    /// List the certificates that are stored, and why those that are void are.
    #[arg(long)]
    list: bool,
}

impl Arguments {
    /// The lender, unless it is host memory, and the importer, where one is named.
    fn pair(&self) -> Result<(Option<PciAddress>, Option<&Named>)> {
        let refuse = |why, next| Err(Error::new(Kind::InvalidInput, "verify a path", why).next(next));
        if self.host && self.memory.given().is_some() {
            let why =
                "--region and --range choose from a device's memory, and --host lends memory of its own";
            return refuse(why, "leave them out; or name the device: peervram verify 0000:01:00.0 vulkan");
        }
        match (self.host, &self.first, &self.second) {
            (true, importer, None) => Ok((None, importer.as_ref())),
            (true, _, Some(_)) => {
                refuse("with --host there is one device, the importer", "peervram verify --host vulkan")
            }
            (false, Some(Named::Device(address)), importer) => Ok((Some(*address), importer.as_ref())),
            (false, _, _) => refuse(
                "the lender is no PCI address",
                "write it as lspci -D does: peervram verify 0000:01:00.0 vulkan; or lend --host memory",
            ),
        }
    }
}

impl Arguments {
    /// Refuses what would have no effect on the list.
    fn check_list(&self) -> Result<()> {
        match self.memory.given() {
            Some(option) => {
                let why = format!("--list lists all certificates, whatever {option} says");
                Err(Error::new(Kind::InvalidInput, "list certificates", why).next("peervram verify --list"))
            }
            None => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DirectionArgument {
    Read,
    Write,
    Both,
}

impl From<DirectionArgument> for Direction {
    fn from(way: DirectionArgument) -> Self {
        match way {
            DirectionArgument::Read => Self::Read,
            DirectionArgument::Write => Self::Write,
            DirectionArgument::Both => Self::Both,
        }
    }
}

/// An importer as `peervram import` has it, or a PCI address.
#[derive(Debug, Clone)]
enum Named {
    Target(Target),
    Device(PciAddress),
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        text.parse().map(Self::Device).or_else(|_| text.parse().map(Self::Target))
    }
}

#[derive(Serialize)]
struct Report<'a> {
    certificate: &'a Certificate,
    path: &'static str,
    passed: bool,
    /// Whether attachments that ask for a verified path take it.
    granted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<ErrorReport>,
    /// Where it is kept; nowhere, where the folder cannot be written.
    file: Option<PathBuf>,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    if arguments.list {
        arguments.check_list()?;
        return list(Store::of_user(), json);
    }
    let (lender, importer) = arguments.pair()?;
    let selector = match importer {
        None => &Selector::default(),
        Some(Named::Target(Target::Vulkan(selector))) => selector,
        Some(Named::Target(Target::Drm(node))) => {
            let why = "a display has no engine that reads or writes for this process";
            return Err(unsupported(node.display(), why).into());
        }
        Some(Named::Device(address)) => {
            let why = "this program has no driver for it, so nobody can have its engine copy";
            return Err(unsupported(address, why).into());
        }
    };
    let importer = Arc::new(Instance::open()?.open_device(selector)?);
    match lender {
        Some(address) => {
            let device = Opened::open(address)?;
            let ranges = arguments.memory.ranges(&device)?;
            verify(arguments, json, device, ranges, importer)
        }
        None => {
            let memory = HostMemory::new(HOST_BYTES)?;
            let ranges = DmaRanges::whole(memory.region())?;
            verify(arguments, json, memory, ranges, importer)
        }
    }
}

fn unsupported(on: impl Display, why: &'static str) -> Error {
    Error::new(Kind::Unsupported, "verify a path", why).on(on).next(
        "name a Vulkan device (vulkan:WHICH), or have a driver of yours bring the engine, as docs/verify.md shows",
    )
}

fn verify<E: Exporter + 'static, I: backends::Importer>(
    arguments: &Arguments,
    json: bool,
    exporter: E,
    ranges: DmaRanges,
    importer: Arc<I>,
) -> anyhow::Result<ExitCode> {
    let direction = arguments.direction.into();
    let mut limits = Limits::default();
    limits.quick_bytes = arguments.bytes;
    limits.full = arguments.full;
    limits.seed = arguments.seed;
    limits.outlives_reboots = arguments.outlives_reboots;

    // What a CPU imports is what the CPU sees.
    let is_cpu = !importer.governed_by_p2pdma() && importer.pci_address().is_none();
    let lender = Lender::new(exporter);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let attachment: Attachment<I> = export.attach(importer, Trust::Unverified)?;
    let certificate = attachment.verify(direction, &limits, &mut progress_line())?;
    let granted = certificate.grants(&attachment.request(direction).window_only(is_cpu));
    // Host memory is other memory the next time.
    let is_kept = certificate.subject.lender.address.is_some();
    let file = is_kept.then(|| Store::of_user().keep(certificate.clone())).flatten();
    let report = Report {
        passed: certificate.passed(),
        path: attachment.path().name(),
        granted: granted.is_ok(),
        why_not: granted.as_ref().err().map(ErrorReport::from),
        certificate: &certificate,
        file,
    };
    if json {
        print_json(&report)?;
    } else {
        print(&report, &mut peervram_programs::output())?;
    }
    attachment.detach()?;
    Ok(ExitCode::from(u8::from(!report.passed)))
}

/// Says how far it is on a terminal, in one line that is written over; and nothing elsewhere.
fn progress_line() -> impl FnMut(&Progress) {
    let is_shown = io::stderr().is_terminal();
    let mut last: Option<Instant> = None;
    move |progress| {
        let is_over = progress.done_bytes >= progress.of_bytes;
        let is_early = last.is_some_and(|last| last.elapsed() < PROGRESS_INTERVAL);
        if !is_shown || (is_early && !is_over) {
            return;
        }
        last = Some(Instant::now());
        let percent = 100 * progress.done_bytes / progress.of_bytes.max(1);
        let mut output = io::stderr().lock();
        // To the start of the line, and nothing behind.
        let _ = write!(output, "\r\x1b[K{}: {} {percent} %", progress.engine, progress.direction);
        if is_over {
            let _ = write!(output, "\r\x1b[K");
        }
        let _ = output.flush();
    }
}

fn print(report: &Report, output: &mut impl Write) -> io::Result<()> {
    let subject = &report.certificate.subject;
    writeln!(
        output,
        "{}, region {}, to {} by {}\n",
        subject.lender, subject.region, subject.importer, report.path
    )?;
    let mut table = Table::new(&["direction", "engine", "copied", "longest copy", "bytes", "seen by"]);
    for test in &report.certificate.tests {
        let figure = test.figure.map_or("-".into(), |figure| {
            format!(
                "{} in {:.0} us, {:.1} MB/s",
                bytes::in_words(figure.size_bytes),
                figure.time_ns as f64 / 1e3,
                figure.mb_per_s()
            )
        });
        table.row([
            test.direction.to_string(),
            test.engine.clone(),
            bytes::in_words(test.copied_bytes),
            figure,
            if test.passed() { "right" } else { "WRONG" }.into(),
            test.observer.to_string(),
        ]);
    }
    table.print(output, columns())?;
    writeln!(output)?;
    for test in &report.certificate.tests {
        if let Some(failure) = &test.failure {
            writeln!(output, "{} by the {}: {failure}", test.direction, test.engine)?;
        }
    }
    match report.certificate.tests.first().map(|test| &test.faults) {
        Some(Faults::NotWatched(why)) => writeln!(output, "IOMMU faults were not watched: {why}")?,
        _ => writeln!(output, "IOMMU faults were watched in the kernel's log")?,
    }
    match &report.why_not {
        None => writeln!(output, "Attachments that ask for a verified path take this one.")?,
        Some(why) => writeln!(
            output,
            "Attachments that ask for a verified path do not take this one: {}",
            why.message()
        )?,
    }
    match &report.file {
        None if subject.lender.address.is_none() => {
            writeln!(output, "The certificate is not kept: host memory is other memory the next time")
        }
        Some(file) => writeln!(output, "Certificate: {}", file.display()),
        None => {
            writeln!(output, "The certificate is not kept: the state folder cannot be written (-v says why)")
        }
    }
}

#[derive(Serialize)]
struct Stored<'a> {
    file: Option<&'a PathBuf>,
    current: bool,
    void: Vec<String>,
    certificate: &'a Certificate,
}

#[derive(Serialize)]
struct IgnoredFile<'a> {
    file: &'a PathBuf,
    why: &'a str,
}

fn list(store: &Store, json: bool) -> anyhow::Result<ExitCode> {
    let listing = store.list()?;
    let stored: Vec<Stored> = (listing.certificates.iter())
        .map(|(file, certificate)| {
            let changes = certificate.is_current(&certificate.fingerprint_now()).err().unwrap_or_default();
            let void: Vec<String> = changes.iter().map(ToString::to_string).collect();
            Stored { file: file.as_ref(), current: void.is_empty(), void, certificate }
        })
        .collect();
    if json {
        let ignored: Vec<IgnoredFile> = (listing.ignored.iter())
            .map(|ignored| IgnoredFile { file: &ignored.file, why: &ignored.why })
            .collect();
        print_json(&serde_json::json!({
            "folder": store.folder(),
            "certificates": stored,
            "ignored": ignored,
        }))?;
    } else {
        print_list(store, &stored, &listing, &mut peervram_programs::output())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_list(
    store: &Store,
    stored: &[Stored],
    listing: &Listing,
    output: &mut impl Write,
) -> io::Result<()> {
    match store.folder() {
        Some(folder) if stored.is_empty() => writeln!(output, "No certificates in {}", folder.display())?,
        Some(folder) => writeln!(output, "Certificates in {}", folder.display())?,
        None => writeln!(output, "No state folder: neither XDG_STATE_HOME nor HOME is set")?,
    }
    for Stored { current, void, certificate, .. } in stored {
        let subject = &certificate.subject;
        let state = if *current { "current" } else { "VOID" };
        writeln!(
            output,
            "\n{}, region {}, to {}: {state}",
            subject.lender, subject.region, subject.importer
        )?;
        for change in void {
            writeln!(output, "  {change}")?;
        }
        for test in &certificate.tests {
            let bytes = if test.passed() { "right" } else { "WRONG" };
            let window = if test.observer == Observer::OwnerEngine { "" } else { ", window only" };
            writeln!(
                output,
                "  {:5} by {} through the {}: {bytes}{window}, {}",
                test.direction, test.path, test.engine, test.when
            )?;
        }
    }
    for ignored in &listing.ignored {
        writeln!(output, "\nIgnored: {}: {}", ignored.file.display(), ignored.why)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(failure: &serde_json::Value) -> Certificate {
        let test = serde_json::json!({
            "direction": "read",
            "engine": "transfer queue",
            "observer": "owner-cpu-through-bar",
            "path": "peer",
            "ranges": [{ "offset_bytes": 0, "length_bytes": 16 << 20 }],
            "full": false,
            "places": [{ "offset_bytes": 0, "length_bytes": 1 << 20, "name": "start" }],
            "seed": 7,
            "when": "2026-11-24T19:41:00Z",
            "copied_bytes": 4 << 20,
            "figure": { "size_bytes": 1 << 20, "time_ns": 80_000 },
            "faults": { "not-watched": "/dev/kmsg cannot be read: Permission denied" },
            "failure": failure,
        });
        let party = |address: &str| serde_json::json!({ "name": address, "address": address });
        let certificate = serde_json::json!({
            "format": 2,
            "machine": "unknown",
            "subject": { "lender": party("0000:01:00.0"), "region": 2, "importer": party("0000:02:00.0") },
            "outlives_reboots": false,
            "tests": [test],
            "fingerprint": { "the kernel command line": "quiet" },
        });
        serde_json::from_value(certificate).unwrap()
    }

    fn printed(certificate: &Certificate, why_not: Option<&Error>) -> String {
        let report = Report {
            certificate,
            path: "peer",
            passed: certificate.passed(),
            granted: why_not.is_none(),
            why_not: why_not.map(ErrorReport::from),
            file: Some("/state/peervram/a.json".into()),
        };
        let mut output = Vec::new();
        print(&report, &mut output).unwrap();
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn what_was_seen_and_by_whom_is_printed() {
        let refused =
            Error::new(Kind::Unverified, "trust a path", "it was seen through the same window only");
        let text = printed(&certificate(&serde_json::Value::Null), Some(&refused));
        for part in [
            "0000:01:00.0, region 2, to 0000:02:00.0 by peer",
            "1 MiB in 80 us, 13107.2 MB/s",
            "right  window only",
            "IOMMU faults were not watched: /dev/kmsg",
            "do not take this one: cannot trust a path",
            "Certificate: /state/peervram/a.json",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }

    #[test]
    fn wrong_bytes_are_printed_with_what_they_look_like() {
        let failure = serde_json::json!({ "wrong-bytes": {
            "first_wrong_bytes": 4096, "expected": "01", "seen": "ff", "wrong_bytes": 12, "of_bytes": 4096,
            "looks_like": "all ones, as where nobody answers",
        }});
        let text = printed(&certificate(&failure), None);
        assert!(text.contains("WRONG") && text.contains("the first at 0x1000"), "{text}");
        assert!(text.contains("they look like all ones"), "{text}");
    }

    #[test]
    fn a_list_says_what_voids() {
        let certificate = certificate(&serde_json::Value::Null);
        let void = vec!["the kernel command line was quiet and is loud".to_owned()];
        let stored = [Stored { file: None, current: false, void, certificate: &certificate }];
        let mut output = Vec::new();
        print_list(&Store::at("/state/peervram"), &stored, &Listing::default(), &mut output).unwrap();
        let text = String::from_utf8(output).unwrap();
        assert!(
            text.contains("to 0000:02:00.0: VOID\n  the kernel command line was quiet and is loud"),
            "{text}"
        );
        assert!(text.contains("read  by peer through the transfer queue: right, window only"), "{text}");
    }
}
