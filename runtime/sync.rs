//! Locks, atomics and threads as this crate uses them; under the feature `shuttle`, those of the
//! scheduler that tries interleavings.
//!
//! Shuttle knows no time: what waits with a deadline waits there until it is woken.

use std::time::{Duration, Instant};

#[cfg(not(feature = "shuttle"))]
mod real {
    use super::{Duration, Instant};

    pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::{atomic, mpsc};
    pub(crate) use std::thread;
    pub(crate) use std::thread_local;

    /// Lets others go on, for a while.
    pub(crate) fn pause(length: Duration) {
        thread::sleep(length);
    }

    /// Waits to be woken, at most until `deadline`. Says whether that passed.
    pub(crate) fn wait_until<'a, T>(
        condvar: &Condvar,
        mut guard: MutexGuard<'a, T>,
        deadline: Instant,
    ) -> (MutexGuard<'a, T>, bool) {
        let timed_out = condvar.wait_until(&mut guard, deadline).timed_out();
        (guard, timed_out)
    }

    /// Waits to be woken, or for a moment: until what nobody wakes for is looked at again.
    pub(crate) fn doze<T>(condvar: &Condvar, mut guard: MutexGuard<'_, T>, moment: Duration) {
        condvar.wait_for(&mut guard, moment);
    }
}

#[cfg(feature = "shuttle")]
mod real {
    use super::{Duration, Instant};

    pub(crate) use shuttle::sync::{Condvar, MutexGuard};
    pub(crate) use shuttle::sync::{atomic, mpsc};
    pub(crate) use shuttle::thread;
    pub(crate) use shuttle::thread_local;

    /// A mutex that nobody poisons, as parking_lot's.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }

    /// Lets others go on.
    pub(crate) fn pause(_: Duration) {
        thread::yield_now();
    }

    /// Waits to be woken; a deadline that has passed is all that is seen of time.
    pub(crate) fn wait_until<'a, T>(
        condvar: &Condvar,
        guard: MutexGuard<'a, T>,
        deadline: Instant,
    ) -> (MutexGuard<'a, T>, bool) {
        if deadline <= Instant::now() {
            return (guard, true);
        }
        (condvar.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner), false)
    }

    /// Lets others go on.
    pub(crate) fn doze<T>(_: &Condvar, guard: MutexGuard<'_, T>, _: Duration) {
        drop(guard);
        thread::yield_now();
    }
}

pub(crate) use real::*;
