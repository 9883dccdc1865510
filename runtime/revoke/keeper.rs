//! `Keeper`: does what the [`machine`](super::machine) decides.
//!
//! ```text
//! the caller's thread                                a thread for calls
//!   ask -> gates close, everyone is told
//!   wait for each attachment, up to the deadline
//!   free what must be freed first
//!   hand over ------------------------------------->   note who is attached
//!   . that takes too long: hand over to another        owners quiesce
//!   wait, up to the call's limit                       BARs under mappings become shadow memory
//!   . not back: say what it waits for, and return      the call
//!                                                      the device is ready
//!                                                      BARs come back, owners resume
//!   done <------------------------------------------   gates open in the next generation
//! ```
//! There is one keeper for a process, because one call may reset several devices. Its lock is held for
//! decisions and for opening and closing gates, so that these come in the order of the decisions; never
//! while anything waits, a callback runs or the kernel is asked.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use peervram_backends::{Error, Exporter, Kind, deadline_after};

use super::RevokeCause;
use super::call::Call;
use super::call_threads::CallThreads;
use super::entry::{Entry, names};
use super::event::What;
use super::held;
use super::machine::{
    Action, AttachmentId, Change, ChangeId, DeviceId, ExportId, Input, Machine, Refusal, State, Terms,
};
use super::stuck::{CallThread, Stuck};
use crate::Result;
use crate::export::Lent;
use crate::gate::Gate;
use crate::lender::insist_on_close;
use crate::sync::{self, Condvar, Mutex, MutexGuard, Thread, wait_until};

/// An attachment, as a revoke sees it.
pub(crate) trait Gated: Send + Sync {
    fn gate(&self) -> &Arc<Gate>;
    /// Waits until nobody uses the memory, at most until `deadline`. Says whether that is so.
    fn wait_idle(&self, deadline: Instant) -> bool;
    /// Frees the import, where it must be freed before the call. Nobody uses it.
    fn free(&self);
    /// Whose it is, for messages.
    fn importer(&self) -> String;
    /// Whose it is and who is inside, for messages.
    fn describe(&self) -> String;
}

/// Decides and acts for all devices of a process.
pub(crate) struct Keeper {
    start: Instant,
    state: Mutex<Kept>,
    /// Some change went on.
    changed: Condvar,
    threads: CallThreads,
    /// Devices whose lenders are gone, that are to be closed, and that there was no thread for.
    orphans: Mutex<Vec<Orphan>>,
}

/// A device whose lender is gone.
type Orphan = (Arc<Entry>, Arc<dyn Exporter>);

struct Kept {
    machine: Machine,
    entries: HashMap<DeviceId, Arc<Entry>>,
    /// Each with its gate, which leads nowhere: an attachment must not end under the lock.
    gated: HashMap<AttachmentId, (Arc<Gate>, Weak<dyn Gated>)>,
    changes: HashMap<ChangeId, Progress>,
}

/// How far a change is.
#[derive(Default)]
struct Progress {
    entries: Vec<Arc<Entry>>,
    call: bool,
    stuck: bool,
    /// The call is back; with its answer.
    answer: Option<Result<()>>,
    /// Everyone was told of its end, or it was called off.
    is_told: bool,
    /// Callbacks that took too much of everyone's time, in words.
    slow: Vec<String>,
    /// Who was late, in words.
    words: Vec<(AttachmentId, String)>,
    must_be_freed: bool,
}

