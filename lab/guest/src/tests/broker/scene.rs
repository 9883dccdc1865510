//! `Scene`: a broker in the test's process, and what is looked at in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peervram::Lender;
use peervram::backends::{Aperture, DmaRange, DmaRanges, PciAddress, vfio};
use peervram::broker::{Broker, Memory, Status, client};

use crate::broker_process::{MEMORY, ServedModel, serve_lender};
use crate::crossing::{PATIENCE, VRAM};

/// A broker in the test's process, and an operator of it.
pub struct Scene {
    pub socket: PathBuf,
    /// Root, who may do everything.
    pub operator: client::Broker,
    pub broker: Broker,
    pub lender: Arc<Lender<vfio::Device>>,
}

impl Scene {
    /// Of the beginning of a model GPU's VRAM, with its engine.
    pub fn model(function: PciAddress, pool_bytes: u64) -> Result<Self> {
        let socket = new_socket()?;
        let ServedModel { lender, broker, .. } = ServedModel::serve(function, &socket, pool_bytes)?;
        let operator = client::Broker::connect(&socket)?;
        Ok(Self { socket, operator, broker, lender })
    }

    /// Of what `aperture` says.
    pub fn of(lender: Lender<vfio::Device>, aperture: Aperture) -> Result<Self> {
        let (socket, lender) = (new_socket()?, Arc::new(lender));
        let broker = serve_lender(&lender, aperture, &socket)?;
        let operator = client::Broker::connect(&socket)?;
        Ok(Self { socket, operator, broker, lender })
    }

    /// What is there of the memory that it lends.
    pub fn memory(&self) -> Result<Memory> {
        memory(&balanced(&self.operator)?)
    }

    /// Waits until it is so.
    pub fn wait_until(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Result<Status> {
        wait_until(&self.operator, what, is_so)
    }

    /// Waits until everything that is not lent is scrubbed.
    pub fn wait_until_scrubbed(&self) -> Result<()> {
        self.wait_until("everything is scrubbed", |status| status.memories[0].unscrubbed == 0).map(drop)
    }

    /// What the owner's CPU sees at a place of VRAM.
    pub fn seen(&self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<u8>> {
        let device = self.lender.device();
        let ranges = DmaRanges::new(device.region(VRAM)?, &[DmaRange::new(offset_bytes, length_bytes)])?;
        let mut seen = vec![0; length_bytes as usize];
        device.map(&ranges)?.read(0, &mut seen)?;
        Ok(seen)
    }

    /// The owner's CPU writes to a place of VRAM.
    pub fn write(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        let device = self.lender.device();
        let range = DmaRange::new(offset_bytes, bytes.len() as u64);
        let ranges = DmaRanges::new(device.region(VRAM)?, &[range])?;
        Ok(device.map(&ranges)?.write(0, bytes)?)
    }

    /// Ends the broker, and expects that nothing of it keeps the device.
    pub fn close(self) -> Result<()> {
        let Self { broker, lender, operator, .. } = self;
        drop(operator);
        broker.close();
        let lender = Arc::into_inner(lender).context("the broker has not let go of the lender")?;
        lender.close(PATIENCE).map_err(peervram::Error::from)?;
        Ok(())
    }
}

/// Where a broker of this test listens.
pub fn new_socket() -> Result<PathBuf> {
    let path = Path::new("/run").join(format!("broker-{}", std::process::id()));
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| path.display().to_string())
        }
        _ => Ok(path),
    }
}

/// The only memory that is lent.
pub fn memory(status: &Status) -> Result<Memory> {
    let memory = status.memories.first().context("nothing is lent")?;
    ensure!(memory.name == MEMORY, "{memory:?}");
    Ok(memory.clone())
}

/// What the broker says of itself, in which no byte is lost and none is there twice.
pub fn balanced(operator: &client::Broker) -> Result<Status> {
    let status = operator.status()?;
    let memory = memory(&status)?;
    let lent: u64 = status.leases.iter().map(|lease| lease.size).sum();
    let quarantined: u64 = status.quarantine.iter().map(|one| one.size).sum();
    ensure!(memory.quarantined == quarantined, "{status:?}");
    ensure!(memory.free + lent + quarantined == memory.size, "bytes are lost: {status:?}");
    let mut ranges: Vec<_> = (status.leases.iter().flat_map(|lease| &lease.ranges))
        .chain(status.quarantine.iter().flat_map(|one| &one.ranges))
        .collect();
    ranges.sort_by_key(|range| range.offset);
    let apart = ranges.windows(2).all(|two| two[0].offset + two[0].length <= two[1].offset);
    ensure!(apart, "bytes are lent twice: {status:?}");
    Ok(status)
}

/// Waits until a broker's books are so.
pub fn wait_until(operator: &client::Broker, what: &str, is_so: impl Fn(&Status) -> bool) -> Result<Status> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = balanced(operator)?;
        if is_so(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < deadline, "not so after {} s: {what}; {status:?}", PATIENCE.as_secs());
        thread::sleep(Duration::from_millis(2));
    }
}
