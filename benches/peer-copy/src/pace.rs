//! `Pace`: how often something is copied, and when each copy began and ended.
//!
//! The first copies warm up and are not counted. Then it goes on until there are enough, or time is up and there
//! are a few. Where bytes are looked at, source and destination are written anew before the last copy of a stream, so that what
//! is looked at is what a timed copy brought, and not what an earlier one left behind. Two paces that meet begin each copy together.

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

/// What a stream of copies does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// One copy, which is timed.
    Copy,
    /// The source is written with what this round sends, and the destination with poison. That is not timed, and the last
    /// copy follows.
    Renew(u64),
}

/// From when to when a copy went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Before it was asked for.
    pub begin: Instant,
    /// When it was done.
    pub end: Instant,
}

impl Span {
    /// How long it took.
    pub fn ns(&self) -> f64 {
        self.end.duration_since(self.begin).as_nanos() as f64
    }

    /// From the first begin of two to the last end.
    pub fn around(self, other: Span) -> Span {
        Span { begin: self.begin.min(other.begin), end: self.end.max(other.end) }
    }
}

/// Copies under way.
#[derive(Debug)]
pub struct Pace<'a> {
    plan: Plan,
    meeting: Option<&'a Meeting>,
    /// What the last copy sends; none where nobody looks at it, and once that was written.
    last_round: Option<u64>,
    /// How many are counted with the last one, once that is known.
    ends_at: Option<usize>,
    done: usize,
    spent: Duration,
    is_over: bool,
    /// The time as the caller sees it.
    pub spans: Vec<Span>,
    /// The time by the device's own clock, where it has one.
    pub device_times_ns: Vec<f64>,
}

impl<'a> Pace<'a> {
    /// By itself.
    pub fn new(plan: Plan) -> Self {
        Self {
            plan,
            meeting: None,
            last_round: None,
            ends_at: None,
            done: 0,
            spent: Duration::ZERO,
            is_over: false,
            spans: Vec::new(),
            device_times_ns: Vec::new(),
        }
    }

    /// As often as its plan says at least, each time together with another.
    pub fn together(plan: Plan, meeting: &'a Meeting) -> Self {
        let mut pace = Self::new(Plan { most: plan.least, ..plan });
        pace.meeting = Some(meeting);
        pace
    }

    /// The last copy sends what that round sends, to a destination that was poisoned just before.
    pub fn renewed_at_last(mut self, round: u64) -> Self {
        self.last_round = Some(round);
        self
    }

    /// What is to be done next; nothing when there are enough.
    pub fn next_step(&mut self) -> Option<Step> {
        let counted = self.spans.len();
        if self.is_over {
            return None;
        }
        if let Some(end) = self.ends_at {
            return (counted < end).then_some(Step::Copy);
        }
        let has_time = self.spent < self.plan.budget;
        let wants = |counted: usize| counted < self.plan.least || has_time && counted < self.plan.most;
        let is_cold = self.done < self.plan.warm_up;
        match self.last_round {
            None => wants(counted).then_some(Step::Copy),
            Some(_) if is_cold || wants(counted + 1) => Some(Step::Copy),
            Some(round) => {
                self.ends_at = Some(counted + 1);
                self.last_round = None;
                Some(Step::Renew(round))
            }
        }
    }

    /// Times one copy, which says how long the device worked on it, where it can.
    ///
    /// # Errors
    /// The copy's.
    pub fn time(&mut self, copy: impl FnOnce() -> Result<Option<Duration>>) -> Result<()> {
        if self.meeting.is_some_and(|meeting| !meeting.wait()) {
            // The other side failed and reports why.
            self.is_over = true;
            return Ok(());
        }
        let begin = Instant::now();
        let worked = copy()?;
        let end = Instant::now();
        self.done += 1;
        if self.done > self.plan.warm_up {
            self.spent += end.duration_since(begin);
            self.spans.push(Span { begin, end });
            // A clock that did not move is none.
            let worked = worked.filter(|worked| !worked.is_zero());
            self.device_times_ns.extend(worked.map(|worked| worked.as_nanos() as f64));
        }
        Ok(())
    }

    /// How long each copy took, as whoever waits has it.
    pub fn times_ns(&self) -> Vec<f64> {
        self.spans.iter().map(Span::ns).collect()
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

    /// How many copies are made, how many are counted, and after how many counted ones which rounds are written.
    fn copies(mut pace: Pace) -> (usize, usize, Vec<(usize, u64)>) {
        let (mut made, mut renewed) = (0, Vec::new());
        while let Some(step) = pace.next_step() {
            match step {
                Step::Copy => {
                    made += 1;
                    pace.time(|| Ok(None)).unwrap();
                }
                Step::Renew(round) => renewed.push((pace.spans.len(), round)),
            }
        }
        (made, pace.spans.len(), renewed)
    }

    #[test]
    fn warming_up_is_not_counted() {
        assert_eq!(copies(Pace::new(plan(Duration::MAX))), (12, 10, vec![]));
        assert_eq!(copies(Pace::new(plan(Duration::ZERO))), (5, 3, vec![]));
    }

    #[test]
    fn before_the_last_copy_everything_is_written_anew() {
        let renewed = |plan| copies(Pace::new(plan).renewed_at_last(7));
        assert_eq!(renewed(plan(Duration::MAX)), (12, 10, vec![(9, 7)]));
        assert_eq!(renewed(plan(Duration::ZERO)), (5, 3, vec![(2, 7)]));
        // One copy is the last one, and what warms up comes before.
        let one = Plan { least: 1, most: 1, ..plan(Duration::ZERO) };
        assert_eq!(renewed(one), (3, 1, vec![(0, 7)]));
        assert_eq!(renewed(Plan { warm_up: 0, ..one }), (1, 1, vec![(0, 7)]));
    }

    #[test]
    fn two_that_meet_copy_equally_often() {
        let meeting = Meeting::default();
        let both = thread::scope(|scope| {
            let run = || copies(Pace::together(plan(Duration::MAX), &meeting).renewed_at_last(1));
            let other = scope.spawn(run);
            (run(), other.join().unwrap())
        });
        assert_eq!(both, ((5, 3, vec![(2, 1)]), (5, 3, vec![(2, 1)])));
    }

    #[test]
    fn two_copies_take_from_the_first_begin_to_the_last_end() {
        let start = Instant::now();
        let span = |from: u64, to: u64| {
            let at = |ns: u64| start + Duration::from_nanos(ns);
            Span { begin: at(from), end: at(to) }
        };
        // One after the other, at once, and one within the other.
        for (one, other, ns) in [
            (span(0, 10), span(15, 25), 25.0),
            (span(0, 10), span(0, 12), 12.0),
            (span(0, 30), span(5, 9), 30.0),
        ] {
            assert_eq!(one.around(other).ns(), ns);
            assert_eq!(other.around(one).ns(), ns);
        }
    }

    #[test]
    fn nobody_waits_for_one_that_left() {
        let meeting = Meeting::default();
        thread::scope(|scope| {
            scope.spawn(|| drop(Pace::together(plan(Duration::MAX), &meeting)));
            let (made, counted, _) = copies(Pace::together(plan(Duration::MAX), &meeting));
            assert_eq!((made, counted), (1, 0));
        });
    }
}
