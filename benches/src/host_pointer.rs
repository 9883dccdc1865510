//! Attaching by host pointer: whether a large buffer costs more than a small one.
//!
//! It should not: the mapping is made without touching it, and the driver is told an address and a
//! length. Small and large take turns, attach by attach. What an attach builds is taken down
//! outside of the time.

use std::sync::Arc;

use anyhow::Result;
use peervram::backends::vulkan::{Instance, Selector};
use peervram::backends::{Aperture, DmaRange, DmaRanges, Exporter, Importer, RawBytes, Region};
use peervram::{Lender, Path, Trust};

use crate::report::{Report, Round, Unit};
use peervram_programs::Samples;

/// What 256 MiB may cost more than 4 KiB.
const LIMIT: f64 = 1.5;

const SMALL_BYTES: u64 = 4 << 10;
const LARGE_BYTES: u64 = 256 << 20;

/// Adds the attaches to `report`.
pub fn measure<E: Exporter>(lender: &Lender<E>, region: &Region, report: &mut Report) -> Result<()> {
    const WHAT: &str = "attach by host pointer";
    if region.size_bytes < LARGE_BYTES {
        report.skip(WHAT, format!("the lender has {} MiB, not 256", region.size_bytes >> 20));
        return Ok(());
    }
    let device = match Instance::open().and_then(|instance| instance.open_device(&Selector::Any)) {
        Ok(device) => Arc::new(device),
        Err(error) if error.kind().cannot_run_here() => {
            report.skip(WHAT, error.to_string());
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    if device.host_pointer_alignment_bytes().is_none_or(|alignment| alignment > SMALL_BYTES) {
        report.skip(WHAT, format!("{} imports no page by host pointer", device.name()));
        return Ok(());
    }
    let ranges = |size_bytes| DmaRanges::new(region, &[DmaRange::new(0, size_bytes)]);
    let (small, large) = (ranges(SMALL_BYTES)?, ranges(LARGE_BYTES)?);

    let mut rounds = Vec::new();
    let import = |ranges: &DmaRanges| device.import_host_pointer(lender.device().map(ranges)?);
    for round in 0..report.rounds {
        peervram_programs::note!("map and import: round {} of {}", round + 1, report.rounds);
        let (mut theirs, mut ours) = (Samples::default(), Samples::default());
        for _ in 0..report.cycles {
            device.release(theirs.time(|| import(&small))?)?;
            device.release(ours.time(|| import(&large))?)?;
        }
        rounds.push(Round { ours: ours.median(), theirs: theirs.median() });
    }
    report.row("map and import a host pointer, 256 MiB", "4 KiB", Unit::Ns, rounds, Some(LIMIT));

    let export = |ranges| lender.export(Aperture::owned(ranges, Arc::new(RawBytes)));
    let (small, large) = (export(small)?, export(large)?);
    let attach = |export: &peervram::Export| export.attach(Arc::clone(&device), Trust::Unverified);
    for export in [&small, &large] {
        let attachment = attach(export)?;
        if attachment.path() != Path::HostPointer {
            let name = device.name();
            report.skip("Export::attach by host pointer", format!("{name} takes the {}", attachment.path()));
            return Ok(());
        }
    }
    let mut rounds = Vec::new();
    for round in 0..report.rounds {
        peervram_programs::note!("attach by host pointer: round {} of {}", round + 1, report.rounds);
        let (mut theirs, mut ours) = (Samples::default(), Samples::default());
        for _ in 0..report.cycles {
            theirs.time(|| attach(&small))?.detach()?;
            ours.time(|| attach(&large))?.detach()?;
        }
        rounds.push(Round { ours: ours.median(), theirs: theirs.median() });
    }
    report.row("attach by host pointer, 256 MiB", "4 KiB", Unit::Ns, rounds, Some(LIMIT));
    Ok(())
}
