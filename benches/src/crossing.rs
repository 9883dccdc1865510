//! Export, import and close: peervram against the same calls made raw.
//!
//! One page, because then the calls themselves weigh least against what surrounds them. Three ways:
//!
//! - the library: `Lender::export`, `Export::attach`, `Attachment::detach`, `Export::close`;
//! - its backends: `vfio::Device::export`, `drm::Node::import`, `release`, `DmaBuf::close`;
//! - the C program `benches/raw/crossing.c`, which inherits the device: four system calls. The fifth of the others names
//!   the dma-buf.
//!
//! What has a limit is counted, for an emulated CPU bends every time: system calls, user-space instructions and allocations
//! of one crossing ([`Counter`]), and the guest's instructions beside the raw calls' where the clock
//! [counts](Clock::Instructions) them. For that, and for the times where it does not, the ways take turns at one open device,
//! a few crossings each, so that whatever else the machine does meets all of them alike.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, Importer, RawBytes, drm, page_size_bytes, vfio,
};
use peervram::{Lender, LentDevice, Trust};

use crate::counter::{Counter, Counts};
use crate::machine::Participants;
use crate::pinned::Pinned;
use crate::report::{Limit, Report, Round, Unit};
use peervram_programs::Samples;

/// What coherent memory may cost beside plain memory, in time.
pub const LIMIT: f64 = 1.10;

/// How many of the guest's instructions a crossing by the library may take, beside the raw calls'.
const INSTRUCTIONS_LIMIT: f64 = 1.12;

/// The system calls of a crossing: export, name, import, close the handle, close the dma-buf. No more, and no fewer.
const SYSTEM_CALLS: f64 = 5.0;
/// User-space instructions, and allocations, of a crossing by the library and by the backends alone.
const OF_THE_LIBRARY: (f64, f64) = (4500.0, 6.0);
const OF_THE_BACKENDS: (f64, f64) = (720.0, 0.0);

/// How many crossings of each way are counted, after as many that are not.
const COUNTED: usize = 9;

/// Crossings until it is another way's turn. The first of a turn is not counted: it pays for the
/// change of turns (the raw program is another process).
pub const TURN: usize = 4;

/// Long enough for anything that does not hang.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A way to cross.
#[derive(Clone, Copy, Debug)]
enum Level {
    Library,
    Backends,
    Raw,
}

/// Every order, so that each way follows each other one equally often.
const ORDERS: [[Level; 3]; 6] = [
    [Level::Library, Level::Backends, Level::Raw],
    [Level::Raw, Level::Backends, Level::Library],
    [Level::Backends, Level::Raw, Level::Library],
    [Level::Raw, Level::Library, Level::Backends],
    [Level::Library, Level::Raw, Level::Backends],
    [Level::Backends, Level::Library, Level::Raw],
];

/// What the machine's clock goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Time.
    Time,
    /// One nanosecond for each instruction of the guest: QEMU's `-icount shift=0`.
    Instructions,
}

/// The C programs beside this one.
#[derive(Clone, Copy)]
pub struct Programs<'a> {
    /// `benches/raw/crossing.c`.
    pub raw: Option<&'a Path>,
    /// `benches/raw/count.c`.
    pub count: Option<&'a Path>,
}

