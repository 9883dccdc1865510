//! `Stuck`: a revoking call that does not come back, and what it waits for.
//!
//! The kernel waits for importers without a limit, and not even a kill ends that (seen on Linux 7.3).
//! Which importers those are is noted before the call: the kernel's list cannot be read while it waits
//! for fences, without standing in line behind it.

use std::fmt;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use super::keeper::Entry;
use crate::{Error, Kind};

/// A call that has not come back.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Stuck {
    /// The device, or devices.
    pub device: String,
    /// What was tried.
    pub tried: &'static str,
    /// For how long.
    pub waited: Duration,
    /// Which devices had its dma-bufs attached before the call.
    pub importers: Vec<String>,
    /// Which processes hold those dma-bufs, or the nodes of those devices.
    pub processes: Vec<String>,
    /// Where in the kernel the call is, innermost first.
    pub stack: Vec<String>,
    /// What could not be found out, and why.
    pub unread: Vec<String>,
}

/// What is known before a call.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    inodes: Vec<u64>,
    importers: Vec<String>,
    unread: Vec<String>,
}

/// The thread that makes a call.
#[derive(Debug, Default)]
pub(crate) struct CallThread(AtomicI32);

impl CallThread {
    /// Said by the thread itself.
    pub fn begin(&self) {
        self.0.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
    }

    /// Where in the kernel it is.
    fn stack(&self) -> Result<Vec<String>, String> {
        let thread = self.0.load(Ordering::Acquire);
        let read = |name: &str| fs::read_to_string(format!("/proc/self/task/{thread}/{name}"));
        // Readable by root alone, where the kernel has it.
        let stack = read("stack").map_err(|error| format!("the kernel's stack: {error}"))?;
        Ok(stack.lines().map(|line| line.trim_start_matches("[<0>] ").to_owned()).collect())
    }
}

impl Snapshot {
    pub fn take(_entries: &[Arc<Entry>]) -> Self {
        Self::default()
    }
}

impl Stuck {
    pub(crate) fn describe(
        tried: &'static str,
        device: String,
        waited: Duration,
        snapshot: &Snapshot,
        thread: &CallThread,
    ) -> Self {
        let mut unread = snapshot.unread.clone();
        let stack = thread.stack().unwrap_or_else(|why| {
            unread.push(why);
            Vec::new()
        });
        let (importers, processes) = (snapshot.importers.clone(), Vec::new());
        Self { device, tried, waited, importers, processes, stack, unread }
    }

    /// The same as an error.
    pub fn error(&self) -> Error {
        let why = format!("the kernel has not come back for {} ms", self.waited.as_millis());
        Error::new(Kind::Stuck, self.tried, why).on(&self.device)
    }
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error())
    }
}
