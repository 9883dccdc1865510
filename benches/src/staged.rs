//! Staged copies: both engines at work at once against one after the other.
//!
//! A model GPU lends, another one cannot reach it, so every access copies: by the lender's engine to host
//! memory, and from there by the other's engine to its VRAM. `enter` does that by several slices of host
//! memory; by hand it is one slice, filled and emptied in turn, by the same engines in pieces of the same
//! size. They take turns, copy by copy.
//!
//! Engines of real devices leave the CPU alone while they move bytes; the model's are threads, and where the
//! machine has few CPUs, two at once get no more done than one. So each is held to a rate ([`ENGINE_RATE`]) that
//! leaves time for everybody else; what they do as fast as they can is shown, without a limit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peervram::backends::pci::Function;
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, HostSlice, Importer, Mapping, Owner, PciAddress, vfio,
};
use peervram::{Direction, Lender, Path, Trust};
use peervram_model::registers::ENGINE_RATE;
use peervram_model_driver::{ImportingGpu, ModelGpu, REGISTER_BAR, VRAM_BAR};

use crate::descriptors::may_be_model;
use crate::machine::Participants;
use crate::report::{Report, Round, Unit};
use peervram_programs::Samples;

/// One after the other takes at least one and a half times as long.
const LIMIT: f64 = 1.0 / 1.5;

const MIB: u64 = 1 << 20;

/// How much is lent.
const SIZE_BYTES: u64 = 32 * MIB;

/// Pieces of the copy by hand: as large as the runtime's.
const PIECE_BYTES: u64 = MIB;

/// Copies of each side in a round.
const CYCLES: usize = 4;

/// Long enough for anything that does not hang.
const PATIENCE: Duration = Duration::from_secs(10);

/// Adds the copies to `report`.
pub fn measure(machine: &Participants, report: &mut Report) -> Result<()> {
    const WHAT: &str = "staged";
    const WHY: &str = "there are no two model GPUs; `cargo xtask bench staged` boots a machine with them";
    let Participants::Vfio { address, .. } = machine else {
        report.skip(WHAT, WHY);
        return Ok(());
    };
    let models: Vec<PciAddress> =
        Function::all()?.iter().filter(|function| may_be_model(function)).map(|one| one.address).collect();
    let other = models.iter().find(|&other| other != address);
    let (true, Some(&other)) = (models.contains(address), other) else {
        report.skip(WHAT, WHY);
        return Ok(());
    };

    let device = vfio::Device::open(*address)?;
    let owner = Arc::new(ModelGpu::new(&device)?);
    let ranges = DmaRanges::new(device.region(VRAM_BAR)?, &[DmaRange::new(0, SIZE_BYTES)])?;
    let vram = device.map(&ranges)?;
    let of_lender = map_registers(&device)?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges.clone(), Arc::clone(&owner) as _))?;

    let other = vfio::Device::open(other)?;
    let gpu = Arc::new(ModelGpu::new(&other)?);
    let mut importer = ImportingGpu::new(&other, gpu, 0..2 * SIZE_BYTES)?;
    importer.forget_peers();
    let importer = Arc::new(importer);
    let attachment = export.attach(Arc::clone(&importer), Trust::Verified(Direction::Read))?;
    ensure!(attachment.path() == Path::Staged, "the path is {}", attachment.path());

    let registers = [of_lender, map_registers(&other)?];
    let by_hand = ByHand { owner: &owner, ranges: &ranges, importer: &importer, slice: slice()? };
    let stage = importer.stage(SIZE_BYTES)?;
    let per_mib = MIB as f64 / SIZE_BYTES as f64;
    for (what, rate_mib, limit) in [("at 128 MiB/s each", 128, Some(LIMIT)), ("as fast as they can", 0, None)]
    {
        registers.iter().try_for_each(|one| one.store_u32(ENGINE_RATE as usize, rate_mib))?;
        let mut rounds = Vec::new();
        // The first round warms up: slices are mapped for DMA by it.
        for round in 0..=report.rounds {
            peervram_programs::note!("staged, {what}: round {round} of {}", report.rounds);
            let (mut ours, mut theirs) = (Samples::default(), Samples::default());
            for cycle in 0..CYCLES {
                // Others each time, so that bytes of an earlier copy are no bytes of this one.
                let seed = (round * CYCLES + cycle) as u64;
                fill(&vram, seed)?;
                let access =
                    ours.time(|| attachment.enter(Direction::Read)).map_err(peervram::Error::from)?;
                let is_last = cycle + 1 == CYCLES;
                if is_last {
                    by_hand.compare(access.memory(), seed).context("the staged copy")?;
                }
                access.finish().check()?;
                theirs.time(|| by_hand.copy(&stage))?;
                if is_last {
                    by_hand.compare(&stage, seed).context("the copy by hand")?;
                }
            }
            if round > 0 {
                rounds.push(Round { ours: ours.median() * per_mib, theirs: theirs.median() * per_mib });
            }
        }
        let copy = format!("staged copy of {} MiB, engines {what}", SIZE_BYTES / MIB);
        report.row(copy, "one after the other", Unit::NsPerMib, rounds, limit);
    }
    importer.release(stage)?;
    attachment.detach()?;
    Ok(())
}

