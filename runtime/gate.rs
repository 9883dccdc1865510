//! `Gate`: whether one attachment may use its memory now, and who is using it.
//!
//! ```text
//!              close(cause)                    drain: the last access leaves
//!   Open(g) ---------------> Closed(g), in use ---------------> Closed(g), idle
//!      ^ ^                       |                                    |
//!      | |   open(g)             |                                    |  the revoking call
//!      | +-----------------------+                                    v
//!      +------------------------------------------------------- open(g + 1) or shut(g + 1)
//! ```
//!
//! One word holds everything that entering and leaving look at, so that either is one atomic addition.
//! What only a refusal or a drain needs lies beside it under a lock.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::{Error, Kind, Signal};

use crate::RevokeCause;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, wait_until};

/// How an access ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The memory stayed the same from entering to finishing.
    Ok,
    /// It was taken back meanwhile: what was read or written is worth nothing.
    Torn {
        /// The generation of the memory now.
        generation: u64,
    },
    /// Of a [staged](crate::Path::Staged) path: the memory stayed the same, but what the importer wrote could
    /// not be copied to it, or only a part. The log says why. What is there is old, new, or some of each.
    NotCopiedBack,
}

impl Outcome {
    /// The same, unless what was written is not where it belongs. What was torn is no better for being there.
    pub(crate) fn unless_lost(self, is_there: bool) -> Self {
        if self == Self::Ok && !is_there { Self::NotCopiedBack } else { self }
    }
}

const CLOSED: u64 = 1 << 63;
const GENERATION_SHIFT: u32 = 32;
const GENERATION_MASK: u64 = (1 << 31) - 1;
const USERS_MASK: u64 = (1 << GENERATION_SHIFT) - 1;

/// Between two looks at work that a device has not finished.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

fn generation_of(state: u64) -> u64 {
    state >> GENERATION_SHIFT & GENERATION_MASK
}

/// The revoked bit and the number of accesses in flight.
pub(crate) struct Gate {
    /// Closed, 31 bits of generation, 32 bits of accesses in flight.
    state: AtomicU64,
    beside: Mutex<Beside>,
    idle: Condvar,
}

struct Beside {
    /// Why it was last closed.
    cause: RevokeCause,
    /// It never opens again.
    is_gone: bool,
    /// Accesses that end when a device is done.
    in_flight: Vec<Arc<InFlight>>,
}

/// A refusal: the gate is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Closed {
    pub generation: u64,
    pub cause: RevokeCause,
    /// For good.
    pub is_gone: bool,
}

/// An access that ends when a signal fires.
pub(crate) struct InFlight {
    signal: Box<dyn Signal>,
    /// Nobody knows any more whether it fires; said once.
    is_lost: AtomicBool,
    generation: u64,
    /// How it ended; and until then what the work needs.
    end: Mutex<Result<Outcome, OnEnd>>,
}

/// What happens when the work is over, before the gate is left. It is told whether the device is known to be
/// done, and says whether what was written is where it belongs.
type OnEnd = Option<Box<dyn FnOnce(bool) -> bool + Send>>;

impl Gate {
    /// An open gate, with one access inside.
    pub fn entered(generation: u64) -> Self {
        Self {
            state: AtomicU64::new((generation & GENERATION_MASK) << GENERATION_SHIFT | 1),
            beside: Mutex::new(Beside {
                cause: RevokeCause::MemoryDisabled,
                is_gone: false,
                in_flight: Vec::new(),
            }),
            idle: Condvar::new(),
        }
    }

    /// Enters, or says why not. Returns the generation entered; pairs with [`Gate::leave`].
    pub fn enter(&self) -> Result<u64, Closed> {
        let state = self.state.fetch_add(1, Ordering::Acquire);
        if state & CLOSED == 0 {
            return Ok(generation_of(state));
        }
        self.leave(generation_of(state));
        Err(self.closed(generation_of(state)))
    }

    /// What there is to say of why it was last closed.
    pub fn closed(&self, generation: u64) -> Closed {
        let beside = self.beside.lock();
        Closed { generation, cause: beside.cause, is_gone: beside.is_gone }
    }

    /// Leaves what was entered in `generation`.
    pub fn leave(&self, generation: u64) -> Outcome {
        let state = self.state.fetch_sub(1, Ordering::Release);
        if state & CLOSED != 0 {
            // The lock orders this against a waiter between its look and its sleep.
            drop(self.beside.lock());
            self.idle.notify_all();
        }
        self.outcome_of(generation, state)
    }

