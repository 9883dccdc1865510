//! What the methods of `io.peervram.Broker` do.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use peervram_backends::{Error, Kind};
use serde::Serialize;
use serde_json::{Value, json};

use super::books::WORDS_BYTES_MAX;
use super::connection::{Business, Lost};
use super::copier::{Order, Window};
use super::inbox::Notice;
use super::message::{self, Call, FAILED, INTERFACE, NAME, Nothing, Refusal, Reply, SERVICE, parameters};
use super::served_memory::NotBorrowed;
use super::server::Server;
use crate::sync::{self, Thread};
use crate::{Result, RevokeCause, RevokeOptions};

/// How long clients may take to answer where an operator does not say.
const OPERATOR_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest that an operator may say.
const OPERATOR_TIMEOUT_MAX: Duration = Duration::from_secs(600);

/// The descriptor that goes with a reply.
#[derive(Clone, Copy)]
enum Attached {
    /// The dma-buf of that lease.
    DmaBuf(u64),
    /// What clients see of their leases without a message.
    Words,
    /// What is copied to and from for the client.
    Window,
}

/// Why a call has no reply of its own.
enum NotAnswered {
    /// It is not served at all.
    Refused(Refusal),
    /// It failed.
    Failed(Error),
    /// It is answered later.
    Later,
}

impl From<Refusal> for NotAnswered {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Error> for NotAnswered {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Server {
    /// Answers a call, now or later.
    pub fn answer(&mut self, id: u64, call: Call) -> Result<(), Lost> {
        let answered = self.try_answer(id, &call);
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let (reply, attached) = match answered {
            Ok((parameters, attached)) => (Reply { parameters, ..Reply::default() }, attached),
            Err(NotAnswered::Refused(refusal)) => (refusal.reply(), None),
            Err(NotAnswered::Failed(error)) => {
                tracing::info!(connection = id, peer = %connection.peer, method = call.method, %error, "a call failed");
                (failed(&error), None)
            }
            Err(NotAnswered::Later) => {
                if !matches!(connection.business, Business::Watches(_)) {
                    connection.business = Business::Waits(Box::new(call));
                }
                return Ok(());
            }
        };
        if call.oneway {
            // Nobody is told of a lease that nobody is sent: it would be lent to nobody.
            if let Some(Attached::DmaBuf(lease)) = attached {
                self.forget_lease(lease, "it was borrowed without asking for a reply");
            }
            return Ok(());
        }
        let (words, window) = (Arc::clone(self.books.words()), connection.window.clone());
        let descriptor = match attached {
            Some(Attached::DmaBuf(lease)) => {
                let record = self.books.lease(lease);
                record.and_then(|record| record.export.dma_buf().ok()).map(AsFd::as_fd)
            }
            Some(Attached::Words) => Some(words.as_fd()),
            Some(Attached::Window) => window.as_ref().map(|window| window.as_fd()),
            None => None,
        };
        connection.send(&reply, descriptor)
    }

    /// The parameters of the reply, and what goes with them.
    fn try_answer(&mut self, id: u64, call: &Call) -> Result<(Value, Option<Attached>), NotAnswered> {
        let Some((interface, method)) = call.method.rsplit_once('.') else {
            return Err(Refusal::InterfaceNotFound(call.method.clone()).into());
        };
        if call.upgrade {
            return Err(Refusal::MethodNotImplemented(method.into()).into());
        }
        let given = call.parameters.clone();
        if interface == SERVICE {
            return Ok((service(method, given)?, None));
        }
        if interface != NAME {
            return Err(Refusal::InterfaceNotFound(interface.into()).into());
        }
        let done = || json!({});
        let parameters = match method {
            "List" => {
                let Nothing {} = parameters(given)?;
                let peer = self.peer(id)?;
                value(&message::Listed { memories: self.books.list(&peer) })?
            }
            "Borrow" => {
                let lease = self.borrow(id, &parameters(given)?)?;
                return Ok((value(&self.books.borrowed(lease))?, Some(Attached::DmaBuf(lease))));
            }
            "Words" => {
                let Nothing {} = parameters(given)?;
                self.check_has_lease(id, "see where leases are")?;
                return Ok((value(&message::Words { words: 0 })?, Some(Attached::Words)));
            }
            "Identify" => {
                let Nothing {} = parameters(given)?;
                value(&message::Identified { connection: id })?
            }
            "Window" => {
                let Nothing {} = parameters(given)?;
                self.check_has_lease(id, "open a window")?;
                let size = self.open_window(id)?;
                return Ok((value(&message::Windowed { window: 0, size })?, Some(Attached::Window)));
            }
            "Copy" => {
                self.copy(id, &parameters(given)?)?;
                return Err(NotAnswered::Later);
            }
            "Watch" => {
                let message::Watch { connection } = parameters(given)?;
                if !call.more || call.oneway {
                    return Err(Refusal::ExpectedMore.into());
                }
                // Events are the reply, and there is no last one.
                return match self.watch(id, connection) {
                    Ok(()) => Err(NotAnswered::Later),
                    Err(_) => Err(Error::new(Kind::Gone, "watch leases", "the client left").into()),
                };
            }
            "Importing" => {
                self.importing(id, &parameters(given)?)?;
                done()
            }
            "Drained" => {
                self.drained(id, parameters(given)?)?;
                done()
            }
            "Return" => {
                let message::OfLease { lease } = parameters(given)?;
                self.own_lease(id, lease, "return a lease")?;
                self.forget_lease(lease, "it was returned");
                done()
            }
            "Status" => {
                let Nothing {} = parameters(given)?;
                self.check_operator(id, "see who has what")?;
                value(&self.books.status())?
            }
            "Revoke" => return self.operate(id, &parameters(given)?, false),
            "Reset" => return self.operate(id, &parameters(given)?, true),
            "Evict" => {
                let message::OfLease { lease } = parameters(given)?;
                self.check_operator(id, "evict a lease")?;
                if self.books.lease(lease).is_none() {
                    return Err(no_lease("evict a lease", lease).into());
                }
                self.end_lease(lease, "an operator evicted it");
                done()
            }
            "Release" => {
                let message::OfLease { lease } = parameters(given)?;
                self.check_operator(id, "end a quarantine")?;
                self.books.release(lease)?;
                done()
            }
            _ => return Err(Refusal::MethodNotFound(call.method.clone()).into()),
        };
        Ok((parameters, None))
    }