/// Host memory for one piece.
fn slice() -> peervram::Result<HostSlice> {
    let mapping = Arc::new(Mapping::of_host_memory(PIECE_BYTES as usize)?);
    HostSlice::new(mapping, 0, PIECE_BYTES as usize)
}

fn map_registers(device: &vfio::Device) -> Result<Arc<Mapping>> {
    Ok(device.map(&DmaRanges::whole(device.region(REGISTER_BAR)?)?)?)
}

/// Writes all that is lent anew. (Memory that was never written is not there yet on the host.)
fn fill(vram: &Mapping, seed: u64) -> Result<()> {
    for offset_bytes in (0..SIZE_BYTES).step_by(PIECE_BYTES as usize) {
        vram.write(offset_bytes as usize, &piece(offset_bytes, seed))?;
    }
    Ok(())
}

/// What belongs there: words that say where they are, and of which filling.
fn piece(offset_bytes: u64, seed: u64) -> Vec<u8> {
    let word = |at: u64| (at ^ seed << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (offset_bytes..offset_bytes + PIECE_BYTES).step_by(8).flat_map(|at| word(at).to_le_bytes()).collect()
}

/// The same copy with one slice.
struct ByHand<'a> {
    owner: &'a ModelGpu,
    ranges: &'a DmaRanges,
    importer: &'a ImportingGpu,
    slice: HostSlice,
}

impl ByHand<'_> {
    fn copy(&self, stage: &<ImportingGpu as Importer>::Memory) -> Result<()> {
        let engines = self.importer.engines();
        let from = self.owner.engine().context("the lender has no engine")?;
        let to = *engines.first().context("the other has no engine")?;
        for offset_bytes in (0..SIZE_BYTES).step_by(PIECE_BYTES as usize) {
            let deadline = Instant::now() + PATIENCE;
            from.read(self.ranges, offset_bytes, &self.slice, deadline)?;
            to.write(stage, offset_bytes, &self.slice, deadline)?;
        }
        Ok(())
    }

    /// Whether all bytes of a filling are there, as the importer's engine finds them.
    fn compare(&self, there: &<ImportingGpu as Importer>::Memory, seed: u64) -> Result<()> {
        let engines = self.importer.engines();
        let engine = *engines.first().context("the other has no engine")?;
        let mut seen = vec![0; PIECE_BYTES as usize];
        for offset_bytes in (0..SIZE_BYTES).step_by(PIECE_BYTES as usize) {
            engine.read(there, offset_bytes, &self.slice, Instant::now() + PATIENCE)?;
            self.slice.mapping().read(self.slice.offset_bytes(), &mut seen)?;
            let expected = piece(offset_bytes, seed);
            let wrong = seen.iter().zip(&expected).position(|(seen, expected)| seen != expected);
            ensure!(
                wrong.is_none(),
                "brought wrong bytes, {wrong:?} bytes into what is at {offset_bytes:#x}"
            );
        }
        Ok(())
    }
}
