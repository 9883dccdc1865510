//! The engines: a thread each, which takes descriptors off a ring in VRAM and does what they say.
//!
//! Faults of the data path happen here, in `Shared::load` and `Shared::store`, and nowhere else.
//! Every load and store of at most [`PIECE_BYTES`] asks again whether the work is still wanted, so a
//! reset never waits longer than for one piece.

use std::borrow::Cow;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use crate::device::Shared;
use crate::draw::draw_row;
use crate::misbehaviour::Loads;
use crate::operation::{EngineKind, Location, Operation, Work, must_go_down};
use crate::registers::{Descriptor, ErrorCode};
use crate::state::{Next, Ticket};

/// What [`Misbehaviour::BadPage`](crate::misbehaviour::Misbehaviour::BadPage) takes away.
const PAGE_BYTES: u64 = 4096;

/// The most bytes moved at a time.
pub const PIECE_BYTES: usize = 64 << 10;

/// Why work ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// The work was cancelled: the device was reset, removed or disabled.
    Abandoned,
    /// The work cannot be done.
    Failed(ErrorCode),
}

impl From<ErrorCode> for Stop {
    fn from(error: ErrorCode) -> Self {
        Stop::Failed(error)
    }
}

impl Shared {
    /// The life of an engine's thread.
    pub(crate) fn run_engine(&self, kind: EngineKind) {
        let mut buffer = vec![0; PIECE_BYTES];
        while let Some(next) = self.wait_for_work(kind) {
            match self.work(kind, next, &mut buffer) {
                Ok(operation) => self.complete(next.ticket, &operation),
                Err(Stop::Abandoned) => tracing::debug!(?kind, "work was abandoned"),
                Err(Stop::Failed(error)) => {
                    tracing::info!(?kind, ?error, "the engine halts");
                    self.with_state(|state| state.fail(next.ticket, error));
                }
            }
        }
    }

