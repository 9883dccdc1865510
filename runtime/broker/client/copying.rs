//! `CopyingBroker`: the broker as what copies between a lease and this process, for importers that cannot take the dma-buf
//! of memory that this process cannot map.

use std::sync::Arc;
use std::time::Instant;

use peervram_backends::{DmaRanges, Engine, Error, HostSlice, Kind, Owner};

use super::super::message::{Copy, Done};
use super::brokers_word::BrokersWord;
use super::call::Calls;
use crate::staged::{StageCopy, by_cpu};
use crate::{Direction, Result};

/// A lease, as its broker copies for it.
pub(super) struct CopyingBroker {
    lease: u64,
    calls: Arc<Calls>,
    origin: Arc<BrokersWord>,
    name: String,
    /// A device does it, and no CPU.
    is_engine: bool,
}

impl CopyingBroker {
    /// Of a lease for which `engine` copies; where there is none, a CPU.
    pub fn new(lease: u64, calls: &Arc<Calls>, origin: &Arc<BrokersWord>, engine: Option<&str>) -> Self {
        let name = format!("{}, by its broker", engine.unwrap_or("CPU"));
        let (calls, origin) = (Arc::clone(calls), Arc::clone(origin));
        Self { lease, calls, origin, name, is_engine: engine.is_some() }
    }

    /// Piece by piece through the window. A piece that has begun is waited for, however long the owner's device takes.
    fn copy(&self, way: StageCopy, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        const TRIED: &str = "copy by a broker";
        // One window, and one piece in it at a time.
        let window = self.calls.window()?.lock();
        let mut at = 0;
        while at < host.length_bytes() {
            if Instant::now() >= deadline {
                let why = format!("{at} of {} bytes were copied in time", host.length_bytes());
                return Err(Error::new(Kind::TimedOut, TRIED, why));
            }
            let length_bytes = window.len().min(host.length_bytes() - at);
            let piece = HostSlice::new(Arc::clone(host.mapping()), host.offset_bytes() + at, length_bytes)?;
            let direction = match way {
                StageCopy::Pull => Direction::Read,
                StageCopy::Push => Direction::Write,
            };
            if way == StageCopy::Push {
                by_cpu(&window, StageCopy::Push, 0, &piece)?;
            }
            let copy = Copy {
                lease: self.lease,
                generation: self.origin.known(),
                direction,
                offset: offset_bytes + at as u64,
                length: length_bytes as u64,
            };
            let Done {} = self.calls.call("Copy", &copy, TRIED)?;
            if way == StageCopy::Pull {
                by_cpu(&window, StageCopy::Pull, 0, &piece)?;
            }
            at += length_bytes;
        }
        Ok(())
    }
}

impl Engine<DmaRanges> for CopyingBroker {
    fn name(&self) -> &str {
        &self.name
    }

    fn read(&self, _: &DmaRanges, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.copy(StageCopy::Pull, offset_bytes, host, deadline)
    }

    fn write(&self, _: &DmaRanges, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.copy(StageCopy::Push, offset_bytes, host, deadline)
    }
}

/// Whoever owns the memory answers for it there. Here it is bytes, and what its device copies.
impl Owner for CopyingBroker {
    fn name(&self) -> &str {
        "its broker"
    }

    fn flush(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn invalidate(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn quiesce(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn engine(&self) -> Option<&dyn Engine<DmaRanges>> {
        self.is_engine.then_some(self)
    }
}
