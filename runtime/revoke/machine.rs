//! The revoke machine: who may use a device's memory, and how it is taken back.
//!
//! ```text
//!            Take                       all answered, or the deadline
//!   Live(g) ------> Draining(g) ------------------------------------------> Calling(g)
//!     ^ ^               |                                                    |      |
//!     | |   called off  |  somebody is late, and must not be                 |      |
//!     | +---------------+                                                    |      |
//!     |                                                                      |      |
//!     +------------------------- the memory is reachable: g + 1 -------------+      |
//!     |                                                                      |      |
//!     |   Restore                                                            v      v
//!     +----------- Calling(g + 1) <----------------------------- Away(g + 1)   (closed: forgotten)
//! ```
//!
//! [`StateMachine::handle`] takes what happened and the time, and says what to do. It holds no clock, thread,
//! lock or descriptor, so that every interleaving can be tried (`machine_model`, `machine_properties`).
//! What it promises:
//!
//! - No revoking call is made before every attachment of its devices has answered, or the deadline
//!   passed; none at all while an attachment that must be freed first has not answered.
//! - An attachment hears of a revoke before it hears of its outcome; who is late is torn before the call.
//! - A generation never falls. An answer to a notice of another change changes nothing.
//! - A revoking call that fails has revoked: the generation of everything it touched moves on.
//! - What is detached, closed or lost leaves nothing behind, and is never spoken of again.
//! - A device is in at most one revoke at a time.
//! - Nobody is let in to a device that failed before a revoke that was asked for afterwards has made its call.
//!
//! Times are durations since an instant of the caller's choice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::RevokeCause;

/// A number that its user gives and never reuses.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) struct $name(pub u64);
    };
}

id! {
    /// A device that lends.
    DeviceId
}
id! {
    /// An export.
    ExportId
}
id! {
    /// An attachment to an export.
    AttachmentId
}
id! {
    /// One change: a revoke, or its end.
    ChangeId
}

/// What happens where somebody is late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AtDeadline {
    /// Nothing is taken back; the caller learns who is late.
    CallOff,
    /// The memory is taken back all the same: what the late ones do ends as
    /// [`Torn`](crate::Outcome::Torn). Still called off while an import must be freed first
    /// ([`OnRevoke::FreeBefore`](peervram_backends::OnRevoke::FreeBefore)): the kernel would wait for it
    /// without a limit, or leave its device in the memory.
    GoOn,
}

/// How memory is taken back. A [`Duration`] is its timeout, and calls off.
///
/// ```
/// # use std::time::Duration;
/// # use peervram::{AtDeadline, RevokeOptions};
/// let insist = RevokeOptions::within(Duration::from_millis(100)).or_go_on().with_call_limit(Duration::from_secs(5));
/// assert_eq!(insist.at_deadline, AtDeadline::GoOn);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct RevokeOptions {
    /// How long those who use the memory have to finish.
    pub timeout: Duration,
    /// What happens where somebody has not by then.
    pub at_deadline: AtDeadline,
    /// After how long the kernel's call counts as stuck. It cannot be ended; it is described then, and
    /// goes on.
    pub call_limit: Duration,
}

impl RevokeOptions {
    /// Long enough for a reset: the kernel gives a device a second, and a stubborn one a minute.
    const CALL_LIMIT: Duration = Duration::from_secs(10);

    /// Those who use the memory have `timeout` to finish. Where somebody has not by then, nothing is taken back. The
    /// kernel's call counts as stuck after ten seconds.
    pub const fn within(timeout: Duration) -> Self {
        Self { timeout, at_deadline: AtDeadline::CallOff, call_limit: Self::CALL_LIMIT }
    }

    /// The same, but taken back all the same ([`AtDeadline::GoOn`]).
    #[must_use]
    pub const fn or_go_on(self) -> Self {
        Self { at_deadline: AtDeadline::GoOn, ..self }
    }