    /// Blocks until there is work; `None` at the end.
    fn wait_for_work(&self, kind: EngineKind) -> Option<Next> {
        let mut state = self.state.lock();
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return None;
            }
            if let Some(next) = state.next(kind, self.now()) {
                return Some(next);
            }
            self.wake.wait(&mut state);
        }
    }

    fn work(&self, kind: EngineKind, next: Next, buffer: &mut [u8]) -> Result<Operation, Stop> {
        let mut descriptor = Descriptor::default();
        let bytes = bytemuck::bytes_of_mut(&mut descriptor);
        self.vram.read(next.descriptor_offset, bytes).map_err(|_| ErrorCode::Internal)?;
        let operation = Operation::check(&descriptor, kind, self.vram.size_bytes())?;
        if operation.uses_dma() && !self.state.lock().is_bus_master() {
            return Err(ErrorCode::BusMasterOff.into());
        }
        let ticket = next.ticket;
        match operation.work {
            Work::Nothing => {}
            Work::Copy { source, destination, bytes } => {
                self.copy(ticket, source, destination, bytes, buffer)?
            }
            Work::Fill { pattern, destination, bytes } => {
                buffer.chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&pattern.to_le_bytes()));
                for (at, piece_bytes) in pieces(bytes, false) {
                    self.store(ticket, destination.after(at), &buffer[..piece_bytes])?;
                }
            }
            Work::Draw { picture, destination, width, height, stride_bytes, frame } => {
                let row = &mut buffer[..width as usize * 4];
                for y in 0..height {
                    draw_row(picture, frame, width, height, y, row);
                    self.store(ticket, destination.after(u64::from(y) * u64::from(stride_bytes)), row)?;
                }
            }
        }
        Ok(operation)
    }

    fn copy(
        &self,
        ticket: Ticket,
        source: Location,
        destination: Location,
        bytes: u64,
        buffer: &mut [u8],
    ) -> Result<(), Stop> {
        let start = Instant::now();
        let mut moved = 0;
        for (at, piece_bytes) in pieces(bytes, must_go_down(source, destination, bytes)) {
            let piece = &mut buffer[..piece_bytes];
            if self.load(ticket, source.after(at), piece)? {
                self.store(ticket, destination.after(at), piece)?;
            }
            moved += piece_bytes as u64;
            // Where pieces come late, the next ones need not wait: the rate is that of the copy.
            let least = self.state.lock().least_time(moved);
            thread::sleep(least.saturating_sub(start.elapsed()));
        }
        Ok(())
    }

    /// Loads a piece. `Ok(false)`: nothing came.
    fn load(&self, ticket: Ticket, place: Location, buffer: &mut [u8]) -> Result<bool, Stop> {
        let faults = self.faults_of(ticket)?.at(self.is_peer(place));
        match place {
            Location::Vram(offset) => {
                let memory = if faults.mirror { self.mirror()? } else { &self.vram };
                memory.read(offset, buffer).map_err(|_| ErrorCode::Internal)?;
                if let Some(page) = faults.bad_page {
                    // What of the page lies in this piece.
                    let within = |bytes: u64| bytes.saturating_sub(offset).min(buffer.len() as u64) as usize;
                    let (begin, end) = (within(page), within(page.saturating_add(PAGE_BYTES)));
                    buffer[begin..end].fill(0);
                }
            }
            Location::Dma(_) if faults.dead_reads => return Ok(false),
            Location::Dma(address) => self.dma.read(address, buffer).map_err(|_| ErrorCode::DmaFault)?,
        }
        match faults.loads {
            Loads::Honest => {}
            Loads::AllOnes => buffer.fill(0xff),
            Loads::Zeros => buffer.fill(0),
        }
        Ok(true)
    }

    /// Stores a piece.
    fn store(&self, ticket: Ticket, place: Location, data: &[u8]) -> Result<(), Stop> {
        match place {
            Location::Vram(offset) => {
                // A reset takes the gate, too: once it is through, nothing of before is stored.
                let _gate = self.gate.read();
                let faults = self.faults_of(ticket)?;
                let memory = if faults.mirror { self.mirror()? } else { &self.vram };
                memory.write(offset, data).map_err(|_| ErrorCode::Internal)?;
            }
            // No gate here: the thread that would reset is the one that takes in the answers of the
            // client. As on a real bus, what is on its way when a reset comes may still arrive.
            Location::Dma(address) => {
                if !self.faults_of(ticket)?.at(self.is_peer(place)).dead_writes {
                    self.dma.write(address, data).map_err(|_| ErrorCode::DmaFault)?;
                }
            }
        }
        Ok(())
    }

    /// Whether it is another device's memory.
    fn is_peer(&self, place: Location) -> bool {
        matches!(place, Location::Dma(address) if self.dma.is_peer(address))
    }

    fn faults_of(&self, ticket: Ticket) -> Result<crate::misbehaviour::Faults, Stop> {
        let state = self.state.lock();
        if state.is_current(ticket) { Ok(state.faults()) } else { Err(Stop::Abandoned) }
    }

    /// Tells that work is done: fence in memory, then the registers, then the interrupt.
    fn complete(&self, ticket: Ticket, operation: &Operation) {
        {
            let mut state = self.state.lock();
            while !state.may_finish() && state.is_current(ticket) && !self.stopping.load(Ordering::Acquire) {
                self.wake.wait(&mut state);
            }
        }
        let value = operation.fence_value.to_le_bytes();
        let written = match operation.fence {
            None => Ok(()),
            Some(Location::Vram(offset)) => {
                let _gate = self.gate.read();
                if !self.state.lock().is_current(ticket) {
                    return;
                }
                self.vram.write(offset, &value).map_err(|_| ErrorCode::Internal)
            }
            Some(Location::Dma(address)) => {
                if !self.state.lock().is_current(ticket) {
                    return;
                }
                self.dma.write(address, &value).map_err(|_| ErrorCode::DmaFault)
            }
        };
        self.with_state(|state| match written {
            Ok(()) => state.finish(ticket, operation.fence_value, operation.interrupt),
            Err(error) => state.fail(ticket, error),
        });
    }
}

/// The pieces of a range, as offset and length, from either end.
fn pieces(bytes: u64, from_end: bool) -> impl Iterator<Item = (u64, usize)> {
    let piece_bytes = PIECE_BYTES as u64;
    let count = bytes.div_ceil(piece_bytes);
    (0..count).map(move |number| {
        let number = if from_end { count - 1 - number } else { number };
        let at = number * piece_bytes;
        (at, (bytes - at).min(piece_bytes) as usize)
    })
}

/// Names a thread after its engine.
pub(crate) fn thread_name(kind: EngineKind) -> Cow<'static, str> {
    match kind {
        EngineKind::Copy => "copy-engine".into(),
        EngineKind::Draw => "draw-engine".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_range_once_from_either_end() {
        const PIECE: u64 = PIECE_BYTES as u64;
        for bytes in [0, 1, PIECE, PIECE + 1, 3 * PIECE - 1] {
            let up: Vec<_> = pieces(bytes, false).collect();
            let mut down: Vec<_> = pieces(bytes, true).collect();
            down.reverse();
            assert_eq!(up, down);
            assert_eq!(up.iter().map(|(_, length)| *length as u64).sum::<u64>(), bytes);
        }
        assert_eq!(pieces(u64::MAX, true).next(), Some((u64::MAX - (PIECE - 1), PIECE_BYTES - 1)));
    }
}
