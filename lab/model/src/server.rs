//! The server: accepts clients, one after another, reads their messages and answers.
//!
//! Order of calls: [`Server::bind`], [`Server::run`] on a thread of its own, [`Server::stop`] from any
//! other. One thread reads. Whatever is wrong with a message, its bytes are taken off the stream
//! before it is answered, so that the next one is found; only a size smaller than a header ends the
//! connection. A client that goes away, even in mid-message, leaves the server ready for the next.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::Shutdown;

use crate::dispatch::{Backend, Dispatcher};
use crate::peer::Peer;
use crate::protocol::{Kind, MESSAGE_BYTES_MAX, command};
use crate::socket::Reader;

/// Bytes taken off the stream at a time where nobody wants them.
const DRAIN_BYTES: usize = 64 << 10;

/// A device that clients come to and leave.
pub trait Served: Backend {
    /// A client is there.
    fn connected(&self, peer: &Arc<Peer>);
    /// The client has gone; its memory must not be touched any more.
    fn disconnected(&self);
}

/// A listening socket, and the client that is served.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    current: Mutex<Option<OwnedFd>>,
    stopping: AtomicBool,
}

impl Server {
    /// Listens at `path`. A socket that a dead process left there is replaced; a live one is not.
    ///
    /// # Errors
    /// `AddrInUse`, or what the kernel says.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Ok(Server {
            listener: listen(path)?,
            path: path.to_owned(),
            current: Mutex::default(),
            stopping: AtomicBool::new(false),
        })
    }

    /// Serves clients until [`Server::stop`].
    ///
    /// # Errors
    /// What `accept` says; an error of a connection ends only that.
    pub fn run<D: Served>(&self, device: &D) -> io::Result<()> {
        while !self.stopping.load(Ordering::Acquire) {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(_) if self.stopping.load(Ordering::Acquire) => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            *self.current.lock() = Some(stream.as_fd().try_clone_to_owned()?);
            tracing::info!(path = %self.path.display(), "a client has connected");
            match serve(device, &stream) {
                Ok(()) => tracing::info!("the client has gone"),
                Err(errno) => tracing::warn!(%errno, "the connection has ended"),
            }
            *self.current.lock() = None;
        }
        Ok(())
    }

    /// Ends [`Server::run`] and the connection that it serves.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(current) = &*self.current.lock() {
            let _ = rustix::net::shutdown(current, Shutdown::Both);
        }
        // Wakes accept, which fails from now on.
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Listens at `path`, where a dead process may have left a socket.
///
/// # Errors
/// `AddrInUse` if somebody answers there, or what the kernel says.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

/// Serves one client to its end.
///
/// # Errors
/// Why the connection ended, unless the client left between two messages.
pub fn serve<D: Served>(device: &D, stream: &UnixStream) -> Result<(), Errno> {
    let socket = rustix::io::fcntl_dupfd_cloexec(stream, 0)?;
    let peer = Arc::new(Peer::new(socket));
    device.connected(&peer);
    let result = converse(device, stream.as_fd(), &peer);
    peer.close();
    device.disconnected();
    result
}

fn converse<D: Served>(device: &D, stream: BorrowedFd<'_>, peer: &Peer) -> Result<(), Errno> {
    let mut dispatcher = Dispatcher::new(device);
    let mut reader = Reader::new(stream);
    let (mut payload, mut reply) = (Vec::new(), Vec::new());
    while let Some(header) = reader.header()? {
        let Some(payload_bytes) = header.payload_bytes() else {
            peer.send(bytemuck::bytes_of(&header.error_reply(Errno::INVAL)), None)?;
            return Err(Errno::PROTO);
        };
        let mut fds = Vec::new();
        let refused = if header.size_bytes > MESSAGE_BYTES_MAX {
            payload.resize(DRAIN_BYTES, 0);
            reader.skip(payload_bytes, &mut payload)?;
            Some(Errno::TOOBIG)
        } else {
            payload.resize(payload_bytes, 0);
            let descriptors = reader.payload(&mut payload)?;
            fds = descriptors.fds;
            match header.kind() {
                Kind::Reply => {
                    peer.deliver(&header, &payload);
                    continue;
                }
                Kind::Unknown => Some(Errno::INVAL),
                Kind::Command if descriptors.truncated => Some(Errno::MFILE),
                Kind::Command => None,
            }
        };
        let fd = match refused {
            Some(errno) => {
                reply.clear();
                reply.extend_from_slice(bytemuck::bytes_of(&header.error_reply(errno)));
                None
            }
            None => dispatcher.handle(&header, &payload, fds, &mut reply),
        };
        if !header.is_no_reply() {
            peer.send(&reply, fd)?;
        }
        if header.command == command::VERSION
            && let Some(bytes) = dispatcher.agreed_data_bytes()
        {
            peer.limit_data(bytes);
        }
        device.after_reply();
    }
    Ok(())
}
