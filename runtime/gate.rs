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
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::{Error, Kind, Signal, deadline_after};

use crate::RevokeCause;
use crate::hook::{self, Hook};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, doze, wait_until};

/// How an access ended. Whoever drops it unseen does not know whether bytes were torn:
///
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use peervram::{Access, Result, backends::Importer};
/// fn unseen<I: Importer>(access: Access<'_, I>) -> Result<()> {
///     access.finish();
///     Ok(())
/// }
/// ```
/// ```
/// #![deny(unused_must_use)]
/// # use peervram::{Access, Result, backends::Importer};
/// fn seen<I: Importer>(access: Access<'_, I>) -> Result<()> {
///     access.finish().check()
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "an access that was torn was worth nothing"]
#[non_exhaustive]
pub enum Outcome {
    /// The memory stayed the same from entering to finishing.
    Ok,
    /// It was taken back meanwhile: what was read or written is worth nothing.
    Torn {
        /// The generation of the memory now.
        generation: u64,
    },
    /// The memory stayed the same, but what the importer wrote could not be copied to it, or only a part (of a
    /// [staged](crate::Path::Staged) path), or its owner could not be made to see it
    /// ([`Owner::invalidate`](peervram_backends::Owner::invalidate)). The log says why. What is there is old,
    /// new, or some of each.
    NotCopiedBack,
}

impl Outcome {
    /// Nothing, or why the access was worth nothing, for `?`.
    ///
    /// # Errors
    /// [`Kind::Revoked`] where it was torn, [`Kind::Unverified`] where what was written is not known to be there.
    pub fn check(self) -> Result<(), Error> {
        const TRIED: &str = "finish an access to lent memory";
        match self {
            Self::Ok => Ok(()),
            Self::Torn { generation } => {
                let why =
                    format!("the memory was taken back meanwhile, and is of generation {generation} now");
                let error = Error::new(Kind::Revoked, TRIED, why);
                Err(error.next("do it again: what was read or written is worth nothing"))
            }
            Self::NotCopiedBack => {
                let why = "what was written could not be brought to where it belongs, or only a part";
                Err(Error::new(Kind::Unverified, TRIED, why).next("the log says why; write it again"))
            }
        }
    }

    /// The same, unless what was written is not where it belongs. What was torn is no better for being there.
    pub(crate) fn unless_lost(self, is_there: bool) -> Self {
        if self == Self::Ok && !is_there { Self::NotCopiedBack } else { self }
    }
}

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

/// An access that ends when a signal fires.
///
/// ```text
///   Running ---------------> Ending ----------------> Ended ---------------------> Over
///           fired, or              copied back, and         nobody looks at the
///           given up               the gate is left         signal; it is dropped
/// ```
/// Several threads look at one signal: who waits for the work, a drain, the thread that outlives an attachment.
/// Who is told how the work ended may destroy what the signal looks at, so nobody is told before it is over.
pub(crate) struct InFlight {
    generation: u64,
    /// Nobody knows any more whether the signal fires; said once.
    is_lost: AtomicBool,
    course: Mutex<Course>,
    /// The work is over.
    over: Condvar,
}

/// How far work in flight is.
struct Course {
    stage: Stage,
    /// None when nobody may look any more.
    signal: Option<Arc<dyn Signal>>,
    /// Threads that look at the signal.
    lookers: usize,
    /// What is done when the work ends; none when somebody does it.
    on_end: Option<OnEnd>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    Ending,
    Ended(Outcome),
    Over(Outcome),
}

/// What happens when the work is over, before the gate is left. It is told whether the device is known to be
/// done, and says whether what was written is where it belongs.
type OnEnd = Box<dyn FnOnce(bool) -> bool + Send>;

impl InFlight {
    /// The signal, to look at. Pairs with [`InFlight::looked`], when it is dropped again. None where the work has
    /// ended.
    fn look(&self) -> Option<Arc<dyn Signal>> {
        let mut course = self.course.lock();
        let signal = course.signal.clone().filter(|_| course.stage == Stage::Running)?;
        course.lookers += 1;
        Some(signal)
    }

    /// A thread does not look any more.
    fn looked(&self) {
        let mut course = self.course.lock();
        course.lookers -= 1;
        self.end_looking(course);
    }

    /// What is done when the work ends, for the one who does it.
    fn begin_end(&self) -> Option<OnEnd> {
        let mut course = self.course.lock();
        if course.stage != Stage::Running {
            return None;
        }
        course.stage = Stage::Ending;
        course.on_end.take()
    }

    /// The gate was left.
    fn ended(&self, outcome: Outcome) {
        let mut course = self.course.lock();
        course.stage = Stage::Ended(outcome);
        self.end_looking(course);
    }

