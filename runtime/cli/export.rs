//! `peervram export`: make a dma-buf of a device's memory, and hand it to a program.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use peervram::backends::{Aperture, PciAddress, RawBytes, vfio};
use peervram::{Error, Kind, Lender};
use peervram_programs::bytes;
use peervram_programs::say;
use serde::Serialize;

use super::arguments::MemoryArguments;
use super::child;
use super::ending::print_json;
use super::opened::Opened;

/// Export memory of a VFIO device as a dma-buf.
///
/// Without a COMMAND it tries the export, says what came of it, and closes everything. With one, the
/// command inherits the dma-buf: every {fd} in its arguments becomes the descriptor's number, and
/// PEERVRAM_FD names it too. The device stays open until the command has ended.
#[derive(Args)]
#[command(after_help = "Example:\n  \
    peervram export 01:00.0 --range 0+4M -- peervram import fd:{fd} --to /dev/dri/card0 --show 640x480")]
pub struct Arguments {
    /// The device, by PCI address. It must be bound to vfio-pci, or to nvgrace_gpu_vfio_pci.
    device: PciAddress,

    #[command(flatten)]
    memory: MemoryArguments,

    /// The program that inherits the dma-buf, and its arguments.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Serialize)]
struct Report {
    device: String,
    interface: &'static str,
    region: u32,
    ranges: usize,
    size_bytes: u64,
    inode: u64,
    export_us: f64,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    if json && !arguments.command.is_empty() {
        let why = "--json is about an export that is tried; with a COMMAND the output is the command's";
        let next = "leave one of them out";
        return Err(Error::new(Kind::InvalidInput, "export memory", why)
            .on(arguments.device)
            .next(next)
            .into());
    }
    let device = Opened::open(arguments.device)?;
    let interface = device.as_ref().interface().map_or("adopted", vfio::Interface::name);
    let ranges = arguments.memory.ranges(&device)?;
    let lender = Lender::new(device);

    let start = Instant::now();
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let dma_buf = export.dma_buf().map_err(Error::clone)?;
    let export_us = start.elapsed().as_secs_f64() * 1e6;

    let ranges = export.aperture().ranges();
    let report = Report {
        device: arguments.device.to_string(),
        interface,
        region: ranges.region_index(),
        ranges: ranges.as_slice().len(),
        size_bytes: export.size_bytes(),
        inode: dma_buf.inode()?,
        export_us,
    };
    let Some((program, rest)) = arguments.command.split_first() else {
        if json {
            print_json(&report)?;
        } else {
            say!(
                "{}: {} of region {} in {} range(s), dma-buf inode {}, exported in {:.0} us by {}",
                report.device,
                bytes::in_words(report.size_bytes),
                report.region,
                report.ranges,
                report.inode,
                report.export_us,
                report.interface,
            );
        }
        return Ok(ExitCode::SUCCESS);
    };

    let (mut command, _inherited) = child::inheriting(dma_buf, program, rest)?;
    let status = command.status().with_context(|| format!("cannot start {program}"))?;
    Ok(match status.code() {
        Some(code) => ExitCode::from(code as u8),
        None => ExitCode::FAILURE,
    })
}