/// Adds the crossings to `report`.
pub fn measure(
    machine: &Participants,
    programs: Programs<'_>,
    clock: Clock,
    report: &mut Report,
) -> Result<()> {
    const WHAT: &str = "crossing";
    let Participants::Vfio { address, region, node } = machine else {
        report.skip(WHAT, "no PCI device is bound to VFIO; `cargo xtask bench` boots a machine that has one");
        return Ok(());
    };
    let node = match node {
        Ok(node) => node,
        Err(why) => {
            report.skip(WHAT, why);
            return Ok(());
        }
    };
    let Some(raw) = programs.raw else {
        report.skip(WHAT, "there is nothing to compare with; compile benches/raw/crossing.c and give --raw");
        return Ok(());
    };
    let _pinned = Pinned::to_this_cpu()?;
    let lender = Lender::new(vfio::Device::open(*address)?);
    let page = DmaRange::new(0, page_size_bytes());
    let ranges = DmaRanges::new(lender.device().region(*region)?, &[page])?;
    let path = node;
    let node = Arc::new(drm::Node::open(path)?);
    let aperture = Aperture::owned(ranges.clone(), Arc::new(RawBytes));

    match programs.count {
        Some(_) if clock == Clock::Instructions => {}
        Some(program) => count(program, &lender, &aperture, &node, report)?,
        None => report
            .skip("crossing: counts", "there is no counter; compile benches/raw/count.c and give --count"),
    }

    let mut raw = Raw::start(raw, lender.device(), path, &ranges)?;
    let (mut library, mut backends, mut seldom) = (Vec::new(), Vec::new(), Vec::new());
    // The first round warms up.
    for round in 0..=report.rounds {
        peervram_programs::note!("crossing: round {round} of {}", report.rounds);
        let (mut by_library, mut by_backends, mut by_raw) =
            (Samples::default(), Samples::default(), Samples::default());
        for turn in 0..report.cycles.div_ceil(TURN - 1) {
            for way in ORDERS[turn % ORDERS.len()] {
                match way {
                    Level::Library => take_by_library(&lender, &aperture, &node, &mut by_library),
                    Level::Backends => take_by_backends(lender.device(), &ranges, &node, &mut by_backends),
                    Level::Raw => raw.take(&mut by_raw),
                }
                .with_context(|| format!("crossing by {way:?}"))?;
            }
        }
        if round > 0 {
            // Instructions come in two modes: what the kernel puts off it does in some crossings, and not in others.
            let modes = |samples: &Samples| match clock {
                Clock::Time => (samples.median(), None),
                Clock::Instructions => {
                    let (lower, upper) = samples.modes();
                    (lower.median(), upper.map(|upper| upper.median()))
                }
            };
            let ((theirs, theirs_seldom), (ours, ours_seldom)) = (modes(&by_raw), modes(&by_library));
            library.push(Round { ours, theirs });
            backends.push(Round { ours: modes(&by_backends).0, theirs });
            seldom.extend(ours_seldom.zip(theirs_seldom).map(|(ours, theirs)| Round { ours, theirs }));
        }
    }
    // Before the device, which it holds open.
    raw.end()?;
    lender.close(PATIENCE)?;
    let (unit, limit) = match clock {
        Clock::Time => (Unit::Ns, None),
        Clock::Instructions => (Unit::Instructions, Some(INSTRUCTIONS_LIMIT)),
    };
    report.row("crossing: export, attach, detach, close", "raw ioctls in C", unit, library, limit);
    report.row("crossing: the backends alone", "raw ioctls in C", unit, backends, None);
    if !seldom.is_empty() {
        report.row("crossing: the larger mode of the library", "raw ioctls in C", unit, seldom, None);
    }
    Ok(())
}

/// What a crossing costs in user space.
fn count(
    program: &Path,
    lender: &Lender<vfio::Device>,
    aperture: &Aperture,
    node: &Arc<drm::Node>,
    report: &mut Report,
) -> Result<()> {
    peervram_programs::note!("crossing: counting");
    let ranges = aperture.ranges();
    for _ in 0..COUNTED {
        cross_by_backends(lender.device(), ranges, node)?;
        cross_by_library(lender, aperture, node)?;
    }
    let mut counter = Counter::attach(program, 3 * COUNTED)?;
    let (mut backends, mut library) = (Vec::new(), Vec::new());
    for _ in 0..COUNTED {
        let ((), nothing) = counter.count(|| ())?;
        let (crossed, counts) = counter.count(|| cross_by_backends(lender.device(), ranges, node))?;
        crossed?;
        backends.push(counts.beyond(nothing));
        let (crossed, counts) = counter.count(|| cross_by_library(lender, aperture, node))?;
        crossed?;
        library.push(counts.beyond(nothing));
    }
    counter.end()?;
    for (whose, counts, (instructions, allocations)) in
        [("the library", library, OF_THE_LIBRARY), ("the backends alone", backends, OF_THE_BACKENDS)]
    {
        let of = |figure: fn(&Counts) -> u64| counts.iter().map(|counts| figure(counts) as f64).collect();
        let mut row = |what: &str, unit, figures, limit| {
            report.count(format!("crossing: {what} of {whose}"), unit, figures, limit);
        };
        let (calls, of_user) = (of(|counts| counts.system_calls), of(|counts| counts.instructions));
        row("system calls", Unit::Calls, calls, Limit::Exactly(SYSTEM_CALLS));
        row("user-space instructions", Unit::Instructions, of_user, Limit::AtMost(instructions));
        row("allocations", Unit::Calls, of(|counts| counts.allocations), Limit::AtMost(allocations));
    }
    Ok(())
}

