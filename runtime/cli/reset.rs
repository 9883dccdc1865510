//! `peervram reset`: take a device's memory back by a reset, and show whom that waits for.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use peervram::backends::holders::Census;
use peervram::backends::vulkan::Instance;
use peervram::backends::{Aperture, DmaRange, DmaRanges, Importer, PciAddress, RawBytes, drm};
use peervram::{
    Attachment, Direction, Error, Event, EventKind, Export, Kind, Lender, Result, RevokeOptions, Trust,
};
use peervram_programs::say;
use serde::Serialize;

use super::ending::{ErrorReport, code_of, print_json};
use super::import::Target;
use super::opened::Opened;

/// How much is lent to the importers that watch: all of it is taken back in any case.
const LENT_BYTES: u64 = 1 << 20;

/// Reset a VFIO device, with what happens meanwhile shown as it happens.
///
/// Everyone who uses the device's memory is told and waited for, then the kernel is asked. With --with,
/// other devices import the memory first, so that you see whether a reset under such an import comes back,
/// how long it takes, and whether the import is good again afterwards. Without it the device is only reset.
///
/// The kernel waits for importers without a limit, and nothing can end that. When it is not back after
/// --call-limit-ms, this says which devices and processes it waits for, where in the kernel, and what to do.
///
/// The device must not be open elsewhere, and opening it may reset it too. Its memory's content is lost.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram reset 01:00.0                                     by the best way that the kernel knows\n  \
    peervram reset 01:00.0 --hot                               its whole slot or bus; the set is shown first\n  \
    peervram reset 01:00.0 --with vulkan --with /dev/dri/card0 under imports of both\n\n\
Exit codes: 0 reset, and every import is good again; 1 not, or stuck; 2 wrong usage; 4 cannot run on this\n\
machine.")]
pub struct Arguments {
    /// The device's PCI address.
    device: PciAddress,

    /// Reset the function by its own configuration space (FLR). The kernel does not say whether it worked.
    #[arg(long, conflicts_with = "hot")]
    function: bool,

    /// Reset the whole slot or bus, and every device on it.
    #[arg(long)]
    hot: bool,

    /// Who imports the memory first: `vulkan`, `vulkan:WHICH`, or a DRM node like /dev/dri/card0. May be given
    /// several times.
    #[arg(long = "with", value_name = "IMPORTER")]
    importers: Vec<Target>,

    /// How long those who use the memory have to finish.
    #[arg(long, value_name = "N", default_value_t = 5000)]
    timeout_ms: u64,

    /// Go on at the timeout, whoever is late, instead of calling it off.
    #[arg(long)]
    go_on: bool,

    /// After how long the kernel's call counts as stuck.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    call_limit_ms: u64,
}

#[derive(Serialize)]
struct Report {
    device: String,
    how: &'static str,
    /// Every device that is reset.
    reset: Vec<String>,
    events: Vec<EventReport>,
    took_ms: f64,
    generation: u64,
    importers: Vec<ImporterReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorReport>,
}

#[derive(Serialize)]
pub struct EventReport {
    at_ms: f64,
    event: &'static str,
    generation: u64,
    text: String,
}

#[derive(Serialize)]
pub struct ImporterReport {
    importer: String,
    path: &'static str,
    /// Whether it can be used again.
    pub good: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorReport>,
}

/// An attachment of whatever importer.
pub trait Attached {
    /// Enters and leaves.
    ///
    /// # Errors
    /// The memory is away, or the import is of an earlier generation.
    fn enter_once(&self) -> Result<()>;

    /// Imports again where that is needed, and enters once.
    fn try_again(&self) -> ImporterReport;
}

impl<I: Importer> Attached for Attachment<I> {
    fn enter_once(&self) -> Result<()> {
        self.enter(Direction::Read)?.finish().check()
    }

    fn try_again(&self) -> ImporterReport {
        let again = || -> Result<()> {
            if !self.is_current() {
                self.current()?;
            }
            self.enter_once()
        };
        let result = again();
        ImporterReport {
            importer: self.importer().name(),
            path: self.path().name(),
            good: result.is_ok(),
            error: result.as_ref().err().map(ErrorReport::from),
        }
    }
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    let device = open(arguments.device)?;
    let reset: Vec<String> = match arguments.hot {
        true => device.as_ref().reset_set()?.iter().map(ToString::to_string).collect(),
        false => vec![arguments.device.to_string()],
    };
    let memory = device.memory()?;
    let lent = DmaRange::new(0, memory.size_bytes.min(LENT_BYTES));
    let ranges = DmaRanges::new(memory, &[lent])?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let attachments = arguments.importers.iter().map(|to| attach(&export, to)).collect::<Result<Vec<_>>>()?;

