//! `Calls`: calls to a broker, one after the other.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use peervram_backends::{DmaBuf, Error, Kind, Mapping, SharedWordsView};
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::super::decoder::{Decoder, MAX_REPLY_BYTES};
use super::super::message::{Call, FAILED, Failed, NAME, Nothing, Reply, Windowed, Words};
use super::super::socket;
use super::gone;
use crate::Result;
use crate::sync::Mutex;

/// What is received at a time.
const RECEIVE_BYTES: usize = 16 << 10;

/// Calls to a broker, over a connection that leases end with.
#[derive(Debug)]
pub(super) struct Calls {
    channel: Mutex<Channel>,
    words: OnceLock<Arc<SharedWordsView>>,
    window: OnceLock<Mutex<Mapping>>,
}

/// How often a call is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Once,
    /// Again and again.
    More,
    Oneway,
}

/// A connection, one message at a time.
#[derive(Debug)]
pub(super) struct Channel {
    socket: UnixStream,
    decoder: Decoder,
    /// A descriptor that came, and where in the stream what it came with ends.
    descriptor: Option<(u64, OwnedFd)>,
    buffer: Box<[u8]>,
    /// A reply was not understood, or not read: what comes next belongs to nothing.
    is_broken: bool,
}

impl Calls {
    /// Connects to the broker at `path`.
    ///
    /// # Errors
    /// Why not.
    pub fn connect(path: &Path) -> Result<Self> {
        Ok(Self {
            channel: Mutex::new(Channel::connect(path)?),
            words: OnceLock::new(),
            window: OnceLock::new(),
        })
    }

    /// What the broker says of leases without a message. It is asked for once, when there is a lease.
    ///
    /// # Errors
    /// What the broker says; [`Kind::Unsupported`] where it sends something else.
    pub fn words(&self) -> Result<Arc<SharedWordsView>> {
        const TRIED: &str = "see where leases are";
        if let Some(words) = self.words.get() {
            return Ok(Arc::clone(words));
        }
        let (Words { words: index }, descriptor) = self.call_for_descriptor("Words", &Nothing {}, TRIED)?;
        let descriptor = descriptor
            .filter(|_| index == 0)
            .ok_or_else(|| not_a_broker(TRIED, "no descriptor came with the words"))?;
        let words = Arc::new(SharedWordsView::open(descriptor)?);
        Ok(Arc::clone(self.words.get_or_init(|| words)))
    }

    /// Host memory that the broker copies to and from. It is asked for once, when there is a lease.
    ///
    /// # Errors
    /// What the broker says; [`Kind::Unsupported`] where it sends something else.
    pub fn window(&self) -> Result<&Mutex<Mapping>> {
        const TRIED: &str = "share memory with a broker";
        if let Some(window) = self.window.get() {
            return Ok(window);
        }
        let (Windowed { window: index, size }, descriptor) =
            self.call_for_descriptor("Window", &Nothing {}, TRIED)?;
        let descriptor = descriptor
            .filter(|_| index == 0)
            .ok_or_else(|| not_a_broker(TRIED, "no descriptor came with the window"))?;
        let buffer = DmaBuf::from_fd(descriptor)?;
        let keeps_size = fcntl_get_seals(&buffer).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if size == 0 || buffer.size_bytes() != size || !keeps_size {
            return Err(not_a_broker(
                TRIED,
                "the window is no memfd of its size that keeps it (F_SEAL_SHRINK)",
            ));
        }
        let window = Mapping::new(Arc::new(buffer.duplicate()?), &[(0, size)])?;
        Ok(self.window.get_or_init(|| Mutex::new(window)))
    }

    /// Calls a method and waits for its reply.
    ///
    /// # Errors
    /// What the broker says; [`Kind::Gone`] where it has ended.
    pub fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        parameters: &impl Serialize,
        tried: &'static str,
    ) -> Result<T> {
        self.call_for_descriptor(method, parameters, tried).map(|(reply, _)| reply)
    }

    /// Calls a method that is not answered.
    ///
    /// # Errors
    /// [`Kind::Gone`] where the broker has ended.
    pub fn tell(&self, method: &str, parameters: &impl Serialize, tried: &'static str) -> Result<()> {
        self.channel.lock().send(method, parameters, Mode::Oneway, tried)
    }

    /// As [`call`](Calls::call); with the descriptor that came with the reply.
    pub fn call_for_descriptor<T: DeserializeOwned>(
        &self,
        method: &str,
        parameters: &impl Serialize,
        tried: &'static str,
    ) -> Result<(T, Option<OwnedFd>)> {
        let mut channel = self.channel.lock();
        channel.send(method, parameters, Mode::Once, tried)?;
        channel.receive(tried)
    }
}

