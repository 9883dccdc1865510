//! A revoke: `Lender::reset` against `vfio::Device::reset`, which is the bare ioctl, while the same
//! memory is imported as often.
//!
//! Each export is a page of its own and is imported by the DRM node, so that the kernel has as many
//! dma-bufs to take back, each with one attachment. Both ways take turns at one device and at the same
//! memory, each with dma-bufs of its own, which are all there all the time. A turn imports its own, by
//! `Export::attach` or by `drm::Node::import`; resets the device, which alone is timed; and frees the
//! imports, which are dead then. So neither way has imports of the other, and a reset that the library does
//! not know of finds nobody who relies on it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use peervram::backends::{
    Aperture, DmaBuf, DmaRange, DmaRanges, Exporter, Importer, Interrupts, Mapping, PciAddress, RawBytes,
    Region, drm, page_size_bytes, vfio,
};
use peervram::{Export, Lender, Trust};

use crate::machine::Participants;
use crate::pinned::Pinned;
use crate::report::{Report, Round, Unit};
use peervram_programs::Samples;

/// What peervram may add to the raw call.
const LIMIT: f64 = 1.2;

/// How many attachments there are.
const COUNTS: [u64; 3] = [1, 8, 64];

/// Resets of each way in a round: one takes tens of milliseconds.
const TURNS: usize = 6;

/// Long enough for anything that does not hang.
const PATIENCE: Duration = Duration::from_secs(10);

/// Adds the revokes to `report`.
pub fn measure(machine: &Participants, report: &mut Report) -> Result<()> {
    const WHAT: &str = "revoke";
    let Participants::Vfio { address, region, node } = machine else {
        report.skip(WHAT, "no PCI device is bound to VFIO; `cargo xtask bench` boots a machine that has one");
        return Ok(());
    };
    let node = match node {
        Ok(node) => Arc::new(drm::Node::open(node)?),
        Err(why) => {
            report.skip(WHAT, why);
            return Ok(());
        }
    };
    let _pinned = Pinned::to_this_cpu()?;
    let device = Arc::new(vfio::Device::open(*address)?);
    let lender = Lender::new(Shared(Arc::clone(&device)));
    for count in COUNTS {
        let exports = export(&lender, *region, count)?;
        let by_hand = (exports.iter())
            .map(|export| lender.device().export(export.aperture().ranges()))
            .collect::<peervram::Result<Vec<_>>>()?;
        let mut rounds = Vec::new();
        // The first round warms up.
        for round in 0..=report.rounds {
            peervram_programs::note!("revoke of {count}: round {round} of {}", report.rounds);
            let (mut ours, mut theirs) = (Samples::default(), Samples::default());
            for turn in 0..TURNS {
                for by_library in [turn % 2 == 0, turn % 2 != 0] {
                    if by_library {
                        reset_by_library(&lender, &exports, &node, &mut ours)
                            .context("a reset by the library")?;
                    } else {
                        reset_by_hand(&device, &by_hand, &node, &mut theirs).context("a raw reset")?;
                    }
                }
            }
            if round > 0 {
                rounds.push(Round { ours: ours.median(), theirs: theirs.median() });
            }
        }
        report.row(format!("reset, imported {count} times"), "raw ioctl", Unit::Ns, rounds, Some(LIMIT));
        for export in exports {
            export.close()?;
        }
    }
    lender.close(PATIENCE)?;
    Ok(())
}

/// A device that this benchmark keeps a hold of while it is lent. Who does so can reset it behind the lender's
/// back, as is done here to be timed.
struct Shared(Arc<vfio::Device>);

impl AsRef<vfio::Device> for Shared {
    fn as_ref(&self) -> &vfio::Device {
        &self.0
    }
}

impl Exporter for Shared {
    fn name(&self) -> String {
        self.0.name()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.0.pci_address()
    }

    fn regions(&self) -> &[Region] {
        self.0.regions()
    }

    fn export(&self, ranges: &DmaRanges) -> peervram::Result<DmaBuf> {
        self.0.export(ranges)
    }

    fn map(&self, ranges: &DmaRanges) -> peervram::Result<Arc<Mapping>> {
        self.0.map(ranges)
    }

    fn check_reachable(&self) -> peervram::Result<()> {
        self.0.check_reachable()
    }

    fn shadow(&self) -> peervram::Result<()> {
        self.0.shadow()
    }

    fn unshadow(&self) -> peervram::Result<()> {
        self.0.unshadow()
    }

    fn retire_mappings(&self) -> peervram::Result<()> {
        self.0.retire_mappings()
    }

    fn close_device(&self) -> peervram::Result<()> {
        self.0.close_device()
    }

    fn interrupts(&self) -> peervram::Result<Interrupts> {
        self.0.interrupts()
    }
}

/// That many pages, each exported by itself.
fn export(lender: &Lender<Shared>, region: u32, count: u64) -> Result<Vec<Export>> {
    let region = lender.device().region(region)?;
    let pages = (0..count).map(|page| DmaRange::new(page * page_size_bytes(), page_size_bytes()));
    pages
        .map(|page| {
            let ranges = DmaRanges::new(region, &[page])?;
            Ok(lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?)
        })
        .collect()
}

fn reset_by_library(
    lender: &Lender<Shared>,
    exports: &[Export],
    node: &Arc<drm::Node>,
    times: &mut Samples,
) -> Result<()> {
    let attach = |export: &Export| export.attach(Arc::clone(node), Trust::Unverified);
    let attachments = exports.iter().map(attach).collect::<Result<Vec<_>, _>>()?;
    times.time(|| lender.reset(PATIENCE))?;
    for attachment in attachments {
        ensure!(!attachment.is_current(), "nothing was taken back");
        attachment.detach()?;
    }
    Ok(())
}

fn reset_by_hand(
    device: &vfio::Device,
    buffers: &[DmaBuf],
    node: &drm::Node,
    times: &mut Samples,
) -> Result<()> {
    let imports = buffers.iter().map(|buffer| node.import(buffer)).collect::<peervram::Result<Vec<_>>>()?;
    times.time(|| device.reset())?;
    for import in imports {
        node.release(import)?;
    }
    Ok(())
}
