//! Lending to other processes.
//!
//! A VFIO device opens once, so whoever owns it is one process. A [`Broker`] in that process lends its memory to others
//! over a Unix socket, to whom a [`Policy`] allows it: programs of other users, without a privilege. [`client`] is the
//! other end. In between is the [Varlink](https://varlink.org) interface `io.peervram.Broker`, which other languages
//! speak with libraries of their own; its file is `runtime/broker/io.peervram.Broker.varlink`.
//!
//! ```
//! use std::sync::Arc;
//! use peervram::backends::{Aperture, DmaRanges, RawBytes, host::HostPool};
//! use peervram::broker::{Broker, Offer, Policy, client};
//! use peervram::Lender;
//!
//! # fn main() -> peervram::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let socket = folder.path().join("socket");
//! let lender = Arc::new(Lender::new(HostPool::new(1 << 30)?));
//! let aperture = Aperture::owned(DmaRanges::whole(lender.device().region(0)?)?, Arc::new(RawBytes));
//!
//! let offer = Offer::new("host", &lender, aperture)?;
//! let broker = Broker::serve(Broker::listen(&socket)?, vec![offer], Policy::owner_only())?;
//!
//! // In another process:
//! let export = client::Broker::connect(&socket)?.borrow(client::Wish::of_size(16 << 20))?;
//! assert_eq!(export.size_bytes(), 16 << 20);
//! # drop(export);
//! # broker.close();
//! # Ok(())
//! # }
//! ```
//!
//! - `message` and `decoder` are the protocol, `socket` carries it. Pure but for the last.
//! - `policy` says who may, `space` which parts are free, `served_memory` is one memory with its device, `books` who has
//!   what. The first two are pure.
//! - `server` is the one thread that has all of it, `connection` a client's socket, `calls` the methods.
//! - `remote` is a lease as a revoke sees it: one more participant of the drain. `lease_words` is what clients see of it
//!   without a message. `inbox` is how other threads tell the server's thread.
//! - `scrub` and `quarantine` have a thread each: nobody reads what another left, and nobody is given what another
//!   still has. So has `copier`, for clients whose importer cannot take the dma-buf.
//!
//! Absent on purpose: taking descriptors from clients, and pulling them out of processes. The broker sends, and nothing
//! else.

mod books;
mod calls;
pub mod client;
mod connection;
mod copier;
#[cfg(all(test, not(feature = "shuttle")))]
mod copying_tests;
mod decoder;
mod inbox;
mod lease_words;
mod message;
mod offer;
mod policy;
mod quarantine;
mod remote;
mod scrub;
mod served_memory;
mod server;
mod socket;
mod space;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
#[cfg(all(test, not(feature = "shuttle")))]
mod unheard_tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use peervram_backends::{Error, Kind, NotClosed};

pub use message::{LeaseState, LeaseStatus, Memory, MemoryState, Quarantined, Range, Status};
pub use offer::Offer;
pub use policy::{Policy, Rule, Who};

use crate::sync::{self, Mutex, Thread};
use crate::{Result, RevokeCause, RevokeOptions};
use books::Books;
use inbox::{Inbox, Notice};
use offer::ServedLender;
use server::Server;

/// What `runtime/fuzz` drives, which is built with `--cfg fuzzing`.
#[cfg(fuzzing)]
pub mod fuzzing {
    use super::decoder::Decoder;
    use super::message::{self, Call, parameters};

    /// Reads a stream of calls in pieces, as a broker does. Returns how many messages came whole.
    pub fn read_calls(stream: &[u8], piece_bytes: usize, limit: usize) -> usize {
        let mut decoder = Decoder::new(limit);
        let mut messages = 0;
        for piece in stream.chunks(piece_bytes.max(1)) {
            decoder.push(piece);
            loop {
                match decoder.next() {
                    Ok(Some(message)) => {
                        assert!(message.bytes.len() <= limit && message.end < decoder.position());
                        messages += 1;
                        read_call(&message.bytes);
                    }
                    Ok(None) => break,
                    Err(_) => return messages,
                }
            }
        }
        messages
    }

    fn read_call(bytes: &[u8]) {
        let Ok(call) = serde_json::from_slice::<Call>(bytes) else { return };
        // What is read is written and read as the same.
        let written = serde_json::to_vec(&call).expect("a call can be written");
        let again: Call = serde_json::from_slice(&written).expect("what was written can be read");
        assert_eq!(format!("{call:?}"), format!("{again:?}"));
        let given = || call.parameters.clone();
        if let Err(refusal) = parameters::<message::Borrow>(given()) {
            refusal.reply();
        }
        drop((parameters::<message::OfLease>(given()), parameters::<message::Importing>(given())));
        drop((parameters::<message::Drained>(given()), parameters::<message::OfMemory>(given())));
        drop(parameters::<message::Nothing>(given()));
    }
}

/// The interface, as its file describes it.
pub const INTERFACE: &str = message::INTERFACE;

/// How long a broker that is dropped waits for its thread.
const PATIENCE: Duration = Duration::from_secs(1);

/// Lends memory to other processes, on threads of its own, until it is closed or dropped: every lease ends then, and
/// clients hear of it. Their dma-bufs stay good until the lender closes the device.
pub struct Broker {
    inbox: Arc<Inbox>,
    /// Each once.
    lenders: Vec<Arc<dyn ServedLender>>,
    ended: Arc<Mutex<Receiver<()>>>,
}