    fn peer(&self, id: u64) -> Result<Arc<peervram_backends::Peer>> {
        let connection = self.connections.get(&id);
        connection
            .map(|connection| Arc::clone(&connection.peer))
            .ok_or_else(|| Error::new(Kind::Gone, "serve a client", "it left"))
    }

    fn check_operator(&self, id: u64, tried: &'static str) -> Result<()> {
        let peer = self.peer(id)?;
        if self.books.is_operator(&peer) {
            return Ok(());
        }
        let why = format!("user {} is no operator of this broker", peer.user);
        Err(Error::new(Kind::PermissionDenied, tried, why)
            .next("ask as root, as the user of the broker, or as whom it allows to operate"))
    }

    /// Some things are for whoever has a lease. Who sees where all leases are sees of others how many they have, and no more.
    fn check_has_lease(&self, id: u64, tried: &'static str) -> Result<()> {
        let peer = self.peer(id)?;
        let has_lease = self.books.leases().any(|(_, record)| record.is_of(id, &peer));
        if has_lease {
            return Ok(());
        }
        let why = "this process has no lease";
        Err(Error::new(Kind::PermissionDenied, tried, why).next("borrow first"))
    }

    /// The lease of that number, which the client's process borrowed.
    fn own_lease(&self, id: u64, lease: u64, tried: &'static str) -> Result<()> {
        let peer = self.peer(id)?;
        // Who does not have a lease is not told whether somebody else does.
        self.books
            .lease(lease)
            .filter(|record| record.is_of(id, &peer))
            .map(drop)
            .ok_or_else(|| no_lease(tried, lease))
    }

    fn borrow(&mut self, id: u64, request: &message::Borrow) -> Result<u64, NotAnswered> {
        let peer = self.peer(id)?;
        match self.books.borrow(&peer, id, request) {
            Ok(lease) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.leases.insert(lease);
                }
                tracing::info!(lease, %peer, request.size, request.memory, "lent");
                Ok(lease)
            }
            Err(NotBorrowed::Failed(error)) => Err(error.into()),
            Err(NotBorrowed::Later) => {
                self.waiting.push_back(id);
                Err(NotAnswered::Later)
            }
        }
    }

    fn importing(&mut self, id: u64, importing: &message::Importing) -> Result<()> {
        self.own_lease(id, importing.lease, "say who imports")?;
        if importing.importer.len() > WORDS_BYTES_MAX {
            let why = format!("an importer's name is longer than {WORDS_BYTES_MAX} bytes");
            return Err(Error::new(Kind::InvalidInput, "say who imports", why).next("take a shorter one"));
        }
        self.books.note_importer(importing.lease, &importing.importer, importing.must_be_freed);
        Ok(())
    }

