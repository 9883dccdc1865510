//! `Attachment`: one importer's use of one export.
//!
//! The user-space twin of the kernel's `dma_buf_attachment`. Order of calls:
//! `attach -> enter(direction) -> use -> finish -> ... -> detach`. After the memory was taken back and returned,
//! `enter` refuses until [`Attachment::current`] has imported it again: what was made from the old
//! import (buffers, descriptor sets, framebuffers) is dead then, and is to be rebuilt. Imports that stay
//! good (mapped memory, drivers that map again by themselves) are simply let in again.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::{Importer, OnRevoke};

use crate::access::{Access, Refused};
use crate::export::Lent;
use crate::gate::Gate;
use crate::hook::{self, Guarded, Hook};
use crate::import::Made;
use crate::piece_lock::PieceLock;
use crate::plan::Known;
use crate::revoke::keeper::Gated;
use crate::revoke::machine::{AttachmentId, DeviceId};
use crate::revoke::{Event, Events, Subscription};
use crate::round_trip::round_trip;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{self, Mutex, Thread, pause};
use crate::verify::{self, Certificate, Fingerprint, Limits, Progress, Request, Store, Target};
use crate::{Direction, Error, Import, Kind, Outcome, Path, Result, Staging, Trust};

/// How often a drain looks whether imports that were given out are still in somebody's hands.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// Memory of one device, imported by another. Released when dropped; what a device still does with the
/// memory then ([`InFlight`](crate::InFlight)) is waited for as long as it is kept.
pub struct Attachment<I: Importer>(Arc<Handle<I>>);

/// What applications hold. The last of it ends the attachment, but for imports that were given out.
pub(crate) struct Handle<I: Importer>(Arc<Attached<I>>);

/// What applications and a revoke share.
pub(crate) struct Attached<I: Importer> {
    id: AttachmentId,
    lent: Arc<Lent>,
    importer: Arc<Guarded<I>>,
    options: AttachOptions,
    gate: Arc<Gate>,
    pieces: Arc<PieceLock>,
    last: Mutex<Last<I>>,
    /// How many imports are alive, whoever holds them.
    imports: AtomicUsize,
}

/// The last import.
struct Last<I: Importer> {
    /// None while the memory is away, where it must be freed first.
    import: Option<Arc<Import<I>>>,
    path: Path,
    refused: Vec<(Path, Error)>,
    staging: Option<Staging>,
    certificate: Option<Certificate>,
}

/// How an importer is to be attached: how far its bytes are trusted, how that is tested, and where certificates
/// are kept. A [`Trust`] alone is enough where the defaults are good: the tests of [`Limits::default`], the
/// user's certificates.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    trust: Trust,
    limits: Limits,
    /// None for the user's.
    store: Option<Arc<Store>>,
    /// What messages call the attachment, beside its importer.
    label: Option<Arc<str>>,
}

impl AttachOptions {
    /// With [`Limits::default`] and the user's certificates.
    pub fn new(trust: Trust) -> Self {
        Self { trust, limits: Limits::default(), store: None, label: None }
    }

    /// Tests within `limits`, where a path is to be verified.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Reads and keeps certificates in `store`, and not with the user's.
    #[must_use]
    pub fn with_store(mut self, store: Arc<Store>) -> Self {
        self.store = Some(store);
        self
    }

    /// Has messages call the attachment so, beside its importer: who is late in a revoke is "llvmpipe (frame 3)". For
    /// importers that attach several times.
    #[must_use]
    pub fn with_label(mut self, label: &str) -> Self {
        self.label = Some(label.into());
        self
    }

    fn store(&self) -> &Store {
        self.store.as_deref().unwrap_or_else(|| Store::of_user())
    }
}

impl From<Trust> for AttachOptions {
    fn from(trust: Trust) -> Self {
        Self::new(trust)
    }
}

