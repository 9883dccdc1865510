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
//!
//! Where another process lends the memory to this one, that process may take it back before this one hears of it: who
//! leaves then looks at the memory's [`Origin`], too.

mod in_flight;
mod origin;
mod outcome;
#[cfg(test)]
#[cfg(not(feature = "shuttle"))]
mod tests;

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::{Signal, deadline_after};

pub(crate) use in_flight::InFlight;
pub(crate) use origin::Origin;
pub use outcome::Outcome;

use crate::RevokeCause;
use crate::hook::{self, Hook};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, doze, wait_until};
use in_flight::nobody;

const CLOSED: u64 = 1 << 63;
const GENERATION_SHIFT: u32 = 32;
const GENERATION_MASK: u64 = (1 << 31) - 1;
const USERS_MASK: u64 = (1 << GENERATION_SHIFT) - 1;

/// Between two looks at work that a device has not finished, of a drain.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// The same, of a thread that nobody waits for but whoever gives the work up.
const OUTLIVE_INTERVAL: Duration = Duration::from_millis(50);

fn generation_of(state: u64) -> u64 {
    state >> GENERATION_SHIFT & GENERATION_MASK
}

/// The revoked bit and the number of accesses in flight.
pub(crate) struct Gate {
    /// Closed, 31 bits of generation, 32 bits of accesses in flight.
    state: AtomicU64,
    slow: Mutex<SlowState>,
    /// Held while a piece of the memory is moved: [`PieceLock`](crate::piece_lock::PieceLock).
    pub(crate) pieces: Mutex<()>,
    idle: Condvar,
    /// None where this process owns the memory.
    origin: Option<Arc<dyn Origin>>,
}

/// What only a refusal or a drain needs.
struct SlowState {
    /// Why it was last closed.
    cause: RevokeCause,
    /// It never opens again.
    is_gone: bool,
    /// The generation that was last barred: nobody knows what those inside of it have read.
    barred: Option<u64>,
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

/// Somebody is inside a gate. Dropping it leaves the gate, also where a panic drops it.
#[must_use = "the gate is left when this is dropped"]
#[derive(Debug)]
pub(crate) struct Inside<'g> {
    gate: &'g Gate,
    generation: u64,
}

impl Inside<'_> {
    /// The generation of the memory when the gate was entered.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Leaves, and says whether the memory stayed the same.
    pub fn leave(self) -> Outcome {
        let (gate, generation) = (self.gate, self.stay());
        gate.leave(generation)
    }

    /// Stays inside for whoever leaves in its place.
    fn stay(self) -> u64 {
        let generation = self.generation;
        mem::forget(self);
        generation
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let _ = self.gate.leave(self.generation);
    }
}

/// The end of work in flight, by the one who ends it. Dropping it leaves the gate, also where a panic drops it.
struct Ending<'a> {
    gate: &'a Gate,
    in_flight: &'a InFlight,
    /// What was written is where it belongs.
    is_there: bool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let outcome = self.gate.leave(self.in_flight.generation);
        self.in_flight.ended(outcome.unless_lost(self.is_there));
    }
}

impl Gate {
    /// An open gate to memory of `generation`, with one access inside: [`Gate::first`]. `origin` is where the memory comes
    /// from, if another process lends it.
    pub fn entered(generation: u64, origin: Option<Arc<dyn Origin>>) -> Self {
        Self {
            state: AtomicU64::new((generation & GENERATION_MASK) << GENERATION_SHIFT | 1),
            slow: Mutex::new(SlowState {
                cause: RevokeCause::MemoryDisabled,
                is_gone: false,
                barred: None,
                in_flight: Vec::new(),
            }),
            pieces: Mutex::default(),
            idle: Condvar::new(),
            origin,
        }
    }