    /// The same with another [`call_limit`](RevokeOptions::call_limit).
    #[must_use]
    pub const fn with_call_limit(self, call_limit: Duration) -> Self {
        Self { call_limit, ..self }
    }
}

/// As [`RevokeOptions::within`].
impl From<Duration> for RevokeOptions {
    fn from(timeout: Duration) -> Self {
        Self::within(timeout)
    }
}

/// A change that somebody asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Change {
    /// Takes memory back. The gates are shut and drained first.
    Take(RevokeCause),
    /// Gives back what is away; nobody is inside.
    Restore,
}

/// Where a device's memory is after a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum After {
    /// It can be reached.
    Here,
    /// It cannot be reached now.
    Away,
    /// It never will be again.
    Closed,
    /// Where it was before: the call was called off before it touched anything. Where somebody was torn for it, the
    /// memory counts as taken all the same, and as given back.
    Untouched,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Input {
    /// A device lends from now on.
    Add { device: DeviceId, reachable: bool },
    /// Memory of a device was exported.
    Export { export: ExportId, device: DeviceId },
    /// An export is no more, and everything attached to it.
    Unexport { export: ExportId },
    /// Somebody attaches. Counts as inside until it answers.
    Attach { attachment: AttachmentId, export: ExportId, free_before: bool },
    /// An attachment ended, or whoever held it was lost.
    Detach { attachment: AttachmentId },
    #[cfg_attr(
        any(not(feature = "broker"), feature = "shuttle"),
        allow(dead_code, reason = "of brokers and their clients")
    )]
    /// The import of an attachment must be freed before its memory is taken back, from now on.
    MustBeFreed { attachment: AttachmentId },
    /// Somebody wants a change of one device, or of all that are reset together.
    Ask { change: ChangeId, what: Change, devices: Vec<DeviceId>, options: RevokeOptions },
    /// An attachment is out of the memory, after the notice of that change.
    Answered { attachment: AttachmentId, change: ChangeId },
    /// The call of a change came back, whatever it said.
    Returned { change: ChangeId, after: Vec<(DeviceId, After)> },
    /// A device failed. Nobody is let in until it has been taken back.
    Fail { device: DeviceId },
    /// Time passed, and everyone has had the chance to answer to that change: who has not, and should have,
    /// is late.
    Tick { change: ChangeId },
}

/// Why a change, or an attachment, is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Refusal {
    /// Another change of that device is under way.
    Busy(DeviceId),
    /// There is nothing to give back.
    NotAway(DeviceId),
    /// The memory is away.
    Away(RevokeCause),
    /// The device or export is closed, or never was.
    Closed,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Let nobody in; answer when nobody is inside.
    Notify {
        attachment: AttachmentId,
        change: ChangeId,
        generation: u64,
        cause: RevokeCause,
        deadline: Duration,
    },
    /// These are late; said once.
    Late { change: ChangeId, attachments: Vec<AttachmentId> },
    /// Whoever is inside is torn from now on: the call is made without waiting for them.
    Tear { attachment: AttachmentId, generation: u64, cause: RevokeCause },
    /// Make the call; answer `Returned`.
    Call { change: ChangeId },
    /// The call is not back after its limit; said once.
    Stuck { change: ChangeId },
    /// Nothing was taken back: let in again.
    CalledOff { attachment: AttachmentId, generation: u64 },
    /// The memory is there, of that generation: let in.
    Open { attachment: AttachmentId, generation: u64 },
    /// The memory is there, of that generation, and its device failed: let nobody in. Those inside stay.
    Bar { attachment: AttachmentId, generation: u64, cause: RevokeCause },
    /// The memory was taken back and is away.
    Away { attachment: AttachmentId, generation: u64, cause: RevokeCause },
    /// The memory was taken back for good. The last word about it.
    Gone { attachment: AttachmentId, generation: u64 },
    /// The change is over. `late` is empty unless it was called off for them.
    Done { change: ChangeId, late: Vec<AttachmentId> },
    /// The change, or the attachment, is not to be.
    RefuseChange { change: ChangeId, why: Refusal },
    /// The attachment is not to be, and is not known.
    RefuseAttach { attachment: AttachmentId, why: Refusal },
}

