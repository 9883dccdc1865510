//! One change: memory is taken back, or given back.
//!
//! ```text
//! the caller's thread                                a thread for calls
//!   begin: gates close, subscribers are told
//!   drain: wait for each attachment, up to the deadline
//!   free the imports that must be freed first
//!   hand over ------------------------------------->   note who is attached
//!   . that takes too long: hand over to another        owners quiesce
//!   wait, up to the call's limit                       BARs under mappings become shadow memory
//!   . not back: say what it waits for, and return      the call
//!                                                      the device is ready
//!                                                      BARs come back, owners resume
//!   done <------------------------------------------   gates open in the next generation
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::{Error, Kind, deadline_after};

use super::RevokeCause;
use super::call::Call;
use super::call_thread::CallThread;
use super::event::EventKind;
use super::lending_device::{LendingDevice, names};
use super::machine::{Action, After, AttachmentId, Change, ChangeId, DeviceId, Input, RevokeOptions, State};
use super::revoker::{Revoker, new_id};
use super::state::{PendingChange, RevokerState, explain};
use super::stuck::Stuck;
use super::thread_accesses;
use crate::Result;
use crate::sync::{Condvar, Mutex, wait_until};

/// A change under way, as the thread that asked for it and the threads for calls share it.
struct Ongoing {
    revoker: Arc<Revoker>,
    id: ChangeId,
    /// What is tried, as a verb phrase for messages.
    tried: &'static str,
    devices: Vec<Arc<LendingDevice>>,
    /// The attachments that must answer before the call.
    notified: Vec<AttachmentId>,
    options: RevokeOptions,
    /// Until when the attachments may take.
    deadline: Instant,
    /// The change went on: see [`PendingChange`].
    went_on: Arc<Condvar>,
    /// None once a thread makes it.
    call: Mutex<Option<Call>>,
    thread: CallThread,
}

impl Revoker {
    /// Makes a change, as drawn above. Blocks until it is over, but no longer than its options say.
    ///
    /// # Errors
    /// [`Kind::TimedOut`] or [`Kind::StillInUse`] where an attachment was late, [`Kind::Busy`],
    /// [`Kind::Gone`] and [`Kind::WouldDeadlock`]: nothing was taken back. [`Kind::Stuck`]: the call goes on.
    /// Else what the call said; everything was taken back all the same. [`Kind::Revoked`] where the call worked, and
    /// the device reported an error meanwhile.
    pub fn change(self: &Arc<Self>, call: Call, options: RevokeOptions) -> Result<()> {
        check_no_access_of_this_thread(&call)?;
        let change = Arc::new(Ongoing::begin(self, call, options)?);
        change.drain();
        change.check_not_called_off()?;
        change.free_imports();
        change.have_call_made();
        change.wait()
    }
}

/// A thread that asks for its own accesses to end would wait for itself.
fn check_no_access_of_this_thread(call: &Call) -> Result<()> {
    let Change::Take(_) = call.what else { return Ok(()) };
    let inside = call.devices.iter().find(|device| thread_accesses::has_access(device.id));
    inside.map_or(Ok(()), |device| {
        let why = "this thread is inside: it would wait for itself";
        Err(Error::new(Kind::WouldDeadlock, call.tried, why)
            .on(&device.name)
            .next("finish the access first, or ask from another thread"))
    })
}

impl Ongoing {
    /// Closes the gates of all attachments to the call's devices.
    fn begin(revoker: &Arc<Revoker>, call: Call, options: RevokeOptions) -> Result<Self> {
        let deadline = deadline_after(options.timeout);
        let (id, what, tried, devices) = (ChangeId(new_id()), call.what, call.tried, call.devices.clone());
        let mut state = revoker.state.lock();
        let ids = devices.iter().map(|device| device.id).collect();
        let pending = PendingChange::of(&devices);
        let went_on = Arc::clone(&pending.went_on);
        state.changes.insert(id, pending);
        let input = Input::Ask { change: id, what, devices: ids, options };
        let actions = state.machine.handle(input, revoker.clock());
        if let Some(Action::RefuseChange { why, .. }) = actions.first() {
            state.changes.remove(&id);
            return Err(explain(*why, tried).on(names(&devices)));
        }
        let notified = (actions.iter())
            .filter_map(|action| match action {
                Action::Notify { attachment, .. } => Some(*attachment),
                _ => None,
            })
            .collect();
        state.act(actions);
        if let Change::Take(cause) = what {
            devices.iter().for_each(|device| device.queue(EventKind::Draining { cause, deadline }));
        }
        drop(state);
        let (revoker, call, thread) = (Arc::clone(revoker), Mutex::new(Some(call)), CallThread::default());
        Ok(Self { revoker, id, tried, devices, notified, options, deadline, went_on, call, thread })
    }

