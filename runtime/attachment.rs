//! `Attachment`: one importer's use of one export.
//!
//! The user-space twin of the kernel's `dma_buf_attachment`. Order of calls:
//! `attach -> enter(direction) -> use -> finish -> ... -> detach`. After the memory was taken back and returned,
//! `enter` refuses until [`Attachment::current`] has imported it again: what was made from the old
//! import (buffers, descriptor sets, framebuffers) is dead then, and is to be rebuilt. Imports that stay
//! good (mapped memory, drivers that map again by themselves) are simply let in again.

use std::fmt;
use std::sync::Arc;

use peervram_backends::Importer;

use crate::access::{Access, Refused};
use crate::attach_options::{AttachOptions, NotAttached};
use crate::attachment_inner::AttachmentInner;
use crate::attempt::Attempt;
use crate::export_inner::ExportInner;
use crate::hook::{self, Guarded, Hook};
use crate::revoke::{Event, Events, Subscription};
use crate::verify::{self, Certificate, Fingerprint, Limits, Progress, Request, Target};
use crate::{Direction, Error, Import, Kind, Outcome, Path, Result, Staging, Trust};

/// Memory of one device, imported by another. Released when dropped; what a device still does with the
/// memory then ([`InFlight`](crate::InFlight)) is waited for as long as it is kept.
pub struct Attachment<I: Importer>(Arc<AttachmentInner<I>>);

impl<I: Importer> Attachment<I> {
    pub(crate) fn new(
        export: &Arc<ExportInner>,
        importer: Arc<I>,
        options: AttachOptions,
    ) -> Result<Self, NotAttached> {
        // From here on, dropping it detaches.
        let attachment = Self(AttachmentInner::new(export, importer, options)?);
        let inner = &attachment.0;
        let inside = inner.gate.first();
        let import = attachment.import_of(inside.generation())?;
        tracing::info!(
            exporter = inner.device_name(),
            importer = inner.importer.name(),
            path = %import.path(),
            trust = ?inner.trust(),
            "attached"
        );
        drop(inside);
        Ok(attachment)
    }

    /// The same attachment, for work in flight: it ends with its last holder.
    pub(crate) fn share(&self) -> Self {
        self.0.add_user();
        Self(Arc::clone(&self.0))
    }

    /// What it shares with its imports and a revoke.
    pub(crate) fn inner(&self) -> &Arc<AttachmentInner<I>> {
        &self.0
    }

    /// Inside the gate: the import of `generation`, made if it is not there.
    fn import_of(&self, generation: u64) -> Result<Arc<Import<I>>, NotAttached> {
        // Held while importing, so that one of several threads does it.
        let mut last = self.0.last.lock();
        if let Some(import) = last.import.as_ref().filter(|import| import.is_of(generation)) {
            return Ok(Arc::clone(import));
        }
        drop(last.import.take());
        *last = Attempt::run(&self.0, generation)?;
        Ok(Arc::clone(last.import.as_ref().expect("an attempt that succeeds has an import")))
    }

    /// How bytes reach the importer, or did while there was an import.
    pub fn path(&self) -> Path {
        self.0.last.lock().path
    }

    /// The paths that were tried before and refused, each with the reason.
    pub fn refused(&self) -> Vec<(Path, Error)> {
        self.0.last.lock().refused.clone()
    }

    /// How bytes are copied, on a [staged](Path::Staged) path; nothing on any other.
    pub fn staging(&self) -> Option<Staging> {
        self.0.last.lock().staging.clone()
    }

    /// What the path was trusted for: the tests, with when each was made and how fast its copies were. Nothing
    /// where nobody asked, and nothing for a copy, whose engines work on memory of their own and the host's.
    pub fn certificate(&self) -> Option<Certificate> {
        self.0.last.lock().certificate.as_deref().cloned()
    }

    /// What the application was content with.
    pub fn trust(&self) -> Trust {
        self.0.trust()
    }

    /// The generation of the memory now: how often it was taken back.
    pub fn generation(&self) -> u64 {
        self.0.gate.generation()
    }

    /// The importer.
    pub fn importer(&self) -> &Arc<I> {
        self.0.importer.inner()
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
        let (inner, trust) = (&self.0, self.trust());
        if !trust.allows().includes(direction) {
            let (device, generation) = (inner.device_name(), self.generation());
            return Err(Refused::untested(device, generation, direction, trust));
        }
        self.begin(direction)
    }

