//! `Server`: the broker's thread. It waits for everything at once, and for nothing else: no client holds up another.

use std::collections::{HashMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use peervram_backends::{Error, Kind, Peer};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use serde_json::json;

use super::books::{Books, Lease, was_taken_back};
use super::connection::{Business, Connection, Lost, Watched};
use super::copier::Copier;
use super::inbox::{Inbox, LeaseNotice, Notice};
use super::message::{self, LeaseEvent, LeaseEventKind, Reply};
use crate::Result;

/// How many connections there may be.
const CONNECTIONS_MAX: usize = 16384;
/// How many of one user.
const CONNECTIONS_OF_USER_MAX: usize = 4096;
/// What is received at a time.
const RECEIVE_BYTES: usize = 64 << 10;
/// What is waited for beside connections. Connections have numbers from [`FIRST_CONNECTION`] on.
const LISTENER: u64 = 0;
const INBOX: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// Everything that the broker's thread has.
pub(super) struct Server {
    epoll: OwnedFd,
    listener: OwnedFd,
    pub inbox: Arc<Inbox>,
    pub books: Books,
    pub copier: Copier,
    pub connections: HashMap<u64, Connection>,
    /// The connections that listen to events.
    watchers: HashMap<Watched, Vec<u64>>,
    of_user: HashMap<u32, usize>,
    next: u64,
    /// Connections that wait for memory to be scrubbed, in the order in which they asked.
    pub waiting: VecDeque<u64>,
    /// Opened for nothing, and closed to answer a client when no other descriptor is free.
    spare: Option<OwnedFd>,
    buffer: Vec<u8>,
    is_over: bool,
}

impl Server {
    /// On a listening Unix stream socket.
    ///
    /// # Errors
    /// What the kernel says: no descriptor is free, or the socket is none that listens.
    pub fn new(listener: OwnedFd, books: Books, inbox: &Arc<Inbox>) -> Result<Self> {
        let failed = |errno: Errno| Error::os("serve a broker", errno);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        rustix::io::ioctl_fionbio(&listener, true).map_err(failed)?;
        let input = epoll::EventFlags::IN;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), input).map_err(failed)?;
        epoll::add(&epoll, &**inbox, epoll::EventData::new_u64(INBOX), input).map_err(failed)?;
        Ok(Self {
            epoll,
            listener,
            inbox: Arc::clone(inbox),
            books,
            copier: Copier::start(inbox)?,
            connections: HashMap::new(),
            watchers: HashMap::new(),
            of_user: HashMap::new(),
            next: FIRST_CONNECTION,
            waiting: VecDeque::new(),
            spare: spare(),
            buffer: vec![0; RECEIVE_BYTES],
            is_over: false,
        })
    }

    /// Serves until it is told to stop. Ends every lease then.
    pub fn run(mut self) {
        let words = Arc::clone(self.books.words());
        // Until every lease has ended, or the process.
        let _life = words.live().inspect_err(|error| {
            tracing::error!(%error, "clients cannot be shown that their broker lives: they refuse to be entered");
        });
        let mut events = [const { MaybeUninit::uninit() }; 64];
        let mut due: Option<Instant> = None;
        while !self.is_over {
            let next = self.books.pass_time();
            // Who waits for what was just returned is refused when that takes too long.
            if std::mem::replace(&mut due, next).is_some_and(|due| due <= Instant::now()) {
                self.serve_waiting();
            }
            let timeout = next.map(|at| {
                let left = at.saturating_duration_since(Instant::now());
                Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 })
            });
            let ready: Vec<(u64, epoll::EventFlags)> =
                match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
                    Ok((ready, _)) => ready.iter().map(|event| (event.data.u64(), event.flags)).collect(),
                    Err(Errno::INTR) => continue,
                    Err(errno) => {
                        tracing::error!(%errno, "the broker cannot wait for its clients, and ends");
                        break;
                    }
                };
            for (what, flags) in ready {
                match what {
                    LISTENER => self.accept(),
                    INBOX => self.take_notices(),
                    connection => self.serve(connection, flags),
                }
            }
        }
        let leases: Vec<u64> = self.books.leases().map(|(lease, _)| lease).collect();
        for lease in leases {
            self.end_lease(lease, "the broker ends");
        }
    }

    /// Lets in who waits to be.
    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            match accept_with(&self.listener, flags) {
                Ok(socket) => {
                    if let Err(error) = self.add(socket) {
                        tracing::warn!(%error, "a client was not let in");
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::MFILE | Errno::NFILE) => {
                    // A client that nobody accepts would wait, and the listener would be ready for ever.
                    drop(self.spare.take());
                    drop(accept_with(&self.listener, flags));
                    self.spare = spare();
                    tracing::error!("no descriptor is free: a client was turned away");
                    return;
                }
                Err(_) => return,
            }
        }
    }

    fn add(&mut self, socket: OwnedFd) -> Result<()> {
        let peer = Peer::of(&socket)?;
        let of_user = self.of_user.entry(peer.user).or_insert(0);
        if self.connections.len() >= CONNECTIONS_MAX || *of_user >= CONNECTIONS_OF_USER_MAX {
            let why =
                format!("{} connections are open, {of_user} of user {}", self.connections.len(), peer.user);
            return Err(Error::new(Kind::Exhausted, "let a client in", why));
        }
        let data = epoll::EventData::new_u64(self.next);
        epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN)
            .map_err(|errno| Error::os("let a client in", errno))?;
        *of_user += 1;
        tracing::debug!(connection = self.next, %peer, "a client connected");
        self.connections.insert(self.next, Connection::new(socket, peer));
        self.next += 1;
        Ok(())
    }

    /// Serves what a connection is ready for.
    fn serve(&mut self, id: u64, flags: epoll::EventFlags) {
        let served = self.try_serve(id, flags);
        self.settle(id, served);
    }

    fn try_serve(&mut self, id: u64, flags: epoll::EventFlags) -> Result<(), Lost> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        if flags.contains(epoll::EventFlags::OUT) {
            connection.send_rest()?;
        }
        if connection.reads() && flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP) {
            connection.receive(&mut self.buffer)?;
        } else if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            return Err(Lost::Closed);
        }
        self.answer_calls(id)
    }

    /// Answers the calls that have come, as long as none has to wait.
    pub fn answer_calls(&mut self, id: u64) -> Result<(), Lost> {
        loop {
            let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
            let Some(call) = connection.next_call()? else { return Ok(()) };
            self.answer(id, call)?;
        }
    }

    /// Waits for what the connection wants next, or ends it.
    pub fn settle(&mut self, id: u64, served: Result<(), Lost>) {
        if let Err(lost) = served {
            self.end_connection(id, &lost);
            return;
        }
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let wanted = connection.wanted();
        if wanted == connection.waited_for {
            return;
        }
        connection.waited_for = wanted;
        let (reads, sends) = wanted;
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN, reads);
        flags.set(epoll::EventFlags::OUT, sends);
        let data = epoll::EventData::new_u64(id);
        if let Err(errno) = epoll::modify(&self.epoll, &*connection, data, flags) {
            self.end_connection(id, &Lost::Broken(format!("it cannot be waited for: {errno}")));
        }
    }

    /// Ends a connection, and the leases that it borrowed.
    fn end_connection(&mut self, id: u64, lost: &Lost) {
        let Some(mut connection) = self.connections.remove(&id) else { return };
        let leases = std::mem::take(&mut connection.leases);
        let peer = &connection.peer;
        match lost {
            Lost::Closed => tracing::debug!(connection = id, %peer, "a client left"),
            Lost::Broken(why) => tracing::warn!(connection = id, %peer, why, "a client was given up"),
        }
        if let Some(count) = self.of_user.get_mut(&peer.user) {
            *count -= 1;
            if *count == 0 {
                self.of_user.remove(&peer.user);
            }
        }
        if let Business::Watches(watched) = &connection.business
            && let Some(watchers) = self.watchers.get_mut(watched)
        {
            watchers.retain(|watcher| *watcher != id);
            if watchers.is_empty() {
                self.watchers.remove(watched);
            }
        }
        self.waiting.retain(|waiting| *waiting != id);
        // Dropping the socket takes it out of the epoll instance: no other descriptor is of it.
        drop(connection);
        for lease in leases {
            self.end_lease(lease, "its connection ended");
        }
    }

    /// Ends a lease, and tells its client, which has not asked for that.
    pub fn end_lease(&mut self, lease: u64, why: &str) {
        let Some(record) = self.books.lease(lease) else { return };
        let (generation, listeners) = (record.attachment.state().0, self.listeners(record));
        self.forget_lease(lease, why);
        let gone = LeaseEvent::new(lease, LeaseEventKind::Gone, generation);
        self.tell(&listeners, &LeaseEvent { why: Some(why.into()), ..gone });
    }

    /// Ends a lease whose client has asked for that, or was never told of it.
    pub fn forget_lease(&mut self, lease: u64, why: &str) {
        let Some(record) = self.books.lease(lease) else { return };
        if let Some(connection) = self.connections.get_mut(&record.connection) {
            connection.leases.remove(&lease);
        }
        self.books.end(lease, why);
    }

    /// Has the connection listen to the events of its process's leases from now on: of those that were borrowed on
    /// connection `of`, where that is given. What is not over is told at once.
    pub fn watch(&mut self, id: u64, of: Option<u64>) -> Result<(), Lost> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let peer = Arc::clone(&connection.peer);
        let watched = match (of, peer.process) {
            (Some(of), _) => Watched::Connection(of),
            (None, Some(process)) => Watched::Process(peer.user, process),
            (None, None) => Watched::Connection(id),
        };
        connection.business = Business::Watches(watched);
        self.watchers.entry(watched).or_default().push(id);
        let is_watched = |record: &Lease| {
            record.peer.is_same_process(&peer) && of.is_none_or(|connection| record.connection == connection)
        };
        let pending: Vec<(u64, LeaseNotice)> = (self.books.leases())
            .filter(|(_, record)| is_watched(record))
            .filter_map(|(lease, record)| Some((lease, record.attachment.pending()?)))
            .collect();
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        for (lease, notice) in pending {
            connection.send(&reply(&event(lease, notice)), None)?;
        }
        Ok(())
    }

    /// Who listens to a lease: connections of the process that borrowed it, and no other's.
    fn listeners(&self, record: &Lease) -> Vec<u64> {
        let process = record.peer.process.map(|process| Watched::Process(record.peer.user, process));
        let watched = [Some(Watched::Connection(record.connection)), process];
        let listeners =
            watched.into_iter().flatten().filter_map(|watched| self.watchers.get(&watched)).flatten();
        let is_own = |id: &&u64| {
            self.connections.get(id).is_some_and(|connection| connection.peer.is_same_process(&record.peer))
        };
        listeners.filter(is_own).copied().collect()
    }

    fn tell(&mut self, listeners: &[u64], event: &LeaseEvent) {
        let reply = reply(event);
        for &id in listeners {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let sent = connection.send(&reply, None);
            self.settle(id, sent);
        }
    }

    fn take_notices(&mut self) {
        for notice in self.inbox.take() {
            match notice {
                Notice::Lease(lease, notice) => {
                    let Some(record) = self.books.lease(lease) else { continue };
                    let listeners = self.listeners(record);
                    self.tell(&listeners, &event(lease, notice));
                    if matches!(notice, LeaseNotice::Gone { .. }) {
                        self.end_lease(lease, "the device was closed");
                    }
                }
                Notice::Memory(memory, notice, generation) => {
                    self.books.note_memory(memory, notice, generation);
                    self.serve_waiting();
                }
                Notice::Freed(lease) => {
                    // An operator may have been faster.
                    let _ = self.books.release(lease);
                    self.serve_waiting();
                }
                Notice::Unproven(lease, why) => {
                    self.books.unproven(lease, why);
                    // Who waited for it does so in vain.
                    self.serve_waiting();
                }
                Notice::Scrubbed(memory, piece, result) => {
                    self.books.scrubbed(memory, piece, &result);
                    match result {
                        Ok(()) => self.serve_waiting(),
                        // Scrubbing goes on when the memory is back.
                        Err(error) if was_taken_back(&error) => self.serve_waiting(),
                        // Who waits would wait for as long as the device does not work.
                        Err(error) => self.refuse_waiting(&error),
                    }
                }
                Notice::Operated(id, result) => {
                    self.answer_waiting(id, result.map(|generation| json!({ "generation": generation })));
                }
                Notice::Copied(id, result) => self.answer_waiting(id, result.map(|()| json!({}))),
                Notice::Stop => self.is_over = true,
            }
        }
    }

    /// Refuses those who wait for scrubbed memory, each in as far as there is none without scrubbing.
    fn refuse_waiting(&mut self, error: &Error) {
        self.serve_waiting();
        for id in std::mem::take(&mut self.waiting) {
            let why = format!("memory could not be scrubbed: {}", error.why());
            let mut refused = Error::new(error.kind(), "borrow memory", why);
            if let Some(device) = error.device() {
                refused = refused.on(device);
            }
            self.answer_waiting(
                id,
                Err(refused.next("try again; `peervram status` shows what is not scrubbed")),
            );
        }
    }

    /// Asks again for those who wait for scrubbed memory, in the order in which they asked.
    fn serve_waiting(&mut self) {
        for id in std::mem::take(&mut self.waiting) {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let Business::Waits(call) = std::mem::replace(&mut connection.business, Business::Calls) else {
                continue;
            };
            let served = self.answer(id, *call).and_then(|()| self.answer_calls(id));
            self.settle(id, served);
        }
    }
}