/// A crossing, whatever lends.
fn cross_by_library<E: Exporter + 'static>(
    lender: &Lender<E>,
    aperture: &Aperture,
    node: &Arc<drm::Node>,
) -> peervram::Result<()> {
    let export = lender.export(aperture.clone())?;
    let attachment = export.attach(Arc::clone(node), Trust::Unverified)?;
    attachment.detach()?;
    export.close().map_err(peervram::Error::from)
}

fn cross_by_backends(
    device: LentDevice<'_, vfio::Device>,
    ranges: &DmaRanges,
    node: &drm::Node,
) -> peervram::Result<()> {
    let dma_buf = device.export(ranges)?;
    node.release(node.import(&dma_buf)?)?;
    dma_buf.close();
    Ok(())
}

/// A turn of crossings, whatever lends.
pub fn take_by_library<E: Exporter + 'static>(
    lender: &Lender<E>,
    aperture: &Aperture,
    node: &Arc<drm::Node>,
    times: &mut Samples,
) -> Result<()> {
    for crossing in 0..TURN {
        times.time_if(crossing > 0, || cross_by_library(lender, aperture, node))?;
    }
    Ok(())
}

fn take_by_backends(
    device: LentDevice<'_, vfio::Device>,
    ranges: &DmaRanges,
    node: &drm::Node,
    times: &mut Samples,
) -> Result<()> {
    for crossing in 0..TURN {
        times.time_if(crossing > 0, || cross_by_backends(device, ranges, node))?;
    }
    Ok(())
}

/// The C program, waiting for its turn.
struct Raw {
    program: Child,
    turns: ChildStdin,
    times: BufReader<ChildStdout>,
}

impl Raw {
    /// Starts it with the same memory to cross, on a DRM node of its own.
    fn start(program: &Path, device: impl AsFd, node: &Path, ranges: &DmaRanges) -> Result<Raw> {
        // A duplicate is inherited, which the device's own descriptor is not.
        let device = rustix::io::dup(device.as_fd()).context("duplicating the device's descriptor")?;
        let mut child = Command::new(program)
            .arg(device.as_raw_fd().to_string())
            .arg(node)
            .args([u64::from(ranges.region_index()), ranges.size_bytes(), TURN as u64].map(|n| n.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let (turns, times) = child.stdin.take().zip(child.stdout.take()).context("it has no pipes")?;
        Ok(Raw { program: child, turns, times: BufReader::new(times) })
    }

    fn take(&mut self, times: &mut Samples) -> Result<()> {
        self.turns.write_all(b"\n").context("it does not listen")?;
        let mut line = String::new();
        if self.times.read_line(&mut line)? == 0 {
            bail!("it ended early, and has said why");
        }
        for word in line.split_whitespace().skip(1) {
            times.push(word.parse().with_context(|| format!("it printed {line:?}"))?);
        }
        Ok(())
    }

    /// Ends it, and with it the other hold on the device.
    fn end(self) -> Result<()> {
        let Raw { mut program, turns, .. } = self;
        drop(turns);
        let status = program.wait()?;
        if !status.success() {
            bail!("the raw crossing: {status}");
        }
        Ok(())
    }
}
