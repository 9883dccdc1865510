//! `PieceLock`: held while this process moves a piece of lent memory for an attachment, by an engine or by the CPU.
//!
//! A revoke that goes on at its deadline tears who is late, and the memory goes. Who copies on then would bring
//! bytes of one generation into the next. So pieces are moved one by one, each under this lock and after a look at
//! the generation; tearing moves the generation on, and the revoke then waits for the piece at hand
//! ([`PieceLock::settle`]) before the memory is taken.
//!
//! What an importing device does with lent memory by itself is not seen here.

use std::sync::Arc;

use crate::gate::Gate;
use crate::sync::MutexGuard;
use crate::{Error, Kind, Result};

const COPY: &str = "copy lent memory";

/// One for each attachment. A clone is the same lock, which lies in the gate.
#[derive(Clone)]
pub(crate) struct PieceLock {
    gate: Arc<Gate>,
    /// The device whose memory it is, for messages.
    device: Arc<str>,
}

impl PieceLock {
    /// Of an attachment with this gate, to memory of `device`.
    pub fn new(gate: Arc<Gate>, device: Arc<str>) -> Self {
        Self { gate, device }
    }

    /// Takes the lock for one piece of an access of `generation`. The memory stays until it is given back.
    ///
    /// # Errors
    /// [`Kind::Revoked`] where the access was torn.
    pub fn hold(&self, generation: u64) -> Result<MutexGuard<'_, ()>> {
        let held = self.gate.pieces.lock();
        // After the lock was taken: who tore the access waits for the lock.
        match self.gate.is_same(generation) {
            true => Ok(held),
            false => Err(self.revoked(COPY)),
        }
    }

    /// As [`hold`](PieceLock::hold), where somebody who wants the memory comes first.
    ///
    /// # Errors
    /// [`Kind::Revoked`] where the access was torn, or a revoke waits for it.
    pub fn hold_unless_wanted(&self, generation: u64) -> Result<MutexGuard<'_, ()>> {
        let held = self.hold(generation)?;
        if self.gate.is_closed() { Err(self.revoked(COPY)) } else { Ok(held) }
    }

    /// Whether an access of `generation` is torn.
    pub fn is_torn(&self, generation: u64) -> bool {
        !self.gate.is_same(generation)
    }

    /// Waits until no piece is moved. Who was torn before moves none afterwards.
    pub fn settle(&self) {
        drop(self.gate.pieces.lock());
    }

    /// What somebody is told whose memory was taken back under them, or is about to be.
    pub fn revoked(&self, tried: &'static str) -> Error {
        let why = "the memory was taken back, or is about to be";
        Error::new(Kind::Revoked, tried, why).on(&self.device)
    }
}
