//! `Connection`: one client's socket, with what came and what is to go. Nothing here blocks.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use peervram_backends::Peer;
use rustix::io::Errno;

use super::copier::Window;
use super::decoder::{Decoder, MAX_CALL_BYTES};
use super::message::{Call, Reply};
use super::socket;

/// What waits to be sent at most, in bytes: who does not read is given up.
const MAX_UNSENT_BYTES: usize = 1 << 20;

/// Why a connection is given up.
#[derive(Debug)]
pub(super) enum Lost {
    /// The client closed it.
    Closed,
    /// The client broke a rule, or the kernel says something: in words.
    Broken(String),
}

/// A client's connection.
pub(super) struct Connection {
    socket: OwnedFd,
    pub peer: Arc<Peer>,
    decoder: Decoder,
    unsent: VecDeque<Unsent>,
    unsent_bytes: usize,
    /// The leases that end with it.
    pub leases: BTreeSet<u64>,
    pub business: Business,
    /// What is copied to and from for its client.
    pub window: Option<Arc<Window>>,
    /// What it is waited for, as [`wanted`](Connection::wanted) said last.
    pub waited_for: (bool, bool),
    has_ended: bool,
}

/// What a connection is busy with. While it is, nothing more is read from it.
#[derive(Debug)]
pub(super) enum Business {
    /// Calls are read and answered.
    Calls,
    /// A call is answered later.
    Waits(Box<Call>),
    /// Events are sent, until it is closed.
    Watches(Watched),
}

/// Whose leases a connection listens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Watched {
    /// Of a user's process.
    Process(u32, u32),
    /// Of the connection that borrowed them.
    Connection(u64),
}

/// A message, or the rest of one.
struct Unsent {
    bytes: Vec<u8>,
    sent: usize,
    descriptor: Option<OwnedFd>,
}

impl Connection {
    /// Of `peer`.
    pub fn new(socket: OwnedFd, peer: Peer) -> Self {
        Self {
            socket,
            peer: Arc::new(peer),
            decoder: Decoder::new(MAX_CALL_BYTES),
            unsent: VecDeque::new(),
            unsent_bytes: 0,
            leases: BTreeSet::new(),
            business: Business::Calls,
            window: None,
            waited_for: (true, false),
            has_ended: false,
        }
    }

    /// Whether calls are read from it.
    pub fn reads(&self) -> bool {
        matches!(self.business, Business::Calls) && !self.has_ended
    }

    /// Whether it is waited for until something comes, and until something can be sent.
    pub fn wanted(&self) -> (bool, bool) {
        (self.reads(), !self.unsent.is_empty())
    }

    /// Receives once what is there.
    ///
    /// # Errors
    /// The connection is over, or to be.
    pub fn receive(&mut self, buffer: &mut [u8]) -> Result<(), Lost> {
        let received = match socket::receive(&self.socket, buffer, false) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(errno) => return Err(Lost::Broken(format!("it cannot be read: {errno}"))),
        };
        if received.has_more_descriptors {
            return Err(Lost::Broken("a descriptor came, and this interface takes none".into()));
        }
        if received.bytes == 0 {
            self.has_ended = true;
        }
        self.decoder.push(&buffer[..received.bytes]);
        Ok(())
    }

    /// The next call, where it is read now and has come whole.
    ///
    /// # Errors
    /// What came is no call, or the client has closed the connection and everything is read.
    pub fn next_call(&mut self) -> Result<Option<Call>, Lost> {
        if !matches!(self.business, Business::Calls) {
            return Ok(None);
        }
        let message = self
            .decoder
            .next()
            .map_err(|too_long| Lost::Broken(format!("a call is longer than {} bytes", too_long.limit)))?;
        match message {
            // A depth of more than 128 is an error, too.
            Some(message) => serde_json::from_slice(&message.bytes)
                .map(Some)
                .map_err(|error| Lost::Broken(format!("what came is no call: {error}"))),
            None if self.has_ended && self.decoder.is_inside() => {
                Err(Lost::Broken("it ended in the middle of a call".into()))
            }
            None if self.has_ended => Err(Lost::Closed),
            None => Ok(None),
        }
    }

    /// Sends `reply`, now or when there is room, with a copy of `descriptor`.
    ///
    /// # Errors
    /// The client is gone, or does not read.
    pub fn send(&mut self, reply: &Reply, descriptor: Option<BorrowedFd<'_>>) -> Result<(), Lost> {
        let mut bytes = serde_json::to_vec(reply)
            .map_err(|error| Lost::Broken(format!("a reply cannot be written: {error}")))?;
        bytes.push(0);
        let mut sent = 0;
        if self.unsent.is_empty() {
            sent = sent_now(&self.socket, &bytes, descriptor)?;
        }
        if sent == bytes.len() {
            return Ok(());
        }
        self.unsent_bytes += bytes.len() - sent;
        if self.unsent_bytes > MAX_UNSENT_BYTES {
            return Err(Lost::Broken(format!("it does not read: {} bytes wait", self.unsent_bytes)));
        }
        let descriptor = match descriptor {
            Some(descriptor) if sent == 0 => Some(
                descriptor
                    .try_clone_to_owned()
                    .map_err(|error| Lost::Broken(format!("a descriptor cannot be kept for it: {error}")))?,
            ),
            _ => None,
        };
        self.unsent.push_back(Unsent { bytes, sent, descriptor });
        Ok(())
    }

    /// Sends what waits, as far as there is room.
    ///
    /// # Errors
    /// The client is gone.
    pub fn send_rest(&mut self) -> Result<(), Lost> {
        while let Some(first) = self.unsent.front_mut() {
            let descriptor = first.descriptor.as_ref().map(AsFd::as_fd);
            let sent = sent_now(&self.socket, &first.bytes[first.sent..], descriptor)?;
            if sent == 0 {
                return Ok(());
            }
            first.descriptor = None;
            first.sent += sent;
            self.unsent_bytes -= sent;
            if first.sent == first.bytes.len() {
                self.unsent.pop_front();
            }
        }
        Ok(())
    }
}

/// Sends as much as there is room for; none where there is no room.
fn sent_now(socket: &OwnedFd, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<usize, Lost> {
    match socket::send(socket, bytes, descriptor) {
        Ok(sent) => Ok(sent),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(Errno::PIPE | Errno::CONNRESET) => Err(Lost::Closed),
        // Too many descriptors wait in messages of this user (unix(7)): the client's own doing, mostly.
        Err(errno) => Err(Lost::Broken(format!("it cannot be written to: {errno}"))),
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
