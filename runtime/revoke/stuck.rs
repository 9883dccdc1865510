//! `Stuck`: a revoking call that does not come back, and what it waits for.
//!
//! The kernel waits for importers without a limit, and not even a kill ends that (seen on Linux 7.3).
//! Which importers those are is noted before the call: the kernel's list cannot be read while it waits
//! for fences, without standing in line behind it.

use std::fmt;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use peervram_backends::holders::{Attachments, Census, Unread};

use super::entry::Entry;
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

/// The thread that makes a call, and what it found out before.
#[derive(Debug, Default)]
pub(crate) struct CallThread {
    id: AtomicI32,
    before: Mutex<Before>,
}

/// What can only be read before the call.
#[derive(Debug, Default)]
struct Before {
    /// Of the device's dma-bufs.
    inodes: Vec<u64>,
    /// None where the kernel did not say, or was not asked.
    attachments: Option<Result<Attachments, Unread>>,
}

impl CallThread {
    /// Notes who is attached. Can wait for revokes of others; while one thread does, no other asks.
    pub fn ask(&self, entries: &[Arc<Entry>]) {
        static IS_ASKING: AtomicBool = AtomicBool::new(false);
        if IS_ASKING.swap(true, Ordering::AcqRel) {
            return;
        }
        let lent = entries.iter().flat_map(|entry| entry.lent());
        let inodes: Vec<u64> = lent.filter_map(|lent| lent.dma_buf()?.inode().ok()).collect();
        let is_empty = inodes.is_empty();
        self.before.lock().inodes = inodes;
        let attachments = if is_empty { Ok(Attachments::default()) } else { Attachments::read() };
        IS_ASKING.store(false, Ordering::Release);
        self.before.lock().attachments = Some(attachments);
    }

    /// Said by the thread itself, before it makes the call.
    pub fn begin(&self) {
        self.id.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
    }

    /// Where in the kernel it is.
    fn stack(&self) -> Result<Vec<String>, String> {
        let thread = self.id.load(Ordering::Acquire);
        let read = |name: &str| fs::read_to_string(format!("/proc/self/task/{thread}/{name}"));
        // Root alone may read it, of a kernel that has it.
        let stack = read("stack").map_err(|error| format!("where in the kernel the call is: {error}"))?;
        Ok(stack.lines().map(|line| line.trim_start_matches("[<0>] ").to_owned()).collect())
    }
}

impl Stuck {
    pub(crate) fn describe(
        tried: &'static str,
        device: String,
        waited: Duration,
        thread: &CallThread,
    ) -> Self {
        let census = Census::take_during_revoke();
        let mut unread: Vec<String> = Vec::new();
        let before = thread.before.lock();
        let attached = match &before.attachments {
            Some(Ok(attachments)) => attachments.to(&before.inodes),
            Some(Err(gap)) => {
                unread.push(gap.to_string());
                Vec::new()
            }
            None => {
                unread.push("the importers: the kernel did not list them in time, before the call".into());
                Vec::new()
            }
        };
        let stack = thread.stack().unwrap_or_else(|why| {
            unread.push(why);
            Vec::new()
        });
        let own = std::process::id();
        let with_descriptor = (census.buffers.iter())
            .filter(|buffer| before.inodes.contains(&buffer.inode))
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
