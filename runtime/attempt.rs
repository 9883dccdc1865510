//! `Attempt`: one try at an import. [`Plan`] says which step comes next; each step is a method here.

use std::sync::Arc;
use std::time::Duration;

use peervram_backends::Importer;

use crate::attach_options::NotAttached;
use crate::attachment_inner::{AttachmentInner, LastImport};
use crate::hook::Guarded;
use crate::import::{Import, give_back};
use crate::plan::{Evidence, Plan, Refusal, Step};
use crate::round_trip::round_trip;
use crate::staged::Staged;
use crate::verify::{self, Certificate};
use crate::{Direction, Error, Kind, Mover, Path, Result, Trust};

/// A try at an import of one generation. What it imported and did not take is given back when it is dropped.
pub(crate) struct Attempt<'a, I: Importer> {
    attachment: &'a Arc<AttachmentInner<I>>,
    generation: u64,
    plan: Plan,
    /// The paths that are not taken, each with the reason.
    refused: Vec<(Path, Error)>,
    /// What the path at hand was imported as.
    memory: Option<I::Memory>,
    /// Why the test of the path at hand failed.
    wrong: Option<Error>,
    /// A path that is not taken though it is right in some direction: its engine may copy.
    kept: Option<(Path, I::Memory)>,
    /// How `memory` is kept in step, where it is a copy.
    staged: Option<Box<Staged<Guarded<I>>>>,
    /// What the tests of the path at hand said.
    certificate: Option<Box<Certificate>>,
}

impl<'a, I: Importer> Attempt<'a, I> {
    /// Imports by the first path that works and is trusted as far as the application wants.
    ///
    /// # Errors
    /// The reasons of all paths; or [`Kind::Revoked`] where the memory was taken back meanwhile.
    pub fn run(
        attachment: &'a Arc<AttachmentInner<I>>,
        generation: u64,
    ) -> Result<LastImport<I>, NotAttached> {
        // What a CPU sees through the memory's window is what a CPU that imports sees; a device may see other bytes.
        let is_device =
            attachment.importer.governed_by_p2pdma() || attachment.importer.pci_address().is_some();
        let mut attempt = Self {
            attachment,
            generation,
            plan: Plan::new(attachment.trust(), is_device, attachment.options.paths),
            refused: Vec::new(),
            memory: None,
            wrong: None,
            kept: None,
            staged: None,
            certificate: None,
        };
        loop {
            // What came of the paths while the memory went says nothing of the next one.
            if attachment.pieces.is_torn(generation) {
                return Err(attachment.pieces.revoked("attach to lent memory").into());
            }
            match attempt.plan.next() {
                Step::Import(path) => attempt.import(path),
                Step::Test(path, direction) => attempt.test(path, direction),
                Step::Refuse(path, why) => attempt.refuse_imported(path, why),
                Step::Stage => attempt.stage(),
                Step::Take(path) => return Ok(attempt.take(path)),
                Step::GiveUp => {
                    let refused = std::mem::take(&mut attempt.refused);
                    return Err(NotAttached::by_any_path(refused, attachment.device_name()));
                }
            }
        }
    }

    /// Imports by `path`, one without a copy.
    fn import(&mut self, path: Path) {
        let may_dare = || self.may_dare(path);
        match self.attachment.export.import(&*self.attachment.importer, path, may_dare) {
            Ok(memory) => {
                self.memory = Some(memory);
                self.plan.imported(path);
            }
            Err(error) => self.refuse(path, error),
        }
    }

    /// Whether an import may be tried that the kernel may refuse, at the cost of the importer's device: where nothing is
    /// to be proven, or the path has worked before, as a current certificate shows.
    fn may_dare(&self, path: Path) -> bool {
        let AttachmentInner { export, importer, .. } = &**self.attachment;
        let Trust::Verified(asked) = self.attachment.trust() else { return true };
        let Ok(Some(store)) = self.attachment.store() else { return false };
        asked
            .each()
            .iter()
            .any(|&direction| verify::is_certified(store, export, &**importer, path, direction))
    }

    /// Has a current certificate, or a test made now, say whether bytes arrive by `path`, which was imported.
    fn test(&mut self, path: Path, direction: Direction) {
        let memory = self.memory.as_ref().expect("a path is tested after it was imported");
        let target = self.attachment.target(memory, path, self.generation);
        let limits = &self.attachment.options.limits;
        let tested = (self.attachment.store())
            .and_then(|store| verify::certified_or_tested(store, &target, direction, limits));
        let evidence = match tested {
            Ok((evidence, mut certificate)) => {
                self.certificate.iter().for_each(|before| certificate.inherit(before));
                self.certificate = Some(Box::new(certificate));
                evidence
            }
            Err(error) => {
                self.wrong = Some(error);
                Evidence::Wrong
            }
        };
        self.plan.tested(path, direction, evidence);
    }