impl<I: Importer> Attachment<I> {
    pub(crate) fn new(lent: Arc<Lent>, importer: Arc<I>, options: AttachOptions) -> Result<Self> {
        let importer = Arc::new(Guarded::new(importer));
        let free_before = importer.on_revoke() == OnRevoke::FreeBefore;
        // Inside from the start, so that a revoke waits for the import that follows.
        let attached = Arc::clone(&lent).keeper().attach(&lent, free_before, |id, generation| {
            let gate = Arc::new(Gate::entered(generation));
            Attached {
                id,
                pieces: Arc::new(PieceLock::new(Arc::clone(&gate), Arc::clone(&lent.entry().name))),
                gate,
                lent: Arc::clone(&lent),
                importer,
                options,
                last: Mutex::new(Last {
                    import: None,
                    path: Path::Peer,
                    refused: Vec::new(),
                    staging: None,
                    certificate: None,
                }),
                imports: AtomicUsize::new(0),
            }
        })?;
        // From here on, dropping it detaches.
        let attachment = Self(Arc::new(Handle(attached)));
        let attached = attachment.attached();
        let inside = attached.gate.first();
        let import = attached.import_of(inside.generation())?;
        tracing::info!(
            exporter = attached.lent.device_name(),
            importer = attached.importer.name(),
            path = %import.path(),
            trust = ?attached.options.trust,
            "attached"
        );
        drop(inside);
        Ok(attachment)
    }

    /// How bytes reach the importer, or did while there was an import.
    pub fn path(&self) -> Path {
        self.attached().last.lock().path
    }

    /// The paths that were tried before and refused, each with the reason.
    pub fn refused(&self) -> Vec<(Path, Error)> {
        self.attached().last.lock().refused.clone()
    }

    /// How bytes are copied, on a [staged](Path::Staged) path; nothing on any other.
    pub fn staging(&self) -> Option<Staging> {
        self.attached().last.lock().staging.clone()
    }

    /// What the path was trusted for: the tests, with when each was made and how fast its copies were. Nothing
    /// where nobody asked, and nothing for a copy, whose engines work on memory of their own and the host's.
    pub fn certificate(&self) -> Option<Certificate> {
        self.attached().last.lock().certificate.clone()
    }

    /// What the application was content with.
    pub fn trust(&self) -> Trust {
        self.attached().options.trust
    }

    /// The generation of the memory now: how often it was taken back.
    pub fn generation(&self) -> u64 {
        self.attached().gate.generation()
    }

    /// The importer.
    pub fn importer(&self) -> &Arc<I> {
        self.attached().importer.inner()
    }

