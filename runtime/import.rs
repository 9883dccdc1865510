//! `Import`: the memory of one generation, as one importer has it.
//!
//! What an application makes of it (descriptor sets, framebuffers, addresses) lives as long as it does.
//! After the memory was taken back an import is stale, unless its driver maps again by itself, it went
//! through this process's own address space, or it is a copy that nobody uses for an access that was torn;
//! [`Attachment::current`](crate::Attachment::current) gives the next one.
//!
//! Which path is taken, [`plan`](crate::plan) decides; here it is carried out.

use std::fmt;
use std::sync::Arc;

use peervram_backends::{Importer, OnRevoke};

use crate::attachment::Attached;
use crate::export::Lent;
use crate::hook::Guarded;
use crate::plan::{Known, Plan, Refusal, Step};
use crate::staged::Staged;
use crate::sync::atomic::Ordering;
use crate::verify::Certificate;
use crate::{Direction, Error, Kind, Mover, Path, Result, Staging};

/// Memory of one device, imported by another. Freed with its last owner; until then a revoke knows of it,
/// also where the attachment was dropped.
pub struct Import<I: Importer> {
    attached: Arc<Attached<I>>,
    /// Empty only while it is being freed.
    memory: Option<I::Memory>,
    generation: u64,
    path: Path,
    /// How `memory` is kept in step, where it is a copy.
    staged: Option<Staged<Guarded<I>>>,
}

/// An import, and how it came to it.
pub(crate) struct Made<I: Importer> {
    pub import: Import<I>,
    /// The paths that are not taken, each with the reason.
    pub refused: Vec<(Path, Error)>,
    /// What the path is trusted for, where that was asked.
    pub certificate: Option<Certificate>,
}

impl<I: Importer> Import<I> {
    /// By the first path that works and is trusted as far as the application wants, with the reasons why those
    /// before are not taken.
    pub(crate) fn make(attached: &Arc<Attached<I>>, generation: u64) -> Result<Made<I>> {
        let (lent, importer) = (attached.lent(), attached.importer());
        let mut plan = Plan::new(attached.trust(), attached.is_device());
        let mut refused = Vec::new();
        let mut refuse = |plan: &mut Plan, path: Path, error: Error| {
            tracing::debug!(%path, %error, "a path was refused");
            refused.push((path, error));
            plan.refused(path);
        };
        // What the path at hand was imported as, why its test failed, and what is kept of a path that is not taken.
        let (mut memory, mut wrong, mut kept, mut staged) = (None, None, None, None);
        let mut certificate: Option<Certificate> = None;
        loop {
            if attached.pieces().is_torn(generation) {
                // What came of the paths came of them while the memory went: that says nothing of the next one.
                let copied = staged.and_then(|mut staged: Staged<Guarded<I>>| staged.take_import());
                let all = [memory, kept.map(|(_, memory)| memory), copied];
                all.into_iter().for_each(|memory| give_back(&**importer, memory));
                return Err(attached.pieces().revoked("attach to lent memory"));
            }
            match plan.next() {
                Step::Import(path) => match lent.import(&**importer, path) {
                    Ok(imported) => {
                        memory = Some(imported);
                        plan.imported(path);
                    }
                    Err(error) => refuse(&mut plan, path, error),
                },
                Step::Test(path, direction) => {
                    let memory = memory.as_ref().expect("a path is tested after it was imported");
                    let known = match attached.test(memory, path, direction, generation) {
                        Ok((known, mut tested)) => {
                            certificate.iter().for_each(|before| tested.inherit(before));
                            certificate = Some(tested);
                            known
                        }
                        Err(error) => {
                            wrong = Some(error);
                            Known::Wrong
                        }
                    };
                    plan.tested(path, direction, known);
                }
                Step::Refuse(path, why) => {
                    // Where the owner has no engine to be trusted, this one may serve to copy.
                    let is_right = Direction::Both.each().iter().any(|&way| plan.is_right(path, way));
                    match memory.take() {
                        Some(imported) if is_right && kept.is_none() => kept = Some((path, imported)),
                        imported => give_back(&**importer, imported),
                    }
                    refuse(&mut plan, path, refusal(why, wrong.take()));
                }
                Step::Stage => match stage(attached, &plan, &mut kept, generation) {
                    Ok((made, copy)) => {
                        (memory, staged) = (Some(made), Some(copy));
                        plan.imported(Path::Staged);
                    }
                    Err(error) => refuse(&mut plan, Path::Staged, error),
                },
                Step::Take(path) => {
                    give_back(&**importer, kept.map(|(_, memory)| memory));
                    attached.imports().fetch_add(1, Ordering::Relaxed);
                    let attached = Arc::clone(attached);
                    let certificate = certificate.filter(|_| path != Path::Staged);
                    let import = Self { attached, memory, generation, path, staged };
                    return Ok(Made { import, refused, certificate });
                }
                Step::GiveUp => {
                    give_back(&**importer, kept.map(|(_, memory)| memory));
                    return Err(combine(lent, &refused));
                }
            }
        }
    }

    /// The importer's own memory: a buffer object, a `VkBuffer`, a mapping for DMA.
    pub fn memory(&self) -> &I::Memory {
        self.memory.as_ref().expect("it is there until it is freed")
    }

    /// The generation in which it was imported.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How bytes reach the importer.
    pub fn path(&self) -> Path {
        self.path
    }

    /// How bytes are copied; nothing where they are not.
    pub fn staging(&self) -> Option<&Staging> {
        self.staged.as_ref().map(Staged::how)
    }

    /// Copies what is lent to the importer's memory, where that is a copy, for an access of `generation`
    /// in `direction`.
    pub(crate) fn pull(&self, generation: u64, direction: Direction) -> Result<()> {
        self.staged.as_ref().map_or(Ok(()), |staged| staged.pull(self.memory(), generation, direction))
    }

