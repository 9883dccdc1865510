//! `AttachmentInner`: what an [`Attachment`](crate::Attachment), its imports and a revoke share.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::{Importer, OnRevoke};

use crate::attach_options::AttachOptions;
use crate::export_inner::ExportInner;
use crate::gate::Gate;
use crate::hook::Guarded;
use crate::import::Import;
use crate::piece_lock::PieceLock;
use crate::revoke::machine::AttachmentId;
use crate::revoke::target::{Admission, RevokeTarget};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{self, Mutex, Thread, pause};
use crate::verify::{self, Certificate, Store, Target};
use crate::{Direction, Error, Path, Result, Staging, Trust};

/// How often a drain looks whether imports that were given out are still in somebody's hands.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// One importer's use of one export. It lives as long as an attachment, work in flight or an import of it does.
pub(crate) struct AttachmentInner<I: Importer> {
    id: AttachmentId,
    pub export: Arc<ExportInner>,
    pub importer: Arc<Guarded<I>>,
    pub options: AttachOptions,
    pub gate: Arc<Gate>,
    pub pieces: PieceLock,
    pub last: Mutex<LastImport<I>>,
    /// How many imports are alive, whoever holds them.
    imports: AtomicUsize,
    /// How many attachments and pieces of work in flight hold this.
    users: AtomicUsize,
}

/// The last import, and how it was come to. What most imports lack is boxed: this is moved in every crossing.
pub(crate) struct LastImport<I: Importer> {
    /// None while the memory is away, where it must be freed first.
    pub import: Option<Arc<Import<I>>>,
    pub path: Path,
    /// The paths that were tried before and refused, each with the reason.
    pub refused: Vec<(Path, Error)>,
    pub staging: Option<Staging>,
    /// What the path is trusted for, where that was asked.
    pub certificate: Option<Box<Certificate>>,
}

impl<I: Importer> AttachmentInner<I> {
    /// Of one user, and with one access inside, so that a revoke waits for the import that follows.
    pub fn new(export: &Arc<ExportInner>, importer: Arc<I>, options: AttachOptions) -> Result<Arc<Self>> {
        let importer = Arc::new(Guarded::new(importer));
        let free_before = importer.on_revoke() == OnRevoke::FreeBefore;
        let device = export.device();
        export.revoker().attach(device, export.id(), free_before, |id, generation| {
            let gate = Arc::new(Gate::entered(generation, device.origin()));
            Self {
                id,
                pieces: PieceLock::new(Arc::clone(&gate), Arc::clone(&device.name)),
                gate,
                export: Arc::clone(export),
                importer,
                options,
                last: Mutex::new(LastImport {
                    import: None,
                    path: Path::Peer,
                    refused: Vec::new(),
                    staging: None,
                    certificate: None,
                }),
                imports: AtomicUsize::new(0),
                users: AtomicUsize::new(1),
            }
        })
    }

    /// One user more.
    pub fn add_user(&self) {
        self.users.fetch_add(1, Ordering::Relaxed);
    }

    /// One user less. The last one ends the attachment, but for imports that were given out.
    pub fn remove_user(&self) {
        if self.users.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        // An import holds its attachment, which holds its last import: an import that was not given out is freed here.
        let import = self.last.lock().import.take();
        drop(import);
        // Work in flight holds what it needs until its device is done, which a thread waits for.
        let left = self.gate.reap();
        if left.is_empty() {
            return;
        }
        let gate = Arc::clone(&self.gate);
        let outlive = move || left.iter().for_each(|in_flight| gate.outlive(in_flight));
        if let Err(error) = sync::start(Thread::Outlive, outlive) {
            tracing::error!(%error, "no thread to wait for a device: what it works on is kept until the next revoke");
        }
    }

    /// An import was made.
    pub fn add_import(&self) {
        self.imports.fetch_add(1, Ordering::Relaxed);
    }

    /// An import was freed: a revoke that sees this goes on.
    pub fn remove_import(&self) {
        self.imports.fetch_sub(1, Ordering::Release);
    }

    /// What accesses may do.
    pub fn trust(&self) -> Trust {
        self.options.trust
    }

    /// The device that the memory is of, for messages.
    pub fn device_name(&self) -> &str {
        self.export.device_name()
    }

    /// What a test of `memory` is about, which was imported by `path` in `generation`.
    pub fn target<'a>(
        &'a self,
        memory: &'a I::Memory,
        path: Path,
        generation: u64,
    ) -> Target<'a, Guarded<I>> {
        let (export, importer, pieces) = (&*self.export, &*self.importer, &self.pieces);
        Target { export, importer, memory, path, pieces, generation }
    }

    /// Where certificates are kept. None for host memory, which is not the same memory tomorrow.
    pub fn store(&self) -> Result<Option<&Store>> {
        let is_device = self.export.device().exporter()?.pci_address().is_some();
        Ok(is_device.then(|| self.options.store()))
    }

    /// Where bytes were wrong before in `direction` by `path`, from the start of what is lent.
    pub fn wrong_places(&self, path: Path, direction: Direction) -> Vec<u64> {
        let request = verify::request(&self.export, &*self.importer, path, direction);
        let subject = verify::subject(&self.export, &*self.importer);
        let known = self.store().ok().flatten().and_then(|store| store.get(&subject));
        known.map_or_else(Vec::new, |known| known.wrong_places(&request))
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
}

impl<I: Importer> RevokeTarget for AttachmentInner<I> {
    fn admission(&self) -> Arc<dyn Admission> {
        Arc::clone(&self.gate) as _
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
        // An access that was torn copies nothing from here on.
        self.pieces.settle();
    }

    fn importer(&self) -> String {
        match &self.options.label {
            Some(label) => format!("{} ({label})", self.importer.name()),
            None => self.importer.name(),
        }
    }

    fn describe(&self) -> String {
        let importer = RevokeTarget::importer(self);
        match self.gate.drain(Instant::now()) {
            0 => format!("{importer} has its import in use"),
            1 => format!("{importer} is inside"),
            several => format!("{importer} is inside {several} times"),
        }
    }
}

impl<I: Importer> Drop for AttachmentInner<I> {
    fn drop(&mut self) {
        // Everything is freed, so no revoke need know of it.
        self.export.revoker().detach(self.id);
    }
}

impl<I: Importer> fmt::Debug for AttachmentInner<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachmentInner")
            .field("export", &self.export)
            .field("importer", &self.importer.name())
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}
