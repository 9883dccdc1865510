//! Copies for clients whose importer cannot take the dma-buf: between a lease and a window that client and broker share.
//!
//! By the owner's engine where it has one, else by this process's CPU. A copy is part of the client's access, which the
//! client answers for: it is made while the lease is draining, and not after its client has said that it is out.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use peervram_backends::host::{Backing, HostMemory};
use peervram_backends::{DmaBuf, DmaRanges, Error, Exporter as _, HostSlice, Kind, Mapping};

use super::inbox::{Inbox, Notice};
use super::message;
use super::remote::RemoteAttachment;
use crate::staged::StageCopy;
use crate::sync::{self, Thread};
use crate::{Direction, Result};

/// How much is copied at a time.
const WINDOW_BYTES: u64 = 1 << 20;
const TRIED: &str = "copy for a client";

/// Host memory that a client and its broker share. A file that keeps its size.
pub(super) struct Window {
    file: DmaBuf,
    mapping: Arc<Mapping>,
}

impl Window {
    /// Of zeros.
    ///
    /// # Errors
    /// No descriptor or memory is free.
    pub fn new() -> Result<Self> {
        let memory = HostMemory::with_backing(WINDOW_BYTES, Backing::Memfd)?;
        let whole = DmaRanges::whole(memory.region())?;
        Ok(Self { file: memory.export(&whole)?, mapping: memory.map(&whole)? })
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        WINDOW_BYTES
    }

    /// The first `length_bytes` of it.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`]: none, or more than there are.
    fn slice(&self, length_bytes: u64) -> Result<HostSlice> {
        HostSlice::new(Arc::clone(&self.mapping), 0, usize::try_from(length_bytes).unwrap_or(usize::MAX))
    }
}

impl AsFd for Window {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A copy that a client asks for.
pub(super) struct Order {
    connection: u64,
    attachment: Arc<RemoteAttachment>,
    way: StageCopy,
    generation: u64,
    offset_bytes: u64,
    slice: HostSlice,
}

impl Order {
    /// Of a lease of `connection`, as its client says.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for both directions, and for what is not in the lease or its window.
    pub fn new(
        connection: u64,
        attachment: &Arc<RemoteAttachment>,
        window: &Window,
        copy: &message::Copy,
    ) -> Result<Self> {
        let way = match copy.direction {
            Direction::Read => StageCopy::Pull,
            Direction::Write => StageCopy::Push,
            Direction::Both => {
                let why = "a copy is out of the lease, or into it";
                return Err(Error::new(Kind::InvalidInput, TRIED, why).next("take read or write"));
            }
        };
        let size_bytes = attachment.size_bytes();
        if copy.offset.checked_add(copy.length).is_none_or(|end| end > size_bytes) {
            let why =
                format!("{} bytes from {} on are not in a lease of {size_bytes}", copy.length, copy.offset);
            return Err(Error::new(Kind::InvalidInput, TRIED, why));
        }
        Ok(Self {
            connection,
            attachment: Arc::clone(attachment),
            way,
            generation: copy.generation,
            offset_bytes: copy.offset,
            slice: window.slice(copy.length)?,
        })
    }
}

/// A thread that copies what it is told to, one after the other. Dropping this ends it, and waits until it has let go of
/// the lease that it works on.
#[derive(Debug)]
pub(super) struct Copier {
    /// None once it is to end.
    orders: Option<Sender<Order>>,
    ended: Receiver<()>,
}

impl Copier {
    /// A thread that tells `inbox` what it did.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(inbox: &Arc<Inbox>) -> Result<Self> {
        let (orders, receiver) = channel::<Order>();
        let (tell, ended) = channel();
        let inbox = Arc::clone(inbox);
        let copy = move || {
            while let Ok(order) = receiver.recv() {
                let Order { connection, attachment, way, generation, offset_bytes, slice } = order;
                let copied = attachment.copy(way, generation, offset_bytes, &slice);
                // Before the client goes on: it may return the lease next.
                drop(attachment);
                inbox.tell(Notice::Copied(connection, copied));
            }
            let _ = tell.send(());
        };
        sync::start(Thread::Copy, copy).map_err(|error| Error::os("start a thread that copies", error))?;
        Ok(Self { orders: Some(orders), ended })
    }

    /// Has a copy made. What comes of it is told as of its connection.
    pub fn copy(&self, order: Order) {
        // The thread listens for as long as this lives.
        if let Some(orders) = &self.orders {
            let _ = orders.send(order);
        }
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        drop(self.orders.take());
        let _ = self.ended.recv();
    }
}