    /// Begins a stretch of use, in which the importer reads, writes or does both. The memory is not taken back
    /// by this process before it is finished. With [`Trust::Verified`] only what was tested may be done.
    ///
    /// On a [staged](Path::Staged) path what is lent is copied to the importer's memory, for an access that only
    /// writes, too: it may leave bytes as they are. An access that only reads is not copied back; what the
    /// importer writes all the same is lost. On any other path nothing keeps the importer to its word.
    ///
    /// Does not block but for the owner's flush, for another thread that imports anew, and on a
    /// [staged](Path::Staged) path for the copy, which gives way to a revoke.
    ///
    /// # Errors
    /// [`Kind::Unverified`] where `direction` is not of those that the attachment is verified for;
    /// [`Kind::Revoked`] while the memory is taken back, or since this attachment's import was made; or the
    /// reason why the owner's device cannot show what it wrote, or why it could not be copied.
    pub fn enter(&self, direction: Direction) -> Result<Access<'_, I>, Refused> {
        let (attached, trust) = (self.attached(), self.trust());
        if !trust.allows().includes(direction) {
            let (device, generation) = (attached.lent.device_name(), self.generation());
            return Err(Refused::untested(device, generation, direction, trust));
        }
        self.begin(direction)
    }

    /// Begins a stretch of use, tested or not.
    fn begin(&self, direction: Direction) -> Result<Access<'_, I>, Refused> {
        let attached = self.attached();
        let inside =
            attached.gate.enter().map_err(|closed| Refused::away(attached.lent.device_name(), closed))?;
        let generation = inside.generation();
        let import = attached.last.lock().import.clone();
        match import {
            Some(import) if import.is_of(generation) => {
                // From here on, dropping it leaves the gate.
                let mut access = Access::new(&self.0, import, inside, direction);
                let not_brought = |error| Refused::not_brought(generation, error);
                attached.lent.flush().map_err(not_brought)?;
                access.pull().map_err(|error: Error| {
                    if error.kind() == Kind::Revoked && attached.gate.is_closed() {
                        let closed = attached.gate.closed(attached.gate.generation());
                        return Refused::away(attached.lent.device_name(), closed);
                    }
                    not_brought(error)
                })?;
                Ok(access)
            }
            other => {
                drop(inside);
                let now = attached.gate.closed(generation);
                let imported = other.map(|import| import.generation());
                Err(Refused::stale(attached.lent.device_name(), now, imported))
            }
        }
    }

    /// The import of the present generation; imports again where the last one is stale, which takes as
    /// long as attaching. What it gives out keeps the import alive: an importer that must be freed before
    /// a revoke ([`OnRevoke::FreeBefore`]) is waited for until it is dropped.
    ///
    /// # Errors
    /// [`Refused`], as an [`Error`], while the memory is away; else as
    /// [`Export::attach`](crate::Export::attach), and it may be tried again.
    pub fn current(&self) -> Result<Arc<Import<I>>> {
        let attached = self.attached();
        let inside =
            attached.gate.enter().map_err(|closed| Refused::away(attached.lent.device_name(), closed))?;
        attached.import_of(inside.generation())
    }

    /// Tests whether bytes arrive, by each of the importer's engines, in `direction`, and says what came of it.
    /// Takes place inside the memory: who takes it back meanwhile waits. Nobody else may use it; what was in
    /// the tested places is put back.
    ///
    /// # Errors
    /// As [`Attachment::enter`]; [`Kind::Unsupported`] where nobody answers for the
    /// memory or the importer has no engine; what the owner's side of the test says;
    /// [`Kind::Revoked`] where the memory was torn away.
    pub fn verify(
        &self,
        direction: Direction,
        limits: &Limits,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Certificate> {
        let attached = self.attached();
        // Whatever it is trusted for: a test is how trust begins. A copy is not tested, so none is to be copied back.
        let access = self.begin(Direction::Read)?;
        let mut progress = |done: &Progress| {
            let whose = || attached.importer.name();
            hook::ask(Hook::Progress, whose, (), || progress(done));
        };
        let wrong = attached.wrong_places(access.import().path(), direction);
        let certificate = verify::certify(&self.target(&access), direction, limits, &wrong, &mut progress);
        match access.finish() {
            // What nobody imported was not tested either: then there is an error to tell.
            Outcome::Ok | Outcome::NotCopiedBack => certificate,
            Outcome::Torn { .. } => {
                let why = "the memory was taken back in the middle of the test";
                Err(Error::new(Kind::Revoked, "verify a path", why).on(attached.lent.device_name()))
            }
        }
    }

    /// What a certificate has to [grant](Certificate::grants) for this attachment to be trusted in `direction`: the
    /// path that it took, for its importer's engines, on the ranges that are lent to it.
    pub fn request(&self, direction: Direction) -> Request {
        verify::request(&self.attached().lent, &*self.attached().importer, self.path(), direction)
    }

    /// What would have to be as it is now for a certificate of this attachment to be current.
    pub fn fingerprint(&self) -> Fingerprint {
        verify::fingerprint(&self.attached().lent, &*self.attached().importer)
    }

    /// Whether [`Attachment::enter`] needs no new import.
    pub fn is_current(&self) -> bool {
        let generation = self.generation();
        self.attached().last.lock().import.as_ref().is_some_and(|import| import.is_of(generation))
    }

    /// Calls back with everything that happens to the memory from now on, until the subscription is
    /// dropped. At [`What::Restored`](crate::What::Restored), rebuild if not
    /// [`is_current`](Attachment::is_current).
    #[track_caller]
    pub fn on_event(&self, callback: impl Fn(&Event) + Send + Sync + 'static) -> Subscription {
        self.attached().lent.entry().subscribers.call(callback)
    }

    /// Keeps everything that happens to the memory from now on, to be polled for and taken.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn events(&self) -> Result<Events> {
        self.attached().lent.entry().subscribers.poll()
    }

    /// Releases the import. The importing device must be done with it. What
    /// [`current`](Attachment::current) gave out keeps it until it is dropped.
    ///
    /// # Errors
    /// What the importer says; the import is gone all the same.
    pub fn detach(self) -> Result<()> {
        let import = self.attached().last.lock().import.take();
        import.and_then(Arc::into_inner).map_or(Ok(()), Import::release)
    }

    /// What a test of the path is of, in an access.
    pub(crate) fn target<'a>(&'a self, access: &'a Access<'_, I>) -> Target<'a, Guarded<I>> {
        self.attached().target(access.memory(), access.import().path(), access.generation())
    }

    fn attached(&self) -> &Arc<Attached<I>> {
        &self.0.0
    }
}