    /// Calls the subscribers back, on this thread, and waits for every attachment that was notified, up to the
    /// deadline. The time that callbacks take is part of the time that attachments have.
    fn drain(&self) {
        let slow = deliver(&self.devices, self.deadline.saturating_duration_since(Instant::now()));
        let mut late = Vec::new();
        for &attachment in &self.notified {
            // An attachment that ended has answered by that.
            let Some(target) = self.revoker.target(attachment) else { continue };
            if target.wait_idle(self.deadline) {
                self.handle(Input::Answered { attachment, change: self.id });
            } else {
                late.push((attachment, target.describe()));
            }
        }
        self.wait_for_the_machines_deadline(late, slow);
        deliver(&self.devices, self.options.call_limit);
    }

    /// Waits until the machine has the call made or calls the change off. Its deadline is a little before the one that
    /// attachments were waited for until, or a little after.
    fn wait_for_the_machines_deadline(&self, late: Vec<(AttachmentId, String)>, slow: Vec<String>) {
        let revoker = &self.revoker;
        let mut state = revoker.state.lock();
        if let Some(pending) = state.changes.get_mut(&self.id) {
            (pending.late, pending.slow) = (late, slow);
        }
        let is_open = |state: &RevokerState| {
            state.changes.get(&self.id).is_some_and(|pending| !pending.is_called && !pending.is_told)
        };
        while is_open(&state) {
            if let Some(left) = state.machine.deadline(self.id).and_then(|at| at.checked_sub(revoker.clock()))
            {
                (state, _) = wait_until(&self.went_on, state, deadline_after(left));
            }
            revoker.handle(&mut state, Input::Tick { change: self.id });
        }
    }

    /// Fails where attachments were late and the change was called off.
    fn check_not_called_off(&self) -> Result<()> {
        let mut state = self.revoker.state.lock();
        if state.changes.get(&self.id).is_none_or(|pending| pending.is_called) {
            return Ok(());
        }
        let Some(pending) = state.changes.remove(&self.id) else { return Ok(()) };
        drop(state);
        let mut late = pending.late_in_words();
        late.extend(pending.slow);
        let (kind, next) = if pending.must_be_freed {
            let next = "finish what is in flight and drop what `current` gave out: the kernel would wait for it, or leave it mapped";
            (Kind::StillInUse, next)
        } else {
            let next =
                "finish what is in flight, wait longer, or go on at the deadline and have it end as torn";
            (Kind::TimedOut, next)
        };
        let waited_ms = self.options.timeout.as_millis();
        let why = format!("not out of the memory within {waited_ms} ms: {}", late.join("; "));
        Err(Error::new(kind, self.tried, why).next(next).on(names(&self.devices)))
    }

    /// Frees the imports that must be freed before the call.
    fn free_imports(&self) {
        let targets = self.notified.iter().filter_map(|attachment| self.revoker.target(*attachment));
        targets.for_each(|target| target.free());
    }

    /// Has the call made by a thread for calls. Where importers may have dma-bufs that this process does not know,
    /// that thread asks the kernel for its list of attachments first, which may take long: the list is behind the
    /// locks of every dma-buf of the machine, and somebody may have one of them for long. The call does not wait for
    /// that: another thread makes it then.
    fn have_call_made(self: &Arc<Self>) {
        const PATIENCE: Duration = Duration::from_millis(100);
        let made_here = self.call.lock().take_if(|call| call.is_made_here);
        if let Some(call) = made_here {
            self.thread.begin();
            self.carry_out(call);
            return;
        }
        let is_handed_out =
            self.devices.iter().any(|device| device.exports().iter().any(|export| export.is_handed_out()));
        let asks = is_handed_out && !self.revoker.state.lock().machine.is_calling_besides(self.id);
        self.hand_over(asks);
        if !asks {
            return;
        }
        let limit = deadline_after(self.options.call_limit.min(PATIENCE));
        let mut state = self.revoker.state.lock();
        let mut timed_out = false;
        let is_running = |state: &RevokerState| {
            state.changes.get(&self.id).is_some_and(|pending| pending.answer.is_none())
        };
        while !timed_out && is_running(&state) {
            (state, timed_out) = wait_until(&self.went_on, state, limit);
        }
        drop(state);
        if self.call.lock().is_some() {
            self.hand_over(false);
        }
    }

    /// Has a thread for calls make the call, unless another has begun to. With `asks` it asks the kernel first who is
    /// attached.
    fn hand_over(self: &Arc<Self>, asks: bool) {
        let change = Arc::clone(self);
        let work = Box::new(move || {
            if asks {
                change.thread.ask();
            }
            let taken = change.call.lock().take();
            if let Some(call) = taken {
                change.thread.begin();
                change.carry_out(call);
            }
        });
        if let Err((work, error)) = self.revoker.threads.run(work) {
            tracing::error!(%error, "no thread for a revoking call: it is made on the caller's");
            work();
        }
    }

