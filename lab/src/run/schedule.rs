//! `Schedule`: which machine is started when several may run at once. Pure: it knows numbers, no machine.
//!
//! A job is a machine with its tests. The job with the most tests starts first, so that the longest one is not left for
//! the end. A job starts when a place is free and its memory fits in what the host has left; a job that
//! fits nowhere runs alone.

/// What a job takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// The host's memory that it takes while it runs.
    pub memory_mib: u64,
    /// How many tests it has: the measure of how long it takes.
    pub tests: usize,
}

/// Jobs that wait and jobs that run.
#[derive(Debug)]
pub struct Schedule {
    jobs: Vec<Job>,
    /// Numbers of jobs that have not started, the next one last.
    waiting: Vec<usize>,
    running: Vec<usize>,
    places: usize,
    memory_mib: u64,
}

impl Schedule {
    /// `places` jobs run at once, as long as their memory fits in `memory_mib`.
    pub fn new(jobs: Vec<Job>, places: usize, memory_mib: u64) -> Schedule {
        let mut waiting: Vec<usize> = (0..jobs.len()).rev().collect();
        waiting.sort_by_key(|&number| jobs[number].tests);
        Schedule { jobs, waiting, running: Vec::new(), places: places.max(1), memory_mib }
    }

    /// The number of a job to start now; none where it is better to wait, or nothing is left.
    pub fn start(&mut self) -> Option<usize> {
        if self.running.len() >= self.places {
            return None;
        }
        let taken_mib: u64 = self.running.iter().map(|&number| self.jobs[number].memory_mib).sum();
        let fits = |&number: &usize| taken_mib + self.jobs[number].memory_mib <= self.memory_mib;
        let place = match self.waiting.iter().rposition(fits) {
            Some(place) => place,
            None if self.running.is_empty() => self.waiting.len().checked_sub(1)?,
            None => return None,
        };
        let number = self.waiting.remove(place);
        self.running.push(number);
        Some(number)
    }

    /// A job is over.
    pub fn end(&mut self, number: usize) {
        self.running.retain(|&running| running != number);
    }

    /// Starts nothing more.
    pub fn call_off(&mut self) {
        self.waiting.clear();
    }

    /// The jobs that run, in the order in which they were started.
    pub fn running(&self) -> &[usize] {
        &self.running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(memory_mib: u64, tests: usize) -> Job {
        Job { memory_mib, tests }
    }

    #[test]
    fn the_most_tests_start_first_and_equal_ones_in_their_order() {
        let mut schedule = Schedule::new(vec![job(1, 2), job(1, 9), job(1, 2), job(1, 5)], 4, 10);
        let started: Vec<usize> = std::iter::from_fn(|| schedule.start()).collect();
        assert_eq!(started, [1, 3, 0, 2]);
    }

    #[test]
    fn no_more_run_at_once_than_there_are_places() {
        let mut schedule = Schedule::new(vec![job(1, 1); 3], 2, 10);
        assert_eq!((schedule.start(), schedule.start(), schedule.start()), (Some(0), Some(1), None));
        schedule.end(0);
        assert_eq!((schedule.start(), schedule.start()), (Some(2), None));
        assert_eq!(schedule.running(), [1, 2]);
    }

    #[test]
    fn a_job_waits_for_memory_and_a_smaller_one_goes_before_it() {
        let mut schedule = Schedule::new(vec![job(6, 9), job(6, 8), job(4, 1)], 3, 10);
        assert_eq!((schedule.start(), schedule.start(), schedule.start()), (Some(0), Some(2), None));
        schedule.end(0);
        assert_eq!(schedule.start(), Some(1));
    }

    #[test]
    fn a_job_larger_than_all_memory_runs_alone() {
        let mut schedule = Schedule::new(vec![job(20, 1), job(1, 5)], 2, 10);
        assert_eq!((schedule.start(), schedule.start()), (Some(1), None));
        schedule.end(1);
        assert_eq!((schedule.start(), schedule.start()), (Some(0), None));
    }

    #[test]
    fn nothing_starts_after_it_was_called_off() {
        let mut schedule = Schedule::new(vec![job(1, 1); 3], 1, 10);
        assert_eq!(schedule.start(), Some(0));
        schedule.call_off();
        schedule.end(0);
        assert_eq!((schedule.start(), schedule.running()), (None, &[][..]));
    }
}
