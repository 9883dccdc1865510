//! `Pin`: the CPUs that copies stay on: one, or one for each side where two places write to each other at once.

use std::str::FromStr;

use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity};

use peervram_programs::{Ending, usage};

/// Which CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// Everything stays on it,
    pub first: usize,
    /// but for the second side of copies both ways, which needs one of its own.
    pub other: Option<usize>,
}

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cpu = |text: &str| text.parse::<usize>().map_err(|_| format!("{text:?} is no number of a CPU"));
        match text.split_once(',') {
            None => Ok(Pin { first: cpu(text)?, other: None }),
            Some((first, other)) => {
                let (first, other) = (cpu(first)?, cpu(other)?);
                if first == other {
                    return Err(format!("each side needs a CPU of its own, and {first} is one"));
                }
                Ok(Pin { first, other: Some(other) })
            }
        }
    }
}

impl Pin {
    /// The CPUs of both sides.
    pub fn cpus(self) -> Vec<usize> {
        [Some(self.first), self.other].into_iter().flatten().collect()
    }

    /// This thread stays on the first CPU, with all threads that it starts later. The other one is tried, too.
    ///
    /// # Errors
    /// Exit code 2: one of them is not there, or not this process's to run on.
    pub fn this_thread(self) -> Result<(), Ending> {
        self.other.map_or(Ok(()), stay_on)?;
        stay_on(self.first)
    }
}

/// The thread stays on that CPU, with all threads that it starts later.
///
/// # Errors
/// Exit code 2: it is not there, or not this process's to run on.
pub fn stay_on(cpu: usize) -> Result<(), Ending> {
    let refused = |why: String| usage(format!("cannot stay on CPU {cpu}: {why}"));
    if cpu >= CpuSet::MAX_CPU {
        return Err(refused(format!("there are at most {}", CpuSet::MAX_CPU)));
    }
    let mut this = CpuSet::new();
    this.set(cpu);
    sched_setaffinity(None, &this).map_err(|errno| match errno {
        Errno::INVAL => refused("it is not there, is off, or is not this process's to run on".to_owned()),
        other => refused(other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use peervram_programs::USAGE;

    #[test]
    fn a_cpu_that_is_not_there_is_usage() {
        assert_eq!(stay_on(1_000_000).unwrap_err().code, USAGE);
        assert_eq!(Pin { first: 0, other: Some(1_000_000) }.this_thread().unwrap_err().code, USAGE);
    }

    #[test]
    fn one_cpu_or_two_that_differ() {
        assert_eq!("3".parse(), Ok(Pin { first: 3, other: None }));
        assert_eq!("3,5".parse(), Ok(Pin { first: 3, other: Some(5) }));
        for text in ["", "a", "3,", "3,3", "1,2,3", "-1"] {
            assert!(text.parse::<Pin>().is_err(), "{text}");
        }
    }
}
