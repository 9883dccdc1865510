//! Tests of gates and of work in flight.

use super::*;
use crate::sync::atomic::AtomicBool;
use peervram_backends::{Error, Flag, Kind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

fn gate() -> Gate {
    let gate = Gate::entered(0, None);
    assert_eq!(gate.first().leave(), Outcome::Ok);
    gate
}

fn soon() -> Instant {
    deadline_after(Duration::from_millis(1))
}

fn late() -> Instant {
    deadline_after(Duration::from_secs(30))
}

#[test]
fn an_open_gate_lets_in_and_out() {
    let gate = gate();
    assert_eq!(gate.enter().unwrap().leave(), Outcome::Ok);
    assert_eq!(gate.drain(Instant::now()), 0);
}

#[test]
fn only_what_was_worth_something_checks_as_good() {
    assert!(Outcome::Ok.check().is_ok());
    let torn = Outcome::Torn { generation: 7 }.check().unwrap_err();
    assert_eq!(torn.kind(), Kind::Revoked);
    assert!(torn.why().contains("generation 7"), "{torn}");
    assert_eq!(Outcome::NotCopiedBack.check().unwrap_err().kind(), Kind::Unverified);
}

#[test]
fn a_closed_gate_refuses_with_its_cause_and_counts_nobody() {
    let gate = gate();
    gate.close(RevokeCause::Reset);
    assert_eq!(
        gate.enter().unwrap_err(),
        Closed { generation: 0, cause: RevokeCause::Reset, is_gone: false }
    );
    assert_eq!(gate.drain(Instant::now()), 0);
}

#[test]
fn a_gate_tells_whether_it_is_closed_to_which_memory_and_who_is_inside() {
    let gate = Gate::entered(5, None);
    let shown = |closed: bool, generation: u64, users: u64| {
        format!("Gate {{ closed: {closed}, generation: {generation}, users: {users}, .. }}")
    };
    assert_eq!((gate.is_closed(), gate.generation()), (false, 5));
    assert_eq!(format!("{gate:?}"), shown(false, 5, 1));
    gate.shut(6, RevokeCause::Reset);
    assert_eq!((gate.is_closed(), gate.generation()), (true, 6));
    assert_eq!(format!("{gate:?}"), shown(true, 6, 1));
    let closed = |generation, is_gone| Closed { generation, cause: RevokeCause::Reset, is_gone };
    assert_eq!(gate.enter().unwrap_err(), closed(6, false));
    gate.shut_for_good(7);
    assert_eq!(gate.enter().unwrap_err(), closed(7, true));
    assert_eq!(format!("{gate:?}"), shown(true, 7, 1));
}

#[test]
fn memory_taken_back_under_an_access_tears_it() {
    let gate = gate();
    let inside = gate.enter().unwrap();
    gate.close(RevokeCause::Reset);
    assert_eq!(gate.drain(soon()), 1);
    gate.open(1);
    assert_eq!(inside.leave(), Outcome::Torn { generation: 1 });
    assert_eq!(gate.enter().unwrap().generation(), 1);
    gate.open(6);
    assert_eq!(gate.enter().unwrap().generation(), 6);
}

#[test]
fn a_revoke_that_was_called_off_tears_nothing() {
    let gate = gate();
    let inside = gate.enter().unwrap();
    gate.close(RevokeCause::MemoryDisabled);
    gate.open(0);
    assert_eq!(inside.leave(), Outcome::Ok);
    assert!(gate.enter().is_ok());
}

/// A gate that was closed while a device is at work, until the flag.
fn revoked_under_a_device() -> (Gate, Flag, Arc<InFlight>) {
    let (gate, flag) = (gate(), Flag::new());
    let in_flight = gate.leave_when(gate.enter().unwrap(), flag.clone(), |_| true);
    gate.close(RevokeCause::Reset);
    assert_eq!(gate.drain(soon()), 1);
    (gate, flag, in_flight)
}

#[test]
fn an_access_lasts_until_its_signal() {
    let (gate, flag, in_flight) = revoked_under_a_device();
    assert_eq!(gate.settle(&in_flight, Duration::ZERO), None);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(20));
            flag.set();
        });
        assert_eq!(gate.drain(late()), 0);
    });
    // Reaped by the drain, in the generation that it was of.
    gate.open(1);
    assert_eq!(gate.settle(&in_flight, Duration::ZERO), Some(Outcome::Ok));
}

