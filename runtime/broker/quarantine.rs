//! Quarantine: memory of a lease that ended is nobody's before the kernel has freed its dma-buf.
//!
//! The end of a process proves nothing: its descriptor may be in another process, behind a GEM handle, or in a message
//! that nobody has received. What proves it is the kernel's own list of dma-bufs (`bufinfo` in debugfs, which root
//! reads): whatever holds a dma-buf keeps it there (`drivers/dma-buf/dma-buf.c`, `dma_buf_release` takes it out). The
//! descriptors of all processes are no proof where that list cannot be read: messages and handles are in none of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use peervram_backends::holders::Attachments;
use peervram_backends::{Error, deadline_after};

use super::inbox::{Inbox, Notice};
use crate::Result;
use crate::sync::{self, Thread};

/// Between two looks at the kernel's list: soon after a lease ended, and then ever less often.
const SOON: Duration = Duration::from_millis(1);
const SELDOM: Duration = Duration::from_secs(1);

/// A thread that waits for dma-bufs to be freed. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Prover(Sender<Order>);

#[derive(Debug)]
enum Order {
    /// Tell when the dma-buf of that inode is freed, which was that lease's.
    Watch { lease: u64, inode: u64 },
    /// Nobody wants to know any more.
    Forget { lease: u64 },
}

impl Prover {
    /// A thread that tells `inbox` what is freed.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(inbox: &Arc<Inbox>) -> Result<Self> {
        let (sender, receiver) = channel();
        let inbox = Arc::clone(inbox);
        sync::start(Thread::Prove, move || run(&receiver, &inbox))
            .map_err(|error| Error::os("start a thread that looks at dma-bufs", error))?;
        Ok(Self(sender))
    }

    /// Tells when the dma-buf of `inode` is freed, which was that lease's.
    pub fn watch(&self, lease: u64, inode: u64) {
        let _ = self.0.send(Order::Watch { lease, inode });
    }

    /// Nobody wants to know of that lease any more.
    pub fn forget(&self, lease: u64) {
        let _ = self.0.send(Order::Forget { lease });
    }
}

/// A dma-buf that is waited for.
struct Watched {
    inode: u64,
    next_look: Instant,
    interval: Duration,
    /// Why it could not be looked for, told once.
    unread: Option<String>,
}

fn run(receiver: &Receiver<Order>, inbox: &Inbox) {
    let mut watched: BTreeMap<u64, Watched> = BTreeMap::new();
    loop {
        let next = watched.values().map(|one| one.next_look).min();
        let order = match next {
            None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(at) => receiver.recv_timeout(at.saturating_duration_since(Instant::now())),
        };
        match order {
            Ok(Order::Watch { lease, inode }) => {
                let next_look = Instant::now() + SOON;
                watched.insert(lease, Watched { inode, next_look, interval: SOON, unread: None });
            }
            Ok(Order::Forget { lease }) => {
                watched.remove(&lease);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        look(&mut watched, inbox);
    }
}

/// Looks for those whose time has come. One reading serves all.
fn look(watched: &mut BTreeMap<u64, Watched>, inbox: &Inbox) {
    let now = Instant::now();
    if watched.values().all(|one| one.next_look > now) {
        return;
    }
    let listed = Attachments::read();
    watched.retain(|lease, one| {
        if one.next_look > now {
            return true;
        }
        one.interval = (one.interval * 2).min(SELDOM);
        one.next_look = deadline_after(one.interval);
        match &listed {
            Ok(listed) if !listed.has_buffer(one.inode) => {
                inbox.tell(Notice::Freed(*lease));
                return false;
            }
            Ok(_) => one.unread = None,
            Err(unread) => {
                let why = unread.to_string();
                if one.unread.as_ref() != Some(&why) {
                    inbox.tell(Notice::Unproven(*lease, why.clone()));
                    one.unread = Some(why);
                }
            }
        }
        true
    });
}