    /// The access that was inside from the beginning. To be asked for once.
    pub fn first(&self) -> Inside<'_> {
        Inside { gate: self, generation: self.generation() }
    }

    /// Enters, or says why not.
    pub fn enter(&self) -> Result<Inside<'_>, Closed> {
        let state = self.state.fetch_add(1, Ordering::Acquire);
        let inside = Inside { gate: self, generation: generation_of(state) };
        if state & CLOSED == 0 {
            return Ok(inside);
        }
        drop(inside);
        Err(self.closed(generation_of(state)))
    }

    fn is_as_heard(&self) -> bool {
        self.origin.as_ref().is_none_or(|origin| origin.is_as_heard())
    }

    /// What there is to say of why it was last closed.
    pub fn closed(&self, generation: u64) -> Closed {
        let slow = self.slow.lock();
        Closed { generation, cause: slow.cause, is_gone: slow.is_gone }
    }

    /// Leaves what was entered in `generation`.
    fn leave(&self, generation: u64) -> Outcome {
        // Before the gate is left: as long as somebody is inside, what this process knows of its origin belongs to
        // the generation of its word, or that word has moved on.
        let is_same = self.is_as_heard();
        let state = self.state.fetch_sub(1, Ordering::Release);
        let mut is_barred = false;
        if state & CLOSED != 0 {
            // The lock orders this against a waiter between its look and its sleep.
            is_barred = self.slow.lock().barred == Some(generation);
            self.idle.notify_all();
        }
        match generation_of(state) {
            same if same != generation => Outcome::Torn { generation: same },
            // The generation that is to come, when the memory is taken back or this process hears that it was.
            _ if is_barred || !is_same => Outcome::Torn { generation: generation + 1 },
            _ => Outcome::Ok,
        }
    }

    /// Leaves when `signal` fires; `on_end` runs just before.
    pub fn leave_when(
        &self,
        inside: Inside<'_>,
        signal: impl Signal + 'static,
        on_end: impl FnOnce(bool) -> bool + Send + 'static,
    ) -> Arc<InFlight> {
        let in_flight = Arc::new(InFlight::new(inside.stay(), signal, on_end));
        // Nobody looks at what is over before the next drain; so that the list stays short, this does.
        self.reap();
        self.slow.lock().in_flight.push(Arc::clone(&in_flight));
        // A drain that waits for a thread to leave has a signal to look at instead.
        self.idle.notify_all();
        in_flight
    }

    /// Ends `in_flight` if its signal fires within `timeout`; says how it ended, and then nobody looks at the
    /// signal any more. Nothing where it goes on, or where its signal is lost: then nobody knows.
    pub fn settle(&self, in_flight: &InFlight, timeout: Duration) -> Option<Outcome> {
        let deadline = deadline_after(timeout);
        let Some(signal) = in_flight.look() else { return in_flight.outcome_by(deadline) };
        let waited = hook::call(Hook::SignalWait, nobody, || signal.wait(timeout));
        drop(signal);
        in_flight.looked();
        match waited {
            Ok(true) => {
                self.end(in_flight, true);
                in_flight.outcome_by(deadline)
            }
            Ok(false) => in_flight.outcome(),
            Err(error) => {
                if !in_flight.is_lost.swap(true, Ordering::Relaxed) {
                    tracing::error!(%error, "whether a device is done with lent memory cannot be known");
                }
                in_flight.outcome()
            }
        }
    }

    /// Waits for the end of what is in flight, for as long as somebody can know of it. Where nobody can, the
    /// device is lost, and what it worked on with it.
    pub fn outlive(&self, in_flight: &InFlight) {
        while !in_flight.has_ended() {
            self.settle(in_flight, OUTLIVE_INTERVAL);
            if in_flight.is_lost.load(Ordering::Relaxed) {
                self.end(in_flight, false);
            }
        }
    }

    /// Ends `in_flight` now, whatever its signal says, and says how; nobody looks at the signal any more.
    pub fn give_up(&self, in_flight: &InFlight) -> Outcome {
        self.end(in_flight, false);
        loop {
            // Whoever looks at a signal that does not fire does so for a moment at a time.
            if let Some(outcome) = in_flight.outcome_by(deadline_after(Duration::MAX)) {
                return outcome;
            }
        }
    }

    /// Ends `in_flight`, unless somebody does; `is_done` says whether its signal has fired.
    fn end(&self, in_flight: &InFlight, is_done: bool) {
        if let Some(on_end) = in_flight.begin_end() {
            let mut ending = Ending { gate: self, in_flight, is_there: false };
            ending.is_there = on_end(is_done);
        }
    }

    /// Ends what is over, and says what is not.
    pub fn reap(&self) -> Vec<Arc<InFlight>> {
        let mut left = self.slow.lock().in_flight.clone();
        if left.is_empty() {
            return left;
        }
        left.retain(|in_flight| {
            self.settle(in_flight, Duration::ZERO);
            !in_flight.has_ended()
        });
        self.slow.lock().in_flight.retain(|in_flight| !in_flight.has_ended());
        left
    }

    /// The present generation: how often the memory was taken back.
    pub fn generation(&self) -> u64 {
        generation_of(self.state.load(Ordering::Acquire))
    }

    /// Whether the memory is the same as in `generation`, as far as anybody knows.
    pub fn is_same(&self, generation: u64) -> bool {
        let is_barred = || self.is_closed() && self.slow.lock().barred == Some(generation);
        self.is_as_heard() && self.generation() == generation && !is_barred()
    }

    /// Whether nobody is let in.
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Lets nobody in from now on. Those inside stay.
    pub fn close(&self, cause: RevokeCause) {
        self.slow.lock().cause = cause;
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Waits until nobody is inside; at most until `deadline`. Says how many are left.
    pub fn drain(&self, deadline: Instant) -> u64 {
        loop {
            self.reap();
            let slow = self.slow.lock();
            let users = self.state.load(Ordering::Acquire) & USERS_MASK;
            let now = Instant::now();
            if users == 0 || now >= deadline {
                return users;
            }
            // Under the lock: a thread that leaves its access to a device after this look wakes the wait below.
            let known = slow.in_flight.iter().find(|one| !one.is_lost.load(Ordering::Relaxed)).cloned();
            match known {
                // Only devices are inside: wait for one of them, and look now and then whether it was given up.
                Some(first) if users == slow.in_flight.len() as u64 => {
                    drop(slow);
                    self.settle(&first, LOOK_INTERVAL.min(deadline - now));
                }
                Some(_) => doze(&self.idle, slow, LOOK_INTERVAL.min(deadline - now)),
                // A thread leaves, which wakes; a lost one can only be given up, which wakes, too.
                None => drop(wait_until(&self.idle, slow, deadline)),
            }
        }
    }

    /// Lets in, to memory of `generation`.
    pub fn open(&self, generation: u64) {
        self.set(generation, 0);
    }

    /// Memory of `generation` is away.
    pub fn shut(&self, generation: u64, cause: RevokeCause) {
        self.slow.lock().cause = cause;
        self.set(generation, CLOSED);
    }

    /// The device of memory of `generation` has failed: nobody is let in, and who is inside is torn.
    pub fn bar(&self, generation: u64, cause: RevokeCause) {
        let mut slow = self.slow.lock();
        (slow.cause, slow.barred) = (cause, Some(generation & GENERATION_MASK));
        drop(slow);
        self.set(generation, CLOSED);
    }

    /// Memory of `generation` is gone for good.
    pub fn shut_for_good(&self, generation: u64) {
        self.slow.lock().is_gone = true;
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
