//! `Import`: the memory of one generation, as one importer has it.
//!
//! What an application makes of it (descriptor sets, framebuffers, addresses) lives as long as it does.
//! After the memory was taken back an import is stale, unless its driver maps again by itself, it went
//! through this process's own address space, or it is a copy that no access uses that was torn;
//! [`Attachment::current`](crate::Attachment::current) gives the next one.

use std::fmt;
use std::sync::Arc;

use peervram_backends::{Importer, OnRevoke};

use crate::attachment_inner::AttachmentInner;
use crate::hook::Guarded;
use crate::staged::Staged;
use crate::{Direction, Path, Result, Staging};

/// Memory of one device, imported by another. Freed with its last owner; until then a revoke knows of it,
/// also where the attachment was dropped.
pub struct Import<I: Importer> {
    attachment: Arc<AttachmentInner<I>>,
    /// None only while it is being freed.
    memory: Option<I::Memory>,
    generation: u64,
    path: Path,
    /// How `memory` is kept in step, where it is a copy.
    staged: Option<Box<Staged<Guarded<I>>>>,
}

impl<I: Importer> Import<I> {
    /// Of `memory`, which the importer of `attachment` imported by `path`.
    pub(crate) fn new(
        attachment: &Arc<AttachmentInner<I>>,
        memory: I::Memory,
        generation: u64,
        path: Path,
        staged: Option<Box<Staged<Guarded<I>>>>,
    ) -> Self {
        attachment.add_import();
        Self { attachment: Arc::clone(attachment), memory: Some(memory), generation, path, staged }
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
        self.staged.as_deref().map(Staged::how)
    }

    /// Copies what is lent to the importer's memory, where that is a copy, for an access of `generation`
    /// in `direction`.
    pub(crate) fn pull(&self, generation: u64, direction: Direction) -> Result<()> {
        self.staged.as_ref().map_or(Ok(()), |staged| staged.pull(self.memory(), generation, direction))
    }

    /// Ends an access that pulled: copies back what it may have written, where `is_done` says that the device is done.
    /// Returns whether what was written is in the lent memory.
    pub(crate) fn push(&self, generation: u64, direction: Direction, is_done: bool) -> bool {
        let push = |staged: &Staged<Guarded<I>>| staged.push(self.memory(), generation, direction, is_done);
        self.staged.as_deref().is_none_or(push)
    }

    /// Whether the importer's driver has the lent memory itself.
    pub(crate) fn holds_lent_memory(&self) -> bool {
        self.staged.as_deref().is_none_or(Staged::holds_import)
    }

    /// Whether it shows the memory of `generation`.
    pub(crate) fn is_of(&self, generation: u64) -> bool {
        let is_free = self.staged.as_ref().is_none_or(|staged| staged.is_free_for(generation));
        is_free && (self.generation == generation || self.outlives_revokes())
    }

    /// Whether it is good again after a revoke without being made again. Mapped memory is: shadow memory is put under it
    /// meanwhile. So is a copy, which every access makes anew, unless an access that was torn still uses it.
    fn outlives_revokes(&self) -> bool {
        if !self.holds_lent_memory() {
            return true;
        }
        match self.attachment.importer.on_revoke() {
            OnRevoke::SelfHeals => true,
            OnRevoke::Reimport => self.path == Path::HostPointer,
            // Any other import is made again.
            _ => false,
        }
    }

    /// Frees it.
    ///
    /// # Errors
    /// What the importer says; it is freed all the same.
    pub(crate) fn release(mut self) -> Result<()> {
        self.free()
    }

    fn free(&mut self) -> Result<()> {
        let Some(memory) = self.memory.take() else { return Ok(()) };
        let importer = &*self.attachment.importer;
        give_back(importer, self.staged.take().and_then(|mut staged| staged.take_import()));
        let freed = importer.release(memory);
        self.attachment.remove_import();
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
            .field("importer", &self.attachment.importer.name())
            .field("generation", &self.generation)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// Frees memory that is not needed. An error is logged.
pub(crate) fn give_back<I: Importer>(importer: &I, memory: Option<I::Memory>) {
    let Some(memory) = memory else { return };
    if let Err(error) = importer.release(memory) {
        tracing::error!(%error, "could not release an import");
    }
}
