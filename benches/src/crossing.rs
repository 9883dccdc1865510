//! Export, import and close: peervram against the same calls made raw.
//!
//! One page, because then the calls themselves weigh least against what surrounds them. Three ways
//! take turns at one open device, a few crossings each, so that whatever else the machine does
//! meets all of them alike:
//!
//! - the library: `Lender::export`, `Export::attach`, `Attachment::detach`, `Export::close`;
//! - its backends: `vfio::Device::export`, `drm::Node::import`, `release`, `DmaBuf::close`;
//! - the C program `benches/raw/crossing.c`, which inherits the device: the four system calls.

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

use crate::machine::Machine;
use crate::pinned::Pinned;
use crate::report::{Report, Round, Unit};
use peervram_programs::Samples;

/// What peervram may add to the raw calls.
pub const LIMIT: f64 = 1.10;

/// Crossings until it is another way's turn. The first of a turn is not counted: it pays for the
/// change of turns (the raw program is another process).
pub const TURN: usize = 4;

/// Long enough for anything that does not hang.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A way to cross.
#[derive(Clone, Copy, Debug)]
enum Way {
    Library,
    Backends,
    Raw,
}

/// Every order, so that each way follows each other one equally often.
const ORDERS: [[Way; 3]; 6] = [
    [Way::Library, Way::Backends, Way::Raw],
    [Way::Raw, Way::Backends, Way::Library],
    [Way::Backends, Way::Raw, Way::Library],
    [Way::Raw, Way::Library, Way::Backends],
    [Way::Library, Way::Raw, Way::Backends],
    [Way::Backends, Way::Library, Way::Raw],
];

/// Adds the crossings to `report`.
pub fn measure(machine: &Machine, raw: Option<&Path>, report: &mut Report) -> Result<()> {
    const WHAT: &str = "crossing";
    let Machine::Vfio { address, region, node } = machine else {
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
    let Some(raw) = raw else {
        report.skip(WHAT, "there is nothing to compare with; compile benches/raw/crossing.c and give --raw");
        return Ok(());
    };
    let _pinned = Pinned::to_this_cpu()?;
    let lender = Lender::new(vfio::Device::open(*address)?);
    let page = DmaRange::new(0, page_size_bytes());
    let ranges = DmaRanges::new(lender.device().region(*region)?, &[page])?;
    let mut raw = Raw::start(raw, lender.device(), node, &ranges)?;
    let node = Arc::new(drm::Node::open(node)?);
    let aperture = Aperture::owned(ranges.clone(), Arc::new(RawBytes));

    let (mut library, mut backends) = (Vec::new(), Vec::new());
    // The first round warms up.
    for round in 0..=report.rounds {
        peervram_programs::note!("crossing: round {round} of {}", report.rounds);
        let (mut by_library, mut by_backends, mut by_raw) =
            (Samples::default(), Samples::default(), Samples::default());
        for turn in 0..report.cycles.div_ceil(TURN - 1) {
            for way in ORDERS[turn % ORDERS.len()] {
                match way {
                    Way::Library => take_by_library(&lender, &aperture, &node, &mut by_library),
                    Way::Backends => take_by_backends(lender.device(), &ranges, &node, &mut by_backends),
                    Way::Raw => raw.take(&mut by_raw),
                }
                .with_context(|| format!("crossing by {way:?}"))?;
            }
        }
        if round > 0 {
            let theirs = by_raw.median();
            library.push(Round { ours: by_library.median(), theirs });
            backends.push(Round { ours: by_backends.median(), theirs });
        }
    }
    // Before the device, which it holds open.
    raw.end()?;
    lender.close(PATIENCE)?;
    report.row("crossing: export, attach, detach, close", "raw ioctls in C", Unit::Ns, library, Some(LIMIT));
    report.row("crossing: the backends alone", "raw ioctls in C", Unit::Ns, backends, None);
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
        times.time_if(crossing > 0, || -> peervram::Result<()> {
            let export = lender.export(aperture.clone())?;
            let attachment = export.attach(Arc::clone(node), Trust::Unverified)?;
            attachment.detach()?;
            export.close().map_err(peervram::Error::from)
        })?;
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
        times.time_if(crossing > 0, || -> peervram::Result<()> {
            let dma_buf = device.export(ranges)?;
            node.release(node.import(&dma_buf)?)?;
            dma_buf.close();
            Ok(())
        })?;
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
