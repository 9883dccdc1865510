//! Trust in coherent memory: it is tested as other memory is, and where it has to be copied, the CPU may.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use peervram::backends::vfio::{self, Interface, IoAddressSpace};
use peervram::backends::{Aperture, DmaRange, DmaRanges, Exporter, Mapping, Owner, RawBytes};
use peervram::nvgrace::{Device, USABLE_REGION};
use peervram::verify::{Limits, Observer, Store};
use peervram::{AttachOptions, Attachment, Direction, Lender, Mover, Outcome, Path, Trust};
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model_driver::{ImportingGpu, ModelGpu};

use super::nvgrace::{grace, interface_of_peers};
use crate::blocks;
use crate::crossing::PATIENCE;
use crate::guest::Guest;
use crate::model::Model;
use crate::stage::{PIECE_BYTES, SCRATCH, STAGES};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_grace("coherent-trust/its-engine-and-another-gpu-see-one-memory", is_certified),
    Test::of_grace("coherent-trust/the-cpu-copies-round-dead-reads", cpu_copies_round_dead_reads),
];

/// What is lent of region 4, and the GPU that imports it.
struct Pair<'guest> {
    other_model: Model<'guest>,
    // In the order in which they go.
    attachment: Attachment<ImportingGpu>,
    importer: Arc<ImportingGpu>,
    view: Arc<Mapping>,
    _other_device: vfio::Device,
    _lender: Lender<Device>,
}

impl<'guest> Pair<'guest> {
    /// `answers` for the memory: the GPU's own driver, or nobody who has an engine.
    fn new(
        guest: &'guest Guest,
        direction: Direction,
        has_driver: bool,
        ways: &[Misbehaviour],
    ) -> Result<Self> {
        let (model, other_model) = (grace(guest)?.0, guest.model(0)?);
        let space = IoAddressSpace::new(Interface::Cdev)?;
        let device = Device::open_into(&space, model.address(), &mut |_| ())?;
        let usable = device.region(USABLE_REGION)?;
        let ranges = DmaRanges::new(usable, &[DmaRange::new(16 << 20, PIECE_BYTES)])?;
        let owner: Arc<dyn Owner> = if has_driver {
            Arc::new(ModelGpu::with_memory(device.as_ref(), usable)?)
        } else {
            Arc::new(RawBytes)
        };
        let view = device.map(&ranges)?;
        let lender = Lender::new(device);
        let export = lender.export(Aperture::owned(ranges, owner))?;

        let space = IoAddressSpace::new(interface_of_peers(guest))?;
        let other_device = vfio::Device::open_into(&space, other_model.address())?;
        let driver = Arc::new(ModelGpu::new(&other_device)?);
        let importer = Arc::new(ImportingGpu::new(&other_device, driver, STAGES)?);
        ways.iter().try_for_each(|&way| other_model.misbehave(way))?;
        let mut limits = Limits::default();
        limits.copy_timeout = Duration::from_secs(5);
        let folder = std::env::temp_dir().join(format!("certificates-{}", std::process::id()));
        let store = Arc::new(Store::at(&folder));
        let options = AttachOptions::new(Trust::Verified(direction)).with_limits(limits).with_store(store);
        let attachment = export.attach(Arc::clone(&importer), options)?;
        Ok(Self { other_model, attachment, importer, view, _other_device: other_device, _lender: lender })
    }

    /// Whether the other GPU reads what the CPU writes.
    fn reads(&self, seed: u32) -> Result<()> {
        let bytes = blocks::bytes(seed, 0, PIECE_BYTES);
        self.view.write(0, &bytes)?;
        let access = self.attachment.enter(Direction::Read)?;
        self.importer.load(access.memory(), 0, SCRATCH, PIECE_BYTES, PATIENCE)?;
        ensure!(access.finish() == Outcome::Ok, "the access is torn");
        let sum = self.other_model.host_checksum(SCRATCH, PIECE_BYTES)?;
        ensure!(sum == peervram::backends::vulkan::checksum(&bytes), "the other GPU has other bytes");
        Ok(())
    }
}

fn is_certified(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Direction::Both, true, &[])?;
    // A type1 container maps the mapping.
    let expected = if guest.facts().has_peers_by_iommufd() { Path::Peer } else { Path::HostPointer };
    ensure!(pair.attachment.path() == expected, "the path is {}", pair.attachment.path());
    let certificate = pair.attachment.certificate().context("it is trusted for nothing")?;
    ensure!(certificate.subject.region == USABLE_REGION, "it is of region {}", certificate.subject.region);
    let is_by_engine = certificate.tests.iter().all(|test| test.observer == Observer::OwnerEngine);
    ensure!(certificate.tests.len() == 2 && is_by_engine, "its tests are {:?}", certificate.tests);
    pair.reads(0x3c)
}

/// The importer's engine reaches host memory and no peer. Nobody answers for the memory with an engine, but the CPU
/// has it cached.
fn cpu_copies_round_dead_reads(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Direction::Read, false, &[Misbehaviour::PeersOnly, Misbehaviour::DeadReads])?;
    ensure!(pair.attachment.path() == Path::Staged, "the path is {}", pair.attachment.path());
    let how = pair.attachment.staging().context("it does not say how it copies")?;
    ensure!(how.pull == Mover::Cpu, "it is copied by {}", how.pull);
    ensure!(how.why_cpu.as_deref().is_some_and(|why| why.contains("cached")), "because {:?}", how.why_cpu);
    pair.reads(0x5a)
}
