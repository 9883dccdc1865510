//! `Pace`: how often something is copied, and how long each copy took.
//!
//! The first copies warm up and are not counted. Then it goes on until there are enough, or time is up and there
//! are a few. Two paces that meet begin each copy together.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use peervram::Result;

/// How many copies.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Not counted.
    pub warm_up: usize,
    /// At least, whatever time they take.
    pub least: usize,
    /// At most.
    pub most: usize,
    /// When this is up, no more than the least are begun.
    pub budget: Duration,
}

/// Copies under way.
#[derive(Debug)]
pub struct Pace<'a> {
    plan: Plan,
    meeting: Option<&'a Meeting>,
    done: usize,
    spent: Duration,
    is_over: bool,
    /// As whoever waits has it.
    pub times_ns: Vec<f64>,
    /// As the device has it, where it tells.
    pub device_times_ns: Vec<f64>,
}

impl<'a> Pace<'a> {
    /// By itself.
    pub fn new(plan: Plan) -> Self {
        Self {
            plan,
            meeting: None,
            done: 0,
            spent: Duration::ZERO,
            is_over: false,
            times_ns: Vec::new(),
            device_times_ns: Vec::new(),
        }
    }

    /// As often as its plan says at least, each time together with another.
    pub fn together(plan: Plan, meeting: &'a Meeting) -> Self {
        let mut pace = Self::new(Plan { most: plan.least, ..plan });
        pace.meeting = Some(meeting);
        pace
    }

    /// Whether one more is to be copied.
    pub fn wants_more(&self) -> bool {
        let counted = self.times_ns.len();
        let has_time = self.spent < self.plan.budget;
        !self.is_over && (counted < self.plan.least || has_time && counted < self.plan.most)
    }

    /// Times one copy, which says how long the device worked on it, where it can.
    ///
    /// # Errors
    /// The copy's.
    pub fn time(&mut self, copy: impl FnOnce() -> Result<Option<Duration>>) -> Result<()> {
        if self.meeting.is_some_and(|meeting| !meeting.wait()) {
            // The other one failed, and says why.
            self.is_over = true;
            return Ok(());
        }
        let start = Instant::now();
        let worked = copy()?;
        let took = start.elapsed();
        self.done += 1;
        if self.done > self.plan.warm_up {
            self.spent += took;
            self.times_ns.push(took.as_nanos() as f64);
            // A clock that did not move is none.
            let worked = worked.filter(|worked| !worked.is_zero());
            self.device_times_ns.extend(worked.map(|worked| worked.as_nanos() as f64));
        }
        Ok(())
    }
}

impl Drop for Pace<'_> {
    fn drop(&mut self) {
        if let Some(meeting) = self.meeting {
            meeting.leave();
        }
    }
}

/// Where two begin together, unless one has left.
#[derive(Debug, Default)]
pub struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_waiting: bool,
    /// How often both were there.
    times: u64,
    has_left: bool,
}

impl Meeting {
    /// Waits for the other one; says whether it came.
    pub fn wait(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.has_left {
            return false;
        }
        if state.is_waiting {
            state.is_waiting = false;
            state.times += 1;
            self.changed.notify_all();
            return true;
        }
        state.is_waiting = true;
        let times = state.times;
        while state.times == times && !state.has_left {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.times != times
    }

    fn leave(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.has_left = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn plan(budget: Duration) -> Plan {
        Plan { warm_up: 2, least: 3, most: 10, budget }
    }

    fn copies(mut pace: Pace) -> (usize, usize) {
        let mut made = 0;
        while pace.wants_more() {
            made += 1;
            pace.time(|| Ok(None)).unwrap();
        }
        (made, pace.times_ns.len())
    }

    #[test]
    fn warming_up_is_not_counted() {
        assert_eq!(copies(Pace::new(plan(Duration::MAX))), (12, 10));
        assert_eq!(copies(Pace::new(plan(Duration::ZERO))), (5, 3));
    }

    #[test]
    fn two_that_meet_copy_equally_often() {
        let meeting = Meeting::default();
        let both = thread::scope(|scope| {
            let run = || copies(Pace::together(plan(Duration::MAX), &meeting));
            let other = scope.spawn(run);
            (run(), other.join().unwrap())
        });
        assert_eq!(both, ((5, 3), (5, 3)));
    }

    #[test]
    fn nobody_waits_for_one_that_left() {
        let meeting = Meeting::default();
        thread::scope(|scope| {
            scope.spawn(|| drop(Pace::together(plan(Duration::MAX), &meeting)));
            let (made, counted) = copies(Pace::together(plan(Duration::MAX), &meeting));
            assert!(made <= 1 && counted == 0);
        });
    }
}
