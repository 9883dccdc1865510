//! Locks, atomics and threads as this crate uses them; under the feature `shuttle`, those of the
//! scheduler that tries interleavings.
//!
//! Shuttle knows no time: what waits with a deadline waits there until it is woken.

use std::io;
use std::time::{Duration, Instant};

/// The threads that this crate starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thread {
    /// Makes a revoking call, or follows what a broker says of a lease.
    Call,
    /// Waits for what a device or its owner tells.
    Watch,
    /// Closes a device whose lender was dropped.
    Close,
    /// Waits for work that its attachment left.
    Outlive,
    /// The second hop of a copy.
    Relay,
    /// Serves the clients of a broker.
    #[cfg(feature = "broker")]
    Serve,
    /// Scrubs what a broker lends.
    #[cfg(feature = "broker")]
    Scrub,
    /// Copies for clients of a broker.
    #[cfg(feature = "broker")]
    Copy,
    /// Looks whether the kernel has freed what a broker lent.
    #[cfg(feature = "broker")]
    Prove,
    /// Does what an operator asks a broker for.
    #[cfg(feature = "broker")]
    Operate,
    /// Listens to a broker.
    #[cfg(feature = "broker")]
    Listen,
}

impl Thread {
    /// Those that a lender needs.
    #[cfg(all(test, feature = "host", not(feature = "shuttle")))]
    pub const ALL: [Self; 5] = [Self::Call, Self::Watch, Self::Close, Self::Outlive, Self::Relay];

    /// What the kernel shows; up to 15 bytes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Call => "peervram-revoke",
            Self::Watch => "peervram-watch",
            Self::Close => "peervram-close",
            Self::Outlive => "peervram-work",
            Self::Relay => "peervram-relay",
            #[cfg(feature = "broker")]
            Self::Serve => "peervram-broker",
            #[cfg(feature = "broker")]
            Self::Scrub => "peervram-scrub",
            #[cfg(feature = "broker")]
            Self::Copy => "peervram-copy",
            #[cfg(feature = "broker")]
            Self::Prove => "peervram-prove",
            #[cfg(feature = "broker")]
            Self::Operate => "peervram-operate",
            #[cfg(feature = "broker")]
            Self::Listen => "peervram-listen",
        }
    }
}

/// Starts a thread. Nobody waits for its end.
///
/// # Errors
/// There is none to be had: EAGAIN, mostly. `work` is dropped.
pub(crate) fn start(thread: Thread, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    #[cfg(all(test, feature = "host", not(feature = "shuttle")))]
    refused::check(thread)?;
    real::thread::Builder::new().name(thread.name().into()).spawn(work).map(drop)
}

/// Starts a thread that ends before `scope` does.
///
/// # Errors
/// As [`start`].
pub(crate) fn start_in<'scope, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    thread: Thread,
    work: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<std::thread::ScopedJoinHandle<'scope, T>> {
    #[cfg(all(test, feature = "host", not(feature = "shuttle")))]
    refused::check(thread)?;
    std::thread::Builder::new().name(thread.name().into()).spawn_scoped(scope, work)
}

/// Threads that a test refuses to those who start them on its own thread.
#[cfg(all(test, feature = "host", not(feature = "shuttle")))]
pub(crate) mod refused {
    use super::Thread;
    use std::cell::Cell;
    use std::io;

    std::thread_local! {
        static REFUSED: Cell<Option<Thread>> = const { Cell::new(None) };
    }

    /// From now on, none of this kind starts.
    pub(crate) fn set(thread: Option<Thread>) {
        REFUSED.set(thread);
    }

    pub(super) fn check(thread: Thread) -> io::Result<()> {
        match REFUSED.get() {
            Some(refused) if refused == thread => Err(rustix::io::Errno::AGAIN.into()),
            _ => Ok(()),
        }
    }
}

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