#[test]
fn work_that_outlasts_a_revoke_is_torn() {
    let (gate, flag, in_flight) = revoked_under_a_device();
    gate.open(1);
    flag.set();
    assert_eq!(gate.settle(&in_flight, Duration::ZERO), Some(Outcome::Torn { generation: 1 }));
    assert_eq!(gate.drain(Instant::now()), 0);
}

#[test]
fn a_device_and_a_thread_inside_are_both_waited_for() {
    let gate = gate();
    let flag = Flag::new();
    gate.leave_when(gate.enter().unwrap(), flag.clone(), |_| true);
    let of_a_thread = gate.enter().unwrap();
    gate.close(RevokeCause::Reset);
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(10));
            flag.set();
            thread::sleep(Duration::from_millis(10));
            assert_eq!(of_a_thread.leave(), Outcome::Ok);
        });
        assert_eq!(gate.drain(late()), 0);
    });
}

/// A drain that waits for a thread hears that the thread left its access to a device.
#[test]
fn an_access_left_to_a_device_in_mid_drain_is_waited_for_by_its_signal() {
    let (gate, flag) = (gate(), Flag::new());
    let inside = gate.enter().unwrap();
    gate.close(RevokeCause::Reset);
    let begun = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            gate.leave_when(inside, flag.clone(), |_| true);
            thread::sleep(Duration::from_millis(50));
            flag.set();
        });
        assert_eq!(gate.drain(late()), 0);
    });
    assert!(begun.elapsed() < Duration::from_secs(10), "it slept until its deadline: {:?}", begun.elapsed());
}

#[test]
fn a_panic_at_the_end_of_an_access_leaves_the_gate() {
    let gate = gate();
    let caught = catch_unwind(AssertUnwindSafe(|| {
        let _inside = gate.enter().unwrap();
        panic!("as a test of panics");
    }));
    assert!(caught.is_err());
    let in_flight = gate.leave_when(gate.enter().unwrap(), Flag::new(), |_| panic!("as a test of panics"));
    assert!(catch_unwind(AssertUnwindSafe(|| gate.give_up(&in_flight))).is_err());
    assert_eq!(gate.give_up(&in_flight), Outcome::NotCopiedBack);
    gate.close(RevokeCause::Reset);
    assert_eq!(gate.drain(Instant::now()), 0);
}

/// Something that may be destroyed once the work on it is over, as a `VkFence`.
#[derive(Default)]
struct Fence {
    has_fired: AtomicBool,
    is_destroyed: AtomicBool,
    looks: AtomicU64,
    /// Looks at it, or ends of looks, after it was destroyed.
    too_late: AtomicU64,
}

impl Fence {
    fn is_touched(&self) {
        self.looks.fetch_add(1, Ordering::SeqCst);
        self.too_late.fetch_add(self.is_destroyed.load(Ordering::SeqCst).into(), Ordering::SeqCst);
    }
}

struct OfFence(Arc<Fence>);

impl Signal for OfFence {
    fn wait(&self, timeout: Duration) -> peervram_backends::Result<bool> {
        let deadline = deadline_after(timeout);
        loop {
            self.0.is_touched();
            let has_fired = self.0.has_fired.load(Ordering::SeqCst);
            if has_fired || Instant::now() >= deadline {
                // A look takes its time, and touches the fence until its end.
                thread::sleep(Duration::from_millis(1));
                self.0.is_touched();
                return Ok(has_fired);
            }
            thread::yield_now();
        }
    }
}

impl Drop for OfFence {
    fn drop(&mut self) {
        self.0.is_touched();
    }
}

/// However many threads look: who was told the outcome may destroy the fence.
#[test]
fn nobody_looks_at_a_signal_whose_outcome_was_told() {
    for round in 0..60 {
        let (gate, fence) = (gate(), Arc::new(Fence::default()));
        let in_flight = gate.leave_when(gate.enter().unwrap(), OfFence(Arc::clone(&fence)), |_| true);
        gate.close(RevokeCause::Reset);
        thread::scope(|scope| {
            scope.spawn(|| gate.drain(late()));
            scope.spawn(|| gate.outlive(&in_flight));
            scope.spawn(|| gate.reap());
            let outcome = if round % 2 == 0 {
                fence.has_fired.store(true, Ordering::SeqCst);
                gate.settle(&in_flight, Duration::from_secs(10)).unwrap()
            } else {
                gate.give_up(&in_flight)
            };
            assert_eq!(outcome, Outcome::Ok);
            fence.is_destroyed.store(true, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(3));
            fence.has_fired.store(true, Ordering::SeqCst);
        });
        assert!(fence.looks.load(Ordering::SeqCst) > 0);
        assert_eq!(fence.too_late.load(Ordering::SeqCst), 0, "round {round}");
    }
}