impl Default for Keeper {
    fn default() -> Self {
        let kept = Kept {
            machine: Machine::default(),
            entries: HashMap::new(),
            gated: HashMap::new(),
            changes: HashMap::new(),
        };
        let (state, changed) = (Mutex::new(kept), Condvar::new());
        let (threads, orphans) = (CallThreads::default(), Mutex::default());
        Self { start: Instant::now(), state, changed, threads, orphans }
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

impl Keeper {
    /// The one of this process.
    pub fn of_process() -> Arc<Self> {
        static PROCESS: LazyLock<Arc<Keeper>> = LazyLock::new(Arc::default);
        Arc::clone(&PROCESS)
    }

    /// A device lends from now on. Where its memory cannot be reached, nothing can be attached until it is
    /// given back.
    pub fn add(&self, exporter: &Arc<dyn Exporter>, reachable: bool) -> Arc<Entry> {
        // The exporter is asked for its name before the lock is taken.
        let device = DeviceId(new_id());
        let entry = Arc::new(Entry::new(device, exporter));
        let mut kept = self.state.lock();
        kept.entries.insert(device, Arc::clone(&entry));
        self.handle(&mut kept, Input::Add { device, reachable });
        entry
    }

    /// Memory of a device is exported. `make` is given its number.
    pub fn export(&self, entry: &Arc<Entry>, make: impl FnOnce(ExportId) -> Lent) -> Arc<Lent> {
        let mut kept = self.state.lock();
        let export = ExportId(new_id());
        self.handle(&mut kept, Input::Export { export, device: entry.id });
        drop(kept);
        let lent = Arc::new(make(export));
        entry.add(&lent);
        lent
    }

    /// An export is no more.
    pub fn unexport(&self, export: ExportId) {
        self.handle(&mut self.state.lock(), Input::Unexport { export });
    }

    /// Somebody attaches, and is inside from now on. `make` is given its number and the generation.
    ///
    /// # Errors
    /// [`Kind::Revoked`], [`Kind::Busy`] or [`Kind::Gone`].
    pub fn attach<G: Gated + 'static>(
        &self,
        lent: &Lent,
        free_before: bool,
        make: impl FnOnce(AttachmentId, u64) -> G,
    ) -> Result<Arc<G>> {
        let entry = lent.entry();
        let mut kept = self.state.lock();
        let attachment = AttachmentId(new_id());
        let input = Input::Attach { attachment, export: lent.id(), free_before };
        if let Some(why) = kept.refusal(input, self.now()) {
            return Err(explain(why, "attach to lent memory").on(&entry.name));
        }
        let gated = Arc::new(make(attachment, entry.generation()));
        let weak: Weak<G> = Arc::downgrade(&gated);
        kept.gated.insert(attachment, (Arc::clone(gated.gate()), weak));
        Ok(gated)
    }

    /// An attachment ended.
    pub fn detach(self: &Arc<Self>, attachment: AttachmentId) {
        let mut kept = self.state.lock();
        let gated = kept.gated.remove(&attachment);
        self.handle(&mut kept, Input::Detach { attachment });
        drop(kept);
        // Work that it still has may be the last to hold an export.
        drop(gated);
        self.close_orphans();
    }

    /// Closes a device whose lender is gone, on a thread of its own, as often as it takes. Where there is no
    /// thread to be had, one is tried for whenever something is detached.
    pub fn close_later(self: &Arc<Self>, entry: &Arc<Entry>, exporter: &Arc<dyn Exporter>) {
        self.orphans.lock().push((Arc::clone(entry), Arc::clone(exporter)));
        self.close_orphans();
    }

    fn close_orphans(self: &Arc<Self>) {
        loop {
            let orphan = self.orphans.lock().pop();
            let Some((entry, exporter)) = orphan else { return };
            let insist = {
                let (keeper, entry, exporter) = (Arc::clone(self), Arc::clone(&entry), Arc::clone(&exporter));
                move || insist_on_close(&keeper, &entry, &exporter)
            };
            if let Err(error) = sync::start(Thread::Close, insist) {
                tracing::error!(%error, device = &*entry.name, "no thread to close a device on: it stays open");
                self.orphans.lock().push((entry, exporter));
                return;
            }
        }
    }

    /// Where a device is; none where it is closed.
    pub fn state_of(&self, entry: &Entry) -> Option<State> {
        self.state.lock().machine.state(entry.id)
    }

    /// Whether a call is being made on a device: whatever needs its memory lock in the kernel waits for that.
    pub fn is_calling(&self, entry: &Entry) -> bool {
        matches!(self.state_of(entry), Some(State::Calling(_)))
    }

    /// The device of that name that lends, if there is one.
    #[cfg(feature = "vfio")]
    pub fn find(&self, name: &str) -> Option<Arc<Entry>> {
        self.state.lock().entries.values().find(|entry| &*entry.name == name).cloned()
    }

    /// Makes a change, as drawn above. Blocks until it is over, but no longer than its terms say.
    ///
    /// # Errors
    /// [`Kind::TimedOut`] or [`Kind::StillInUse`] where somebody was late, [`Kind::Busy`],
    /// [`Kind::Gone`] and [`Kind::WouldDeadlock`]: nothing was taken back. [`Kind::Stuck`]: it goes on.
    /// Else what the call said; everything was taken back all the same. [`Kind::Revoked`] where the call worked, and
    /// the device told of an error meanwhile.
    pub fn change(self: &Arc<Self>, call: Call, terms: Terms) -> Result<()> {
        let (what, tried, entries) = (call.what, call.tried, call.entries.clone());
        if let Change::Take(_) = what
            && let Some(entry) = entries.iter().find(|entry| held::by_this_thread(entry.id))
        {
            let why = "this thread is inside: it would wait for itself";
            return Err(Error::new(Kind::WouldDeadlock, tried, why)
                .on(&entry.name)
                .next("finish the access first, or ask from another thread"));
        }
        let deadline = deadline_after(terms.timeout);
        let (change, notified) = self.begin(what, tried, &entries, terms, deadline)?;
        // Callbacks run on this thread. What they take is of the time that everyone has.
        let slow = deliver(&entries, deadline.saturating_duration_since(Instant::now()));
        self.drain(change, &notified, deadline, slow);
        deliver(&entries, terms.call_limit);
        if let Some(error) = self.called_off(change) {
            let waited = terms.timeout.as_millis();
            return Err(error(tried, waited).on(names(&entries)));
        }

        for attachment in notified.iter().filter_map(|attachment| self.gated(*attachment)) {
            attachment.free();
        }
        let thread = Arc::new(CallThread::default());
        let call = Arc::new(Mutex::new(Some(call)));
        // Reading the kernel's list takes its time, and can stand in line behind a call of ours that hangs.
        let foreign = entries.iter().any(|entry| entry.lent().iter().any(|lent| lent.is_handed_out()));
        let ask = foreign && !self.state.lock().machine.is_calling_besides(change);
        self.hand_over(change, &call, &thread, ask, terms.call_limit);
        if ask {
            self.insist(change, &call, &thread, terms);
        }
        self.wait(change, tried, &entries, terms, &thread, &notified)
    }

    /// Has the call made by a thread for calls, which first asks the kernel who is attached, or does not.
    fn hand_over(
        self: &Arc<Self>,
        change: ChangeId,
        call: &Arc<Mutex<Option<Call>>>,
        thread: &Arc<CallThread>,
        ask: bool,
        limit: Duration,
    ) {
        let (keeper, call, thread) = (Arc::clone(self), Arc::clone(call), Arc::clone(thread));
        let work = Box::new(move || {
            if ask {
                thread.ask();
            }
            // Where asking took too long, another thread has it.
            let taken = call.lock().take();
            if let Some(call) = taken {
                thread.begin();
                keeper.carry_out(change, call, limit);
            }
        });
        if let Err((work, error)) = self.threads.run(work) {
            tracing::error!(%error, "no thread for a revoking call: it is made on the caller's");
            work();
        }
    }

    /// Hands the call over once more, where the kernel does not list in time who is attached: its list is
    /// behind the locks of every dma-buf of the machine, and somebody may have one of them for long. No
    /// revoke waits for that.
    fn insist(
        self: &Arc<Self>,
        change: ChangeId,
        call: &Arc<Mutex<Option<Call>>>,
        thread: &Arc<CallThread>,
        terms: Terms,
    ) {
        const PATIENCE: Duration = Duration::from_millis(100);
        let limit = deadline_after(terms.call_limit.min(PATIENCE));
        let mut kept = self.state.lock();
        let mut timed_out = false;
        while !timed_out && kept.changes.get(&change).is_some_and(|progress| progress.answer.is_none()) {
            (kept, timed_out) = wait_until(&self.changed, kept, limit);
        }
        drop(kept);
        let is_left = call.lock().is_some();
        if is_left {
            self.hand_over(change, call, thread, false, terms.call_limit);
        }
    }

    /// Closes the gates of everyone attached; says who must answer.
    fn begin(
        &self,
        what: Change,
        tried: &'static str,
        entries: &[Arc<Entry>],
        terms: Terms,
        deadline: Instant,
    ) -> Result<(ChangeId, Vec<AttachmentId>)> {
        let mut kept = self.state.lock();
        let change = ChangeId(new_id());
        let devices = entries.iter().map(|entry| entry.id).collect();
        kept.changes.insert(change, Progress::of(entries));
        let actions = kept.machine.handle(Input::Ask { change, what, devices, terms }, self.now());
        if let Some(Action::RefuseChange { why, .. }) = actions.first() {
            kept.changes.remove(&change);
            return Err(explain(*why, tried).on(names(entries)));
        }
        let notified = (actions.iter())
            .filter_map(|action| match action {
                Action::Notify { attachment, .. } => Some(*attachment),
                _ => None,
            })
            .collect();
        self.act(&mut kept, actions);
        if let Change::Take(cause) = what {
            entries.iter().for_each(|entry| entry.queue(What::Draining { cause, deadline }));
        }
        Ok((change, notified))
    }

    /// Waits for everyone who was told, up to the deadline.
    fn drain(&self, change: ChangeId, notified: &[AttachmentId], deadline: Instant, slow: Vec<String>) {
        let mut late = Vec::new();
        for &attachment in notified {
            // One that is gone has answered by that.
            let Some(gated) = self.gated(attachment) else { continue };
            if gated.wait_idle(deadline) {
                self.handle(&mut self.state.lock(), Input::Answered { attachment, change });
            } else {
                late.push((attachment, gated.describe()));
            }
        }
        let mut kept = self.state.lock();
        if let Some(progress) = kept.changes.get_mut(&change) {
            (progress.words, progress.slow) = (late, slow);
        }
        while kept.changes.get(&change).is_some_and(|progress| !progress.call && !progress.is_told) {
            // Somebody is late. The machine's deadline is a little before this one, or a little after.
            if let Some(left) = kept.machine.deadline(change).and_then(|at| at.checked_sub(self.now())) {
                (kept, _) = wait_until(&self.changed, kept, deadline_after(left));
            }
            self.handle(&mut kept, Input::Tick { change });
        }
    }

    /// The error of a change that was called off.
    fn called_off(&self, change: ChangeId) -> Option<impl FnOnce(&'static str, u128) -> Error + use<>> {
        let mut kept = self.state.lock();
        if kept.changes.get(&change).is_none_or(|progress| progress.call) {
            return None;
        }
        let progress = kept.changes.remove(&change)?;
        let (mut late, must_be_freed) = (progress.late(), progress.must_be_freed);
        late.extend(progress.slow);
        Some(move |tried, waited_ms| {
            let kind = if must_be_freed { Kind::StillInUse } else { Kind::TimedOut };
            let why = format!("not out of the memory within {waited_ms} ms: {}", late.join("; "));
            Error::new(kind, tried, why).next(if must_be_freed {
                "finish what is in flight and drop what `current` gave out: the kernel would wait for it, or leave it mapped"
            } else {
                "finish what is in flight, wait longer, or go on at the deadline and have it end as torn"
            })
        })
    }

    /// The part of a change that runs on a thread of its own.
    fn carry_out(&self, change: ChangeId, call: Call, limit: Duration) {
        let (tried, entries) = (call.tried, call.entries.clone());
        let (mut result, after) = call.make();
        let mut kept = self.state.lock();
        let actions = kept.machine.handle(Input::Returned { change, after }, self.now());
        for entry in &entries {
            // A closed one is not known any more.
            let last = entry.generation() + 1;
            entry.set_generation(kept.machine.generation(entry.id).unwrap_or(last));
        }
        self.act(&mut kept, actions);
        for entry in &entries {
            entry.queue(match kept.machine.state(entry.id) {
                None => What::Gone,
                Some(State::Away(cause)) => What::Revoked { cause },
                Some(_) if kept.machine.has_failed(entry.id) => {
                    result = result.and_then(|()| Err(failed_meanwhile(tried, &entry.name)));
                    What::Revoked { cause: RevokeCause::DeviceError }
                }
                Some(_) => What::Restored,
            });
            if kept.machine.state(entry.id).is_none() {
                kept.entries.remove(&entry.id);
            }
        }
        drop(kept);
        self.note(change, |progress| progress.answer = Some(result));
        // Before whoever asked goes on: when they do, everyone has been told, or has had the call's limit.
        deliver(&entries, limit);
        self.note(change, |progress| progress.is_told = true);
        // What a slow one took.
        deliver(&entries, limit);
    }

    /// Notes how far a change is; nobody may wait for it any more.
    fn note(&self, change: ChangeId, note: impl FnOnce(&mut Progress)) {
        if let Some(progress) = self.state.lock().changes.get_mut(&change) {
            note(progress);
        }
        self.changed.notify_all();
    }

    /// Waits for the call, up to its limit.
    fn wait(
        &self,
        change: ChangeId,
        tried: &'static str,
        entries: &[Arc<Entry>],
        terms: Terms,
        thread: &CallThread,
        notified: &[AttachmentId],
    ) -> Result<()> {
        let mut limit = deadline_after(terms.call_limit);
        let (mut is_back, mut tells_late) = (false, false);
        let mut kept = self.state.lock();
        loop {
            let Some(progress) = kept.changes.get_mut(&change) else { return Ok(()) };
            if let Some(answer) = progress.answer.take_if(|_| progress.is_told || tells_late) {
                kept.changes.remove(&change);
                return answer;
            }
            // The call is back, and callbacks take their time: they have the limit once more.
            if progress.answer.is_some() && !is_back {
                (is_back, limit) = (true, deadline_after(terms.call_limit));
            }
            if std::mem::take(&mut progress.stuck) {
                drop(kept);
                let importers =
                    notified.iter().filter_map(|attachment| Some(self.gated(*attachment)?.importer()));
                let stuck = Stuck::describe(tried, entries, importers.collect(), terms.call_limit, thread);
                let stuck = Arc::new(stuck);
                kept = self.state.lock();
                // Where it came back meanwhile, that is told, and what it said is the answer.
                if entries.iter().all(|entry| kept.machine.state(entry.id) == Some(State::Calling(change))) {
                    // Nobody waits for it any more; what comes of it is told by events.
                    kept.changes.remove(&change);
                    entries.iter().for_each(|entry| entry.queue(What::Stuck(Arc::clone(&stuck))));
                    drop(kept);
                    deliver(entries, terms.call_limit);
                    return Err(stuck.error());
                }
                continue;
            }
            let timed_out;
            (kept, timed_out) = wait_until(&self.changed, kept, limit);
            if timed_out {
                tells_late |= is_back;
                // A device that is waited for has a limit of its own, and the kernel has come back.
                if !entries.iter().any(|entry| entry.waits_for_device()) {
                    self.handle(&mut kept, Input::Tick { change });
                }
                limit = deadline_after(terms.call_limit);
            }
        }
    }

    /// A device failed: nobody is let in before it has been taken back.
    pub fn fail(&self, entry: &Entry) {
        self.handle(&mut self.state.lock(), Input::Fail { device: entry.id });
    }

    /// Whether it failed, and nobody has taken it back since.
    pub fn has_failed(&self, entry: &Entry) -> bool {
        self.state.lock().machine.has_failed(entry.id)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn gated(&self, attachment: AttachmentId) -> Option<Arc<dyn Gated>> {
        self.state.lock().gated.get(&attachment)?.1.upgrade()
    }

    fn handle(&self, kept: &mut MutexGuard<'_, Kept>, input: Input) {
        let actions = kept.machine.handle(input, self.now());
        self.act(kept, actions);
    }

    /// Opens and closes gates, and notes how far changes are.
    fn act(&self, kept: &mut MutexGuard<'_, Kept>, actions: Vec<Action>) {
        let kept = &mut **kept;
        for action in actions {
            let (attachment, act): (_, &dyn Fn(&Gate)) = match &action {
                Action::Notify { attachment, cause, .. } => (attachment, &|gate| gate.close(*cause)),
                Action::CalledOff { attachment, generation } | Action::Open { attachment, generation } => {
                    (attachment, &|gate| gate.open(*generation))
                }
                Action::Away { attachment, generation, cause }
                | Action::Bar { attachment, generation, cause }
                | Action::Tear { attachment, generation, cause } => {
                    (attachment, &|gate| gate.shut(*generation, *cause))
                }
                Action::Gone { attachment, generation } => (attachment, &|gate| gate.bury(*generation)),
                Action::Late { change, attachments } => {
                    kept.note_late(*change, attachments);
                    continue;
                }
                Action::Call { change } => {
                    kept.progress(*change, |progress| progress.call = true);
                    continue;
                }
                Action::Stuck { change } => {
                    kept.progress(*change, |progress| progress.stuck = true);
                    continue;
                }
                Action::Done { change, .. } => {
                    // One that was called ends with its call, when everyone has been told.
                    kept.progress(*change, |progress| {
                        if !progress.call {
                            progress.entries.iter().for_each(|entry| entry.queue(What::CalledOff));
                            progress.is_told = true;
                        }
                    });
                    continue;
                }
                // Their askers look at them.
                Action::RefuseChange { .. } | Action::RefuseAttach { .. } => continue,
            };
            if let Some((gate, _)) = kept.gated.get(attachment) {
                act(gate);
            }
        }
        self.changed.notify_all();
    }
}

impl Progress {
    fn of(entries: &[Arc<Entry>]) -> Self {
        let entries = entries.to_vec();
        Self { entries, ..Self::default() }
    }

    fn late(&self) -> Vec<String> {
        self.words.iter().map(|(_, who)| who.clone()).collect()
    }
}

impl Kept {
    fn refusal(&mut self, input: Input, now: Duration) -> Option<Refusal> {
        self.machine.handle(input, now).into_iter().find_map(|action| match action {
            Action::RefuseAttach { why, .. } => Some(why),
            _ => None,
        })
    }

    fn progress(&mut self, change: ChangeId, note: impl FnOnce(&mut Progress)) {
        if let Some(progress) = self.changes.get_mut(&change)
            && progress.answer.is_none()
        {
            note(progress);
        }
    }

    /// Remembers in words who is late, and tells the devices' subscribers.
    fn note_late(&mut self, change: ChangeId, attachments: &[AttachmentId]) {
        let must_be_freed = attachments.iter().any(|id| self.machine.must_be_freed(*id));
        self.progress(change, |progress| {
            let is_late = |(attachment, _): &(AttachmentId, String)| attachments.contains(attachment);
            progress.words.retain(is_late);
            progress.must_be_freed = must_be_freed;
            for entry in &progress.entries {
                entry.queue(What::Late { who: progress.late() });
            }
        });
    }
}

/// A number that nobody has had, in any keeper: a thread remembers which devices it is inside of.
fn new_id() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Why something is refused, in words.
fn explain(why: Refusal, tried: &'static str) -> Error {
    match why {
        Refusal::Busy(_) => Error::new(Kind::Busy, tried, "its memory is being taken back or given back now")
            .next("wait for the event that ends it, and try again"),
        Refusal::Away(cause) => Error::new(Kind::Revoked, tried, format!("its memory is away: {cause}"))
            .next("try again when the memory is there again"),
        Refusal::NotAway(_) => Error::new(Kind::InvalidInput, tried, "its memory is not away"),
        Refusal::Closed => Error::new(Kind::Gone, tried, "the lender closed it"),
    }
}

/// The answer of a call that worked, on a device that told of an error since the call was asked for: whether the call
/// came before the error or after it, nobody knows.
fn failed_meanwhile(tried: &'static str, device: &str) -> Error {
    let why = "it was done, but the device reported an error meanwhile: its memory is away";
    Error::new(Kind::Revoked, tried, why)
        .on(device)
        .next("reset the device, once more where this was a reset")
}

/// Has callbacks called. Says in words which of them took longer than `patience`; everyone is told so next.
fn deliver(entries: &[Arc<Entry>], patience: Duration) -> Vec<String> {
    let mut words = Vec::new();
    for entry in entries {
        for slow in entry.subscribers.deliver(patience) {
            tracing::warn!(device = &*entry.name, %slow, "a callback is slow");
            words.push(slow.to_string());
            entry.queue(What::SlowCallback(slow));
        }
    }
    words
}
