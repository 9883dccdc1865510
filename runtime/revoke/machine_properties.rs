//! Long random lives of large worlds, each step looked at by the [`Observer`].

use std::time::Duration;

use proptest::prelude::*;

use super::RevokeCause;
use super::machine::*;
use super::machine_observer::{Observer, moved_on};

const DEVICES: u64 = 5;

/// What may happen; numbers choose among what there is.
#[derive(Debug, Clone)]
enum Happening {
    Export(u64),
    Unexport(usize),
    Attach(usize, bool),
    Detach(usize),
    Ask { devices: Vec<u64>, take: bool, go_on: bool, timeout_ms: u64 },
    MustBeFreed(usize),
    Answer(usize),
    AnswerLate(usize, u64),
    Return(usize, Vec<u8>),
    Wait(u64),
    Fail(u64),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        2 => (0..DEVICES).prop_map(Happening::Export),
        1 => any::<usize>().prop_map(Happening::Unexport),
        6 => (any::<usize>(), any::<bool>()).prop_map(|(at, free)| Happening::Attach(at, free)),
        2 => any::<usize>().prop_map(Happening::Detach),
        5 => (prop::collection::vec(0..DEVICES, 1..4), prop::bool::weighted(0.7), any::<bool>(), 0..50_u64)
            .prop_map(|(devices, take, go_on, timeout_ms)| Happening::Ask { devices, take, go_on, timeout_ms }),
        1 => any::<usize>().prop_map(Happening::MustBeFreed),
        12 => any::<usize>().prop_map(Happening::Answer),
        2 => (any::<usize>(), 0..40_u64).prop_map(|(at, back)| Happening::AnswerLate(at, back)),
        6 => (any::<usize>(), prop::collection::vec(0..9_u8, 0..5))
            .prop_map(|(at, places)| Happening::Return(at, places)),
        4 => (0..40_u64).prop_map(Happening::Wait),
        2 => (0..DEVICES).prop_map(Happening::Fail),
    ]
}

#[derive(Default)]
struct Life {
    machine: StateMachine,
    observer: Observer,
    now: Duration,
    next_id: u64,
    exports: Vec<ExportId>,
}

impl Life {
    fn take(&mut self, input: &Input) -> Result<(), TestCaseError> {
        self.observer.step(&mut self.machine, input, self.now).map_err(TestCaseError::fail)
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn live(&mut self, happening: Happening) -> Result<(), TestCaseError> {
        match happening {
            Happening::Export(device) => {
                let export = ExportId(self.id());
                self.exports.push(export);
                self.take(&Input::Export { export, device: DeviceId(device) })
            }
            Happening::Unexport(at) => match pick(&self.exports, at) {
                Some(export) => self.take(&Input::Unexport { export }),
                None => Ok(()),
            },
            Happening::Attach(at, free_before) => match pick(&self.exports, at) {
                Some(export) => {
                    let attachment = AttachmentId(self.id());
                    self.take(&Input::Attach { attachment, export, free_before })
                }
                None => Ok(()),
            },
            Happening::Detach(at) => {
                let all: Vec<_> = self.observer.attachments().collect();
                match pick(&all, at) {
                    Some(attachment) => self.take(&Input::Detach { attachment }),
                    None => Ok(()),
                }
            }
            Happening::Ask { devices, take, go_on, timeout_ms } => {
                let what = if take { Change::Take(RevokeCause::Reset) } else { Change::Restore };
                let options = RevokeOptions {
                    timeout: Duration::from_millis(timeout_ms),
                    at_deadline: if go_on { AtDeadline::GoOn } else { AtDeadline::CallOff },
                    call_limit: Duration::from_millis(30),
                };
                let change = ChangeId(self.id());
                self.take(&Input::Ask {
                    change,
                    what,
                    devices: devices.into_iter().map(DeviceId).collect(),
                    options,
                })
            }
            Happening::MustBeFreed(at) => {
                let all: Vec<_> = self.observer.attachments().collect();
                match pick(&all, at) {
                    Some(attachment) => self.take(&Input::MustBeFreed { attachment }),
                    None => Ok(()),
                }
            }
            Happening::Answer(at) => {
                let all: Vec<_> = self.observer.unanswered().collect();
                match pick(&all, at) {
                    Some((attachment, change)) => self.take(&Input::Answered { attachment, change }),
                    None => Ok(()),
                }
            }
            Happening::AnswerLate(at, back) => {
                let all: Vec<_> = self.observer.attachments().collect();
                // Numbers are given in order, so this is a change of before, or no change at all.
                let change = ChangeId(self.next_id.saturating_sub(back));
                match pick(&all, at) {
                    Some(attachment) => self.take(&Input::Answered { attachment, change }),
                    None => Ok(()),
                }
            }
            Happening::Return(at, places) => {
                let all: Vec<_> =
                    self.observer.calls().map(|(change, devices)| (change, devices.clone())).collect();
                let Some((change, devices)) = pick(&all, at) else { return Ok(()) };
                let place = |n: &u8| match n {
                    0 => After::Closed,
                    1..4 => After::Away,
                    4 => After::Untouched,
                    _ => After::Here,
                };
                // Where it says less than it should, of the rest nothing is known.
                let after = devices.iter().copied().zip(places.iter().map(place)).collect();
                let before = self.machine.clone();
                self.take(&Input::Returned { change, after })?;
                for device in devices {
                    let was_taken = before.generation(device) != self.machine.generation(device);
                    prop_assert!(!was_taken || moved_on(&before, &self.machine, device));
                }
                Ok(())
            }
            Happening::Fail(device) => self.take(&Input::Fail { device: DeviceId(device) }),
            Happening::Wait(ms) => {
                self.now += Duration::from_millis(ms);
                let changes: Vec<ChangeId> = self.observer.changes().collect();
                changes.into_iter().try_for_each(|change| self.take(&Input::Tick { change }))
            }
        }
    }
}

fn pick<T: Clone>(all: &[T], at: usize) -> Option<T> {
    (!all.is_empty()).then(|| all[at % all.len()].clone())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn long_lives_keep_every_promise(happenings in prop::collection::vec(happening(), 1..300)) {
        let mut life = Life::default();
        for device in 0..DEVICES {
            life.take(&Input::Add { device: DeviceId(device), reachable: device != 0 })?;
        }
        for happening in happenings {
            life.live(happening)?;
        }
        // Whatever is under way ends when everyone answers and every call comes back.
        for _ in 0..3 {
            let unanswered: Vec<_> = life.observer.unanswered().collect();
            for (attachment, change) in unanswered {
                life.take(&Input::Answered { attachment, change })?;
            }
            let calls: Vec<_> = life.observer.calls().map(|(change, of)| (change, of.clone())).collect();
            for (change, devices) in calls {
                let after = devices.into_iter().map(|device| (device, After::Here)).collect();
                life.take(&Input::Returned { change, after })?;
            }
        }
        for device in (0..DEVICES).map(DeviceId) {
            let state = life.machine.state(device);
            prop_assert!(matches!(state, None | Some(State::Live | State::Away(_))), "{:?}", state);
        }
    }
}