    /// Opens the connection's window. Returns its size in bytes.
    fn open_window(&mut self, id: u64) -> Result<u64> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Err(Error::new(Kind::Gone, "open a window", "the client left"));
        };
        if connection.window.is_none() {
            connection.window = Some(Arc::new(Window::new()?));
        }
        Ok(connection.window.as_ref().map_or(0, |window| window.size_bytes()))
    }

    /// Has a copy made, by another thread.
    fn copy(&mut self, id: u64, copy: &message::Copy) -> Result<()> {
        const TRIED: &str = "copy for a client";
        self.own_lease(id, copy.lease, TRIED)?;
        let record = self.books.lease(copy.lease).ok_or_else(|| no_lease(TRIED, copy.lease))?;
        let window = self.connections.get(&id).and_then(|connection| connection.window.as_ref());
        let window = window.ok_or_else(|| {
            let why = "this connection has no window";
            Error::new(Kind::InvalidInput, TRIED, why).next("call Window first, on the same connection")
        })?;
        self.copier.copy(Order::new(id, &record.attachment, window, copy)?);
        Ok(())
    }

    fn drained(&mut self, id: u64, drained: message::Drained) -> Result<()> {
        const TRIED: &str = "answer a drain";
        self.own_lease(id, drained.lease, TRIED)?;
        let record = self.books.lease(drained.lease).ok_or_else(|| no_lease(TRIED, drained.lease))?;
        if record.attachment.answer(drained.drain, drained.generation) {
            return Ok(());
        }
        let why = format!("lease {} is asked for nothing, or for another answer", drained.lease);
        Err(Error::new(Kind::InvalidInput, TRIED, why)
            .next("answer each draining event once, with its drain and generation"))
    }

    /// Takes a memory back from everybody, on a thread of its own: it waits for clients.
    fn operate(
        &mut self,
        id: u64,
        of: &message::OfMemory,
        resets: bool,
    ) -> Result<(Value, Option<Attached>), NotAnswered> {
        let tried = if resets { "reset a device" } else { "take memory back from everybody" };
        self.check_operator(id, tried)?;
        let offer = self.books.offer(&of.memory)?;
        let timeout = of.timeout_ms.map_or(OPERATOR_TIMEOUT, Duration::from_millis).min(OPERATOR_TIMEOUT_MAX);
        let options = RevokeOptions::within(timeout);
        let options = if of.go_on == Some(true) { options.or_go_on() } else { options };
        let inbox = Arc::clone(&self.inbox);
        let operate = move || {
            let lender = &offer.lender;
            let done = if resets {
                lender.reset(options)
            } else {
                lender.revoke(RevokeCause::Operator, tried, options, Box::new(|| Ok(())))
            };
            inbox.tell(Notice::Operated(id, done.map(|()| lender.generation())));
        };
        sync::start(Thread::Operate, operate).map_err(|error| Error::os(tried, error))?;
        Err(NotAnswered::Later)
    }

    /// What a client waits for is done, or not to be: an operator's revoke, a copy, memory that cannot be scrubbed.
    pub fn answer_waiting(&mut self, id: u64, result: Result<Value>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Business::Waits(call) = std::mem::replace(&mut connection.business, Business::Calls) else {
            return;
        };
        let reply = match result {
            Ok(parameters) => Reply { parameters, ..Reply::default() },
            Err(error) => failed(&error),
        };
        let sent = if call.oneway { Ok(()) } else { connection.send(&reply, None) };
        let served = sent.and_then(|()| self.answer_calls(id));
        self.settle(id, served);
    }
}

fn failed(error: &Error) -> Reply {
    let parameters = serde_json::to_value(message::Failed::from(error)).unwrap_or_default();
    Reply { error: Some(FAILED.into()), parameters, continues: false }
}

fn no_lease(tried: &'static str, lease: u64) -> Error {
    let why = format!("this process has no lease {lease}");
    Error::new(Kind::NotFound, tried, why).next("it may have ended: an event `gone` says why")
}

fn value(reply: &impl Serialize) -> Result<Value> {
    serde_json::to_value(reply).map_err(|error| Error::new(Kind::Os, "write a reply", error.to_string()))
}

/// The methods that every Varlink service has.
fn service(method: &str, given: Value) -> Result<Value, Refusal> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Of {
        interface: String,
    }
    match method {
        "GetInfo" => {
            let Nothing {} = parameters(given)?;
            Ok(json!({
                "vendor": "peervram",
                "product": "peervram broker",
                "version": env!("CARGO_PKG_VERSION"),
                "url": "",
                "interfaces": [SERVICE, NAME],
            }))
        }
        "GetInterfaceDescription" => {
            let Of { interface } = parameters(given)?;
            match interface.as_str() {
                NAME => Ok(json!({ "description": INTERFACE })),
                SERVICE => Ok(json!({ "description": SERVICE_INTERFACE })),
                _ => Err(Refusal::InterfaceNotFound(interface)),
            }
        }
        _ => Err(Refusal::MethodNotFound(format!("{SERVICE}.{method}"))),
    }
}

/// `org.varlink.service`, as <https://varlink.org/Service> has it.
const SERVICE_INTERFACE: &str = "\
interface org.varlink.service
method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)
error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
";
