//! `Route`: one way to copy between two places, made ready for copies of one size.
//!
//! Order of calls: [`prepare`](Route::prepare) -> [`copy`](Route::copy) -> [`check`](Route::check), as often as
//! wanted. Source and destination are written by whoever owns them, and the destination is looked at by its
//! owner: an engine, or the CPU where there is none, which sees no more than the window shows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use peervram::backends::{DmaRanges, HostSlice, Mapping, Owner};
use peervram::{Error, Kind};

use crate::bytes::{Bytes, Wrong};
use crate::pace::Pace;
use crate::record::Direction;

/// For one copy.
const PATIENCE: Duration = Duration::from_secs(30);

/// When a copy that begins now has hung.
pub fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// One way to copy.
pub trait Route: Send {
    /// What moves the bytes.
    fn engine(&self) -> String;

    /// Who looks at the destination: see [`Side::observer`].
    fn observer(&self) -> &'static str;

    /// Whether the bytes cross as posted writes, so that their ceiling is known.
    fn is_posted(&self) -> bool;

    /// Writes what a round sends to the source, and poison to the destination, each by its owner.
    ///
    /// # Errors
    /// What its owner's engine says.
    fn prepare(&mut self, round: u64) -> Result<()>;

    /// Does what `pace` wants, step by step, until it wants no more: copies, and [`prepare`](Route::prepare) before the last.
    ///
    /// # Errors
    /// What the engine says, or the owner's.
    fn copy(&mut self, pace: &mut Pace) -> Result<()>;

    /// What is wrong with the destination after a round, as its owner sees it.
    ///
    /// # Errors
    /// What its owner's engine says: nothing is known then.
    fn check(&mut self, round: u64) -> Result<Option<Wrong>>;

    /// The same copies with nothing around them, `count` of them; false where there is no such way.
    ///
    /// # Errors
    /// What the engine says.
    fn copy_by_hand(&mut self, count: usize) -> Result<bool> {
        let _ = count;
        Ok(false)
    }
}

/// What a route is to be.
pub struct Order {
    /// Which way.
    pub direction: Direction,
    /// How much each copy moves.
    pub size_bytes: u64,
    /// What is copied.
    pub bytes: Arc<Bytes>,
}

/// The lender's side of lent memory.
#[derive(Clone)]
pub enum Side {
    /// The owner's engine works on it.
    Engine {
        /// Whose.
        owner: Arc<dyn Owner>,
        /// Which memory.
        ranges: DmaRanges,
    },
    /// The CPU looks through the BAR.
    Window(Arc<Mapping>),
    /// The CPU looks at its own memory.
    Host(Arc<Mapping>),
}

impl Side {
    /// Who looks: "owner-engine"; "cpu-through-bar", which sees what importers see and nothing behind it; "host".
    pub fn observer(&self) -> &'static str {
        match self {
            Self::Engine { .. } => "owner-engine",
            Self::Window(_) => "cpu-through-bar",
            Self::Host(_) => "host",
        }
    }

    /// Fills the memory from its start.
    ///
    /// # Errors
    /// What the engine says.
    pub fn write(&self, from: &HostSlice) -> peervram::Result<()> {
        match self {
            Self::Engine { owner, ranges } => engine_of(owner)?.write(ranges, 0, from, deadline()),
            Self::Window(mapping) | Self::Host(mapping) => {
                copy_by_cpu((from.mapping(), from.offset_bytes()), (mapping, 0), from.length_bytes())
            }
        }
    }

    /// Reads the memory from its start.
    ///
    /// # Errors
    /// What the engine says.
    pub fn read(&self, into: &HostSlice) -> peervram::Result<()> {
        match self {
            Self::Engine { owner, ranges } => engine_of(owner)?.read(ranges, 0, into, deadline()),
            Self::Window(mapping) | Self::Host(mapping) => {
                copy_by_cpu((mapping, 0), (into.mapping(), into.offset_bytes()), into.length_bytes())
            }
        }
    }
}

/// The owner's engine, which was there when the side was made.
pub fn engine_of(owner: &Arc<dyn Owner>) -> peervram::Result<&dyn peervram::backends::Engine<DmaRanges>> {
    owner.engine().ok_or_else(|| {
        Error::new(Kind::Unsupported, "look at lent memory", "its owner has no engine any more")
    })
}

/// Copies between two mappings, by way of memory that the CPU caches.
fn copy_by_cpu(
    (from, from_bytes): (&Mapping, usize),
    (to, to_bytes): (&Mapping, usize),
    length_bytes: usize,
) -> peervram::Result<()> {
    let mut piece = vec![0; length_bytes.min(64 << 10)];
    for at in (0..length_bytes).step_by(piece.len().max(1)) {
        let length = piece.len().min(length_bytes - at);
        from.read(from_bytes + at, &mut piece[..length])?;
        to.write(to_bytes + at, &piece[..length])?;
    }
    Ok(())
}

/// Host memory for what is read back.
///
/// # Errors
/// There is not so much.
pub fn landing(size_bytes: u64) -> peervram::Result<HostSlice> {
    let mapping = Arc::new(Mapping::of_host_memory(size_bytes as usize)?);
    HostSlice::new(mapping, 0, size_bytes as usize)
}