    /// Begins a stretch of use, tested or not.
    fn begin(&self, direction: Direction) -> Result<Access<'_, I>, Refused> {
        let inner = &self.0;
        let inside = inner.gate.enter().map_err(|closed| Refused::away(inner.device_name(), closed))?;
        let generation = inside.generation();
        let import = inner.last.lock().import.clone();
        match import {
            Some(import) if import.is_of(generation) => {
                // From here on, dropping it leaves the gate.
                let mut access = Access::new(self, import, inside, direction);
                let not_brought = |error| Refused::not_brought(generation, error);
                inner.export.flush().map_err(not_brought)?;
                access.pull().map_err(|error: Error| {
                    if error.kind() == Kind::Revoked && inner.gate.is_closed() {
                        let closed = inner.gate.closed(inner.gate.generation());
                        return Refused::away(inner.device_name(), closed);
                    }
                    not_brought(error)
                })?;
                Ok(access)
            }
            other => {
                drop(inside);
                let now = inner.gate.closed(generation);
                let imported = other.map(|import| import.generation());
                Err(Refused::stale(inner.device_name(), now, imported))
            }
        }
    }

    /// The import of the present generation; imports again where the last one is stale, which takes as
    /// long as attaching. What it gives out keeps the import alive: an importer that must be freed before
    /// a revoke ([`OnRevoke::FreeBefore`](peervram_backends::OnRevoke::FreeBefore)) is waited for until it is dropped.
    ///
    /// # Errors
    /// [`Refused`], as an [`Error`], while the memory is away; else as
    /// [`Export::attach`](crate::Export::attach), and it may be tried again.
    pub fn current(&self) -> Result<Arc<Import<I>>> {
        let inner = &self.0;
        let inside = inner.gate.enter().map_err(|closed| Refused::away(inner.device_name(), closed))?;
        Ok(self.import_of(inside.generation())?)
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
        let inner = &self.0;
        // Whatever it is trusted for: a test is how trust begins. A copy is not tested, so none is to be copied back.
        let access = self.begin(Direction::Read)?;
        let mut progress = |done: &Progress| {
            let whose = || inner.importer.name();
            hook::ask(Hook::Progress, whose, (), || progress(done));
        };
        let wrong = inner.wrong_places(access.import().path(), direction);
        let certificate = verify::certify(&self.target(&access), direction, limits, &wrong, &mut progress);
        match access.finish() {
            // What nobody imported was not tested either: then there is an error to tell.
            Outcome::Ok | Outcome::NotCopiedBack => certificate,
            Outcome::Torn { .. } => {
                let why = "the memory was taken back in the middle of the test";
                Err(Error::new(Kind::Revoked, "verify a path", why).on(inner.device_name()))
            }
        }
    }

    /// What a certificate has to [grant](Certificate::grants) for this attachment to be trusted in `direction`: the
    /// path that it took, for its importer's engines, on the ranges that are lent to it.
    pub fn request(&self, direction: Direction) -> Request {
        verify::request(&self.0.export, &*self.0.importer, self.path(), direction)
    }

    /// What would have to be as it is now for a certificate of this attachment to be current.
    pub fn fingerprint(&self) -> Fingerprint {
        verify::fingerprint(&self.0.export, &*self.0.importer)
    }

    /// Whether [`Attachment::enter`] needs no new import.
    pub fn is_current(&self) -> bool {
        let generation = self.generation();
        self.0.last.lock().import.as_ref().is_some_and(|import| import.is_of(generation))
    }

    /// Calls back with everything that happens to the memory from now on, until the subscription is
    /// dropped. At [`EventKind::Restored`](crate::EventKind::Restored), rebuild if not
    /// [`is_current`](Attachment::is_current).
    #[track_caller]
    pub fn on_event(&self, callback: impl Fn(&Event) + Send + Sync + 'static) -> Subscription {
        self.0.export.device().subscribers.call(callback)
    }

    /// Keeps everything that happens to the memory from now on, to be polled for and taken.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn events(&self) -> Result<Events> {
        self.0.export.device().subscribers.poll()
    }

    /// Releases the import. The importing device must be done with it. What
    /// [`current`](Attachment::current) gave out keeps it until it is dropped.
    ///
    /// # Errors
    /// What the importer says; the import is gone all the same.
    pub fn detach(self) -> Result<()> {
        let import = self.0.last.lock().import.take();
        import.and_then(Arc::into_inner).map_or(Ok(()), Import::release)
    }

    /// What a test of the path is of, in an access.
    pub(crate) fn target<'a>(&'a self, access: &'a Access<'_, I>) -> Target<'a, Guarded<I>> {
        self.0.target(access.memory(), access.import().path(), access.generation())
    }
}

impl<I: Importer> Drop for Attachment<I> {
    fn drop(&mut self) {
        self.0.remove_user();
    }
}

impl<I: Importer> fmt::Debug for Attachment<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