impl<I: Importer> Handle<I> {
    pub(crate) fn lent(&self) -> &Arc<Lent> {
        &self.0.lent
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.0.gate
    }

    pub(crate) fn device(&self) -> DeviceId {
        self.0.lent.entry().id
    }
}

impl<I: Importer> Attached<I> {
    pub(crate) fn lent(&self) -> &Arc<Lent> {
        &self.lent
    }

    pub(crate) fn importer(&self) -> &Arc<Guarded<I>> {
        &self.importer
    }

    pub(crate) fn imports(&self) -> &AtomicUsize {
        &self.imports
    }

    pub(crate) fn pieces(&self) -> &Arc<PieceLock> {
        &self.pieces
    }

    pub(crate) fn trust(&self) -> Trust {
        self.options.trust
    }

    fn target<'a>(&'a self, memory: &'a I::Memory, path: Path, generation: u64) -> Target<'a, Guarded<I>> {
        Target { lent: &self.lent, importer: &self.importer, memory, path, pieces: &self.pieces, generation }
    }

    /// What a current certificate, or a test made now, says of bytes in `direction` by `memory`, which was
    /// imported by `path` in `generation`.
    ///
    /// # Errors
    /// Why `path` is not to be trusted: what was seen, or why nobody could look.
    pub(crate) fn test(
        &self,
        memory: &I::Memory,
        path: Path,
        direction: Direction,
        generation: u64,
    ) -> Result<(Known, Certificate)> {
        verify::assure(self.store()?, &self.target(memory, path, generation), direction, &self.options.limits)
    }

    /// Where certificates of this are kept. A device is the same one tomorrow; host memory is not.
    fn store(&self) -> Result<Option<&Store>> {
        let is_device = self.lent.entry().exporter()?.pci_address().is_some();
        Ok(is_device.then(|| self.options.store()))
    }

    /// Where bytes were wrong before in `direction` by `path`, from the start of what is lent.
    fn wrong_places(&self, path: Path, direction: Direction) -> Vec<u64> {
        let request = verify::request(&self.lent, &*self.importer, path, direction);
        let subject = verify::subject(&self.lent, &*self.importer);
        let known = self.store().ok().flatten().and_then(|store| store.get(&subject));
        known.map_or_else(Vec::new, |known| known.wrong_places(&request))
    }

    /// Tries the owner's engine on memory of `generation`, where there is one and the application wants tests.
    ///
    /// # Errors
    /// As [`round_trip`].
    pub(crate) fn try_owner_engine(&self, generation: u64) -> Result<()> {
        let ranges = self.lent.aperture().ranges();
        match self.lent.aperture().owner().and_then(|owner| owner.engine()) {
            Some(engine) if self.options.trust != Trust::Unverified => {
                let timeout = self.options.limits.copy_timeout;
                round_trip(engine, ranges, ranges.size_bytes(), timeout, || self.pieces.hold(generation))
                    .map_err(|error| error.on(self.lent.device_name()))
            }
            _ => Ok(()),
        }
    }

    /// Tries the importer's engine on `memory` for a copy, where that is filled by it.
    ///
    /// # Errors
    /// As [`round_trip`].
    pub(crate) fn try_importer_engine(&self, memory: &I::Memory) -> Result<()> {
        let size_bytes = self.lent.aperture().ranges().size_bytes();
        match self.importer.engines().first() {
            Some(&engine)
                if self.options.trust != Trust::Unverified && self.importer.host_memory(memory).is_none() =>
            {
                // Memory of the importer's own stays.
                let stays = || Ok(());
                round_trip(engine, memory, size_bytes, self.options.limits.copy_timeout, stays)
                    .map_err(|error| error.on(self.importer.name()))
            }
            _ => Ok(()),
        }
    }

