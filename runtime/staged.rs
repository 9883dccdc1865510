//! `Staged`: a copy of lent memory in memory of the importer's own, kept in step by an attachment.
//!
//! Order of calls: [`Staged::new`], then for each access [`pull`](Staged::pull) -> use ->
//! [`push`](Staged::push). Bytes go over host memory:
//!
//! ```text
//!   lent memory <-- mover --> host slices <-- importer's engine --> the importer's memory
//!                                   (or the importer's memory is host memory: one hop)
//! ```
//!
//! The mover is the owner's engine, else an engine of the importer's that reaches the lent memory, else this
//! process's CPU through the BAR, which is slow to read. Of memory that another process lends and this one cannot map, it is
//! that process's CPU. Both hops are at work at once ([`relay`]).
//!
//! One copy serves all accesses of an attachment. Each pulls, unless one that may write is inside: a pull would
//! overwrite what that one has not pushed yet, so the others find what is there. One that may write pushes
//! at its end; one that only reads does not.
//!
//! A copy is of one generation at a time. An access that was torn may have a device that is late and still writes
//! into the importer's memory; until it has ended, no access of another generation is let in
//! ([`Staged::is_free_for`]), and the attachment makes another copy, in other memory. A push never ends up in lent
//! memory of another generation: [`PieceLock`] sees to that.
//!
//! Absent on purpose: copying only what changed, which nobody here can know, and copying ahead of time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::{CpuAccess, Engine, HostSlice, Importer, Mapping};

use crate::export_inner::ExportInner;
use crate::piece_lock::PieceLock;
use crate::relay::{pieces, relay};
use crate::staging::{Mover, Staging};
use crate::sync::Mutex;
use crate::{Direction, Error, Kind, Result};

/// How large a slice is. Measured between two model GPUs: see the book's measurements.
const SLICE_BYTES: usize = 1 << 20;
/// One that is filled and one that is emptied.
const SLICES: usize = 2;
/// How long a device may take for one piece.
const PIECE_TIMEOUT: Duration = Duration::from_secs(5);
/// What the CPU has of a BAR at a time.
const BOUNCE_BYTES: usize = 64 << 10;

/// A copy of lent memory for one import.
pub(crate) struct Staged<I: Importer> {
    importer: Arc<I>,
    export: Arc<ExportInner>,
    pieces: PieceLock,
    how: Staging,
    /// The lent memory as the importer has it, where its engine is the mover.
    peer: Option<I::Memory>,
    /// The lent memory as a CPU has it, where that is the mover.
    bar: Option<Bar>,
    /// The importer's memory, where that is host memory.
    stage: Option<Arc<Mapping>>,
    /// Made at the first copy; forgotten where one fails, since an engine may still write into them.
    slices: Mutex<Option<Vec<HostSlice>>>,
    /// Held while accesses begin and end: one copy is made at a time.
    turn: Mutex<()>,
    /// Accesses that have pulled and not ended, by the generation that they are of.
    inside: Mutex<BTreeMap<u64, Inside>>,
}

/// How many accesses of one generation are inside.
#[derive(Debug, Default, Clone, Copy)]
struct Inside {
    all: usize,
    /// Of these, how many may write.
    writers: usize,
}

/// How a CPU has lent memory.
enum Bar {
    /// It is mapped into this process.
    Mapped(Arc<Mapping>),
    /// The process that owns it copies.
    ByItsOwner,
}