impl Channel {
    /// Connects to the broker at `path`.
    ///
    /// # Errors
    /// Why not.
    pub fn connect(path: &Path) -> Result<Self> {
        const TRIED: &str = "connect to a broker";
        let socket = UnixStream::connect(path).map_err(|error| {
            let next = "start one with `peervram serve`, or name the socket of another";
            match error.kind() {
                ErrorKind::ConnectionRefused => {
                    Error::new(Kind::Gone, TRIED, "nobody listens there any more")
                        .on(path.display())
                        .next(next)
                }
                _ => Error::os(TRIED, error).on(path.display()).next(next),
            }
        })?;
        Ok(Self {
            socket,
            decoder: Decoder::new(MAX_REPLY_BYTES),
            descriptor: None,
            buffer: vec![0; RECEIVE_BYTES].into(),
            is_broken: false,
        })
    }

    /// The socket, to be shut down by another thread.
    pub fn try_clone(&self, tried: &'static str) -> Result<UnixStream> {
        self.socket.try_clone().map_err(|error| Error::os(tried, error))
    }

    /// Sends a call.
    ///
    /// # Errors
    /// [`Kind::Gone`].
    pub fn send(
        &mut self,
        method: &str,
        parameters: &impl Serialize,
        mode: Mode,
        tried: &'static str,
    ) -> Result<()> {
        if self.is_broken {
            return Err(gone(tried));
        }
        let not_written = |error: serde_json::Error| Error::new(Kind::InvalidInput, tried, error.to_string());
        let parameters = serde_json::to_value(parameters).map_err(not_written)?;
        let (more, oneway) = (mode == Mode::More, mode == Mode::Oneway);
        let call = Call { method: format!("{NAME}.{method}"), parameters, more, oneway, upgrade: false };
        let mut bytes = serde_json::to_vec(&call).map_err(not_written)?;
        bytes.push(0);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match socket::send(&self.socket, rest, None) {
                Ok(sent) => rest = &rest[sent..],
                Err(Errno::INTR) => {}
                Err(_) => {
                    self.is_broken = true;
                    return Err(gone(tried));
                }
            }
        }
        Ok(())
    }

    /// The next reply, with the descriptor that came with it. Waits for it.
    ///
    /// # Errors
    /// What the broker says; [`Kind::Gone`] where it has ended; [`Kind::Unsupported`] where what comes is no reply.
    pub fn receive<T: DeserializeOwned>(&mut self, tried: &'static str) -> Result<(T, Option<OwnedFd>)> {
        let received = self.try_receive(tried);
        // An error of the broker's is a reply like any other.
        let reply = received.inspect_err(|_| self.is_broken = true)?;
        let (reply, descriptor) = reply;
        match reply.error {
            None => Ok((self.understood(serde_json::from_value(reply.parameters), tried)?, descriptor)),
            Some(name) if name == FAILED => {
                let failed: Failed = self.understood(serde_json::from_value(reply.parameters), tried)?;
                Err(failed.into_error(tried))
            }
            Some(name) => {
                let why = format!("the broker answers {name} {}", reply.parameters);
                Err(Error::new(Kind::Unsupported, tried, why)
                    .next("it may be older or newer than this program"))
            }
        }
    }

    fn understood<T>(&mut self, parsed: serde_json::Result<T>, tried: &'static str) -> Result<T> {
        parsed.map_err(|error| {
            self.is_broken = true;
            not_a_broker(tried, &error.to_string())
        })
    }

    fn try_receive(&mut self, tried: &'static str) -> Result<(Reply, Option<OwnedFd>)> {
        if self.is_broken {
            return Err(gone(tried));
        }
        loop {
            let message = self.decoder.next().map_err(|too_long| {
                not_a_broker(tried, &format!("a reply is longer than {} bytes", too_long.limit))
            })?;
            if let Some(message) = message {
                let reply = serde_json::from_slice(&message.bytes)
                    .map_err(|error| not_a_broker(tried, &error.to_string()))?;
                let is_of_it = |(last, _): &mut (u64, OwnedFd)| *last <= message.end;
                return Ok((reply, self.descriptor.take_if(is_of_it).map(|(_, descriptor)| descriptor)));
            }
            match socket::receive(self.socket.as_fd(), &mut self.buffer, true) {
                Ok(received) if received.bytes == 0 => return Err(gone(tried)),
                Ok(received) => {
                    self.decoder.push(&self.buffer[..received.bytes]);
                    if received.has_more_descriptors
                        || (received.descriptor.is_some() && self.descriptor.is_some())
                    {
                        return Err(not_a_broker(tried, "more than one descriptor came with a message"));
                    }
                    if let Some(descriptor) = received.descriptor {
                        self.descriptor = Some((self.decoder.position() - 1, descriptor));
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(gone(tried)),
                Err(errno) => return Err(Error::os(tried, errno)),
            }
        }
    }
}

fn not_a_broker(tried: &'static str, why: &str) -> Error {
    Error::new(Kind::Unsupported, tried, format!("what answers does not speak {NAME}: {why}"))
        .next("connect to the socket of `peervram serve`")
}