    /// Drops the signal, if the work has ended and nobody looks.
    fn end_looking(&self, mut course: MutexGuard<'_, Course>) {
        let (Stage::Ended(outcome), 0) = (course.stage, course.lookers) else { return };
        let Some(signal) = course.signal.take() else { return };
        drop(course);
        hook::ask(Hook::SignalDrop, nobody, (), || drop(signal));
        self.course.lock().stage = Stage::Over(outcome);
        self.over.notify_all();
    }

    /// Whether the gate was left.
    fn has_ended(&self) -> bool {
        matches!(self.course.lock().stage, Stage::Ended(_) | Stage::Over(_))
    }

    /// How it ended, if it is over.
    fn outcome(&self) -> Option<Outcome> {
        match self.course.lock().stage {
            Stage::Over(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// How it ended. Waits until it is over, at most until `deadline`.
    fn outcome_by(&self, deadline: Instant) -> Option<Outcome> {
        let mut course = self.course.lock();
        let mut timed_out = false;
        loop {
            match course.stage {
                Stage::Over(outcome) => return Some(outcome),
                _ if timed_out => return None,
                _ => (course, timed_out) = wait_until(&self.over, course, deadline),
            }
        }
    }
}

/// Whose a signal is: it has no name.
fn nobody() -> String {
    "a device at work".into()
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
    /// An open gate to memory of `generation`, with one access inside: [`Gate::first`].
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

    /// What there is to say of why it was last closed.
    pub fn closed(&self, generation: u64) -> Closed {
        let beside = self.beside.lock();
        Closed { generation, cause: beside.cause, is_gone: beside.is_gone }
    }

    /// Leaves what was entered in `generation`.
    fn leave(&self, generation: u64) -> Outcome {
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

    /// Leaves when `signal` fires; `on_end` runs just before.
    pub fn leave_when(
        &self,
        inside: Inside<'_>,
        signal: impl Signal + 'static,
        on_end: impl FnOnce(bool) -> bool + Send + 'static,
    ) -> Arc<InFlight> {
        let course = Course {
            stage: Stage::Running,
            signal: Some(Arc::new(signal)),
            lookers: 0,
            on_end: Some(Box::new(on_end)),
        };
        let in_flight = Arc::new(InFlight {
            generation: inside.stay(),
            is_lost: AtomicBool::new(false),
            course: Mutex::new(course),
            over: Condvar::new(),
        });
        // Nobody looks at what is over before the next drain; so that the list stays short, this does.
        self.reap();
        self.beside.lock().in_flight.push(Arc::clone(&in_flight));
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
        let mut left = self.beside.lock().in_flight.clone();
        if left.is_empty() {
            return left;
        }
        left.retain(|in_flight| {
            self.settle(in_flight, Duration::ZERO);
            !in_flight.has_ended()
        });
        self.beside.lock().in_flight.retain(|in_flight| !in_flight.has_ended());
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
            self.reap();
            let beside = self.beside.lock();
            let users = self.state.load(Ordering::Acquire) & USERS_MASK;
            let now = Instant::now();
            if users == 0 || now >= deadline {
                return users;
            }
            // Under the lock: a thread that leaves its access to a device after this look wakes the wait below.
            let known = beside.in_flight.iter().find(|one| !one.is_lost.load(Ordering::Relaxed)).cloned();
            match known {
                // Only devices are inside: wait for one of them, and look now and then whether it was given up.
                Some(first) if users == beside.in_flight.len() as u64 => {
                    drop(beside);
                    self.settle(&first, LOOK_INTERVAL.min(deadline - now));
                }
                Some(_) => doze(&self.idle, beside, LOOK_INTERVAL.min(deadline - now)),
                // A thread leaves, which wakes; a lost one can only be given up, which wakes, too.
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
    pub fn shut_for_good(&self, generation: u64) {
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

#[cfg(test)]
#[cfg(not(feature = "shuttle"))]
mod tests {
    use super::*;
    use peervram_backends::Flag;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    fn gate() -> Gate {
        let gate = Gate::entered(0);
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
        let gate = Gate::entered(5);
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
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "it slept until its deadline: {:?}",
            begun.elapsed()
        );
    }

    #[test]
    fn a_panic_at_the_end_of_an_access_leaves_the_gate() {
        let gate = gate();
        let caught = catch_unwind(AssertUnwindSafe(|| {
            let _inside = gate.enter().unwrap();
            panic!("as a test of panics");
        }));
        assert!(caught.is_err());
        let in_flight =
            gate.leave_when(gate.enter().unwrap(), Flag::new(), |_| panic!("as a test of panics"));
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
        assert_eq!(gate.beside.lock().in_flight.len(), 1);
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
}
