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

use super::entry::{Entry, names};
use crate::export::Lent;
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
    /// Who had its memory imported before the call: importers of this process, and devices attached to
    /// dma-bufs that were handed out.
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
    /// Who is attached to which dma-buf of the machine. None where the kernel did not say, or was not asked.
    before: Mutex<Option<Result<Attachments, Unread>>>,
}

impl CallThread {
    /// Notes who is attached. Can wait for revokes of others; while one thread does, no other asks.
    pub fn ask(&self) {
        static IS_ASKING: AtomicBool = AtomicBool::new(false);
        if IS_ASKING.swap(true, Ordering::AcqRel) {
            return;
        }
        let attachments = Attachments::read();
        IS_ASKING.store(false, Ordering::Release);
        *self.before.lock() = Some(attachments);
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
    /// `importers` are those that this process has made itself.
    pub(crate) fn describe(
        tried: &'static str,
        entries: &[Arc<Entry>],
        mut importers: Vec<String>,
        waited: Duration,
        thread: &CallThread,
    ) -> Self {
        let census = Census::take_during_revoke();
        let lent: Vec<Arc<Lent>> = entries.iter().flat_map(|entry| entry.lent()).collect();
        let inodes: Vec<u64> = lent.iter().filter_map(|lent| lent.inode()).collect();
        let mut unread: Vec<String> = Vec::new();
        let attached = match &*thread.before.lock() {
            Some(Ok(attachments)) => attachments.to(&inodes),
            Some(Err(gap)) => {
                unread.push(gap.to_string());
                Vec::new()
            }
            None => {
                if lent.iter().any(|lent| lent.is_handed_out()) {
                    let why =
                        "importers by other means: the kernel did not list them in time, before the call";
                    unread.push(why.into());
                }
                Vec::new()
            }
        };
        let stack = thread.stack().unwrap_or_else(|why| {
            unread.push(why);
            Vec::new()
        });
        let own = std::process::id();
        let with_descriptor = (census.buffers.iter())
            .filter(|buffer| inodes.contains(&buffer.inode))
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
        importers.extend(attached.iter().map(ToString::to_string));
        importers.sort();
        importers.dedup();
        Self { device: names(entries), tried, waited, importers, processes, stack, unread }
    }

    /// The same as an error.
    pub fn error(&self) -> Error {
        let mut why = format!("the kernel has not come back for {} ms", self.waited.as_millis());
        for (what, list) in [("it is imported by", &self.importers), ("of the processes,", &self.processes)] {
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
