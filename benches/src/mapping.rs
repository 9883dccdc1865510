//! Building a mapping: `Exporter::map` and the first touch of every page, for each MiB.
//!
//! Compared with touching the same pages again, when they are mapped: the difference is what the
//! kernel does to map them.

use anyhow::Result;
use peervram::LentDevice;
use peervram::backends::{DmaRange, DmaRanges, Exporter, Mapping, Region, page_size_bytes};

use crate::report::{Report, Round, Unit};
use peervram_programs::Samples;

const MIB: u64 = 1 << 20;

/// How many mappings a round makes.
const CYCLES: usize = 5;

const SIZES: [(&str, u64); 4] =
    [("4 KiB", 4 << 10), ("2 MiB", 2 * MIB), ("64 MiB", 64 * MIB), ("256 MiB", 256 * MIB)];

/// Adds the mappings to `report`.
pub fn measure<E: Exporter>(device: LentDevice<'_, E>, region: &Region, report: &mut Report) -> Result<()> {
    for (size, size_bytes) in SIZES {
        if size_bytes > region.size_bytes {
            report.skip("mapping", format!("{size} are more than the lender has"));
            continue;
        }
        let ranges = DmaRanges::new(region, &[DmaRange::new(0, size_bytes)])?;
        let per_mib = MIB as f64 / size_bytes as f64;
        let mut rounds = Vec::new();
        // The first round warms up: host memory is allocated by it.
        for round in 0..=report.rounds {
            peervram_programs::note!("mapping {size}: round {round} of {}", report.rounds);
            let (mut built, mut again) = (Samples::default(), Samples::default());
            for _ in 0..CYCLES {
                let mapping = built.time(|| -> peervram::Result<_> {
                    let mapping = device.map(&ranges)?;
                    touch(&mapping)?;
                    Ok(mapping)
                })?;
                again.time(|| touch(&mapping))?;
            }
            if round > 0 {
                rounds.push(Round { ours: built.median() * per_mib, theirs: again.median() * per_mib });
            }
        }
        report.row(format!("map and touch first, {size}"), "touch again", Unit::NsPerMib, rounds, None);
    }
    Ok(())
}

/// Reads a word of every page.
fn touch(mapping: &Mapping) -> peervram::Result<()> {
    let mut word = [0; 8];
    (0..mapping.len())
        .step_by(page_size_bytes() as usize)
        .try_for_each(|offset_bytes| mapping.read(offset_bytes, &mut word))
}
