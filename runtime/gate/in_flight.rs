//! `InFlight`: an access that ends when a device is done, as its gate keeps it.

use std::sync::Arc;
use std::time::Instant;

use peervram_backends::Signal;

use super::outcome::Outcome;
use crate::hook::{self, Hook};
use crate::sync::atomic::AtomicBool;
use crate::sync::{Condvar, Mutex, MutexGuard, wait_until};

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
    pub(super) generation: u64,
    /// Nobody knows any more whether the signal fires; said once.
    pub(super) is_lost: AtomicBool,
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
pub(super) type OnEnd = Box<dyn FnOnce(bool) -> bool + Send>;

impl InFlight {
    /// Work of an access that began in `generation`; `on_end` is called when it ends, before the gate is left.
    pub(super) fn new(
        generation: u64,
        signal: impl Signal + 'static,
        on_end: impl FnOnce(bool) -> bool + Send + 'static,
    ) -> Self {
        let course = Course {
            stage: Stage::Running,
            signal: Some(Arc::new(signal)),
            lookers: 0,
            on_end: Some(Box::new(on_end)),
        };
        Self { generation, is_lost: AtomicBool::new(false), course: Mutex::new(course), over: Condvar::new() }
    }

    /// The signal, to look at. Pairs with [`InFlight::looked`], when it is dropped again. None where the work has
    /// ended.
    pub(super) fn look(&self) -> Option<Arc<dyn Signal>> {
        let mut course = self.course.lock();
        let signal = course.signal.clone().filter(|_| course.stage == Stage::Running)?;
        course.lookers += 1;
        Some(signal)
    }

    /// A thread does not look any more.
    pub(super) fn looked(&self) {
        let mut course = self.course.lock();
        course.lookers -= 1;
        self.end_looking(course);
    }

    /// What is done when the work ends, for the one who does it.
    pub(super) fn begin_end(&self) -> Option<OnEnd> {
        let mut course = self.course.lock();
        if course.stage != Stage::Running {
            return None;
        }
        course.stage = Stage::Ending;
        course.on_end.take()
    }

    /// The gate was left.
    pub(super) fn ended(&self, outcome: Outcome) {
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
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.course.lock().stage, Stage::Ended(_) | Stage::Over(_))
    }

    /// How it ended, if it is over.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        match self.course.lock().stage {
            Stage::Over(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// How it ended. Waits until it is over, at most until `deadline`.
    pub(super) fn outcome_by(&self, deadline: Instant) -> Option<Outcome> {
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
pub(super) fn nobody() -> String {
    "a device at work".into()
}