fn spare() -> Option<OwnedFd> {
    std::fs::File::open("/dev/null").ok().map(OwnedFd::from)
}

fn reply(event: &LeaseEvent) -> Reply {
    let parameters = serde_json::to_value(message::Watched { event: event.clone() }).unwrap_or_default();
    Reply { error: None, parameters, continues: true }
}

/// A notice as it is sent.
fn event(lease: u64, notice: LeaseNotice) -> LeaseEvent {
    let told = |event, generation| LeaseEvent::new(lease, event, generation);
    match notice {
        LeaseNotice::Draining { drain, generation } => LeaseEvent {
            drain: Some(drain.change.0),
            cause: Some(drain.cause.code().into()),
            deadline_ms: Some(drain.deadline.saturating_duration_since(Instant::now()).as_millis() as u64),
            at_deadline: Some(drain.at_deadline.into()),
            ..told(LeaseEventKind::Draining, generation)
        },
        LeaseNotice::CalledOff { generation } => told(LeaseEventKind::CalledOff, generation),
        LeaseNotice::Revoked { generation, cause } => {
            LeaseEvent { cause: Some(cause.code().into()), ..told(LeaseEventKind::Revoked, generation) }
        }
        LeaseNotice::Restored { generation } => told(LeaseEventKind::Restored, generation),
        LeaseNotice::Gone { generation } => told(LeaseEventKind::Gone, generation),
    }
}