/// A signal that does not fire; each look at it lasts until it is told to end.
struct SlowLook {
    begun: Sender<()>,
    end: Mutex<Receiver<()>>,
}

impl Signal for SlowLook {
    fn wait(&self, _timeout: Duration) -> peervram_backends::Result<bool> {
        self.begun.send(()).ok();
        self.end.lock().recv().ok();
        Ok(false)
    }
}

#[test]
fn who_looks_while_another_gives_up_is_told_how_it_ended_and_nobody_is_before() {
    let gate = gate();
    let ((begun, is_looking), (end, told)) = (channel(), channel());
    let signal = SlowLook { begun, end: Mutex::new(told) };
    let in_flight = gate.leave_when(gate.enter().unwrap(), signal, |_| true);
    thread::scope(|scope| {
        let looker = scope.spawn(|| gate.settle(&in_flight, Duration::ZERO));
        is_looking.recv().unwrap();
        let giver = scope.spawn(|| gate.give_up(&in_flight));
        while !in_flight.has_ended() {
            thread::yield_now();
        }
        let too_early = gate.settle(&in_flight, Duration::from_millis(1));
        end.send(()).unwrap();
        assert_eq!(too_early, None);
        assert_eq!(looker.join().unwrap(), Some(Outcome::Ok));
        assert_eq!(giver.join().unwrap(), Outcome::Ok);
    });
}

#[test]
fn work_that_nobody_waits_for_is_outlived_and_given_up_where_its_signal_is_lost() {
    struct Lost;
    impl Signal for Lost {
        fn wait(&self, _timeout: Duration) -> peervram_backends::Result<bool> {
            Err(Error::new(Kind::Os, "wait for a device", "it is lost"))
        }
    }
    let (gate, flag) = (gate(), Flag::new());
    let work = gate.leave_when(gate.enter().unwrap(), flag.clone(), |is_done| is_done);
    thread::scope(|scope| {
        let outlives = scope.spawn(|| gate.outlive(&work));
        flag.set();
        outlives.join().unwrap();
    });
    assert_eq!(work.outcome(), Some(Outcome::Ok));
    let lost = gate.leave_when(gate.enter().unwrap(), Lost, |is_done| is_done);
    gate.outlive(&lost);
    assert_eq!(lost.outcome(), Some(Outcome::NotCopiedBack));
}

#[test]
fn what_is_over_is_reaped_and_the_rest_is_given_back() {
    let gate = gate();
    let (over, goes_on) = (Flag::new(), Flag::new());
    let ended = gate.leave_when(gate.enter().unwrap(), over.clone(), |_| true);
    let left = gate.leave_when(gate.enter().unwrap(), goes_on, |_| true);
    over.set();
    let reaped = gate.reap();
    assert!(reaped.len() == 1 && Arc::ptr_eq(&reaped[0], &left));
    assert_eq!(gate.slow.lock().in_flight.len(), 1);
    assert_eq!(ended.outcome(), Some(Outcome::Ok));
}

#[test]
fn finished_work_does_not_pile_up() {
    let gate = gate();
    for _ in 0..100 {
        let flag = Flag::new();
        gate.leave_when(gate.enter().unwrap(), flag.clone(), |_| true);
        flag.set();
    }
    assert!(gate.slow.lock().in_flight.len() <= 1);
}

#[test]
fn nobody_is_inside_after_a_drain_however_threads_race() {
    let gate = Arc::new(gate());
    let users: Vec<_> = (0..4)
        .map(|_| {
            let gate = Arc::clone(&gate);
            thread::spawn(move || {
                loop {
                    match gate.enter() {
                        Ok(inside) => assert_eq!(inside.leave(), Outcome::Ok),
                        Err(closed) if closed.cause == RevokeCause::ExporterGone => return,
                        Err(_) => thread::yield_now(),
                    }
                }
            })
        })
        .collect();
    for generation in 1..=200 {
        gate.close(RevokeCause::Reset);
        assert_eq!(gate.drain(late()), 0);
        gate.open(generation);
        thread::yield_now();
    }
    gate.close(RevokeCause::ExporterGone);
    for user in users {
        user.join().unwrap();
    }
    assert_eq!(gate.generation(), 200);
}
