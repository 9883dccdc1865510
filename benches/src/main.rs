//! What a crossing costs: peervram against the same calls made raw, large against small, and what
//! building a mapping takes; what a driver costs against none. Ratios within one run, by medians; no figure of another machine.
//!
//! [`machine`] finds the devices, [`crossing`], [`descriptors`], [`host_pointer`] and [`mapping`]
//! measure, one [`report`] comes out. `cargo xtask bench` runs this program in the lab's virtual machine; it runs
//! as well where there is a real device, or none.
#![forbid(unsafe_code)]

mod crossing;
mod descriptors;
mod host_pointer;
mod machine;
mod mapping;
mod report;
mod samples;

use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use peervram::Lender;
use peervram::backends::{PciAddress, vfio};

use machine::Machine;
use report::Report;

/// Something was tried and went wrong, or a ratio is over its limit.
const FAILED: u8 = 1;
/// Nothing of what was asked for can be measured here.
const CANNOT_RUN_HERE: u8 = 4;

/// Measures what lending memory costs and prints one table.
///
/// The lender is the VFIO device of this machine, or host memory in its place where there is none.
/// A VFIO device is opened, which resets it: what its memory holds is lost.
#[derive(Parser)]
#[command(
    name = "peervram-benches",
    after_help = "Exit codes: 0 every ratio is within its limit; 1 one is over it, or something \
failed; 2 usage; 4 nothing of this can be measured here.

Examples:
  peervram-benches                              everything that this machine has devices for
  peervram-benches crossing --raw ./crossing    against the C program benches/raw/crossing.c
  peervram-benches mapping --host               without a device"
)]
struct Arguments {
    /// What to measure; everything if left out
    what: Vec<What>,
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
    /// How often both sides of a ratio take their turn
    #[arg(long, default_value = "15")]
    rounds: NonZero<usize>,
    /// How many crossings, attaches or batches of each side a round has
    #[arg(long, default_value = "600")]
    cycles: NonZero<usize>,
    /// After the table print the figures, every round's, as one line of JSON
    #[arg(long)]
    json: bool,
}

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Export, import into a DRM node and close, against the same calls made raw in C
    Crossing,
    /// Attach Vulkan by host pointer, 256 MiB against 4 KiB
    HostPointer,
    /// Map the lender's memory and touch every page
    Mapping,
    /// Give a model GPU's engine descriptors through its driver, against the same written by hand
    Descriptors,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut report = Report::new(arguments.rounds.get(), arguments.cycles.get());
    let chosen = if arguments.what.is_empty() { What::value_variants() } else { &arguments.what };
    let machine = match arguments.host {
        true => Machine::Host,
        false => Machine::find(arguments.lender, arguments.node.clone())?,
    };
    report.lender = machine.to_string();

    if chosen.contains(&What::Crossing) {
        crossing::measure(&machine, arguments.raw.as_deref(), &mut report)?;
    }
    if chosen.contains(&What::Descriptors) {
        descriptors::measure(&machine, &mut report)?;
    }
    match &machine {
        // Opening the device for nothing would reset it for nothing.
        _ if chosen.iter().all(|what| matches!(what, What::Crossing | What::Descriptors)) => {}
        Machine::Vfio { address, region, .. } => {
            let device = vfio::Device::open(*address)?;
            let region = device.region(*region)?.clone();
            measure_memory(&Lender::new(device), &region, chosen, &mut report)?;
        }
        Machine::Host => {
            let memory = machine::host_memory()?;
            let region = memory.region().clone();
            measure_memory(&Lender::new(memory), &region, chosen, &mut report)?;
        }
    }

    let mut output = std::io::stdout().lock();
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
    chosen: &[What],
    report: &mut Report,
) -> Result<()> {
    if chosen.contains(&What::HostPointer) {
        host_pointer::measure(lender, region, report)?;
    }
    if chosen.contains(&What::Mapping) {
        mapping::measure(lender.device(), region, report)?;
    }
    Ok(())
}
