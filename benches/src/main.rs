//! What a crossing costs, and taking memory back: peervram against the same calls made raw, large against
//! small, and what building a mapping or using memory takes; what a driver costs against none; what two engines at once are worth. Ratios within
//! one run, by medians; no figure of another machine.
//!
//! [`machine`] finds the devices, [`crossing`] (with [`counter`]), [`revoke`], [`nvgrace`], [`descriptors`], [`access`], [`host_pointer`],
//! [`mapping`], [`staged`] and [`broker`] measure, one [`report`] comes out. `cargo xtask bench` runs this program in the lab's virtual
//! machine; it runs as well where there is a real device, or none.
#![forbid(unsafe_code)]

mod access;
mod broker;
mod counter;
mod crossing;
mod descriptors;
mod host_pointer;
mod machine;
mod mapping;
mod nvgrace;
mod pinned;
mod report;
mod revoke;
mod staged;

use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use peervram::Lender;
use peervram::backends::{PciAddress, vfio};
use peervram_programs::{CANNOT_RUN_HERE, FAILED};

use crossing::{Clock, Programs};
use machine::Participants;
use report::Report;

/// Measures what lending memory costs and prints one table.
///
/// The lender is the VFIO device of this machine, or host memory in its place where there is none.
/// A VFIO device is opened, which resets it: what its memory holds is lost.
#[derive(Parser)]
#[command(
    name = "peervram-benches",
    after_help = "Exit codes: 0 everything is within its limit; 1 something is not, or \
failed; 2 usage; 4 nothing of this can be measured here.

Examples:
  peervram-benches                              everything that this machine has devices for
  peervram-benches crossing --raw ./crossing    against the C program benches/raw/crossing.c
  peervram-benches mapping --host               without a device"
)]
struct Arguments {
    /// What to measure; everything if left out
    what: Vec<Benchmark>,
    /// The VFIO device whose memory is lent; found by itself if left out
    #[arg(long, value_name = "ADDRESS")]
    lender: Option<PciAddress>,
    /// The DRM node that imports; found by itself if left out
    #[arg(long, value_name = "PATH")]
    node: Option<PathBuf>,
    /// Lend host memory even where there is a VFIO device
    #[arg(long, conflicts_with_all = ["lender", "node"])]
    host: bool,
    /// benches/raw/crossing.c, compiled: what crossings are compared with
    #[arg(long, value_name = "PROGRAM")]
    raw: Option<PathBuf>,
    /// benches/raw/count.c, compiled: what counts a crossing's instructions, system calls and allocations
    #[arg(long, value_name = "PROGRAM")]
    count: Option<PathBuf>,
    /// The clock counts instructions, one for each nanosecond: QEMU's -icount shift=0
    #[arg(long)]
    instruction_clock: bool,
    /// How often both sides of a ratio take their turn
    #[arg(long, default_value = "15")]
    rounds: NonZero<usize>,
    /// How many crossings, attaches or batches of each side a round has; resets and mappings are fewer
    #[arg(long, default_value = "600")]
    cycles: NonZero<usize>,
    /// The CPU is emulated: times by themselves are shown, and have no limit
    #[arg(long)]
    emulated: bool,
    /// After the table print the figures, every round's, as one line of JSON
    #[arg(long)]
    json: bool,
}

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Benchmark {
    /// Export, import into a DRM node and close, against the same calls made raw in C
    Crossing,
    /// Reset the lender while a DRM node has 1, 8 or 64 imports, against the same ioctl made raw
    Revoke,
    /// Enter and finish an access, while nobody takes memory back
    Access,
    /// Attach Vulkan by host pointer, 256 MiB against 4 KiB
    HostPointer,
    /// Map the lender's memory and touch every page
    Mapping,
    /// Export, import and close of coherent memory, against the same of a plain VFIO device's
    Nvgrace,
    /// Give a model GPU's engine descriptors through its driver, against the same written by hand
    Descriptors,
    /// Copy from one model GPU to another by both engines at once, against one after the other
    Staged,
    /// Lend to other processes: a lease against a bare descriptor, clients against the owner's process
    Broker,
}

impl Benchmark {
    /// Whether host memory will do as well as a VFIO device.
    fn takes_any_lender(&self) -> bool {
        matches!(self, Benchmark::Access | Benchmark::HostPointer | Benchmark::Mapping)
    }
}

fn main() -> ExitCode {
    let code = match run(&Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            peervram_programs::note!("error: {error:#}");
            ExitCode::from(FAILED)
        }
    };
    peervram_programs::end(code)
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut report = Report::new(arguments.rounds.get(), arguments.cycles.get());
    let chosen = if arguments.what.is_empty() { Benchmark::value_variants() } else { &arguments.what };
    let machine = match arguments.host {
        true => Participants::Host,
        false => Participants::find(arguments.lender, arguments.node.clone())?,
    };
    report.lender = machine.to_string();

    if chosen.contains(&Benchmark::Crossing) {
        let programs = Programs { raw: arguments.raw.as_deref(), count: arguments.count.as_deref() };
        let clock = if arguments.instruction_clock { Clock::Instructions } else { Clock::Time };
        crossing::measure(&machine, programs, clock, &mut report)?;
    }
    if chosen.contains(&Benchmark::Revoke) {
        revoke::measure(&machine, &mut report)?;
    }
    if chosen.contains(&Benchmark::Nvgrace) {
        nvgrace::measure(&machine, &mut report)?;
    }
    if chosen.contains(&Benchmark::Descriptors) {
        descriptors::measure(&machine, &mut report)?;
    }
    if chosen.contains(&Benchmark::Staged) {
        staged::measure(&machine, &mut report)?;
    }
    if chosen.contains(&Benchmark::Broker) {
        broker::measure(&machine, &mut report)?;
    }
    match &machine {
        // Opening the device for nothing would reset it for nothing.
        _ if !chosen.iter().any(Benchmark::takes_any_lender) => {}
        Participants::Vfio { address, region, .. } => {
            let device = vfio::Device::open(*address)?;
            let region = device.region(*region)?.clone();
            measure_memory(&Lender::new(device), &region, chosen, arguments.emulated, &mut report)?;
        }
        Participants::Host => {
            let memory = machine::host_memory()?;
            let region = memory.region().clone();
            measure_memory(&Lender::new(memory), &region, chosen, arguments.emulated, &mut report)?;
        }
    }

    let mut output = peervram_programs::output();
    report.print(&mut output)?;
    if arguments.json {
        report.print_json(&mut output)?;
    }
    Ok(ExitCode::from(match () {
        () if report.is_empty() => CANNOT_RUN_HERE,
        () if report.is_over() => FAILED,
        () => 0,
    }))
}

/// What any lender can do, a VFIO device or not.
fn measure_memory<E: peervram::backends::Exporter>(
    lender: &Lender<E>,
    region: &peervram::backends::Region,
    chosen: &[Benchmark],
    emulated: bool,
    report: &mut Report,
) -> Result<()> {
    if chosen.contains(&Benchmark::Access) {
        access::measure(lender, region, !emulated, report)?;
    }
    if chosen.contains(&Benchmark::HostPointer) {
        host_pointer::measure(lender, region, report)?;
    }
    if chosen.contains(&Benchmark::Mapping) {
        mapping::measure(lender.device(), region, report)?;
    }
    Ok(())
}
