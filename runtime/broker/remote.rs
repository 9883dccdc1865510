//! `RemoteAttachment`: a lease, as one more participant of a revoke. Whoever imports is another process: it is told over
//! its socket, and answers over it.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use peervram_backends::{Error, HostSlice, Kind, Mapping, Peer};

use super::inbox::{Inbox, LeaseNotice, Notice};
use super::lease_words::LeaseWord;
use super::message::LeaseState;
use crate::export_inner::ExportInner;
use crate::revoke::machine::{AttachmentId, ChangeId};
use crate::revoke::target::{Admission, Drain, RevokeTarget};
use crate::staged::{StageCopy, by_cpu, moved};
use crate::sync::{Condvar, Mutex, wait_until};
use crate::{Result, RevokeCause};

/// A lease of another process. Dropping it ends its part in revokes.
pub(super) struct RemoteAttachment {
    id: AttachmentId,
    export: Arc<ExportInner>,
    admission: Arc<RemoteAdmission>,
    /// Held while this process copies for the client.
    copying: Mutex<()>,
    /// The memory as this process's CPU has it, once it has copied.
    bar: OnceLock<Arc<Mapping>>,
}

/// A lease and whose it is, for messages.
pub(super) struct LeaseHolder {
    pub lease: u64,
    pub peer: Arc<Peer>,
    pub label: Option<String>,
}

impl fmt::Display for LeaseHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, lease {}", self.peer, self.lease)?;
        self.label.as_ref().map_or(Ok(()), |label| write!(f, " ({label})"))
    }
}

/// What lets a client in: messages to it. Where it is is known here from the answers.
pub(super) struct RemoteAdmission {
    holder: LeaseHolder,
    inbox: Arc<Inbox>,
    word: LeaseWord,
    state: Mutex<State>,
    answered: Condvar,
}

#[derive(Debug, Clone, Copy)]
struct State {
    generation: u64,
    phase: Phase,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Live,
    Draining(Drain),
    Drained,
    Away(RevokeCause),
    Gone,
}

impl RemoteAttachment {
    /// Of whoever borrowed `export`, and reads `word`.
    ///
    /// # Errors
    /// As [`Export::attach`](crate::Export::attach) where the memory is not there now.
    pub fn new(
        export: &Arc<ExportInner>,
        holder: LeaseHolder,
        word: LeaseWord,
        inbox: &Arc<Inbox>,
    ) -> Result<Arc<Self>> {
        export.revoker().attach(export.device(), export.id(), false, |id, generation| {
            word.set(generation);
            let state = Mutex::new(State { generation, phase: Phase::Live });
            let (inbox, answered) = (Arc::clone(inbox), Condvar::new());
            let admission = Arc::new(RemoteAdmission { holder, inbox, word, state, answered });
            let (copying, bar) = (Mutex::default(), OnceLock::new());
            Self { id, export: Arc::clone(export), admission, copying, bar }
        })
    }

    /// The generation of its memory, and whether its client uses it.
    pub fn state(&self) -> (u64, LeaseState) {
        let State { generation, phase } = *self.admission.state.lock();
        let state = match phase {
            Phase::Live => LeaseState::Live,
            Phase::Draining(_) => LeaseState::Draining,
            Phase::Drained => LeaseState::Drained,
            Phase::Away(_) | Phase::Gone => LeaseState::Away,
        };
        (generation, state)
    }

    /// The number of its word.
    pub fn word(&self) -> usize {
        self.admission.word.index()
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.export.size_bytes()
    }

    /// The name of the engine that [`copy`](RemoteAttachment::copy) is made by; none where it is the CPU.
    pub fn engine(&self) -> Option<&str> {
        Some(self.export.aperture().owner()?.engine()?.name())
    }

    /// Copies between its memory of `generation`, from an offset on, and `slice`, as part of an access of the client's.
    ///
    /// # Errors
    /// [`Kind::Revoked`] where the memory is of another generation, or the client has said that it is out of it; what the
    /// owner, its engine, or mapping the memory says.
    pub fn copy(&self, way: StageCopy, generation: u64, offset_bytes: u64, slice: &HostSlice) -> Result<()> {
        let _copying = self.copying.lock();
        // After the lock was taken: whoever takes the memory waits for the lock.
        let state = *self.admission.state.lock();
        if state.generation != generation || !matches!(state.phase, Phase::Live | Phase::Draining(_)) {
            let why = "the memory was taken back, or is about to be";
            return Err(Error::new(Kind::Revoked, "copy lent memory", why).on(self.export.device_name()));
        }
        if way == StageCopy::Pull {
            self.export.flush()?;
        }
        match self.export.aperture().owner().and_then(|owner| owner.engine()) {
            Some(engine) => moved(engine, self.export.aperture().ranges(), way, offset_bytes, slice)?,
            None => by_cpu(&*self.bar()?, way, offset_bytes, slice)?,
        }
        if way == StageCopy::Push && !self.export.invalidate() {
            let why = "the owner's device cannot be made to see what was written";
            return Err(Error::new(Kind::Unverified, "copy lent memory", why).on(self.export.device_name()));
        }
        Ok(())
    }