    let how = match (arguments.hot, arguments.function) {
        (true, _) => "hot",
        (_, true) => "function",
        _ => "device",
    };
    if !json && arguments.hot {
        say!("reset with it: {}", reset.join(", "));
    }
    let begun = Instant::now();
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&events);
    let subscription = lender.on_event(move |event| {
        let report = EventReport::new(event, begun.elapsed());
        if !json {
            // Nobody reads it any more: the reset goes on.
            let _ = writeln!(io::stdout().lock(), "{report}");
        }
        log.lock().unwrap_or_else(PoisonError::into_inner).push(report);
    });
    let mut options = RevokeOptions::within(Duration::from_millis(arguments.timeout_ms))
        .with_call_limit(Duration::from_millis(arguments.call_limit_ms));
    if arguments.go_on {
        options = options.or_go_on();
    }
    let result = match how {
        "hot" => lender.hot_reset(&[], options),
        "function" => lender.function_level_reset(options),
        _ => lender.reset(options),
    };
    let took_ms = begun.elapsed().as_secs_f64() * 1e3;
    drop(subscription);

    let importers: Vec<ImporterReport> = attachments.iter().map(|attached| attached.try_again()).collect();
    let all_good = importers.iter().all(|importer| importer.good);
    let report = Report {
        device: arguments.device.to_string(),
        how,
        reset,
        events: std::mem::take(&mut events.lock().unwrap_or_else(PoisonError::into_inner)),
        took_ms,
        generation: lender.generation(),
        importers,
        error: result.as_ref().err().map(ErrorReport::from),
    };
    if json {
        print_json(&report)?;
        return Ok(code(result.as_ref().err(), all_good));
    }
    print(&report, result.is_ok(), &mut peervram_programs::output())?;
    result?;
    Ok(code(None, all_good))
}

/// What it ends with, with --json and without.
fn code(error: Option<&Error>, all_good: bool) -> ExitCode {
    match error {
        Some(error) => code_of(error),
        None => ExitCode::from(u8::from(!all_good)),
    }
}

/// Opens the device; where somebody else has it, says who.
pub fn open(address: PciAddress) -> Result<Opened> {
    Opened::open(address).map_err(|error| {
        if error.kind() != Kind::Busy {
            return error;
        }
        let census = Census::take();
        let holders = census.device(address).map_or(&[][..], |device| &device.holders[..]);
        let names: Vec<String> = holders.iter().map(|holder| holder.process.to_string()).collect();
        match names.is_empty() {
            true => error.next(format!("sudo peervram holders {address} says who has it")),
            false => error.next(format!("have {} reset it, or end it", names.join(", "))),
        }
    })
}

/// Attaches the importer that `to` names, by the first path that works.
///
/// # Errors
/// It is not there, or takes no path.
pub fn attach(export: &Export, to: &Target) -> Result<Box<dyn Attached>> {
    Ok(match to {
        Target::Vulkan(selector) => {
            let device = Arc::new(Instance::open()?.open_device(selector)?);
            Box::new(export.attach(device, Trust::Unverified)?)
        }
        Target::Drm(path) => {
            let node = Arc::new(drm::Node::open(path)?);
            Box::new(export.attach(node, Trust::Unverified)?)
        }
    })
}

impl EventReport {
    pub fn new(event: &Event, at: Duration) -> Self {
        let text = match &event.kind {
            EventKind::Draining { cause, deadline } => {
                let left = deadline.saturating_duration_since(Instant::now());
                format!("{cause}: everyone is told, and has {} ms", left.as_millis())
            }
            EventKind::Late { who } => format!("late: {}", who.join("; ")),
            EventKind::CalledOff => "called off: nothing was taken back".into(),
            EventKind::Stuck(stuck) => stuck.to_string(),
            EventKind::Revoked { cause } => format!("taken back, and away: {cause}"),
            EventKind::Restored => "taken back, and there again: its content is unknown".into(),
            EventKind::NotReady(why) => format!("the kernel is back, and the device is {why}"),
            EventKind::Gone => "gone for good".into(),
            EventKind::SlowCallback(slow) => slow.to_string(),
            other => other.code().into(),
        };
        let at_ms = at.as_secs_f64() * 1e3;
        Self { at_ms, event: event.kind.code(), generation: event.generation, text }
    }
}

impl fmt::Display for EventReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:8.1} ms  {:10}  {}", self.at_ms, self.event, self.text)
    }
}

fn print(report: &Report, is_reset: bool, output: &mut impl Write) -> io::Result<()> {
    for importer in &report.importers {
        let state = match &importer.error {
            None => "good again",
            Some(error) => error.message(),
        };
        writeln!(output, "{}, by {}: {state}", importer.importer, importer.path)?;
    }
    if is_reset {
        writeln!(
            output,
            "{} was reset in {:.0} ms; its memory is of generation {} now",
            report.reset.join(", "),
            report.took_ms,
            report.generation
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ending;

    #[test]
    fn it_ends_with_one_code_whether_it_prints_text_or_json() {
        for kind in
            [Kind::InvalidInput, Kind::PermissionDenied, Kind::GroupNotViable, Kind::Stuck, Kind::TimedOut]
        {
            let error = Error::new(kind, "reset a device", "for a test");
            // As text the error is what `run` gives back.
            let as_text = ending::of(Err(error.clone().into()), false);
            assert_eq!(code(Some(&error), true), as_text, "{kind:?}");
            assert_ne!(as_text, ExitCode::SUCCESS);
        }
        assert_eq!(code(None, true), ExitCode::SUCCESS);
        assert_eq!(code(None, false), ExitCode::FAILURE);
    }
}
