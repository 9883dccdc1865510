//! `Pinned`: what is measured stays on one CPU.
//!
//! A crossing waits for the importing device. Whoever happens to run on the CPU that takes its
//! interrupts is woken sooner, and keeps that advantage for as long as the machine is up. A revoke hands
//! its call to another thread: in a virtual machine, waking a CPU that sleeps for that takes as long as
//! the host likes.

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// This thread, and threads and programs that it starts, on one CPU until dropped.
pub struct Pinned {
    before: CpuSet,
}

impl Pinned {
    /// On the CPU that it is on now.
    pub fn to_this_cpu() -> Result<Pinned> {
        let before = sched_getaffinity(None).context("asking which CPUs this thread may use")?;
        let mut this = CpuSet::new();
        this.set(sched_getcpu());
        sched_setaffinity(None, &this).context("staying on one CPU")?;
        Ok(Pinned { before })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Where that fails, what is measured next runs on one CPU too.
        sched_setaffinity(None, &self.before).ok();
    }
}
