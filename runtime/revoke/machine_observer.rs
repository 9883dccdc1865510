//! What the machine promises, checked step by step: an observer that remembers what everyone was told.
//!
//! Both searches use it: the model checker, in every state of a small world, and the property tests, on
//! long random lives of large ones.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::machine::*;

/// What an attachment was told last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Told {
    /// It may use the memory.
    In,
    /// It is to get out, for that change; whether it has said that it is.
    Notified { change: ChangeId, answered: bool },
    /// It did not get out in time.
    Torn,
    /// The memory is away.
    Away,
    /// The memory is there, and its device failed.
    Barred,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Seen {
    export: ExportId,
    free_before: bool,
    generation: u64,
    told: Told,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Asked {
    what: Change,
    devices: BTreeSet<DeviceId>,
    /// Of these, what had failed before.
    failed: BTreeSet<DeviceId>,
    /// Somebody was torn for it.
    has_torn: bool,
    /// Of the devices, what the call came back from without a touch.
    untouched: BTreeSet<DeviceId>,
    at_deadline: AtDeadline,
    deadline: Duration,
    called: bool,
    said_late: bool,
    said_stuck: bool,
}

/// The world as those see it whom the machine speaks to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Observer {
    exports: BTreeMap<ExportId, DeviceId>,
    attachments: BTreeMap<AttachmentId, Seen>,
    changes: BTreeMap<ChangeId, Asked>,
    generations: BTreeMap<DeviceId, u64>,
    /// Devices that failed since the last revoke was asked for.
    failed: BTreeSet<DeviceId>,
}