    /// Does not take `path`, which was imported. Where it is right in some direction it is kept: its engine may copy.
    fn refuse_imported(&mut self, path: Path, why: Refusal) {
        let is_right = Direction::Both.each().iter().any(|&direction| self.plan.is_right(path, direction));
        match self.memory.take() {
            Some(memory) if is_right && self.kept.is_none() => self.kept = Some((path, memory)),
            memory => give_back(&*self.attachment.importer, memory),
        }
        let error = match (why, self.wrong.take()) {
            (Refusal::Wrong, Some(error)) => error,
            (Refusal::Wrong, None) => Error::new(Kind::Unsupported, "trust a path", "nobody could test it"),
            (Refusal::WindowOnly, _) => {
                let why = "only a CPU looked at the bytes, through the same window as the importer";
                Error::new(Kind::Unsupported, "trust a path", why)
                    .next("give the aperture an owner with an engine, or attach unverified")
            }
        };
        self.refuse(path, error);
    }

    /// Makes memory to copy to, and decides who copies.
    fn stage(&mut self) {
        match self.try_stage() {
            Ok((memory, staged)) => {
                (self.memory, self.staged) = (Some(memory), Some(Box::new(staged)));
                self.plan.imported(Path::Staged);
            }
            Err(error) => self.refuse(Path::Staged, error),
        }
    }

    fn try_stage(&mut self) -> Result<(I::Memory, Staged<Guarded<I>>)> {
        let AttachmentInner { export, importer, pieces, .. } = &**self.attachment;
        let has_engine = export.aperture().owner().is_some_and(|owner| owner.engine().is_some());
        let tried = self.try_owner_engine();
        let path = self.kept.as_ref().map(|(path, _)| *path);
        let cpu = export.cpu_access();
        let mover = |direction| self.plan.mover(direction, has_engine && tried.is_ok(), cpu, path);
        let writes = self.attachment.trust().allows().includes(Direction::Write);
        let movers = (mover(Direction::Read), writes.then(|| mover(Direction::Write)));

        let memory = importer.stage(export.size_bytes())?;
        if let Err(error) = self.try_importer_engine(&memory) {
            give_back(&**importer, Some(memory));
            return Err(error);
        }
        let is_wanted = movers.0 == Mover::ImporterEngine || movers.1 == Some(Mover::ImporterEngine);
        let peer = if is_wanted { self.kept.take().map(|(_, memory)| memory) } else { None };
        match Staged::new(importer, export, pieces, movers, tried.err(), &memory, peer) {
            Ok(staged) => Ok((memory, staged)),
            Err((error, peer)) => {
                [peer, Some(memory)].into_iter().for_each(|memory| give_back(&**importer, memory));
                Err(error)
            }
        }
    }

    /// Tries the owner's engine, where there is one and the application wants tests: bytes that are tested must not be
    /// copied by an engine that is not.
    ///
    /// # Errors
    /// As [`round_trip`].
    fn try_owner_engine(&self) -> Result<()> {
        let AttachmentInner { export, pieces, .. } = &**self.attachment;
        let engine = export.aperture().owner().and_then(|owner| owner.engine());
        let Some(engine) = engine.filter(|_| self.wants_tests()) else { return Ok(()) };
        let ranges = export.aperture().ranges();
        round_trip(engine, ranges, ranges.size_bytes(), self.copy_timeout(), || pieces.hold(self.generation))
            .map_err(|error| error.on(export.device_name()))
    }

    /// Tries the importer's engine on `memory` for a copy, where that engine fills it.
    ///
    /// # Errors
    /// As [`round_trip`].
    fn try_importer_engine(&self, memory: &I::Memory) -> Result<()> {
        let AttachmentInner { export, importer, .. } = &**self.attachment;
        let is_tried = self.wants_tests() && importer.host_memory(memory).is_none();
        let Some(&engine) = importer.engines().first().filter(|_| is_tried) else { return Ok(()) };
        // Memory of the importer's own is not taken back.
        let stays = || Ok(());
        round_trip(engine, memory, export.size_bytes(), self.copy_timeout(), stays)
            .map_err(|error| error.on(importer.name()))
    }

    fn wants_tests(&self) -> bool {
        self.attachment.trust() != Trust::Unverified
    }

    fn copy_timeout(&self) -> Duration {
        self.attachment.options.limits.copy_timeout
    }

    fn refuse(&mut self, path: Path, error: Error) {
        tracing::debug!(%path, %error, "a path was refused");
        self.refused.push((path, error));
        self.plan.refused(path);
    }

    /// Takes `path`.
    fn take(mut self, path: Path) -> LastImport<I> {
        let memory = self.memory.take().expect("a path is taken after it was imported");
        let staging = self.staged.as_ref().map(|staged| staged.how().clone());
        let import = Import::new(self.attachment, memory, self.generation, path, self.staged.take());
        LastImport {
            import: Some(Arc::new(import)),
            path,
            refused: std::mem::take(&mut self.refused),
            staging,
            certificate: self.certificate.take().filter(|_| path != Path::Staged),
        }
    }
}

impl<I: Importer> Drop for Attempt<'_, I> {
    fn drop(&mut self) {
        let peer = self.staged.take().and_then(|mut staged| staged.take_import());
        let kept = self.kept.take().map(|(_, memory)| memory);
        let left = [self.memory.take(), kept, peer];
        left.into_iter().for_each(|memory| give_back(&*self.attachment.importer, memory));
    }
}