    fn bar(&self) -> Result<Arc<Mapping>> {
        if let Some(bar) = self.bar.get() {
            return Ok(Arc::clone(bar));
        }
        let bar = self.export.device().exporter()?.map(self.export.aperture().ranges())?;
        Ok(Arc::clone(self.bar.get_or_init(|| bar)))
    }

    /// What a client that begins to listen has to hear of first, where something is not over.
    pub fn pending(&self) -> Option<LeaseNotice> {
        let State { generation, phase } = *self.admission.state.lock();
        match phase {
            Phase::Live | Phase::Drained => None,
            Phase::Draining(drain) => Some(LeaseNotice::Draining { drain, generation }),
            Phase::Away(cause) => Some(LeaseNotice::Revoked { generation, cause }),
            Phase::Gone => Some(LeaseNotice::Gone { generation }),
        }
    }

    /// The client says that it is out of the memory. Returns whether that is the answer to what it was asked.
    pub fn answer(&self, change: u64, generation: u64) -> bool {
        let mut state = self.admission.state.lock();
        let is_answer = matches!(state.phase, Phase::Draining(drain) if drain.change == ChangeId(change));
        if is_answer && state.generation == generation {
            state.phase = Phase::Drained;
            self.admission.answered.notify_all();
            return true;
        }
        false
    }

    /// The lease is over: who waits for an answer goes on. The descriptors that the client had are the books' matter.
    pub fn end(&self) {
        let mut state = self.admission.state.lock();
        state.phase = Phase::Gone;
        self.admission.word.end();
        self.admission.answered.notify_all();
    }

    /// An importer of the client's has to free its import before the memory is taken back.
    pub fn must_be_freed(&self) {
        self.export.revoker().must_be_freed(self.id);
    }
}

impl RemoteAdmission {
    fn tell(&self, notice: LeaseNotice) {
        self.inbox.tell(Notice::Lease(self.holder.lease, notice));
    }

    /// Moves on, wakes whoever waits for an answer, and tells the client. A lease that is over stays so.
    fn move_to(&self, generation: u64, phase: Phase, notice: LeaseNotice) {
        let mut state = self.state.lock();
        if matches!(state.phase, Phase::Gone) {
            return;
        }
        match phase {
            // For the client, the word of a lease that is over says the same.
            Phase::Gone => self.word.end(),
            _ => self.word.set(generation),
        }
        *state = State { generation, phase };
        self.answered.notify_all();
        drop(state);
        self.tell(notice);
    }
}

impl Admission for RemoteAdmission {
    fn close(&self, drain: Drain) {
        let generation = self.state.lock().generation;
        self.move_to(generation, Phase::Draining(drain), LeaseNotice::Draining { drain, generation });
    }

    fn call_off(&self, generation: u64) {
        self.move_to(generation, Phase::Live, LeaseNotice::CalledOff { generation });
    }

    fn open(&self, generation: u64) {
        self.move_to(generation, Phase::Live, LeaseNotice::Restored { generation });
    }

    fn shut(&self, generation: u64, cause: RevokeCause) {
        // Who was torn hears once that the memory is away.
        let before = *self.state.lock();
        if matches!(before.phase, Phase::Away(_)) && before.generation == generation {
            return;
        }
        self.move_to(generation, Phase::Away(cause), LeaseNotice::Revoked { generation, cause });
    }

    fn bar(&self, generation: u64, cause: RevokeCause) {
        self.shut(generation, cause);
        let state = self.state.lock();
        if !matches!(state.phase, Phase::Gone) {
            // The generation that is to come when the memory is taken back: who is inside is torn.
            self.word.set(generation + 1);
        }
    }

    fn shut_for_good(&self, generation: u64) {
        self.move_to(generation, Phase::Gone, LeaseNotice::Gone { generation });
    }
}

impl RevokeTarget for RemoteAttachment {
    fn admission(&self) -> Arc<dyn Admission> {
        Arc::clone(&self.admission) as _
    }

    fn wait_idle(&self, deadline: Instant) -> bool {
        let mut state = self.admission.state.lock();
        let mut timed_out = false;
        while matches!(state.phase, Phase::Draining(_)) && !timed_out {
            (state, timed_out) = wait_until(&self.admission.answered, state, deadline);
        }
        !matches!(state.phase, Phase::Draining(_))
    }

    /// What must be freed is the client's, which frees it before it answers. A client that was torn may still have this
    /// process copy for it.
    fn free(&self) {
        drop(self.copying.lock());
    }

    fn importer(&self) -> String {
        self.admission.holder.to_string()
    }

    fn describe(&self) -> String {
        format!("{} has not answered", self.admission.holder)
    }
}

impl Drop for RemoteAttachment {
    fn drop(&mut self) {
        self.end();
        self.export.revoker().detach(self.id);
    }
}