impl Broker {
    /// Serves the clients that connect to `listener`, a Unix stream socket that listens: from [`Broker::listen`], or from
    /// a service manager. It is the broker's from here on, and closed with it, also where this fails.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for two offers of one name or a socket that does not listen; what the lenders say: one is closed,
    /// or being reset; else what the kernel says: no descriptor is free, no thread could be started.
    pub fn serve(listener: OwnedFd, offers: Vec<Offer>, policy: Policy) -> Result<Self> {
        const TRIED: &str = "serve a broker";
        let listens = rustix::net::sockopt::socket_acceptconn(&listener)
            .map_err(|errno| Error::os(TRIED, errno).next("give it a Unix stream socket that listens"))?;
        if !listens {
            let error = Error::new(Kind::InvalidInput, TRIED, "the socket does not listen");
            return Err(error.next("give it what Broker::listen makes"));
        }
        let inbox = Arc::new(Inbox::new()?);
        let lenders: BTreeMap<usize, Arc<dyn ServedLender>> =
            offers.iter().map(|offer| (offer.lender.identity(), Arc::clone(&offer.lender))).collect();
        let books = Books::new(offers, policy, &inbox)?;
        let server = Server::new(listener, books, &inbox)?;
        let (tell, ended) = channel();
        sync::start(Thread::Serve, move || {
            server.run();
            let _ = tell.send(());
        })
        .map_err(|error| Error::os(TRIED, error))?;
        Ok(Self { inbox, lenders: lenders.into_values().collect(), ended: Arc::new(Mutex::new(ended)) })
    }

    /// Makes a socket at `path` that everybody may connect to: the [`Policy`] says what they may do then. A socket that
    /// nobody listens to any more is replaced. The file stays when the broker ends; whoever made it removes it.
    ///
    /// # Errors
    /// [`Kind::Busy`] where a broker listens there; [`Kind::PermissionDenied`] where the folder may not be written to;
    /// [`Kind::NotFound`] where it is not there; [`Kind::InvalidInput`] where something else is in the way, or the path is
    /// longer than 107 bytes (`sockaddr_un`).
    pub fn listen(path: &Path) -> Result<OwnedFd> {
        const TRIED: &str = "listen for clients";
        let failed = |error: std::io::Error| match error.kind() {
            ErrorKind::InvalidInput => Error::new(Kind::InvalidInput, TRIED, error.to_string()),
            _ => Error::os(TRIED, error),
        };
        let failed = |error| failed(error).on(path.display());
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                free_path(path)?;
                UnixListener::bind(path)
            }
            other => other,
        };
        let listener = listener.map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).map_err(failed)?;
        Ok(listener.into())
    }

    /// Ends every lease, and waits until the broker's thread has ended. The lenders are the caller's alone then. Nobody is
    /// asked: what clients have in flight is torn.
    pub fn close(self) {
        end(&self.inbox, &self.ended);
    }

    /// As [`close`](Broker::close), when every client has finished what it has in flight. Blocks for that up to the
    /// timeout of `options`.
    ///
    /// # Errors
    /// As [`Lender::revoke`](crate::Lender::revoke), with the broker given back: somebody is late, or another revoke is under
    /// way, and nothing has ended.
    pub fn close_within(self, options: impl Into<RevokeOptions>) -> Result<(), NotClosed<Self>> {
        let (inbox, ended) = (Arc::clone(&self.inbox), Arc::clone(&self.ended));
        let last = Box::new(move || {
            end(&inbox, &ended);
            Ok(())
        });
        match end_within(&self.lenders, options.into(), last) {
            Ok(()) => Ok(()),
            Err(error) => Err(NotClosed::new(self, error)),
        }
    }
}

/// Has the broker's thread end every lease, and itself.
fn end(inbox: &Inbox, ended: &Mutex<Receiver<()>>) {
    inbox.tell(Notice::Stop);
    let _ = ended.lock().recv();
}

/// Does `last` when nobody uses memory of any of the lenders: inside a revoke of each.
fn end_within(
    lenders: &[Arc<dyn ServedLender>],
    options: RevokeOptions,
    last: Box<dyn FnOnce() -> Result<()> + Send>,
) -> Result<()> {
    let Some((first, rest)) = lenders.split_first() else { return last() };
    let rest = rest.to_vec();
    let call = Box::new(move || end_within(&rest, options, last));
    first.revoke(RevokeCause::ExporterGone, "end a broker", options, call)
}

/// Removes a socket that nobody listens to.
fn free_path(path: &Path) -> Result<()> {
    const TRIED: &str = "listen for clients";
    let is_socket = std::fs::symlink_metadata(path)
        .is_ok_and(|file| std::os::unix::fs::FileTypeExt::is_socket(&file.file_type()));
    if !is_socket {
        let error =
            Error::new(Kind::InvalidInput, TRIED, "something that is no socket is there").on(path.display());
        return Err(error.next("take another path, or remove it"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| Error::os(TRIED, error).on(path.display()))
        }
        _ => Err(Error::new(Kind::Busy, TRIED, "a broker listens there already")
            .on(path.display())
            .next("take another path, or end the other broker; `peervram status` shows what it lends")),
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.inbox.tell(Notice::Stop);
        let _ = self.ended.lock().recv_timeout(PATIENCE);
    }
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broker").finish_non_exhaustive()
    }
}