impl Bar {
    fn of(export: &ExportInner) -> Result<Self> {
        let mapped = export.device().exporter().and_then(|device| device.map(export.aperture().ranges()));
        match mapped {
            Ok(mapping) => Ok(Self::Mapped(mapping)),
            Err(_) if export.device().copier().is_some() => Ok(Self::ByItsOwner),
            Err(error) => Err(error),
        }
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StageCopy {
    Pull,
    Push,
}

impl<I: Importer> Staged<I> {
    /// A copy in `memory`, which the importer's `stage` made. `owner_failed` says why the owner's engine is not a
    /// mover, where it has one. `peer` is the lent memory as the importer has it,
    /// which is wanted where its engine is a mover.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where nobody could fill `memory`. What was given is given back.
    pub fn new(
        importer: &Arc<I>,
        export: &Arc<ExportInner>,
        pieces: &PieceLock,
        (pull, push): (Mover, Option<Mover>),
        owner_failed: Option<Error>,
        memory: &I::Memory,
        peer: Option<I::Memory>,
    ) -> Result<Self, (Error, Option<I::Memory>)> {
        const TRIED: &str = "stage lent memory";
        let stage = importer.host_memory(memory);
        if stage.is_none() && importer.engines().is_empty() {
            let why = "it has no engine that this process may use, to fill its memory with";
            return Err((Error::new(Kind::Unsupported, TRIED, why).on(importer.name()), peer));
        }
        let is_cpu = pull == Mover::Cpu || push == Some(Mover::Cpu);
        let bar = match is_cpu.then(|| Bar::of(export)).transpose() {
            Ok(bar) => bar,
            Err(error) => return Err((error, peer)),
        };
        let why_cpu = is_cpu.then(|| {
            let owner = match (export.aperture().owner(), owner_failed) {
                (_, Some(error)) => format!("its owner's engine is not to be trusted ({error})"),
                (None, None) => "nobody answers for the memory".to_owned(),
                (Some(owner), None) => format!("its owner ({}) has no engine", owner.name()),
            };
            match export.cpu_access() {
                CpuAccess::Cached => format!("{owner}, and the CPU has the memory cached"),
                _ => format!("{owner}, and no engine of the importer's was found to reach it"),
            }
        });
        if let Some(why) = why_cpu.as_ref().filter(|_| export.cpu_access() != CpuAccess::Cached) {
            tracing::warn!(device = export.device_name(), why, "the CPU copies through the BAR");
        }
        Ok(Self {
            importer: Arc::clone(importer),
            export: Arc::clone(export),
            pieces: pieces.clone(),
            how: Staging { pull, push, in_host_memory: stage.is_some(), why_cpu },
            peer,
            bar,
            stage,
            slices: Mutex::default(),
            turn: Mutex::default(),
            inside: Mutex::default(),
        })
    }

    /// How it copies.
    pub fn how(&self) -> &Staging {
        &self.how
    }

    /// Whether it holds lent memory by the importer's driver.
    pub fn holds_import(&self) -> bool {
        self.peer.is_some()
    }

    /// What it holds of that, to be freed.
    pub fn take_import(&mut self) -> Option<I::Memory> {
        self.peer.take()
    }

    /// Whether an access of `generation` may use the importer's memory: nobody of another one does.
    pub fn is_free_for(&self, generation: u64) -> bool {
        self.inside.lock().keys().all(|&other| other == generation)
    }

    /// Copies what is lent to `memory`, for an access of `generation` in `direction`.
    ///
    /// # Errors
    /// [`Kind::Revoked`] where the memory is taken back meanwhile, or `memory` is in use by an access that was
    /// torn; what an engine said. The access has not begun then.
    pub fn pull(&self, memory: &I::Memory, generation: u64, direction: Direction) -> Result<()> {
        let _turn = self.turn.lock();
        if !self.is_free_for(generation) {
            let why = "a device still uses the copy for an access that was torn";
            return Err(Error::new(Kind::Revoked, "copy lent memory", why)
                .on(self.export.device_name())
                .next("take the current import, which is another copy"));
        }
        let writers = self.inside.lock().get(&generation).map_or(0, |inside| inside.writers);
        if writers == 0 {
            self.copy(memory, StageCopy::Pull, self.how.pull, generation)?;
        } else if self.pieces.is_torn(generation) {
            return Err(self.pieces.revoked("copy lent memory"));
        }
        let mut inside = self.inside.lock();
        let inside = inside.entry(generation).or_default();
        inside.all += 1;
        inside.writers += usize::from(direction.includes(Direction::Write));
        Ok(())
    }

    /// Ends an access that pulled, of `generation` in `direction`: copies `memory` back where it may have written,
    /// and where it is known to be done. Says whether what it wrote is there.
    pub fn push(&self, memory: &I::Memory, generation: u64, direction: Direction, is_done: bool) -> bool {
        let _turn = self.turn.lock();
        let is_there = !direction.includes(Direction::Write) || self.copy_back(memory, generation, is_done);
        let mut inside = self.inside.lock();
        if let Some(of_generation) = inside.get_mut(&generation) {
            of_generation.all -= 1;
            of_generation.writers -= usize::from(direction.includes(Direction::Write));
            if of_generation.all == 0 {
                inside.remove(&generation);
            }
        }
        is_there
    }

    fn copy_back(&self, memory: &I::Memory, generation: u64, is_done: bool) -> bool {
        let Some(mover) = self.how.push else { return false };
        if !is_done {
            tracing::warn!(importer = self.importer.name(), "nobody knows what it wrote: not copied back");
            return false;
        }
        match self.copy(memory, StageCopy::Push, mover, generation) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "could not copy back what an importer wrote");
                false
            }
        }
    }

    fn copy(&self, memory: &I::Memory, way: StageCopy, mover: Mover, generation: u64) -> Result<()> {
        let size_bytes = self.export.aperture().ranges().size_bytes();
        if let Some(stage) = &self.stage {
            let mut pieces = pieces(size_bytes, SLICE_BYTES as u64);
            return pieces.try_for_each(|(offset_bytes, length_bytes)| {
                let slice = HostSlice::new(Arc::clone(stage), offset_bytes as usize, length_bytes)?;
                self.move_piece(way, mover, generation, offset_bytes, &slice)
            });
        }
        let engine = *self.importer.engines().first().ok_or_else(|| {
            Error::new(Kind::Unsupported, "copy by an engine", "it has none").on(self.importer.name())
        })?;
        let slices = self.slices(size_bytes)?;
        let far = |offset_bytes: u64, slice: &HostSlice| {
            self.move_piece(way, mover, generation, offset_bytes, slice)
        };
        let near = |offset_bytes: u64, slice: &HostSlice| {
            let deadline = Instant::now() + PIECE_TIMEOUT;
            match way {
                StageCopy::Pull => engine.write(memory, offset_bytes, slice, deadline),
                StageCopy::Push => engine.read(memory, offset_bytes, slice, deadline),
            }
        };
        let result = match way {
            StageCopy::Pull => relay(size_bytes, &slices, far, near),
            StageCopy::Push => relay(size_bytes, &slices, near, far),
        };
        if result.is_err() {
            *self.slices.lock() = None;
        }
        result
    }

    /// Moves one piece between the lent memory and `slice`.
    fn move_piece(
        &self,
        way: StageCopy,
        mover: Mover,
        generation: u64,
        offset_bytes: u64,
        slice: &HostSlice,
    ) -> Result<()> {
        // A pull gives way to whoever wants the memory; a push is what they wait for.
        let _held = match way {
            StageCopy::Pull => self.pieces.hold_unless_wanted(generation)?,
            StageCopy::Push => self.pieces.hold(generation)?,
        };
        match mover {
            Mover::OwnerEngine => {
                let engine = self.export.aperture().owner().and_then(|owner| owner.engine());
                let engine = engine.ok_or_else(|| self.no_engine("the owner has none any more"))?;
                moved(engine, self.export.aperture().ranges(), way, offset_bytes, slice)
            }
            Mover::ImporterEngine => {
                let engines = self.importer.engines();
                // Another one than the second hop's, if there is: they work at the same time.
                match (engines.last(), &self.peer) {
                    (Some(&engine), Some(peer)) => moved(engine, peer, way, offset_bytes, slice),
                    _ => Err(self.no_engine("the importer has none any more")),
                }
            }
            Mover::Cpu => match &self.bar {
                Some(Bar::Mapped(bar)) => by_cpu(bar, way, offset_bytes, slice),
                Some(Bar::ByItsOwner) => {
                    let copier = self.export.device().copier();
                    let copier = copier.ok_or_else(|| self.no_engine("nobody copies"))?;
                    moved(copier, self.export.aperture().ranges(), way, offset_bytes, slice)
                }
                None => Err(self.no_engine("the memory is not mapped")),
            },
        }
    }

    fn no_engine(&self, why: &'static str) -> Error {
        Error::new(Kind::Unsupported, "copy lent memory", why).on(self.export.device_name())
    }

    /// Two slices, or one where all fits it.
    fn slices(&self, size_bytes: u64) -> Result<Vec<HostSlice>> {
        let mut slices = self.slices.lock();
        if let Some(slices) = &*slices {
            return Ok(slices.clone());
        }
        let count = if size_bytes > SLICE_BYTES as u64 { SLICES } else { 1 };
        let mapping = Arc::new(Mapping::of_host_memory(count * SLICE_BYTES)?);
        let made: Vec<HostSlice> = (0..count)
            .map(|number| HostSlice::new(Arc::clone(&mapping), number * SLICE_BYTES, SLICE_BYTES))
            .collect::<Result<_>>()?;
        *slices = Some(made.clone());
        Ok(made)
    }
}