    fn outcome_of(&self, generation: u64, state: u64) -> Outcome {
        match generation_of(state) {
            same if same == generation => Outcome::Ok,
            generation => Outcome::Torn { generation },
        }
    }

    /// Leaves what was entered in `generation` when `signal` fires; `on_end` runs just before.
    pub fn leave_when(
        &self,
        generation: u64,
        signal: Box<dyn Signal>,
        on_end: impl FnOnce(bool) -> bool + Send + 'static,
    ) -> Arc<InFlight> {
        let end = Mutex::new(Err(Some(Box::new(on_end) as Box<dyn FnOnce(bool) -> bool + Send>)));
        let in_flight = Arc::new(InFlight { signal, is_lost: AtomicBool::new(false), generation, end });
        // Nobody looks at what is over before the next drain; so that the list stays short, this does.
        self.reap();
        self.beside.lock().in_flight.push(Arc::clone(&in_flight));
        in_flight
    }

    /// Ends `in_flight` if its signal fires within `timeout`; says how it ended. Nothing where it goes
    /// on, or where its signal is lost: then nobody knows.
    pub fn settle(&self, in_flight: &InFlight, timeout: Duration) -> Option<Outcome> {
        if let Ok(outcome) = *in_flight.end.lock() {
            return Some(outcome);
        }
        // A signal may be somebody else's code, which must not end a revoke halfway.
        let waited = catch_unwind(AssertUnwindSafe(|| in_flight.signal.wait(timeout)));
        match waited.unwrap_or_else(|_| Err(Error::new(Kind::Os, "wait for a signal", "it panicked"))) {
            Ok(true) => Some(self.end(in_flight, true)),
            Ok(false) => None,
            Err(error) => {
                if !in_flight.is_lost.swap(true, Ordering::Relaxed) {
                    tracing::error!(%error, "whether a device is done with lent memory cannot be known");
                }
                None
            }
        }
    }

    /// Waits for the end of what is in flight, for as long as somebody can know of it. Where nobody can, the
    /// device is lost, and what it worked on with it.
    pub fn outlive(&self, in_flight: &InFlight) {
        while self.settle(in_flight, Duration::from_secs(1)).is_none() {
            if in_flight.is_lost.load(Ordering::Relaxed) {
                self.end(in_flight, false);
            }
        }
    }

    /// Ends `in_flight` now, whatever its signal says; `is_done` says whether it has fired.
    pub fn end(&self, in_flight: &InFlight, is_done: bool) -> Outcome {
        let mut end = in_flight.end.lock();
        match &mut *end {
            Ok(outcome) => *outcome,
            Err(on_end) => {
                let is_there = on_end.take().is_none_or(|on_end| on_end(is_done));
                let outcome = self.leave(in_flight.generation).unless_lost(is_there);
                *end = Ok(outcome);
                outcome
            }
        }
    }

    /// Ends what is over, and says how much is not.
    pub fn reap(&self) -> Vec<Arc<InFlight>> {
        let all = self.beside.lock().in_flight.clone();
        if all.is_empty() {
            return all;
        }
        let is_over = |in_flight: &Arc<InFlight>| self.settle(in_flight, Duration::ZERO).is_some();
        let (over, left): (Vec<_>, Vec<_>) = all.into_iter().partition(is_over);
        self.beside.lock().in_flight.retain(|one| !over.iter().any(|over| Arc::ptr_eq(one, over)));
        left
    }

    /// The present generation: how often the memory was taken back.
    pub fn generation(&self) -> u64 {
        generation_of(self.state.load(Ordering::Acquire))
    }

