//! `Import`: the memory of one generation, as one importer has it.
//!
//! What an application makes of it (descriptor sets, framebuffers, addresses) lives as long as it does.
//! After the memory was taken back an import is stale, unless its driver maps again by itself or it went
//! through this process's own address space; [`Attachment::current`](crate::Attachment::current) gives
//! the next one.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use peervram_backends::{Importer, OnRevoke};

use crate::attachment::Attached;
use crate::export::Lent;
use crate::sync::atomic::Ordering;
use crate::{Error, Kind, Path, Result};

/// Memory of one device, imported by another. Freed with its last owner; until then a revoke knows of it,
/// also where the attachment was dropped.
pub struct Import<I: Importer> {
    attached: Arc<Attached<I>>,
    /// Empty only while it is being freed.
    memory: Option<I::Memory>,
    generation: u64,
    path: Path,
}

impl<I: Importer> Import<I> {
    /// By the first path that works, with the reasons why those before did not.
    pub(crate) fn new(attached: &Arc<Attached<I>>, generation: u64) -> Result<(Self, Vec<(Path, Error)>)> {
        let (lent, importer) = (attached.lent(), attached.importer());
        let mut refused = Vec::new();
        for path in Path::IN_ORDER {
            match lent.import(&**importer, path) {
                Ok(memory) => {
                    attached.imports().fetch_add(1, Ordering::Relaxed);
                    let (attached, memory) = (Arc::clone(attached), Some(memory));
                    return Ok((Self { attached, memory, generation, path }, refused));
                }
                Err(error) => {
                    tracing::debug!(%path, %error, "a path was refused");
                    refused.push((path, error));
                }
            }
        }
        Err(combine(lent, &refused))
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

    /// Whether it shows the memory of `generation`.
    pub(crate) fn is_of(&self, generation: u64) -> bool {
        self.generation == generation || self.outlives_revokes()
    }

    /// Whether it is good again after a revoke without being made again. Mapped memory is: the runtime
    /// itself puts shadow memory under it meanwhile.
    fn outlives_revokes(&self) -> bool {
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
        // An importer may be somebody else's code, which must not end a revoke halfway.
        let freed = catch_unwind(AssertUnwindSafe(|| importer.release(memory)));
        // After it is free: a revoke that sees this goes on.
        self.attached.imports().fetch_sub(1, Ordering::Release);
        freed.unwrap_or_else(|_| {
            Err(Error::new(Kind::Os, "free an import", "the importer panicked").on(importer.name()))
        })
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