    /// Makes the call and opens the gates again; the part of a change that a thread for calls does.
    fn carry_out(&self, call: Call) {
        let (mut result, after) = call.make();
        let revoker = &self.revoker;
        let mut state = revoker.state.lock();
        let untouched: Vec<DeviceId> = (after.iter())
            .filter_map(|(device, after)| (*after == After::Untouched).then_some(*device))
            .collect();
        let actions = state.machine.handle(Input::Returned { change: self.id, after }, revoker.clock());
        for device in &self.devices {
            // The machine has forgotten a device that is closed.
            let last = device.generation() + 1;
            device.set_generation(state.machine.generation(device.id).unwrap_or(last));
        }
        state.act(actions);
        for device in &self.devices {
            device.queue(match state.machine.state(device.id) {
                _ if untouched.contains(&device.id) => EventKind::CalledOff,
                None => EventKind::Gone,
                Some(State::Away(cause)) => EventKind::Revoked { cause },
                Some(_) if state.machine.has_failed(device.id) => {
                    result = result.and_then(|()| Err(failed_meanwhile(self.tried, &device.name)));
                    EventKind::Revoked { cause: RevokeCause::DeviceError }
                }
                Some(_) => EventKind::Restored,
            });
            if state.machine.state(device.id).is_none() {
                state.devices.remove(&device.id);
            }
        }
        drop(state);
        self.note(|pending| pending.answer = Some(result));
        // Before the thread that asked goes on: when it does, every subscriber has been told, or has had the call's
        // limit to be told in.
        deliver(&self.devices, self.options.call_limit);
        self.note(|pending| pending.is_told = true);
        // Reports of callbacks that were slow.
        deliver(&self.devices, self.options.call_limit);
    }

    /// Waits for the call, up to its limit.
    fn wait(&self) -> Result<()> {
        let (id, call_limit) = (self.id, self.options.call_limit);
        let mut limit = deadline_after(call_limit);
        let (mut is_back, mut tells_late) = (false, false);
        let mut state = self.revoker.state.lock();
        loop {
            let Some(pending) = state.changes.get_mut(&id) else { return Ok(()) };
            if let Some(answer) = pending.answer.take_if(|_| pending.is_told || tells_late) {
                state.changes.remove(&id);
                return answer;
            }
            // The call is back, and callbacks take their time: they have the limit once more.
            if pending.answer.is_some() && !is_back {
                (is_back, limit) = (true, deadline_after(call_limit));
            }
            if std::mem::take(&mut pending.is_stuck) {
                drop(state);
                let stuck = self.describe_stuck();
                state = self.revoker.state.lock();
                // Where the call came back meanwhile, what it said is the answer.
                if self
                    .devices
                    .iter()
                    .all(|device| state.machine.state(device.id) == Some(State::Calling(id)))
                {
                    // Nobody waits for the change any more; what comes of it is told by events.
                    state.changes.remove(&id);
                    self.devices.iter().for_each(|device| device.queue(EventKind::Stuck(Arc::clone(&stuck))));
                    drop(state);
                    deliver(&self.devices, call_limit);
                    return Err(stuck.error());
                }
                continue;
            }
            let timed_out;
            (state, timed_out) = wait_until(&self.went_on, state, limit);
            if timed_out {
                tells_late |= is_back;
                // The kernel has come back where a device is waited for, and that wait has a limit of its own.
                if !self.devices.iter().any(|device| device.waits_for_device()) {
                    self.revoker.handle(&mut state, Input::Tick { change: id });
                }
                limit = deadline_after(call_limit);
            }
        }
    }

    /// What a call that does not come back waits for.
    fn describe_stuck(&self) -> Arc<Stuck> {
        let importer = |attachment: &AttachmentId| Some(self.revoker.target(*attachment)?.importer());
        let importers = self.notified.iter().filter_map(importer).collect();
        let waited = self.options.call_limit;
        Arc::new(self.thread.describe_stuck(self.tried, &self.devices, importers, waited))
    }

    fn handle(&self, input: Input) {
        self.revoker.handle(&mut self.revoker.state.lock(), input);
    }

    /// Notes how far the change is, unless nobody waits for it any more.
    fn note(&self, note: impl FnOnce(&mut PendingChange)) {
        if let Some(pending) = self.revoker.state.lock().changes.get_mut(&self.id) {
            note(pending);
            self.went_on.notify_all();
        }
    }
}

/// The answer of a call that worked, on a device that reported an error since the call was asked for: whether the call
/// came before the error or after it cannot be known.
fn failed_meanwhile(tried: &'static str, device: &str) -> Error {
    let why = "it was done, but the device reported an error meanwhile: its memory is away";
    Error::new(Kind::Revoked, tried, why)
        .on(device)
        .next("reset the device, once more where this was a reset")
}

/// Calls subscribers back with what is queued. Returns in words which callbacks took longer than `patience`; the next
/// delivery reports them to every subscriber.
fn deliver(devices: &[Arc<LendingDevice>], patience: Duration) -> Vec<String> {
    let mut words = Vec::new();
    for device in devices {
        for slow in device.subscribers.deliver(patience) {
            tracing::warn!(device = &*device.name, %slow, "a callback is slow");
            words.push(slow.to_string());
            device.queue(EventKind::SlowCallback(slow));
        }
    }
    words
}
