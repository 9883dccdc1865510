//! `Gate`: whether a device's memory may be used now, and who is using it.
//!
//! ```text
//!              close(cause)                 wait_idle: the last access leaves
//!   Open(g) ---------------> Closed(g), draining ---------------> Closed(g), idle
//!      ^                         |                                    |
//!      |   reopen()              |                                    |  the revoking call
//!      +-------------------------+                                    v
//!      +------------------------------------------------------- advance(): g + 1
//!             open, if the memory can be reached again
//! ```
//!
//! One word holds everything that entering and leaving look at, so that either is one atomic
//! addition. The cause, for words, lies beside it under a lock that only a refusal takes.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Why memory was taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RevokeCause {
    /// The device was reset.
    Reset,
    /// Its memory decoding was switched off.
    MemoryDisabled,
    /// The lender closed the device.
    ExporterGone,
}

impl fmt::Display for RevokeCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reset => "the device was reset",
            Self::MemoryDisabled => "the device's memory was switched off",
            Self::ExporterGone => "the exporter closed the device",
        })
    }
}

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
}

const CLOSED: u64 = 1 << 63;
const GENERATION_SHIFT: u32 = 32;
const GENERATION_MASK: u64 = (1 << 31) - 1;
const USERS_MASK: u64 = (1 << GENERATION_SHIFT) - 1;

fn generation_of(state: u64) -> u64 {
    state >> GENERATION_SHIFT & GENERATION_MASK
}

/// The revoked bit and the number of accesses in flight.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Closed, 31 bits of generation, 32 bits of accesses in flight.
    state: AtomicU64,
    cause: Mutex<RevokeCause>,
    idle: Condvar,
}

/// A refusal: the gate is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Closed {
    pub cause: RevokeCause,
}

impl Gate {
    pub(crate) fn open() -> Self {
        Self {
            state: AtomicU64::new(0),
            cause: Mutex::new(RevokeCause::MemoryDisabled),
            idle: Condvar::new(),
        }
    }

    /// Enters, or says why not. Returns the generation entered; pairs with [`Gate::leave`].
    pub(crate) fn enter(&self) -> Result<u64, Closed> {
        let state = self.state.fetch_add(1, Ordering::Acquire);
        if state & CLOSED == 0 {
            return Ok(generation_of(state));
        }
        self.leave(generation_of(state));
        Err(Closed { cause: *self.cause.lock() })
    }

    /// Leaves what was entered in `generation`.
    pub(crate) fn leave(&self, generation: u64) -> Outcome {
        let state = self.state.fetch_sub(1, Ordering::Release);
        if state & CLOSED != 0 && state & USERS_MASK == 1 {
            // The lock orders this against a waiter between its look and its sleep.
            drop(self.cause.lock());
            self.idle.notify_all();
        }
        match generation_of(state) {
            same if same == generation => Outcome::Ok,
            generation => Outcome::Torn { generation },
        }
    }

    /// The present generation: how often the memory was taken back.
    pub(crate) fn generation(&self) -> u64 {
        generation_of(self.state.load(Ordering::Acquire))
    }

    /// Lets nobody in from now on. Those inside stay.
    pub(crate) fn close(&self, cause: RevokeCause) {
        *self.cause.lock() = cause;
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Waits until nobody is inside; at most `timeout`. Says how many are left.
    pub(crate) fn wait_idle(&self, timeout: Duration) -> u64 {
        let deadline = Instant::now() + timeout;
        let mut cause = self.cause.lock();
        loop {
            let users = self.state.load(Ordering::Acquire) & USERS_MASK;
            if users == 0 || self.idle.wait_until(&mut cause, deadline).timed_out() {
                return users;
            }
        }
    }

    /// Opens again without anything having been revoked.
    pub(crate) fn reopen(&self) {
        self.state.fetch_and(!CLOSED, Ordering::AcqRel);
    }

    /// Moves to the next generation, open or closed: the memory was taken back.
    pub(crate) fn advance(&self, open: bool) {
        let next = |state: u64| {
            let generation = generation_of(state).wrapping_add(1) & GENERATION_MASK;
            let closed = if open { 0 } else { CLOSED };
            Some(closed | generation << GENERATION_SHIFT | state & USERS_MASK)
        };
        // The closure never refuses, so there is always a previous value.
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn an_open_gate_lets_in_and_out() {
        let gate = Gate::open();
        let generation = gate.enter().unwrap();
        assert_eq!(gate.leave(generation), Outcome::Ok);
        assert_eq!(gate.wait_idle(Duration::ZERO), 0);
    }

    #[test]
    fn a_closed_gate_refuses_with_its_cause_and_counts_nobody() {
        let gate = Gate::open();
        gate.close(RevokeCause::Reset);
        assert_eq!(gate.enter(), Err(Closed { cause: RevokeCause::Reset }));
        assert_eq!(gate.wait_idle(Duration::ZERO), 0);
    }

    #[test]
    fn memory_taken_back_under_an_access_tears_it() {
        let gate = Gate::open();
        let generation = gate.enter().unwrap();
        gate.close(RevokeCause::Reset);
        assert_eq!(gate.wait_idle(Duration::from_millis(1)), 1);
        gate.advance(true);
        assert_eq!(gate.leave(generation), Outcome::Torn { generation: 1 });
        assert_eq!(gate.enter(), Ok(1));
    }

    #[test]
    fn a_revoke_that_was_called_off_tears_nothing() {
        let gate = Gate::open();
        let generation = gate.enter().unwrap();
        gate.close(RevokeCause::MemoryDisabled);
        gate.reopen();
        assert_eq!(gate.leave(generation), Outcome::Ok);
        assert!(gate.enter().is_ok());
    }

    #[test]
    fn nobody_is_inside_after_a_drain_however_threads_race() {
        let gate = Arc::new(Gate::open());
        let users: Vec<_> = (0..4)
            .map(|_| {
                let gate = Arc::clone(&gate);
                thread::spawn(move || {
                    let mut entered = 0_u64;
                    loop {
                        match gate.enter() {
                            Ok(generation) => {
                                entered += 1;
                                assert_eq!(gate.leave(generation), Outcome::Ok);
                            }
                            Err(closed) if closed.cause == RevokeCause::ExporterGone => return entered,
                            Err(_) => thread::yield_now(),
                        }
                    }
                })
            })
            .collect();
        for _ in 0..200 {
            gate.close(RevokeCause::Reset);
            assert_eq!(gate.wait_idle(Duration::from_secs(30)), 0);
            gate.advance(true);
            thread::yield_now();
        }
        gate.close(RevokeCause::ExporterGone);
        for user in users {
            user.join().unwrap();
        }
        assert_eq!(gate.generation(), 200);
    }
}
