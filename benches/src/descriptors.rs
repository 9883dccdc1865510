//! Descriptors through a driver: `ModelGpu::copy_all` against the same descriptors written by hand.
//!
//! A batch is small copies within VRAM, and waiting for the last. Both ways give the copy engine of
//! one model GPU the same work: an entry of the ring for each copy, the doorbell once, then looks at
//! the fence at the same interval. They take turns, a few batches each; the engine is set
//! up anew in between, which is not timed. Of what the driver does besides, nothing is done by hand:
//! no lock, no look at how full the ring is, no deadline, no question why a fence is late.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use bytemuck::bytes_of;
use peervram::backends::pci::Function;
use peervram::backends::{DmaRange, DmaRanges, Exporter, Mapping, page_size_bytes, vfio};
use peervram_model::registers::engine::{
    CONTROL, CONTROL_ENABLE, CONTROL_RESET, FENCE_HIGH, FENCE_LOW, RING_ADDRESS_HIGH, RING_ADDRESS_LOW,
    RING_ENTRIES, TAIL,
};
use peervram_model::registers::{BAR0_BYTES, COPY_ENGINE, DESCRIPTOR_BYTES, Descriptor};
use peervram_model_driver::{ModelGpu, REGISTER_BAR, VRAM_BAR};

use crate::machine::Participants;
use crate::report::{Report, Round, Unit};
use peervram_programs::Samples;

/// What the driver may cost more than no driver.
const LIMIT: f64 = 1.05;

/// Descriptors of a batch, and what each copies.
const BATCH: u64 = 16;
const COPY_BYTES: u64 = 4 << 10;

/// Batches until it is the other way's turn: enough for the ring to go round four times. The first of a
/// turn is not counted: it meets an engine that was just set up.
const TURN: usize = 16;

/// Long enough for anything that does not hang.
const PATIENCE: Duration = Duration::from_secs(10);

/// Adds the descriptors to `report`.
pub fn measure(machine: &Participants, report: &mut Report) -> Result<()> {
    const WHAT: &str = "descriptors";
    const WHY: &str = "the lender is no model GPU; `cargo xtask bench descriptors` boots a machine with one";
    let address = match machine {
        Participants::Vfio { address, .. } if may_be_model(&Function::read(*address)?) => *address,
        _ => {
            report.skip(WHAT, WHY);
            return Ok(());
        }
    };
    let device = vfio::Device::open(address)?;
    let driver = match ModelGpu::new(&device) {
        Ok(driver) => driver,
        Err(error) if error.kind().cannot_run_here() => {
            report.skip(WHAT, error.to_string());
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let mut by_hand = ByHand::new(&device, driver.lendable_bytes() - page_size_bytes())?;
    let copies: Vec<Descriptor> = (0..BATCH)
        .map(|copy| Descriptor::copy(copy * COPY_BYTES, (BATCH + copy) * COPY_BYTES, COPY_BYTES, 0))
        .collect();

    let mut rounds = Vec::new();
    // The first round warms up.
    for round in 0..=report.rounds {
        peervram_programs::note!("descriptors: round {round} of {}", report.rounds);
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for turn in 0..report.cycles.div_ceil(TURN - 1) {
            for by_driver in [turn % 2 == 0, turn % 2 != 0] {
                if by_driver {
                    driver.restart(&device)?;
                    for batch in 0..TURN {
                        ours.time_if(batch > 0, || driver.copy_all(&copies, PATIENCE))?;
                    }
                } else {
                    by_hand.start()?;
                    for batch in 0..TURN {
                        theirs.time_if(batch > 0, || by_hand.copy_all(&copies))?;
                    }
                }
            }
        }
        if round > 0 {
            rounds.push(Round { ours: ours.median(), theirs: theirs.median() });
        }
    }
    // What they map keeps the device open.
    drop((driver, by_hand));
    device.close()?;
    report.row(
        format!("{BATCH} descriptors of {} KiB by the driver", COPY_BYTES >> 10),
        "by hand",
        Unit::Ns,
        rounds,
        Some(LIMIT),
    );
    Ok(())
}

/// Whether its registers are as large as a model's. Other devices are not touched.
pub fn may_be_model(function: &Function) -> bool {
    function.bars.iter().any(|bar| bar.index == REGISTER_BAR && bar.size_bytes == BAR0_BYTES)
        && function.bars.iter().any(|bar| bar.index == VRAM_BAR)
}

/// The copy engine without a driver, as its register map says.
struct ByHand {
    registers: Arc<Mapping>,
    /// One page of VRAM, with the ring.
    ring: Arc<Mapping>,
    ring_offset_bytes: u64,
    /// Descriptors that were given to it, and the last one's fence.
    tail: u32,
}

impl ByHand {
    /// Entries of the ring, which fill a page.
    const ENTRIES: u32 = 64;

    /// As often as the driver looks at the fence.
    const POLL_INTERVAL: Duration = Duration::from_micros(100);

    fn new(device: &vfio::Device, ring_offset_bytes: u64) -> Result<ByHand> {
        let page = DmaRange::new(ring_offset_bytes, page_size_bytes());
        Ok(ByHand {
            registers: device.map(&DmaRanges::whole(device.region(REGISTER_BAR)?)?)?,
            ring: device.map(&DmaRanges::new(device.region(VRAM_BAR)?, &[page])?)?,
            ring_offset_bytes,
            tail: 0,
        })
    }

    /// Gives the engine an empty ring.
    fn start(&mut self) -> peervram::Result<()> {
        self.tail = 0;
        self.store(CONTROL, CONTROL_RESET)?;
        self.store(RING_ADDRESS_LOW, self.ring_offset_bytes as u32)?;
        self.store(RING_ADDRESS_HIGH, (self.ring_offset_bytes >> 32) as u32)?;
        self.store(RING_ENTRIES, Self::ENTRIES)?;
        self.store(CONTROL, CONTROL_ENABLE)
    }

    /// Gives it `descriptors`, fewer than the ring has entries, and waits for the last.
    fn copy_all(&mut self, descriptors: &[Descriptor]) -> peervram::Result<()> {
        for descriptor in descriptors {
            let entry = (self.tail % Self::ENTRIES) as usize * DESCRIPTOR_BYTES as usize;
            self.tail += 1;
            let descriptor = Descriptor { fence_value: u64::from(self.tail), ..*descriptor };
            self.ring.write(entry, bytes_of(&descriptor))?;
        }
        self.store(TAIL, self.tail)?;
        loop {
            let low = self.load(FENCE_LOW)?;
            let reached = u64::from(low) | u64::from(self.load(FENCE_HIGH)?) << 32;
            if reached >= u64::from(self.tail) {
                return Ok(());
            }
            thread::sleep(Self::POLL_INTERVAL);
        }
    }

    fn load(&self, register: u32) -> peervram::Result<u32> {
        self.registers.load_u32((COPY_ENGINE + register) as usize)
    }

    fn store(&self, register: u32, value: u32) -> peervram::Result<()> {
        self.registers.store_u32((COPY_ENGINE + register) as usize, value)
    }
}