    /// Whether nobody is let in.
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Lets nobody in from now on. Those inside stay.
    pub fn close(&self, cause: RevokeCause) {
        self.beside.lock().cause = cause;
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Waits until nobody is inside; at most until `deadline`. Says how many are left.
    pub fn drain(&self, deadline: Instant) -> u64 {
        loop {
            let left = self.reap();
            let beside = self.beside.lock();
            let users = self.state.load(Ordering::Acquire) & USERS_MASK;
            let now = Instant::now();
            if users == 0 || now >= deadline {
                return users;
            }
            let waits = left.iter().find(|one| !one.is_lost.load(Ordering::Relaxed));
            match waits {
                // Only devices are inside: wait for one of them, and look now and then whether it was given up.
                Some(first) if users == left.len() as u64 => {
                    drop(beside);
                    self.settle(first, LOOK_INTERVAL.min(deadline - now));
                }
                Some(_) => drop(wait_until(&self.idle, beside, deadline.min(now + LOOK_INTERVAL))),
                // A lost one can only be given up, which wakes.
                None => drop(wait_until(&self.idle, beside, deadline)),
            }
        }
    }

    /// Lets in, to memory of `generation`.
    pub fn open(&self, generation: u64) {
        self.set(generation, 0);
    }

    /// Memory of `generation` is away.
    pub fn shut(&self, generation: u64, cause: RevokeCause) {
        self.beside.lock().cause = cause;
        self.set(generation, CLOSED);
    }

    /// Memory of `generation` is gone for good.
    pub fn bury(&self, generation: u64) {
        self.beside.lock().is_gone = true;
        self.set(generation, CLOSED);
    }

    fn set(&self, generation: u64, closed: u64) {
        let next = |state: u64| {
            Some(closed | (generation & GENERATION_MASK) << GENERATION_SHIFT | state & USERS_MASK)
        };
        // The closure never refuses, so there is always a previous value.
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.load(Ordering::Acquire);
        f.debug_struct("Gate")
            .field("closed", &(state & CLOSED != 0))
            .field("generation", &generation_of(state))
            .field("users", &(state & USERS_MASK))
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use peervram_backends::Flag;
    use std::thread;

    fn gate() -> Gate {
        let gate = Gate::entered(0);
        gate.leave(0);
        gate
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(1)
    }

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn an_open_gate_lets_in_and_out() {
        let gate = gate();
        let generation = gate.enter().unwrap();
        assert_eq!(gate.leave(generation), Outcome::Ok);
        assert_eq!(gate.drain(Instant::now()), 0);
    }

    #[test]
    fn a_closed_gate_refuses_with_its_cause_and_counts_nobody() {
        let gate = gate();
        gate.close(RevokeCause::Reset);
        assert_eq!(gate.enter(), Err(Closed { generation: 0, cause: RevokeCause::Reset, is_gone: false }));
        assert_eq!(gate.drain(Instant::now()), 0);
    }

    #[test]
    fn memory_taken_back_under_an_access_tears_it() {
        let gate = gate();
        let generation = gate.enter().unwrap();
        gate.close(RevokeCause::Reset);
        assert_eq!(gate.drain(soon()), 1);
        gate.open(1);
        assert_eq!(gate.leave(generation), Outcome::Torn { generation: 1 });
        assert_eq!(gate.enter(), Ok(1));
    }

    #[test]
    fn a_revoke_that_was_called_off_tears_nothing() {
        let gate = gate();
        let generation = gate.enter().unwrap();
        gate.close(RevokeCause::MemoryDisabled);
        gate.open(0);
        assert_eq!(gate.leave(generation), Outcome::Ok);
        assert!(gate.enter().is_ok());
    }

    /// A gate that was closed while a device is at work, until the flag.
    fn revoked_under_a_device() -> (Gate, Flag, Arc<InFlight>) {
        let (gate, flag) = (gate(), Flag::new());
        let generation = gate.enter().unwrap();
        let in_flight = gate.leave_when(generation, Box::new(flag.clone()), |_| true);
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
        let of_a_device = gate.enter().unwrap();
        gate.leave_when(of_a_device, Box::new(flag.clone()), |_| true);
        let of_a_thread = gate.enter().unwrap();
        gate.close(RevokeCause::Reset);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(10));
                flag.set();
                thread::sleep(Duration::from_millis(10));
                assert_eq!(gate.leave(of_a_thread), Outcome::Ok);
            });
            assert_eq!(gate.drain(late()), 0);
        });
    }

    #[test]
    fn finished_work_does_not_pile_up() {
        let gate = gate();
        for _ in 0..100 {
            let flag = Flag::new();
            let generation = gate.enter().unwrap();
            gate.leave_when(generation, Box::new(flag.clone()), |_| true);
            flag.set();
        }
        assert!(gate.beside.lock().in_flight.len() <= 1);
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
                            Ok(generation) => assert_eq!(gate.leave(generation), Outcome::Ok),
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
}