/// Where a device is. Drawn in the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum State {
    Live,
    Draining(ChangeId),
    Calling(ChangeId),
    Away(RevokeCause),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Device {
    state: State,
    generation: u64,
    /// It failed, and no revoke has been asked for since.
    failed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Attachment {
    export: ExportId,
    free_before: bool,
}

/// A change under way.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Pending {
    what: Change,
    /// Each with what it was away for before.
    devices: BTreeMap<DeviceId, Option<RevokeCause>>,
    /// Of these, what had failed before the change was asked for, and is no more when its call has been made.
    failed: BTreeSet<DeviceId>,
    /// Who was told and has not answered; empty once the call is made.
    unanswered: BTreeSet<AttachmentId>,
    at_deadline: AtDeadline,
    /// Somebody was torn.
    has_torn: bool,
    /// Of the drain; once the call is made, when it counts as stuck. None when that was said.
    deadline: Option<Duration>,
    call_limit: Duration,
}

/// All devices, exports and attachments of one process, and what happens to them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct StateMachine {
    devices: BTreeMap<DeviceId, Device>,
    exports: BTreeMap<ExportId, DeviceId>,
    attachments: BTreeMap<AttachmentId, Attachment>,
    changes: BTreeMap<ChangeId, Pending>,
}

impl StateMachine {
    /// Takes what happened `now` and says what to do, in order.
    pub fn handle(&mut self, input: Input, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Add { device, reachable } => {
                let state = if reachable { State::Live } else { State::Away(RevokeCause::MemoryDisabled) };
                self.devices.entry(device).or_insert(Device { state, generation: 0, failed: false });
            }
            Input::Export { export, device } => {
                if self.devices.contains_key(&device) {
                    self.exports.insert(export, device);
                }
            }
            Input::Unexport { export } => {
                self.exports.remove(&export);
                let of_it = |(id, attachment): (&AttachmentId, &Attachment)| {
                    (attachment.export == export).then_some(*id)
                };
                let attached: Vec<_> = self.attachments.iter().filter_map(of_it).collect();
                for attachment in attached {
                    self.forget(attachment, now, &mut actions);
                }
            }
            Input::Attach { attachment, export, free_before } => match self.may_attach(export) {
                Ok(()) => {
                    self.attachments.insert(attachment, Attachment { export, free_before });
                }
                Err(why) => actions.push(Action::RefuseAttach { attachment, why }),
            },
            Input::Detach { attachment } => self.forget(attachment, now, &mut actions),
            Input::MustBeFreed { attachment } => {
                if let Some(attachment) = self.attachments.get_mut(&attachment) {
                    attachment.free_before = true;
                }
            }
            Input::Ask { change, what, devices, options } => {
                self.ask(change, what, devices, options, now, &mut actions);
            }
            Input::Answered { attachment, change } => {
                if self.changes.get_mut(&change).is_some_and(|it| it.unanswered.remove(&attachment)) {
                    self.call_if_all_answered(change, now, &mut actions);
                }
            }
            Input::Returned { change, after } => self.returned(change, &after, &mut actions),
            Input::Fail { device } => self.fail(device, &mut actions),
            Input::Tick { change } => self.pass_deadline(change, now, &mut actions),
        }
        actions
    }

    /// When to say [`Input::Tick`] of a change.
    pub fn deadline(&self, change: ChangeId) -> Option<Duration> {
        self.changes.get(&change)?.deadline
    }

    /// What happens at that deadline.
    pub fn at_deadline(&self, change: ChangeId) -> Option<AtDeadline> {
        Some(self.changes.get(&change)?.at_deadline)
    }

    /// Where a device is; none where it is closed.
    pub fn state(&self, device: DeviceId) -> Option<State> {
        Some(self.devices.get(&device)?.state)
    }

    /// How often its memory was taken back.
    pub fn generation(&self, device: DeviceId) -> Option<u64> {
        Some(self.devices.get(&device)?.generation)
    }

    /// Whether it failed, and has not been taken back since.
    pub fn has_failed(&self, device: DeviceId) -> bool {
        self.devices.get(&device).is_some_and(|device| device.failed)
            || self.changes.values().any(|change| change.failed.contains(&device))
    }

    /// Whether any change is under way, and so any deadline.
    pub fn is_changing(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Whether a call of another change is under way.
    pub fn is_calling_besides(&self, change: ChangeId) -> bool {
        let is_other = |device: &Device| matches!(device.state, State::Calling(other) if other != change);
        self.devices.values().any(is_other)
    }

    /// Whether an export is known.
    #[cfg(test)]
    pub fn has_export(&self, export: ExportId) -> bool {
        self.exports.contains_key(&export)
    }

    /// Whether an attachment must be freed before its memory is taken back.
    pub fn must_be_freed(&self, attachment: AttachmentId) -> bool {
        self.attachments.get(&attachment).is_some_and(|attachment| attachment.free_before)
    }

    /// The attachments to memory of `device`.
    pub fn attachments_of(&self, device: DeviceId) -> Vec<AttachmentId> {
        let is_of_it = |attachment: &Attachment| self.exports.get(&attachment.export) == Some(&device);
        let attachments = self.attachments.iter();
        attachments.filter(|(_, attachment)| is_of_it(attachment)).map(|(id, _)| *id).collect()
    }

    fn device_of(&self, attachment: AttachmentId) -> Option<&Device> {
        let export = self.attachments.get(&attachment)?.export;
        self.devices.get(self.exports.get(&export)?)
    }

    fn may_attach(&self, export: ExportId) -> Result<(), Refusal> {
        let device = *self.exports.get(&export).ok_or(Refusal::Closed)?;
        match self.devices.get(&device).ok_or(Refusal::Closed)?.state {
            State::Live if self.has_failed(device) => Err(Refusal::Away(RevokeCause::DeviceError)),
            State::Live => Ok(()),
            State::Away(cause) => Err(Refusal::Away(cause)),
            State::Draining(_) | State::Calling(_) => Err(Refusal::Busy(device)),
        }
    }

    fn ask(
        &mut self,
        change: ChangeId,
        what: Change,
        devices: Vec<DeviceId>,
        options: RevokeOptions,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let devices = BTreeSet::from_iter(devices);
        let refusal = devices.iter().find_map(|&device| match (self.state(device), what) {
            (None, _) => Some(Refusal::Closed),
            (Some(State::Draining(_) | State::Calling(_)), _) => Some(Refusal::Busy(device)),
            (Some(State::Live), Change::Restore) => Some(Refusal::NotAway(device)),
            (Some(State::Live | State::Away(_)), _) => None,
        });
        if let Some(why) = refusal.or(devices.is_empty().then_some(Refusal::Closed)) {
            actions.push(Action::RefuseChange { change, why });
            return;
        }
        let deadline = now.saturating_add(options.timeout);
        let mut unanswered = BTreeSet::new();
        let (mut before, mut failed) = (BTreeMap::new(), BTreeSet::new());
        for device in devices {
            // Who is attached to memory that is away was told when it went.
            let away = match self.devices[&device].state {
                State::Away(cause) => Some(cause),
                _ => None,
            };
            if let (None, Change::Take(cause)) = (away, what) {
                let generation = self.devices[&device].generation;
                for attachment in self.attachments_of(device) {
                    actions.push(Action::Notify { attachment, change, generation, cause, deadline });
                    unanswered.insert(attachment);
                }
            }
            // A failure that comes from now on is another one.
            if let (Change::Take(_), Some(entry)) = (what, self.devices.get_mut(&device))
                && std::mem::take(&mut entry.failed)
            {
                failed.insert(device);
            }
            before.insert(device, away);
            self.move_to(device, State::Draining(change));
        }
        let pending = Pending {
            what,
            devices: before,
            failed,
            unanswered,
            has_torn: false,
            at_deadline: options.at_deadline,
            deadline: Some(deadline),
            call_limit: options.call_limit,
        };
        self.changes.insert(change, pending);
        self.call_if_all_answered(change, now, actions);
    }

    fn fail(&mut self, device: DeviceId, actions: &mut Vec<Action>) {
        let Some(entry) = self.devices.get_mut(&device) else { return };
        let was_open = entry.state == State::Live && !entry.failed;
        entry.failed = true;
        let generation = entry.generation;
        if was_open {
            let (all, cause) = (self.attachments_of(device), RevokeCause::DeviceError);
            actions.extend(all.into_iter().map(|attachment| Action::Bar { attachment, generation, cause }));
        }
    }

    /// An attachment is no more, and nobody waits for it.
    fn forget(&mut self, attachment: AttachmentId, now: Duration, actions: &mut Vec<Action>) {
        self.attachments.remove(&attachment);
        let waiting = self
            .changes
            .iter_mut()
            .find_map(|(change, pending)| pending.unanswered.remove(&attachment).then_some(*change));
        if let Some(change) = waiting {
            self.call_if_all_answered(change, now, actions);
        }
    }

    fn call_if_all_answered(&mut self, change: ChangeId, now: Duration, actions: &mut Vec<Action>) {
        if self.changes[&change].unanswered.is_empty() && self.is_draining(change) {
            self.call(change, now, actions);
        }
    }

    fn is_draining(&self, change: ChangeId) -> bool {
        let mut devices = self.changes[&change].devices.keys();
        devices.all(|device| self.devices[device].state == State::Draining(change))
    }

    fn call(&mut self, change: ChangeId, now: Duration, actions: &mut Vec<Action>) {
        let Some(pending) = self.changes.get_mut(&change) else { return };
        pending.deadline = Some(now.saturating_add(pending.call_limit));
        // Nobody waits for the late any more.
        let (what, late) = (pending.what, std::mem::take(&mut pending.unanswered));
        pending.has_torn = matches!(what, Change::Take(_)) && !late.is_empty();
        for attachment in late {
            let Change::Take(cause) = what else { continue };
            // The generation that is to come: the kernel takes the memory before the call returns.
            let generation = self.device_of(attachment).map_or(0, |device| device.generation + 1);
            actions.push(Action::Tear { attachment, generation, cause });
        }
        let pending = &self.changes[&change];
        let devices: Vec<DeviceId> = pending.devices.keys().copied().collect();
        for device in devices {
            self.move_to(device, State::Calling(change));
        }
        actions.push(Action::Call { change });
    }

    fn pass_deadline(&mut self, change: ChangeId, now: Duration, actions: &mut Vec<Action>) {
        if self.deadline(change).is_none_or(|deadline| deadline > now) {
            return;
        }
        if !self.is_draining(change) {
            self.changes.get_mut(&change).expect("it has a deadline").deadline = None;
            actions.push(Action::Stuck { change });
            return;
        }
        let pending = &self.changes[&change];
        let late: Vec<AttachmentId> = pending.unanswered.iter().copied().collect();
        let must_be_freed = late.iter().any(|id| self.attachments[id].free_before);
        actions.push(Action::Late { change, attachments: late.clone() });
        match pending.at_deadline {
            AtDeadline::GoOn if !must_be_freed => self.call(change, now, actions),
            AtDeadline::GoOn | AtDeadline::CallOff => self.call_off(change, late, actions),
        }
    }

    fn call_off(&mut self, change: ChangeId, late: Vec<AttachmentId>, actions: &mut Vec<Action>) {
        let Some(pending) = self.changes.remove(&change) else { return };
        for (device, away) in pending.devices {
            let state = away.map_or(State::Live, State::Away);
            self.move_to(device, state);
            let entry = self.devices.get_mut(&device).expect("a device in a change is known");
            // Nothing was done about it.
            entry.failed |= pending.failed.contains(&device);
            if away.is_some() {
                continue;
            }
            let (generation, failed, cause) = (entry.generation, entry.failed, RevokeCause::DeviceError);
            actions.extend(self.attachments_of(device).into_iter().map(|attachment| match failed {
                true => Action::Bar { attachment, generation, cause },
                false => Action::CalledOff { attachment, generation },
            }));
        }
        actions.push(Action::Done { change, late });
    }

    fn returned(&mut self, change: ChangeId, after: &[(DeviceId, After)], actions: &mut Vec<Action>) {
        // Only the call that is being waited for can come back.
        if !self.changes.contains_key(&change) || self.is_draining(change) {
            return;
        }
        let Some(pending) = self.changes.remove(&change) else { return };
        for (device, away) in pending.devices {
            let found = after.iter().find(|(id, _)| *id == device).map(|(_, after)| *after);
            let attachments = self.attachments_of(device);
            let entry = self.devices.get_mut(&device).expect("a device in a change is known");
            let after = match found {
                Some(After::Untouched) if pending.has_torn => After::Here,
                // Nothing was said of it: better shut than torn.
                found => found.unwrap_or(After::Away),
            };
            // A revoking call revokes first, and may fail then (vfio_pci_ioctl_reset).
            let cause = match pending.what {
                Change::Take(_) if after == After::Untouched => {
                    entry.failed |= pending.failed.contains(&device);
                    away.unwrap_or(RevokeCause::DeviceError)
                }
                Change::Take(cause) => {
                    entry.generation += 1;
                    cause
                }
                Change::Restore => away.expect("only what is away is given back"),
            };
            let (generation, failed) = (entry.generation, entry.failed);
            match after {
                After::Here => self.move_to(device, State::Live),
                After::Untouched => self.move_to(device, away.map_or(State::Live, State::Away)),
                After::Away => self.move_to(device, State::Away(cause)),
                After::Closed => self.close(device),
            }
            // Who is attached to memory that stays away knows.
            if after == After::Untouched && away.is_some() {
                continue;
            }
            actions.extend(attachments.into_iter().map(|attachment| match after {
                After::Here | After::Untouched if failed => {
                    Action::Bar { attachment, generation, cause: RevokeCause::DeviceError }
                }
                After::Here => Action::Open { attachment, generation },
                After::Untouched => Action::CalledOff { attachment, generation },
                After::Away => Action::Away { attachment, generation, cause },
                After::Closed => Action::Gone { attachment, generation },
            }));
        }
        actions.push(Action::Done { change, late: Vec::new() });
    }

    /// Forgets a device with all that hangs on it.
    fn close(&mut self, device: DeviceId) {
        for attachment in self.attachments_of(device) {
            self.attachments.remove(&attachment);
        }
        self.exports.retain(|_, of| *of != device);
        self.devices.remove(&device);
    }

    /// The only place where a state changes.
    fn move_to(&mut self, device: DeviceId, state: State) {
        let entry = self.devices.get_mut(&device).expect("only known devices are moved");
        let legal = match (entry.state, state) {
            (State::Live | State::Away(_), State::Draining(_)) => true,
            (State::Draining(_), State::Live | State::Away(_)) => true,
            (State::Draining(from), State::Calling(to)) => from == to,
            (State::Calling(_), State::Live | State::Away(_)) => true,
            _ => false,
        };
        debug_assert!(legal, "{device:?} cannot go from {:?} to {state:?}", entry.state);
        entry.state = state;
    }
}
