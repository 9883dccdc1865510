//! `Attachment`: one importer's use of one export, and `Access`: one stretch of using it.
//!
//! The user-space twin of the kernel's `dma_buf_attachment`. Order of calls:
//! `attach -> enter -> use -> finish -> ... -> detach`. After the memory was taken back and
//! returned, `enter` refuses until [`Attachment::renew`] has imported it again; what was made from
//! the old import (buffers, descriptor sets, framebuffers) is dead then.

use std::fmt;
use std::sync::Arc;

use peervram_backends::{Importer, OnRevoke};

use crate::export::Lent;
use crate::gate::Outcome;
use crate::{Error, Kind, Path, Result, RevokeCause, Trust};

/// Memory of one device, imported by another. Released when dropped.
pub struct Attachment<I: Importer> {
    lent: Arc<Lent>,
    importer: Arc<I>,
    trust: Trust,
    path: Path,
    refused: Vec<(Path, Error)>,
    generation: u64,
    /// Empty only inside `renew` and `detach`.
    memory: Option<I::Memory>,
}

impl<I: Importer> Attachment<I> {
    pub(crate) fn new(lent: Arc<Lent>, importer: Arc<I>, trust: Trust) -> Result<Self> {
        // Inside the gate, so that no revoke begins between the import and its being known.
        let generation = enter(&lent)?;
        let result = Self::import(&lent, &*importer);
        lent.gate.leave(generation);
        let (memory, path, refused) = result?;
        tracing::info!(exporter = lent.device_name(), importer = importer.name(), %path, ?trust, "attached");
        Ok(Self { lent, importer, trust, path, refused, generation, memory: Some(memory) })
    }

    /// By the first path that works, with the reasons why those before did not.
    #[expect(clippy::type_complexity, reason = "three parts of an attachment that is being made")]
    fn import(lent: &Lent, importer: &I) -> Result<(I::Memory, Path, Vec<(Path, Error)>)> {
        let mut refused = Vec::new();
        for path in Path::IN_ORDER {
            match lent.import(importer, path) {
                Ok(memory) => return Ok((memory, path, refused)),
                Err(error) => {
                    tracing::debug!(%path, %error, "a path was refused");
                    refused.push((path, error));
                }
            }
        }
        Err(combine(lent, &refused))
    }

    /// How bytes reach the importer.
    pub fn path(&self) -> Path {
        self.path
    }

    /// The paths that were tried before and refused, each with the reason.
    pub fn refused(&self) -> &[(Path, Error)] {
        &self.refused
    }

    /// What the application was content with.
    pub fn trust(&self) -> Trust {
        self.trust
    }

    /// The generation of the memory that was imported.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The importer.
    pub fn importer(&self) -> &Arc<I> {
        &self.importer
    }

    /// Begins a stretch of use. The memory is not taken back by this process before
    /// [`Access::finish`]; finish when the importing device is done, not when work is submitted.
    ///
    /// # Errors
    /// [`Kind::Revoked`] or [`Kind::Gone`] while the memory is taken back, or since this attachment
    /// was made; or the owner's reason why its device's writes cannot be seen.
    pub fn enter(&self) -> Result<Access<'_, I>> {
        let generation = enter(&self.lent)?;
        let stale = generation != self.generation && self.importer.on_revoke() != OnRevoke::SelfHeals;
        if stale || self.memory.is_none() {
            self.lent.gate.leave(generation);
            let why = format!("generation {} was taken back; it is {generation} now", self.generation);
            return Err(refusal(&self.lent, Kind::Revoked, why)
                .next("renew the attachment and rebuild what was made of it"));
        }
        // From here on, dropping it leaves the gate.
        let access = Access { attachment: self, generation, left: false };
        self.lent.flush()?;
        Ok(access)
    }

    /// Imports the memory again after it was taken back and returned, by whichever path works now.
    /// Everything made from the old import is dead, which is why this needs the attachment alone.
    ///
    /// # Errors
    /// As [`Export::attach`](crate::Export::attach). The attachment is unusable then, and may be
    /// renewed again.
    pub fn renew(&mut self) -> Result<()> {
        if let Some(memory) = self.memory.take() {
            self.lent.release(&*self.importer, memory)?;
        }
        let mut renewed = Self::new(Arc::clone(&self.lent), Arc::clone(&self.importer), self.trust)?;
        std::mem::swap(self, &mut renewed);
        Ok(())
    }

    /// Releases the import. The importing device must be done with it.
    ///
    /// # Errors
    /// What the importer says; the import is gone all the same.
    pub fn detach(mut self) -> Result<()> {
        self.memory.take().map_or(Ok(()), |memory| self.lent.release(&*self.importer, memory))
    }
}

impl<I: Importer> Drop for Attachment<I> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take()
            && let Err(error) = self.lent.release(&*self.importer, memory)
        {
            tracing::error!(%error, "could not release an import");
        }
    }
}

impl<I: Importer> fmt::Debug for Attachment<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment")
            .field("lent", &self.lent)
            .field("importer", &self.importer.name())
            .field("path", &self.path)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// Leave to use the memory, until [`finish`](Access::finish) or drop.
#[derive(Debug)]
#[must_use = "an access that is dropped at once allows nothing"]
pub struct Access<'a, I: Importer> {
    attachment: &'a Attachment<I>,
    generation: u64,
    left: bool,
}

impl<'a, I: Importer> Access<'a, I> {
    /// The import of this generation.
    pub fn memory(&self) -> &'a I::Memory {
        // `renew` and `detach` need the attachment that is borrowed here.
        self.attachment.memory.as_ref().expect("an attachment that can be entered has its import")
    }

    /// Ends the access and says whether the memory stayed the same.
    pub fn finish(mut self) -> Outcome {
        self.leave()
    }

    fn leave(&mut self) -> Outcome {
        self.left = true;
        self.attachment.lent.invalidate();
        self.attachment.lent.gate.leave(self.generation)
    }
}

impl<I: Importer> Drop for Access<'_, I> {
    fn drop(&mut self) {
        if !self.left {
            self.leave();
        }
    }
}

/// Enters the gate, or says in words why not.
fn enter(lent: &Lent) -> Result<u64> {
    lent.gate.enter().map_err(|closed| {
        let kind = match closed.cause {
            RevokeCause::ExporterGone => Kind::Gone,
            _ => Kind::Revoked,
        };
        refusal(lent, kind, closed.cause.to_string())
    })
}

fn refusal(lent: &Lent, kind: Kind, why: String) -> Error {
    Error::new(kind, "use lent memory", why).on(lent.device_name())
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
