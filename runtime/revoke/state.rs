//! `RevokerState`: what the [`Revoker`](super::revoker::Revoker) keeps under its lock: the machine, the gates that
//! it opens and closes, and the changes under way.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use peervram_backends::deadline_after;

use super::event::EventKind;
use super::lending_device::LendingDevice;
use super::machine::{Action, AtDeadline, AttachmentId, ChangeId, DeviceId, Input, Refusal, StateMachine};
use super::target::{Admission, Drain, RevokeTarget};
use crate::sync::Condvar;
use crate::{Error, Kind, Result};

/// What lets an attachment's accesses in, and the attachment.
type Target = (Arc<dyn Admission>, Weak<dyn RevokeTarget>);

/// The machine, and what its numbers stand for.
pub(crate) struct RevokerState {
    /// What the machine counts time from.
    start: Instant,
    pub machine: StateMachine,
    pub devices: BTreeMap<DeviceId, Arc<LendingDevice>>,
    /// Each attachment, with its gate. The gate keeps nothing alive: an attachment must not be dropped under the lock.
    pub targets: BTreeMap<AttachmentId, Target>,
    pub changes: BTreeMap<ChangeId, PendingChange>,
}

/// How far a change is.
#[derive(Default)]
pub(crate) struct PendingChange {
    /// It went on. Of its own, so that one change wakes nobody who waits for another.
    pub went_on: Arc<Condvar>,
    pub devices: Vec<Arc<LendingDevice>>,
    /// The call is to be made, or being made.
    pub is_called: bool,
    /// The call's limit has passed.
    pub is_stuck: bool,
    /// The call has returned; with its answer.
    pub answer: Option<Result<()>>,
    /// Every subscriber was told of the end, or the change was called off.
    pub is_told: bool,
    /// Callbacks that took more time than the change could wait, in words.
    pub slow: Vec<String>,
    /// The attachments that were late, each in words.
    pub late: Vec<(AttachmentId, String)>,
    /// One of the late attachments has an import that must be freed before the call.
    pub must_be_freed: bool,
}

impl PendingChange {
    /// Of these devices, just begun.
    pub fn of(devices: &[Arc<LendingDevice>]) -> Self {
        Self { devices: devices.to_vec(), ..Self::default() }
    }

    /// The attachments that were late, in words.
    pub fn late_in_words(&self) -> Vec<String> {
        self.late.iter().map(|(_, words)| words.clone()).collect()
    }
}

/// What is done to an attachment's admission.
type Act<'a> = &'a dyn Fn(&dyn Admission);

impl RevokerState {
    /// Of no device yet.
    pub fn since(start: Instant) -> Self {
        Self {
            start,
            machine: StateMachine::default(),
            devices: BTreeMap::new(),
            targets: BTreeMap::new(),
            changes: BTreeMap::new(),
        }
    }

    /// Hands an input to the machine and does what it says.
    pub fn handle(&mut self, input: Input, now: Duration) {
        let actions = self.machine.handle(input, now);
        self.act(actions);
    }

    /// Hands an [`Input::Attach`] to the machine; returns why it is refused, if it is.
    pub fn refusal(&mut self, input: Input, now: Duration) -> Option<Refusal> {
        self.machine.handle(input, now).into_iter().find_map(|action| match action {
            Action::RefuseAttach { why, .. } => Some(why),
            _ => None,
        })
    }

    /// Opens and closes gates, and notes how far changes are.
    pub fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            let (attachment, act): (&AttachmentId, Act<'_>) = match &action {
                Action::Notify { attachment, change, cause, deadline, .. } => {
                    let at_deadline = self.machine.at_deadline(*change).unwrap_or(AtDeadline::CallOff);
                    let deadline =
                        self.start.checked_add(*deadline).unwrap_or_else(|| deadline_after(Duration::MAX));
                    let drain = Drain { change: *change, cause: *cause, deadline, at_deadline };
                    (attachment, &move |gate| gate.close(drain))
                }
                Action::CalledOff { attachment, generation } => {
                    (attachment, &|gate| gate.call_off(*generation))
                }
                Action::Open { attachment, generation } => (attachment, &|gate| gate.open(*generation)),
                Action::Away { attachment, generation, cause }
                | Action::Tear { attachment, generation, cause } => {
                    (attachment, &|gate| gate.shut(*generation, *cause))
                }
                Action::Bar { attachment, generation, cause } => {
                    (attachment, &|gate| gate.bar(*generation, *cause))
                }
                Action::Gone { attachment, generation } => {
                    (attachment, &|gate| gate.shut_for_good(*generation))
                }
                Action::Late { change, attachments } => {
                    self.note_late(*change, attachments);
                    continue;
                }
                Action::Call { change } => {
                    self.note(*change, |pending| pending.is_called = true);
                    continue;
                }
                Action::Stuck { change } => {
                    self.note(*change, |pending| pending.is_stuck = true);
                    continue;
                }
                Action::Done { change, .. } => {
                    // A change whose call was made is over when every subscriber has been told of the call's end.
                    self.note(*change, |pending| {
                        if !pending.is_called {
                            pending.devices.iter().for_each(|device| device.queue(EventKind::CalledOff));
                            pending.is_told = true;
                        }
                    });
                    continue;
                }
                // The requesting thread reads its own refusal.
                Action::RefuseChange { .. } | Action::RefuseAttach { .. } => continue,
            };
            if let Some((gate, _)) = self.targets.get(attachment) {
                act(&**gate);
            }
        }
    }

    /// Notes how far a change is, unless its call has returned or nobody waits for it any more.
    fn note(&mut self, change: ChangeId, note: impl FnOnce(&mut PendingChange)) {
        if let Some(pending) = self.changes.get_mut(&change)
            && pending.answer.is_none()
        {
            note(pending);
            pending.went_on.notify_all();
        }
    }

    /// Keeps the words of the attachments that are late, and tells the devices' subscribers.
    fn note_late(&mut self, change: ChangeId, attachments: &[AttachmentId]) {
        let must_be_freed = attachments.iter().any(|id| self.machine.must_be_freed(*id));
        self.note(change, |pending| {
            pending.late.retain(|(attachment, _)| attachments.contains(attachment));
            pending.must_be_freed = must_be_freed;
            for device in &pending.devices {
                device.queue(EventKind::Late { who: pending.late_in_words() });
            }
        });
    }
}

/// Why the machine refuses something, as an error.
pub(crate) fn explain(why: Refusal, tried: &'static str) -> Error {
    match why {
        Refusal::Busy(_) => Error::new(Kind::Busy, tried, "its memory is being taken back or given back now")
            .next("wait for the event that ends it, and try again"),
        Refusal::Away(cause) => Error::new(Kind::Revoked, tried, format!("its memory is away: {cause}"))
            .next("try again when the memory is there again"),
        Refusal::NotAway(_) => Error::new(Kind::InvalidInput, tried, "its memory is not away"),
        Refusal::Closed => Error::new(Kind::Gone, tried, "the lender closed it"),
    }
}