    /// Whether what a CPU sees through the same window is no proof of what the importer sees.
    pub(crate) fn is_device(&self) -> bool {
        self.importer.governed_by_p2pdma() || self.importer.pci_address().is_some()
    }

    /// Whether the importer's driver must let go of the lent memory before it is taken back.
    fn must_be_freed(&self) -> bool {
        self.importer.on_revoke() == OnRevoke::FreeBefore
            && self.last.lock().import.as_ref().is_none_or(|import| import.holds_lent_memory())
    }

    /// Whether anybody but the attachment holds an import.
    fn is_given_out(&self) -> bool {
        let last = self.last.lock();
        let alive = self.imports.load(Ordering::Acquire);
        match &last.import {
            Some(import) => alive > 1 || Arc::strong_count(import) > 1,
            None => alive > 0,
        }
    }

    /// Inside the gate: the import of `generation`, made if it is not there.
    fn import_of(self: &Arc<Self>, generation: u64) -> Result<Arc<Import<I>>> {
        // Held while importing, so that one of several threads does it.
        let mut last = self.last.lock();
        if let Some(import) = last.import.as_ref().filter(|import| import.is_of(generation)) {
            return Ok(Arc::clone(import));
        }
        drop(last.import.take());
        let Made { import, refused, certificate } = Import::make(self, generation)?;
        let (path, staging) = (import.path(), import.staging().cloned());
        let import = Arc::new(import);
        *last = Last { import: Some(Arc::clone(&import)), path, refused, staging, certificate };
        Ok(import)
    }
}

impl<I: Importer> Gated for Attached<I> {
    fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    fn wait_idle(&self, deadline: Instant) -> bool {
        if self.gate.drain(deadline) > 0 {
            return false;
        }
        if !self.must_be_freed() {
            return true;
        }
        // Nobody is let in, so nobody can take another one.
        while self.is_given_out() {
            if Instant::now() >= deadline {
                return false;
            }
            pause(LOOK_INTERVAL);
        }
        true
    }

    fn free(&self) {
        if self.must_be_freed() {
            let import = self.last.lock().import.take();
            drop(import);
        }
        // Who was torn copies nothing from here on.
        self.pieces.settle();
    }

    fn importer(&self) -> String {
        match &self.options.label {
            Some(label) => format!("{} ({label})", self.importer.name()),
            None => self.importer.name(),
        }
    }

    fn describe(&self) -> String {
        let who = Gated::importer(self);
        match self.gate.drain(Instant::now()) {
            0 => format!("{who} has its import in use"),
            1 => format!("{who} is inside"),
            several => format!("{who} is inside {several} times"),
        }
    }
}

impl<I: Importer> Drop for Handle<I> {
    fn drop(&mut self) {
        // It leads back to what it is in: an import that nobody took ends here, and the attachment with it.
        let import = self.0.last.lock().import.take();
        drop(import);
        // So does work that a device has not finished. It keeps what it needs, and somebody must see its end.
        let left = self.0.gate.reap();
        if left.is_empty() {
            return;
        }
        let gate = Arc::clone(&self.0.gate);
        let outlive = move || left.iter().for_each(|in_flight| gate.outlive(in_flight));
        if let Err(error) = sync::start(Thread::Outlive, outlive) {
            tracing::error!(%error, "no thread to wait for a device: what it works on is kept until the next revoke");
        }
    }
}

impl<I: Importer> Drop for Attached<I> {
    fn drop(&mut self) {
        // Everything is freed, so no revoke need know of it.
        self.lent.keeper().detach(self.id);
    }
}

impl<I: Importer> fmt::Debug for Attachment<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.0.fmt(f)
    }
}

impl<I: Importer> fmt::Debug for Attached<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached")
            .field("lent", &self.lent)
            .field("importer", &self.importer.name())
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}
