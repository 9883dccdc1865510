//! The client, as the device reaches it: replies, and the messages by which an engine reads and
//! writes memory that came without a file.
//!
//! One message is outstanding at a time, of at most 64 KiB, and an answer is waited for no longer
//! than [`ANSWER_TIMEOUT`]. Whoever waits must not be the thread that reads messages: that one calls
//! [`Peer::deliver`]. After [`Peer::close`] nobody waits any more.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use crate::dma_message::{CHUNK_BYTES_MAX, FRAME_BYTES, decode_read_reply, encode_read, encode_write};
use crate::protocol::Header;
use crate::socket;

/// How long the client may take to answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Our ids have this bit, so that a reader of a trace can tell them from the client's.
const OUR_IDS: u16 = 0x8000;

#[derive(Debug, Default)]
enum Exchange {
    #[default]
    Idle,
    Waiting {
        id: u16,
    },
    Answered(Result<Vec<u8>, Errno>),
    Closed,
}

/// Held by whoever has a message outstanding.
#[derive(Debug)]
struct Turn {
    id: u16,
    chunk_bytes: usize,
}

/// One connected client.
#[derive(Debug)]
pub struct Peer {
    socket: OwnedFd,
    writer: Mutex<()>,
    turn: Mutex<Turn>,
    exchange: Mutex<Exchange>,
    answered: Condvar,
}

impl Peer {
    /// A client at the other end of `socket`, for which it owns a descriptor of its own.
    pub fn new(socket: OwnedFd) -> Self {
        Peer {
            socket,
            writer: Mutex::new(()),
            turn: Mutex::new(Turn { id: 0, chunk_bytes: CHUNK_BYTES_MAX }),
            exchange: Mutex::default(),
            answered: Condvar::new(),
        }
    }

    /// The client takes no more than this in one message.
    pub fn limit_data(&self, bytes: usize) {
        self.turn.lock().chunk_bytes = bytes.clamp(1, CHUNK_BYTES_MAX);
    }

    /// Sends a message, whole.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn send(&self, message: &[u8], fd: Option<std::os::fd::BorrowedFd<'_>>) -> Result<(), Errno> {
        let _writer = self.writer.lock();
        socket::send(self.socket.as_fd(), message, fd)
    }

    /// A reply came in. Replies that nobody waits for are dropped: a late one, or nonsense.
    pub fn deliver(&self, header: &Header, payload: &[u8]) {
        let mut exchange = self.exchange.lock();
        match *exchange {
            Exchange::Waiting { id } if id == header.id => {
                let answer = match header.errno() {
                    Some(errno) => Err(errno),
                    None if payload.len() > FRAME_BYTES + CHUNK_BYTES_MAX => Err(Errno::PROTO),
                    None => Ok(payload.to_vec()),
                };
                *exchange = Exchange::Answered(answer);
                self.answered.notify_all();
            }
            _ => tracing::warn!(id = header.id, "a reply that nobody waits for was dropped"),
        }
    }

    /// The client is gone.
    pub fn close(&self) {
        *self.exchange.lock() = Exchange::Closed;
        self.answered.notify_all();
    }

    /// Reads memory of the client.
    ///
    /// # Errors
    /// The client's errno, `ETIMEDOUT`, `ENOTCONN`, or `EPROTO` for an answer that is none.
    pub fn read(&self, mut address: u64, mut buffer: &mut [u8]) -> Result<(), Errno> {
        let turn = &mut *self.turn.lock();
        while !buffer.is_empty() {
            let count = buffer.len().min(turn.chunk_bytes);
            let payload = self.ask(turn, |id| encode_read(id, address, count))?;
            let data = decode_read_reply(&payload, count).ok_or(Errno::PROTO)?;
            buffer[..count].copy_from_slice(data);
            buffer = &mut buffer[count..];
            address = address.wrapping_add(count as u64);
        }
        Ok(())
    }

    /// Writes memory of the client.
    ///
    /// # Errors
    /// The errors of [`Peer::read`].
    pub fn write(&self, mut address: u64, mut data: &[u8]) -> Result<(), Errno> {
        let turn = &mut *self.turn.lock();
        while !data.is_empty() {
            let count = data.len().min(turn.chunk_bytes);
            self.ask(turn, |id| encode_write(id, address, &data[..count]))?;
            data = &data[count..];
            address = address.wrapping_add(count as u64);
        }
        Ok(())
    }

    fn ask(&self, turn: &mut Turn, encode: impl FnOnce(u16) -> Vec<u8>) -> Result<Vec<u8>, Errno> {
        turn.id = turn.id.wrapping_add(1);
        let id = turn.id | OUR_IDS;
        {
            let mut exchange = self.exchange.lock();
            if let Exchange::Closed = *exchange {
                return Err(Errno::NOTCONN);
            }
            *exchange = Exchange::Waiting { id };
        }
        self.send(&encode(id), None)?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut exchange = self.exchange.lock();
        while let Exchange::Waiting { .. } = *exchange {
            if self.answered.wait_until(&mut exchange, deadline).timed_out() {
                break;
            }
        }
        match std::mem::take(&mut *exchange) {
            Exchange::Answered(answer) => answer,
            Exchange::Closed => {
                *exchange = Exchange::Closed;
                Err(Errno::NOTCONN)
            }
            Exchange::Waiting { .. } | Exchange::Idle => Err(Errno::TIMEDOUT),
        }
    }
}
