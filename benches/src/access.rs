//! An access: `Attachment::enter` and `Access::finish`, while nobody takes memory back.
//!
//! The importer does nothing and the owner of the memory has nothing to do, so what is left is what
//! the library itself adds to every stretch of use. A batch of accesses is timed as a whole: asking
//! for the time would cost as much as an access.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::Result;
use peervram::backends::{
    Aperture, DmaBuf, DmaRange, DmaRanges, Exporter, Importer, Mapping, OnRevoke, RawBytes, Region,
    page_size_bytes,
};
use peervram::{Attachment, Direction, Lender, Outcome, Trust};

use crate::report::{Report, Unit};
use peervram_programs::Samples;

/// What an access may take, in nanoseconds, on the CPU itself.
const LIMIT_NS: f64 = 60.0;

/// Accesses that are timed together.
const BATCH: usize = 1000;

/// An importer that takes everything and does nothing.
pub struct Nothing;

impl Importer for Nothing {
    type Memory = ();

    fn name(&self) -> String {
        "nothing".into()
    }

    fn on_revoke(&self) -> OnRevoke {
        OnRevoke::Reimport
    }

    fn governed_by_p2pdma(&self) -> bool {
        false
    }

    fn import(&self, _: &DmaBuf) -> peervram::Result<()> {
        Ok(())
    }

    fn import_host_pointer(&self, _: Arc<Mapping>) -> peervram::Result<()> {
        Ok(())
    }

    fn release(&self, (): ()) -> peervram::Result<()> {
        Ok(())
    }
}

/// Adds the accesses to `report`: with a limit where `on_the_cpu`, without one where it is emulated.
pub fn measure<E: Exporter>(
    lender: &Lender<E>,
    region: &Region,
    on_the_cpu: bool,
    report: &mut Report,
) -> Result<()> {
    let page = DmaRanges::new(region, &[DmaRange::new(0, page_size_bytes())])?;
    let export = lender.export(Aperture::owned(page, Arc::new(RawBytes)))?;
    let attachment = export.attach(Arc::new(Nothing), Trust::Unverified)?;
    let mut rounds = Vec::new();
    // The first round warms up.
    for round in 0..=report.rounds {
        let mut times = Samples::default();
        for _ in 0..report.cycles {
            times.time(|| use_often(&attachment))?;
        }
        if round > 0 {
            rounds.push(times.median() / BATCH as f64);
        }
    }
    attachment.detach()?;
    report.figure("enter and finish an access", Unit::Ns, rounds, on_the_cpu.then_some(LIMIT_NS));
    Ok(())
}

/// A batch. A function of its own, so that its instructions can be counted.
#[inline(never)]
fn use_often(attachment: &Attachment<Nothing>) -> peervram::Result<()> {
    for _ in 0..BATCH {
        let access = black_box(attachment).enter(Direction::Read)?;
        debug_assert_eq!(access.generation(), 0);
        let outcome = access.finish();
        debug_assert_eq!(black_box(outcome), Outcome::Ok);
    }
    Ok(())
}
