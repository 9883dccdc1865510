//! Export, import and close of coherent memory, against the same of a plain VFIO device's, in one run.
//!
//! Both by the library, one page each, into the same DRM node. The two take turns, a few crossings each, so that
//! whatever else the machine does meets both alike.

use std::sync::Arc;

use anyhow::Result;
use peervram::backends::pci::Function;
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, PciAddress, RawBytes, Region, drm, page_size_bytes, vfio,
};
use peervram::{Lender, nvgrace};

use crate::crossing::{LIMIT, PATIENCE, TURN, take_by_library};
use crate::machine::Participants;
use crate::pinned::Pinned;
use crate::report::{Report, Round, Unit};
use peervram_programs::Samples;

const WHAT: &str = "nvgrace";

/// Adds them to `report`.
pub fn measure(machine: &Participants, report: &mut Report) -> Result<()> {
    let Participants::Vfio { node, .. } = machine else {
        report.skip(WHAT, "no PCI device is bound to VFIO; `cargo xtask bench` boots a machine that has one");
        return Ok(());
    };
    let functions = Function::all()?;
    let bound = |wanted: &str| {
        let is_it = |function: &&Function| function.driver.as_deref() == Some(wanted);
        functions
            .iter()
            .find(is_it)
            .and_then(|function| Some((function.address, function.largest_memory()?.index)))
    };
    let (coherent, plain) = (bound(nvgrace::DRIVER), bound("vfio-pci"));
    let (Some((coherent, _)), Some(plain), Ok(node)) = (coherent, plain, node) else {
        report.skip(
            WHAT,
            "it takes a GPU under the nvgrace driver, another device under vfio-pci, and a DRM node",
        );
        return Ok(());
    };
    let _pinned = Pinned::to_this_cpu()?;
    let node = Arc::new(drm::Node::open(node)?);
    let coherent = open_coherent(coherent)?;
    let usable = coherent.usable()?.region_index;
    let (coherent, of_coherent) = lend(coherent, |device| Ok(device.region(usable)?))?;
    let (plain, of_plain) = lend(vfio::Device::open(plain.0)?, |device| Ok(device.region(plain.1)?))?;

    let mut rounds = Vec::new();
    // The first warms up.
    for round in 0..=report.rounds {
        peervram_programs::note!("nvgrace: round {round} of {}", report.rounds);
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for turn in 0..report.cycles.div_ceil(TURN - 1) {
            // Each goes first as often as the other.
            for side in [turn, turn + 1] {
                match side % 2 {
                    0 => take_by_library(&coherent, &of_coherent, &node, &mut ours)?,
                    _ => take_by_library(&plain, &of_plain, &node, &mut theirs)?,
                }
            }
        }
        if round > 0 {
            rounds.push(Round { ours: ours.median(), theirs: theirs.median() });
        }
    }
    coherent.close(PATIENCE)?;
    plain.close(PATIENCE)?;
    let what = "crossing: export, attach, detach, close of coherent memory";
    report.row(what, "a plain VFIO device's", Unit::Ns, rounds, Some(LIMIT));
    Ok(())
}

fn open_coherent(address: PciAddress) -> Result<nvgrace::Device> {
    Ok(nvgrace::Device::open(address, &mut |why| peervram_programs::note!("{address}: {why}"))?)
}

/// A lender, and a page of that region.
fn lend<E: Exporter + 'static>(
    device: E,
    region: impl Fn(&E) -> Result<&Region>,
) -> Result<(Lender<E>, Aperture)> {
    let ranges = DmaRanges::new(region(&device)?, &[DmaRange::new(0, page_size_bytes())])?;
    Ok((Lender::new(device), Aperture::owned(ranges, Arc::new(RawBytes))))
}
