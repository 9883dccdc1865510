//! `Inbox`: what other threads tell the broker's thread.
//!
//! Told under the revoker's lock, too, so that clients hear in the order of its decisions: telling does not block.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use peervram_backends::Error;
use rustix::event::{EventfdFlags, eventfd};

use super::space::Piece;
use crate::revoke::target::Drain;
use crate::sync::Mutex;
use crate::{Result, RevokeCause};

/// Something that another thread tells.
#[derive(Debug)]
pub(super) enum Notice {
    /// Of a lease.
    Lease(u64, LeaseNotice),
    /// A memory was taken back or given back, or is about to be; with its generation from then on.
    Memory(usize, MemoryNotice, u64),
    /// The kernel has freed the dma-buf of a lease that ended.
    Freed(u64),
    /// Whether it has cannot be known.
    Unproven(u64, String),
    /// A piece of a memory is scrubbed, or why not.
    Scrubbed(usize, Piece, Result<()>),
    /// What an operator asked for on a connection is done; with the generation of the memory.
    Operated(u64, Result<u64>),
    /// A copy that a client asked for on a connection is made, or why not.
    Copied(u64, Result<()>),
    /// The broker ends.
    Stop,
}

/// What a client is told of its lease.
#[derive(Debug, Clone, Copy)]
pub(super) enum LeaseNotice {
    Draining { drain: Drain, generation: u64 },
    CalledOff { generation: u64 },
    Revoked { generation: u64, cause: RevokeCause },
    Restored { generation: u64 },
    Gone { generation: u64 },
}

/// What became of a memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MemoryNotice {
    Draining,
    CalledOff,
    Away,
    Restored,
    Gone,
}

/// What was told and not taken yet.
#[derive(Debug)]
pub(super) struct Inbox {
    notices: Mutex<VecDeque<Notice>>,
    /// Readable while there are notices.
    wake: OwnedFd,
}

impl Inbox {
    /// An empty one.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn new() -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|errno| Error::os("make an eventfd", errno))?;
        Ok(Self { notices: Mutex::default(), wake })
    }

    /// Tells the broker's thread.
    pub fn tell(&self, notice: Notice) {
        let mut notices = self.notices.lock();
        notices.push_back(notice);
        if notices.len() == 1 {
            // It fails only where the counter is full, and then it is readable as it should be.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }

    /// Takes everything that was told, in order.
    pub fn take(&self) -> VecDeque<Notice> {
        let mut notices = self.notices.lock();
        // Under the lock: what is told after this is signalled anew.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut *notices)
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
