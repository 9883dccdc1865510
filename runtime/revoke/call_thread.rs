//! `CallThread`: the thread that makes a revoking call, and what is found out about the call's importers.
//!
//! Who is attached to the memory is noted before the call: while the kernel waits for an importer's fences, reading its
//! list of attachments would wait behind that.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use peervram_backends::holders::{Attachments, Census, Unread};

use super::lending_device::{LendingDevice, names};
use super::stuck::Stuck;

/// The thread that makes a call, and what it found out before.
#[derive(Debug, Default)]
pub(crate) struct CallThread {
    /// Its thread id; 0 before the call.
    id: AtomicI32,
    /// Who is attached to which dma-buf of the machine. None where the kernel did not say, or was not asked.
    before: Mutex<Option<Result<Attachments, Unread>>>,
}

impl CallThread {
    /// Notes who is attached. Can wait for revokes of others; while one thread of the process asks, no other does.
    pub fn ask(&self) {
        static IS_ASKING: AtomicBool = AtomicBool::new(false);
        if IS_ASKING.swap(true, Ordering::AcqRel) {
            return;
        }
        let attachments = Attachments::read();
        IS_ASKING.store(false, Ordering::Release);
        *self.before.lock() = Some(attachments);
    }

    /// Called by the thread itself, before it makes the call.
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

    /// What the call `tried` on `devices` waits for, after `waited`. `importers` are those of this process.
    pub fn describe_stuck(
        &self,
        tried: &'static str,
        devices: &[Arc<LendingDevice>],
        mut importers: Vec<String>,
        waited: Duration,
    ) -> Stuck {
        let census = Census::take_during_revoke();
        let exports: Vec<_> = devices.iter().flat_map(|device| device.exports()).collect();
        let inodes: Vec<u64> = exports.iter().filter_map(|export| export.inode()).collect();
        let mut unread: Vec<String> = Vec::new();
        let attached = match &*self.before.lock() {
            Some(Ok(attachments)) => attachments.to(&inodes),
            Some(Err(gap)) => {
                unread.push(gap.to_string());
                Vec::new()
            }
            None => {
                if exports.iter().any(|export| export.is_handed_out()) {
                    let why =
                        "importers by other means: the kernel did not list them in time, before the call";
                    unread.push(why.into());
                }
                Vec::new()
            }
        };
        let stack = self.stack().unwrap_or_else(|why| {
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
        Stuck { device: names(devices), tried, waited, importers, processes, stack, unread }
    }
}