    /// Ends an access that pulled: copies back what it may have written. Says whether that is where it belongs.
    pub(crate) fn push(&self, generation: u64, direction: Direction, is_done: bool) -> bool {
        let push = |staged: &Staged<Guarded<I>>| staged.push(self.memory(), generation, direction, is_done);
        self.staged.as_ref().is_none_or(push)
    }

    /// Whether the importer's driver has the lent memory itself.
    pub(crate) fn holds_lent_memory(&self) -> bool {
        self.staged.as_ref().is_none_or(Staged::holds_import)
    }

    /// Whether it shows the memory of `generation`.
    pub(crate) fn is_of(&self, generation: u64) -> bool {
        let is_free = self.staged.as_ref().is_none_or(|staged| staged.is_free_for(generation));
        is_free && (self.generation == generation || self.outlives_revokes())
    }

    /// Whether it is good again after a revoke without being made again. Mapped memory is: the runtime
    /// itself puts shadow memory under it meanwhile. So is a copy, which every access makes anew, unless an
    /// access that was torn still uses it.
    fn outlives_revokes(&self) -> bool {
        if !self.holds_lent_memory() {
            return true;
        }
        match self.attached.importer().on_revoke() {
            OnRevoke::SelfHeals => true,
            OnRevoke::Reimport => self.path == Path::HostPointer,
            // What is not known is made again.
            _ => false,
        }
    }

    /// Frees it, and says what the importer says.
    pub(crate) fn release(mut self) -> Result<()> {
        self.free()
    }

    fn free(&mut self) -> Result<()> {
        let Some(memory) = self.memory.take() else { return Ok(()) };
        let importer = self.attached.importer();
        give_back(&**importer, self.staged.take().and_then(|mut staged| staged.take_import()));
        let freed = importer.release(memory);
        // After it is free: a revoke that sees this goes on.
        self.attached.imports().fetch_sub(1, Ordering::Release);
        freed
    }
}

impl<I: Importer> Drop for Import<I> {
    fn drop(&mut self) {
        if let Err(error) = self.free() {
            tracing::error!(%error, "could not release an import");
        }
    }
}

impl<I: Importer> fmt::Debug for Import<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Import")
            .field("importer", &self.attached.importer().name())
            .field("generation", &self.generation)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// Memory to copy to, and the copies. `kept` is taken where the importer's engine is to reach the lent memory.
fn stage<I: Importer>(
    attached: &Arc<Attached<I>>,
    plan: &Plan,
    kept: &mut Option<(Path, I::Memory)>,
    generation: u64,
) -> Result<(I::Memory, Staged<Guarded<I>>)> {
    let (lent, importer) = (attached.lent(), attached.importer());
    let size_bytes = lent.aperture().ranges().size_bytes();
    let has_engine = lent.aperture().owner().is_some_and(|owner| owner.engine().is_some());
    // Who wants bytes to be tested does not want them copied by an engine that was not.
    let tried = attached.try_owner_engine(generation);
    let path = kept.as_ref().map(|(path, _)| *path);
    let cpu = lent.cpu_access();
    let mover = |way| plan.mover(way, has_engine && tried.is_ok(), cpu, path);
    let writes = attached.trust().allows().includes(Direction::Write);
    let movers = (mover(Direction::Read), writes.then(|| mover(Direction::Write)));
    let is_wanted = movers.0 == Mover::ImporterEngine || movers.1 == Some(Mover::ImporterEngine);
    let peer = if is_wanted { kept.take().map(|(_, memory)| memory) } else { None };
    let made = importer.stage(size_bytes).and_then(|memory| match attached.try_importer_engine(&memory) {
        Ok(()) => Ok(memory),
        Err(error) => {
            give_back(&**importer, Some(memory));
            Err(error)
        }
    });
    let memory = match made {
        Ok(memory) => memory,
        Err(error) => {
            give_back(&**importer, peer);
            return Err(error);
        }
    };
    match Staged::new(importer, lent, attached.pieces(), movers, tried.err(), &memory, peer) {
        Ok(staged) => Ok((memory, staged)),
        Err((error, peer)) => {
            [peer, Some(memory)].into_iter().for_each(|memory| give_back(&**importer, memory));
            Err(error)
        }
    }
}

/// Frees what is not needed.
fn give_back<I: Importer>(importer: &I, memory: Option<I::Memory>) {
    let Some(memory) = memory else { return };
    if let Err(error) = importer.release(memory) {
        tracing::error!(%error, "could not release an import");
    }
}

fn refusal(why: Refusal, wrong: Option<Error>) -> Error {
    const TRIED: &str = "trust a path";
    match (why, wrong) {
        (Refusal::Wrong, Some(error)) => error,
        (Refusal::Wrong, None) => Error::new(Kind::Unsupported, TRIED, "nobody could test it"),
        (Refusal::WindowOnly, _) => {
            let why = "only a CPU looked at the bytes, through the same window as the importer";
            Error::new(Kind::Unsupported, TRIED, why)
                .next("give the aperture an owner with an engine, or attach unverified")
        }
    }
}

/// One error for all paths: the first one's kind, everyone's reason.
fn combine(lent: &Lent, refused: &[(Path, Error)]) -> Error {
    let reasons: Vec<String> = refused.iter().map(|(path, error)| format!("by {path}: {error}")).collect();
    let kind = refused.first().map_or(Kind::Unsupported, |(_, error)| error.kind());
    let error = Error::new(kind, "attach to lent memory", reasons.join(". ")).on(lent.device_name());
    match refused.iter().find_map(|(_, error)| error.raw_os_error()) {
        Some(errno) => error.raw_errno(errno),
        None => error,
    }
}