pub(crate) fn moved<M: ?Sized>(
    engine: &dyn Engine<M>,
    memory: &M,
    way: StageCopy,
    offset_bytes: u64,
    slice: &HostSlice,
) -> Result<()> {
    let deadline = Instant::now() + PIECE_TIMEOUT;
    match way {
        StageCopy::Pull => engine.read(memory, offset_bytes, slice, deadline),
        StageCopy::Push => engine.write(memory, offset_bytes, slice, deadline),
    }
}

/// Copies by this process's CPU, by way of memory that it caches.
pub(crate) fn by_cpu(bar: &Mapping, way: StageCopy, offset_bytes: u64, slice: &HostSlice) -> Result<()> {
    let mut bounce = vec![0; BOUNCE_BYTES.min(slice.length_bytes())];
    for (at, length_bytes) in pieces(slice.length_bytes() as u64, bounce.len() as u64) {
        let bounce = &mut bounce[..length_bytes];
        let (in_bar, in_slice) = ((offset_bytes + at) as usize, slice.offset_bytes() + at as usize);
        match way {
            StageCopy::Pull => {
                bar.read(in_bar, bounce)?;
                slice.mapping().write(in_slice, bounce)?;
            }
            StageCopy::Push => {
                slice.mapping().read(in_slice, bounce)?;
                bar.write(in_bar, bounce)?;
            }
        }
    }
    Ok(())
}
