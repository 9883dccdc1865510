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

use peervram_backends::holders::{Attached, Census, Unread};

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
    /// Which other processes hold those dma-bufs, and which have the nodes of those devices open: one of
    /// them has the import, where it is not a driver's own.
    pub processes: Vec<String>,
    /// Where in the kernel the call is, innermost first.
    pub stack: Vec<String>,
    /// What could not be found out, and why.
    pub unread: Vec<String>,
}

/// What is known before a call.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// Of the device's dma-bufs.
    inodes: Vec<u64>,
    attached: Result<Vec<Attached>, Unread>,
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
        // Root alone may read it, of a kernel that has it.
        let stack = read("stack").map_err(|error| format!("where in the kernel the call is: {error}"))?;
        Ok(stack.lines().map(|line| line.trim_start_matches("[<0>] ").to_owned()).collect())
    }
}

impl Snapshot {
    /// What can only be read before the call.
    pub fn take(entries: &[Arc<Entry>]) -> Self {
        let lent = entries.iter().flat_map(|entry| entry.lent());
        let inodes: Vec<u64> = lent.filter_map(|lent| lent.dma_buf()?.inode().ok()).collect();
        let attached = if inodes.is_empty() { Ok(Vec::new()) } else { Census::attached_to(&inodes) };
        Self { inodes, attached }
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
        let census = Census::take_during_revoke();
        let mut unread: Vec<String> = Vec::new();
        let none = Vec::new();
        let attached = snapshot.attached.as_ref().unwrap_or_else(|gap| {
            unread.push(gap.to_string());
            &none
        });
        let stack = thread.stack().unwrap_or_else(|why| {
            unread.push(why);
            Vec::new()
        });
        let own = std::process::id();
        let with_descriptor = (census.buffers.iter())
            .filter(|buffer| snapshot.inodes.contains(&buffer.inode))
            .flat_map(|buffer| &buffer.holders)
            .filter(|holder| holder.process.pid != own)
            .map(|holder| format!("{} has a descriptor of the memory", holder.process));
        let with_node = attached.iter().flat_map(|attached| {
            let nodes = census.nodes_of(attached);
            nodes.flat_map(|node| {
                node.holders.iter().map(|holder| format!("{} has {} open", holder.process, node.path))
            })
        });
        let mut processes: Vec<String> = with_descriptor.chain(with_node).collect();
        processes.sort();
        processes.dedup();
        let importers = attached.iter().map(ToString::to_string).collect();
        Self { device, tried, waited, importers, processes, stack, unread }
    }

    /// The same as an error.
    pub fn error(&self) -> Error {
        let mut why = format!("the kernel has not come back for {} ms", self.waited.as_millis());
        for (what, list) in [("attached are", &self.importers), ("of the processes,", &self.processes)] {
            if !list.is_empty() {
                why.push_str(&format!("; {what} {}", list.join(", ")));
            }
        }
        Error::new(Kind::Stuck, self.tried, why).on(&self.device).next(
            "end what holds the import, or have it unmap: the call then ends by itself. It cannot be killed, \
             and nothing of this device can be used until then",
        )
    }
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error())?;
        for (what, lines) in [("in the kernel", &self.stack), ("not known", &self.unread)] {
            if !lines.is_empty() {
                write!(f, "\n  {what}: {}", lines.join("\n    "))?;
            }
        }
        Ok(())
    }
}
