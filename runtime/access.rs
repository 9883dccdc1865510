//! `Access`: one stretch of using lent memory.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use peervram_backends::{Importer, Kind, Signal};

use crate::attachment::Attachment;
use crate::gate::{Closed, Inside};
use crate::in_flight::InFlight;
use crate::revoke::thread_accesses;
use crate::{Direction, Error, Import, Outcome, Result, RevokeCause, Trust};

/// Why an access did not begin. As an [`Error`] its kind tells what to do: [`Kind::Revoked`] to wait for the
/// memory or to take the [current](crate::Attachment::current) import, [`Kind::Gone`] to give up,
/// [`Kind::Unverified`] to attach with another [`Trust`]; any other is what an owner or an engine said.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Refused {
    /// The generation of the memory now.
    pub generation: u64,
    /// Why the memory was taken back, where that is the reason.
    pub cause: Option<RevokeCause>,
    /// Why, in full.
    error: Error,
}

impl Refused {
    pub(crate) fn away(device: &str, closed: Closed) -> Self {
        let Closed { generation, cause, is_gone } = closed;
        let kind = if is_gone { Kind::Gone } else { Kind::Revoked };
        let error = Error::new(kind, TRIED, cause.to_string()).on(device);
        let error = error.next("an event tells when it is there again, if ever");
        Self { generation, cause: Some(cause), error }
    }

    pub(crate) fn stale(device: &str, now: Closed, imported: Option<u64>) -> Self {
        let Closed { generation, cause, .. } = now;
        let why = match imported {
            Some(imported) => format!("generation {imported} was taken back; it is {generation} now"),
            None => format!("it was taken back, and is of generation {generation} now"),
        };
        let error = Error::new(Kind::Revoked, TRIED, why)
            .on(device)
            .next("take the current import and rebuild what was made of the old one");
        Self { generation, cause: Some(cause), error }
    }

    /// The memory is there, and what is in it cannot be brought to the importer.
    pub(crate) fn not_brought(generation: u64, error: Error) -> Self {
        Self { generation, cause: None, error }
    }

    /// The attachment is trusted for less than an access in `direction`.
    pub(crate) fn untested(device: &str, generation: u64, direction: Direction, trust: Trust) -> Self {
        let tested = trust.allows();
        let why =
            format!("it was attached to {tested} only: its path is not tested for an access to {direction}");
        let error = Error::new(Kind::Unverified, TRIED, why)
            .on(device)
            .next("attach with Trust::Verified(Direction::Both), or enter in the direction that was tested");
        Self { generation, cause: None, error }
    }
}

const TRIED: &str = "use lent memory";

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Refused {}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        refused.error
    }
}

/// Leave to use the memory, until [`finish`](Access::finish), [`finish_when`](Access::finish_when) or drop.
///
/// It stays on its thread, so that a thread that is inside and asks for a revoke can be told so.
#[must_use = "an access that is dropped at once allows nothing"]
pub struct Access<'a, I: Importer> {
    attachment: &'a Attachment<I>,
    /// None only while it ends.
    import: Option<Arc<Import<I>>>,
    /// None only while it ends.
    inside: Option<Inside<'a>>,
    generation: u64,
    direction: Direction,
    /// What is lent is in the importer's memory, where that is a copy.
    is_pulled: bool,
    stays: PhantomData<*const ()>,
}

impl<'a, I: Importer> Access<'a, I> {
    /// Of a thread that is inside the gate of `attachment`.
    pub(crate) fn new(
        attachment: &'a Attachment<I>,
        import: Arc<Import<I>>,
        inside: Inside<'a>,
        direction: Direction,
    ) -> Self {
        thread_accesses::begin(attachment.inner().export.device().id);
        let generation = inside.generation();
        let (import, inside, stays) = (Some(import), Some(inside), PhantomData);
        Self { attachment, import, inside, generation, direction, is_pulled: false, stays }
    }

    /// Copies what is lent to the importer's memory, where that is a copy.
    pub(crate) fn pull(&mut self) -> Result<()> {
        self.import().pull(self.generation, self.direction)?;
        self.is_pulled = true;
        Ok(())
    }

    /// The import's memory.
    pub fn memory(&self) -> &I::Memory {
        self.import().memory()
    }

    /// The import.
    pub fn import(&self) -> &Import<I> {
        self.import.as_ref().expect("it is there until the access ends")
    }

    /// The generation of the memory.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What the importer may do with the memory meanwhile, as [`Attachment::enter`](crate::Attachment::enter)
    /// was told.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Ends the access and says whether the memory stayed the same. Finish when the importing device is
    /// done, not when work is submitted; or else [`Access::finish_when`].
    ///
    /// On a [staged](crate::Path::Staged) path an access that may write is first copied back, which blocks for
    /// as long as that takes. A revoke that waits for this access waits for the copy, too;
    /// one that does not wait any more (`Torn`) has nothing copied into memory that it took.
    pub fn finish(mut self) -> Outcome {
        self.end()
    }

    /// Lasts on until `signal` fires: a fence, a timeline's value, a sync file. The memory is not taken
    /// back by this process before that, or the deadline of whoever takes it.
    ///
    /// On a [staged](crate::Path::Staged) path an access that may write is copied back after the signal, by
    /// whoever notices it first: [`InFlight::wait`], the next `finish_when`, a revoke, or the end of the
    /// attachment. Until then the lent memory has the old bytes, and no other access copies anew: it finds
    /// what is in the importer's memory. So wait, where the bytes are wanted.
    pub fn finish_when(mut self, signal: impl Signal + 'static) -> InFlight<I> {
        self.end_on_this_thread();
        let inside = self.inside.take().expect("it is there until the access ends");
        let (import, export) = (self.import.take(), Arc::clone(&self.attachment.inner().export));
        let (generation, direction, is_pulled) = (self.generation, self.direction, self.is_pulled);
        let on_end = move |is_done| {
            let push = |import: &Arc<Import<I>>| import.push(generation, direction, is_done);
            let is_there = !is_pulled || import.as_ref().is_none_or(push);
            drop(import);
            let is_seen = export.invalidate() || !direction.includes(Direction::Write);
            is_there && is_seen
        };
        let in_flight = self.attachment.inner().gate.leave_when(inside, signal, on_end);
        InFlight::new(self.attachment.share(), in_flight)
    }

    fn end_on_this_thread(&self) {
        thread_accesses::end(self.attachment.inner().export.device().id);
    }

    fn end(&mut self) -> Outcome {
        let (Some(inside), Some(import)) = (self.inside.take(), self.import.take()) else {
            return Outcome::Ok;
        };
        self.end_on_this_thread();
        let is_there = !self.is_pulled || import.push(self.generation, self.direction, true);
        drop(import);
        let is_seen =
            self.attachment.inner().export.invalidate() || !self.direction.includes(Direction::Write);
        inside.leave().unless_lost(is_there && is_seen)
    }
}

impl<I: Importer> Drop for Access<'_, I> {
    fn drop(&mut self) {
        // An application that wants the outcome calls `finish`.
        let _ = self.end();
    }
}

impl<I: Importer> fmt::Debug for Access<'_, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("import", &self.import)
            .field("generation", &self.generation)
            .field("direction", &self.direction)
            .finish_non_exhaustive()
    }
}