impl Observer {
    /// Attachments that live.
    pub fn attachments(&self) -> impl Iterator<Item = AttachmentId> + '_ {
        self.attachments.keys().copied()
    }

    /// Attachments that were told to get out, and have not said that they are; each with the change.
    pub fn unanswered(&self) -> impl Iterator<Item = (AttachmentId, ChangeId)> + '_ {
        self.attachments.iter().filter_map(|(id, seen)| match seen.told {
            Told::Notified { change, answered: false } => Some((*id, change)),
            _ => None,
        })
    }

    /// Calls that are made and have not come back, with the devices of each.
    pub fn calls(&self) -> impl Iterator<Item = (ChangeId, &BTreeSet<DeviceId>)> + '_ {
        let all = self.changes.iter();
        all.filter(|(_, asked)| asked.called).map(|(id, asked)| (*id, &asked.devices))
    }

    /// Changes whose call is not made.
    pub fn uncalled(&self) -> impl Iterator<Item = ChangeId> + '_ {
        self.changes.iter().filter(|(_, asked)| !asked.called).map(|(id, _)| *id)
    }

    /// Changes that are not over.
    pub fn changes(&self) -> impl Iterator<Item = ChangeId> + '_ {
        self.changes.keys().copied()
    }

    pub fn has_export(&self, export: ExportId) -> bool {
        self.exports.contains_key(&export)
    }

    /// Follows one step, and says which promise it broke.
    pub fn step(&mut self, machine: &mut StateMachine, input: &Input, now: Duration) -> Result<(), String> {
        let before = machine.clone();
        let actions = machine.handle(input.clone(), now);
        if let Input::Answered { attachment, change } = input
            && !self.unanswered().any(|waited_for| waited_for == (*attachment, *change))
            && (&before != machine || !actions.is_empty())
        {
            return Err(format!("a stale answer of {attachment:?} changed something"));
        }
        self.expect(&before, input, now);
        if let Input::Returned { change, .. } = input
            && self.uncalled().any(|uncalled| uncalled == *change)
            && (&before != machine || !actions.is_empty())
        {
            return Err(format!("{change:?} came back before it was called"));
        }
        for action in &actions {
            self.hear(action, now).map_err(|why| format!("{why}: {action:?} after {input:?}"))?;
        }
        self.check(machine, input, &actions).map_err(|why| format!("{why} after {input:?}, with {actions:?}"))
    }

    /// What the input itself changes.
    fn expect(&mut self, before: &StateMachine, input: &Input, now: Duration) {
        match input {
            Input::Add { device, .. } => {
                self.generations.entry(*device).or_insert(0);
            }
            Input::Export { export, device } if before.state(*device).is_some() => {
                self.exports.insert(*export, *device);
            }
            Input::Unexport { export } => {
                self.exports.remove(export);
                self.attachments.retain(|_, seen| seen.export != *export);
            }
            Input::Attach { attachment, export, free_before } => {
                let device = self.exports.get(export);
                let generation = device.map_or(0, |device| self.generations[device]);
                let (export, free_before) = (*export, *free_before);
                self.attachments
                    .insert(*attachment, Seen { export, free_before, generation, told: Told::In });
            }
            Input::Detach { attachment } => {
                self.attachments.remove(attachment);
            }
            Input::MustBeFreed { attachment } => {
                if let Some(seen) = self.attachments.get_mut(attachment) {
                    seen.free_before = true;
                }
            }
            Input::Returned { change, after } => {
                if let Some(asked) =
                    self.changes.get_mut(change).filter(|asked| asked.called && !asked.has_torn)
                {
                    let untouched = after.iter().filter(|(_, after)| *after == After::Untouched);
                    asked.untouched = untouched.map(|(device, _)| *device).collect();
                }
            }
            Input::Ask { change, what, devices, options } => {
                let devices: BTreeSet<DeviceId> = devices.iter().copied().collect();
                let mut failed = BTreeSet::new();
                if matches!(what, Change::Take(_)) {
                    failed = &devices & &self.failed;
                    self.failed = &self.failed - &failed;
                }
                let asked = Asked {
                    what: *what,
                    devices,
                    failed,
                    at_deadline: options.at_deadline,
                    deadline: now.saturating_add(options.timeout),
                    called: false,
                    has_torn: false,
                    untouched: BTreeSet::new(),
                    said_late: false,
                    said_stuck: false,
                };
                self.changes.insert(*change, asked);
            }
            Input::Answered { attachment, change } => {
                if let Some(seen) = self.attachments.get_mut(attachment)
                    && let Told::Notified { change: asked, answered } = &mut seen.told
                    && asked == change
                {
                    *answered = true;
                }
            }
            Input::Fail { device } if before.state(*device).is_some() => {
                self.failed.insert(*device);
            }
            Input::Fail { .. } | Input::Export { .. } | Input::Tick { .. } => {}
        }
    }

    fn hear(&mut self, action: &Action, now: Duration) -> Result<(), String> {
        match action {
            Action::Notify { attachment, change, generation, .. } => {
                let seen = self.seen(*attachment)?;
                if !matches!(seen.told, Told::In | Told::Barred) {
                    return Err("told twice to get out".into());
                }
                if seen.generation != *generation {
                    return Err("told of another generation".into());
                }
                seen.told = Told::Notified { change: *change, answered: false };
            }
            Action::Late { change, attachments } => {
                let asked = self.changes.get_mut(change).ok_or("an unknown change")?;
                if std::mem::replace(&mut asked.said_late, true) || now < asked.deadline {
                    return Err("late said twice, or too early".into());
                }
                for attachment in attachments {
                    if self.seen(*attachment)?.told != (Told::Notified { change: *change, answered: false }) {
                        return Err("called late without need".into());
                    }
                }
            }
            Action::Tear { attachment, generation, .. } => {
                let seen = self.seen(*attachment)?;
                let is_late = matches!(seen.told, Told::Notified { answered: false, .. });
                if !is_late || *generation != seen.generation + 1 {
                    return Err("torn without need, or of another generation".into());
                }
                if seen.free_before {
                    return Err("torn, and must be freed first".into());
                }
                seen.told = Told::Torn;
                let export = seen.export;
                let device = *self.exports.get(&export).ok_or("attached to nothing")?;
                let asked = self.changes.values_mut().find(|asked| asked.devices.contains(&device));
                asked.ok_or("torn for nothing")?.has_torn = true;
            }
            Action::Call { change } => self.hear_call(*change, now)?,
            Action::Stuck { change } => {
                let asked = self.changes.get_mut(change).ok_or("an unknown change")?;
                if !asked.called || std::mem::replace(&mut asked.said_stuck, true) {
                    return Err("stuck without a call, or twice".into());
                }
            }
            Action::CalledOff { attachment, generation } => {
                self.check_sound(*attachment, |asked| !asked.called || !asked.untouched.is_empty())?;
                let seen = self.seen(*attachment)?;
                if !matches!(seen.told, Told::Notified { .. }) || seen.generation != *generation {
                    return Err("called off what was not announced, or moved on".into());
                }
                seen.told = Told::In;
            }
            Action::Open { attachment, generation } => {
                self.check_sound(*attachment, |_| false)?;
                self.outcome(*attachment, *generation, Told::In)?;
            }
            Action::Bar { attachment, generation, .. } => {
                let seen = self.seen(*attachment)?;
                if seen.generation == *generation && matches!(seen.told, Told::In | Told::Notified { .. }) {
                    seen.told = Told::Barred;
                } else {
                    self.outcome(*attachment, *generation, Told::Barred)?;
                }
            }
            Action::Away { attachment, generation, .. } => {
                self.outcome(*attachment, *generation, Told::Away)?;
            }
            Action::Gone { attachment, generation } => {
                self.outcome(*attachment, *generation, Told::Away)?;
                self.attachments.remove(attachment);
            }
            Action::Done { change, .. } | Action::RefuseChange { change, .. } => {
                let asked = self.changes.remove(change).ok_or("a change that was over, or never was")?;
                // Nothing was done about what had failed.
                match asked.called {
                    false => self.failed.extend(asked.failed),
                    true => self.failed.extend(&asked.failed & &asked.untouched),
                }
            }
            Action::RefuseAttach { attachment, .. } => {
                self.attachments.remove(attachment);
            }
        }
        Ok(())
    }

    fn hear_call(&mut self, change: ChangeId, now: Duration) -> Result<(), String> {
        let asked = self.changes.get(&change).ok_or("an unknown change")?.clone();
        if self.calls().any(|(_, devices)| !devices.is_disjoint(&asked.devices)) {
            return Err("two calls on one device".into());
        }
        for (attachment, seen) in &self.attachments {
            let device = self.exports.get(&seen.export).ok_or("attached to nothing")?;
            if !asked.devices.contains(device) {
                continue;
            }
            match seen.told {
                Told::In | Told::Barred => {
                    return Err(format!("{attachment:?} may be inside, and was not told"));
                }
                Told::Notified { answered: false, .. } => {
                    return Err(format!("{attachment:?} may be inside, and is not torn"));
                }
                Told::Torn if now < asked.deadline || asked.at_deadline == AtDeadline::CallOff => {
                    return Err(format!("{attachment:?} had time left"));
                }
                Told::Notified { answered: true, .. } | Told::Torn | Told::Away => {}
            }
        }
        let asked = self.changes.get_mut(&change).expect("it was found above");
        if std::mem::replace(&mut asked.called, true) {
            return Err("called twice".into());
        }
        Ok(())
    }

    /// Whether the device of `attachment` has not failed since it was last taken back; nor before a change under
    /// way of those that `counts`.
    fn check_sound(&self, attachment: AttachmentId, counts: impl Fn(&Asked) -> bool) -> Result<(), String> {
        let export = self.attachments.get(&attachment).ok_or("spoke of what is not there")?.export;
        let device = self.exports.get(&export).ok_or("attached to nothing")?;
        let in_change = self.changes.values().any(|asked| counts(asked) && asked.failed.contains(device));
        if in_change || self.failed.contains(device) {
            return Err("let in to a device that failed".into());
        }
        Ok(())
    }

    fn outcome(&mut self, attachment: AttachmentId, generation: u64, told: Told) -> Result<(), String> {
        let seen = self.seen(attachment)?;
        if matches!(seen.told, Told::In | Told::Barred) {
            return Err("an outcome without a notice".into());
        }
        if generation < seen.generation {
            return Err("a generation fell".into());
        }
        // What was taken back under them is another memory now.
        if matches!(seen.told, Told::Notified { .. } | Told::Torn) && generation != seen.generation + 1 {
            return Err("taken back, and of the same generation".into());
        }
        (seen.generation, seen.told) = (generation, told);
        Ok(())
    }

    fn seen(&mut self, attachment: AttachmentId) -> Result<&mut Seen, String> {
        self.attachments.get_mut(&attachment).ok_or_else(|| "spoke of what is not there".into())
    }

    fn check(&mut self, after: &StateMachine, input: &Input, actions: &[Action]) -> Result<(), String> {
        if let Input::Returned { change, after: places } = input
            && self.changes.get(change).is_some_and(|asked| asked.called)
        {
            return Err(format!("a call came back with {places:?}, and its change is not over"));
        }
        for (device, generation) in &mut self.generations {
            let Some(now) = after.generation(*device) else { continue };
            let took = |action: &Action| matches!(action, Action::Done { late, .. } if late.is_empty());
            let moved = now != *generation;
            if now < *generation || moved && !actions.iter().any(took) {
                return Err(format!("{device:?} went from generation {generation} to {now}"));
            }
            *generation = now;
        }
        let is_closed = |device: &DeviceId| after.state(*device).is_none();
        self.failed.retain(|device| !is_closed(device));
        if let Some((export, _)) =
            self.exports.iter().find(|(id, device)| is_closed(device) == after.has_export(**id))
        {
            return Err(format!("{export:?} is forgotten, or not forgotten with its device"));
        }
        self.exports.retain(|_, device| !is_closed(device));
        for device in self.generations.keys() {
            let attached = after.attachments_of(*device);
            if let Some(ghost) = attached.iter().find(|id| !self.attachments.contains_key(id)) {
                return Err(format!("{ghost:?} is still known"));
            }
        }
        if let Some(change) = self.uncalled().find(|change| after.deadline(*change).is_none()) {
            return Err(format!("{change:?} drains without a deadline"));
        }
        Ok(())
    }
}

/// A revoking call that failed has revoked: the generation is another one, wherever the memory is.
pub(crate) fn moved_on(before: &StateMachine, after: &StateMachine, device: DeviceId) -> bool {
    match (before.generation(device), after.generation(device)) {
        (Some(before), Some(after)) => after == before + 1,
        // Closed.
        (_, None) => true,
        (None, Some(_)) => false,
    }
}
