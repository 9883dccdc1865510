//! Every interleaving of a small world: two devices, reset together or alone, and whoever is attached.
//!
//! The model checker tries every order of asking, answering, coming back, detaching and being late, and
//! asks the [`Observer`] in each step. `docs/reliability.md` says how many states that is, and how to
//! count them again.

use std::time::Duration;

use stateright::{Checker, Model, Property};

use super::RevokeCause;
use super::machine::*;
use super::machine_observer::Observer;

/// A world, and how much may happen in it.
struct World {
    /// Each attachment's export and whether it must be freed first. Export n is of device n.
    attachments: &'static [(u64, bool)],
    /// Changes that are asked for, at most.
    changes: u64,
    /// Together (a hot reset), or each alone.
    together: bool,
    /// How often the first device fails, at most.
    failures: usize,
    /// Calls may come back without a touch.
    untouched: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Moment {
    machine: StateMachine,
    observer: Observer,
    now: Duration,
    attached: usize,
    asked: u64,
    failed: usize,
    broken: Option<String>,
}

const DEVICES: [DeviceId; 2] = [DeviceId(0), DeviceId(1)];
const TIMEOUT: Duration = Duration::from_secs(1);
const CALL_LIMIT: Duration = Duration::from_secs(1);

impl Model for World {
    type State = Moment;
    type Action = (Input, bool);

    fn init_states(&self) -> Vec<Moment> {
        let mut moment = Moment {
            machine: StateMachine::default(),
            observer: Observer::default(),
            now: Duration::ZERO,
            attached: 0,
            asked: 0,
            failed: 0,
            broken: None,
        };
        for device in DEVICES {
            moment.take(&Input::Add { device, reachable: true });
            moment.take(&Input::Export { export: ExportId(device.0), device });
        }
        vec![moment]
    }

    /// Each with whether time passes up to the next deadline first.
    fn actions(&self, moment: &Moment, actions: &mut Vec<(Input, bool)>) {
        if moment.broken.is_some() {
            return;
        }
        let mut inputs = Vec::new();
        if let Some(&(export, free_before)) = self.attachments.get(moment.attached) {
            let attachment = AttachmentId(moment.attached as u64);
            inputs.push(Input::Attach { attachment, export: ExportId(export), free_before });
        }
        for attachment in moment.observer.attachments() {
            inputs.push(Input::Detach { attachment });
            // To every notice that there was, also those that nobody waits for an answer to any more.
            let changes = (0..moment.asked).map(ChangeId);
            inputs.extend(changes.map(|change| Input::Answered { attachment, change }));
        }
        for (change, devices) in moment.observer.calls() {
            let untouched = self.untouched.then_some(After::Untouched);
            for place in [After::Here, After::Away, After::Closed].into_iter().chain(untouched) {
                let after = devices.iter().map(|device| (*device, place)).collect();
                inputs.push(Input::Returned { change, after });
            }
            // Halfway: the first came back, of the others nothing is known.
            if devices.len() > 1 {
                let first = devices.iter().take(1).map(|device| (*device, After::Here)).collect();
                inputs.push(Input::Returned { change, after: first });
            }
        }
        for change in moment.observer.uncalled() {
            // What nobody called cannot come back.
            let after = DEVICES.map(|device| (device, After::Here)).to_vec();
            inputs.push(Input::Returned { change, after });
        }
        if moment.asked < self.changes {
            inputs.extend(self.asks(moment.asked));
        }
        if moment.failed < self.failures {
            inputs.push(Input::Fail { device: DEVICES[0] });
        }
        for device in DEVICES {
            let export = ExportId(device.0);
            if moment.observer.has_export(export) {
                inputs.push(Input::Unexport { export });
            }
        }
        actions.extend(inputs.into_iter().map(|input| (input, false)));
        let ticks = moment.observer.changes().filter(|change| moment.machine.deadline(*change).is_some());
        actions.extend(ticks.map(|change| (Input::Tick { change }, true)));
    }

    fn next_state(&self, moment: &Moment, (input, time_passes): (Input, bool)) -> Option<Moment> {
        let mut next = moment.clone();
        if let (true, Input::Tick { change }) = (time_passes, &input) {
            next.now = next.machine.deadline(*change)?.max(next.now);
        }
        match input {
            Input::Attach { .. } => next.attached += 1,
            Input::Ask { .. } => next.asked += 1,
            Input::Fail { .. } => next.failed += 1,
            _ => {}
        }
        next.take(&input);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("every promise is kept", |_, moment: &Moment| moment.broken.is_none()),
            // That the search reaches what it is about.
            Property::sometimes("somebody is late", |_, moment: &Moment| moment.now >= TIMEOUT),
            Property::sometimes("memory is of its second generation", |_, moment: &Moment| {
                DEVICES.iter().any(|device| moment.machine.generation(*device) == Some(2))
            }),
            Property::sometimes("a device is closed", |_, moment: &Moment| {
                DEVICES.iter().any(|device| moment.machine.state(*device).is_none())
            }),
        ]
    }
}

impl World {
    fn asks(&self, number: u64) -> Vec<Input> {
        let change = ChangeId(number);
        let options = |at_deadline| RevokeOptions { timeout: TIMEOUT, at_deadline, call_limit: CALL_LIMIT };
        let sets: Vec<Vec<DeviceId>> = if self.together {
            vec![DEVICES.to_vec(), vec![DEVICES[0]]]
        } else {
            DEVICES.iter().map(|device| vec![*device]).collect()
        };
        let mut asks = Vec::new();
        for devices in sets {
            for at_deadline in [AtDeadline::CallOff, AtDeadline::GoOn] {
                let (devices, options) = (devices.clone(), options(at_deadline));
                asks.push(Input::Ask { change, what: Change::Take(RevokeCause::Reset), devices, options });
            }
            let options = options(AtDeadline::CallOff);
            asks.push(Input::Ask { change, what: Change::Restore, devices, options });
        }
        asks
    }
}

impl Moment {
    fn take(&mut self, input: &Input) {
        self.broken = self.observer.step(&mut self.machine, input, self.now).err();
    }
}

/// Searches all of `world`; prints how large it was.
fn search(name: &str, world: World) {
    let checker = world.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    println!(
        "{name}: {} states, {} of them different, depth {}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
}

#[test]
fn two_devices_each_for_itself() {
    let attachments = &[(0, false), (0, true), (1, false)];
    let world = World { attachments, changes: 3, together: false, failures: 0, untouched: false };
    search("two devices, each for itself", world);
}

#[test]
fn two_devices_of_which_one_fails() {
    let attachments = &[(0, false), (0, true)];
    let world = World { attachments, changes: 3, together: false, failures: 2, untouched: false };
    search("two devices, of which one fails", world);
}

#[test]
fn two_devices_reset_together() {
    let attachments = &[(0, false), (1, true), (1, false)];
    let world = World { attachments, changes: 3, together: true, failures: 0, untouched: false };
    search("two devices, reset together", world);
}

/// As a client of a broker has it: what it gives back may be called off.
#[test]
fn a_device_whose_calls_may_come_back_without_a_touch() {
    let attachments = &[(0, false), (0, true)];
    let world = World { attachments, changes: 2, together: true, failures: 1, untouched: true };
    search("calls without a touch", world);
}
