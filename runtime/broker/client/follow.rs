//! `Follower`: what a broker says of this process's leases becomes revokes of this process.
//!
//! ```text
//!   broker: draining -> gates of this process shut, accesses finish, imports are freed -> Drained
//!           called-off | restored | revoked | gone  -> what the local call comes back with
//! ```
//! One thread listens. Each lease has its events in a queue, and a thread while there are any: a revoke waits for
//! accesses, and one lease must not hold up another. The local revoke is like any other; what it asks is the broker
//! instead of the kernel.

use std::collections::{BTreeMap, VecDeque};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::{Error, Exporter, Kind, deadline_after};

use super::super::message::{
    Done, Drained, Identified, LeaseEvent, LeaseEventKind, Nothing, OfLease, Watch, Watched, WireAtDeadline,
};
use super::call::{Calls, Channel, Mode};
use super::memory::BorrowedMemory;
use crate::Result;
use crate::revoke::call::{Call, Took};
use crate::revoke::lending_device::LendingDevice;
use crate::revoke::machine::{After, AtDeadline, Change, State};
use crate::revoke::revoker::Revoker;
use crate::revoke::{RevokeCause, RevokeOptions};
use crate::sync::{self, Condvar, Mutex, MutexGuard, Thread, pause, wait_until};

const TRIED: &str = "give memory back to its broker";
/// Between two looks at whether a change that the broker began is over.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// What the broker took without waiting for this process is taken without waiting here.
const AT_ONCE: RevokeOptions = RevokeOptions {
    timeout: Duration::ZERO,
    at_deadline: AtDeadline::GoOn,
    // The broker says when it is over, however long that takes.
    call_limit: Duration::MAX,
};

/// Listens to a broker for all leases of one connection.
pub(super) struct Follower {
    known: Mutex<Known>,
    /// To end the thread that listens.
    socket: UnixStream,
    /// Held while a lease is borrowed.
    borrowing: Mutex<()>,
}

#[derive(Default)]
struct Known {
    leases: BTreeMap<u64, Arc<Followed>>,
    /// The highest number that was borrowed here. What comes of a higher one is kept for it.
    last: u64,
    early: BTreeMap<u64, Vec<LeaseEvent>>,
    /// The broker has ended.
    is_over: bool,
}

impl Follower {
    /// Listens to the broker at `path` for the leases that `calls` borrows, on a thread of its own.
    ///
    /// # Errors
    /// As [`Channel::connect`]; no thread could be started.
    pub fn start(path: &Path, calls: &Calls) -> Result<Arc<Self>> {
        const TRIED: &str = "listen to a broker";
        let Identified { connection } = calls.call("Identify", &Nothing {}, TRIED)?;
        let mut channel = Channel::connect(path)?;
        channel.send("Watch", &Watch { connection: Some(connection) }, Mode::More, TRIED)?;
        let socket = channel.try_clone(TRIED)?;
        let follower = Arc::new(Self { known: Mutex::default(), socket, borrowing: Mutex::default() });
        let listener = Arc::downgrade(&follower);
        let listen = move || {
            let why = loop {
                match channel.receive::<Watched>(TRIED) {
                    Ok((Watched { event }, _)) => match listener.upgrade() {
                        Some(follower) => follower.hear(event),
                        None => return,
                    },
                    Err(error) => break error,
                }
            };
            if let Some(follower) = listener.upgrade() {
                follower.end(&why);
            }
        };
        sync::start(Thread::Listen, listen).map_err(|error| Error::os(TRIED, error))?;
        Ok(follower)
    }

    /// A lease is about to be borrowed: nobody else borrows one until this is dropped.
    pub fn borrow(&self) -> MutexGuard<'_, ()> {
        self.borrowing.lock()
    }

    /// A lease was borrowed. What came of it meanwhile comes now.
    pub fn add(&self, _: &mut MutexGuard<'_, ()>, followed: &Arc<Followed>) {
        let mut known = self.known.lock();
        let lease = followed.lease;
        known.last = known.last.max(lease);
        known.leases.insert(lease, Arc::clone(followed));
        let early = known.early.remove(&lease).unwrap_or_default();
        let is_over = known.is_over;
        drop(known);
        early.into_iter().for_each(|event| followed.deliver(event));
        if is_over {
            followed.deliver(gone(lease));
        }
    }

    /// What came of a lease that could not be used is forgotten.
    pub fn forget_early(&self, lease: u64) {
        let mut known = self.known.lock();
        known.last = known.last.max(lease);
        known.early.remove(&lease);
    }

    /// A lease is over for this process.
    pub fn remove(&self, lease: u64) {
        let removed = self.known.lock().leases.remove(&lease);
        drop(removed);
    }

    #[cfg(all(test, not(feature = "shuttle")))]
    pub fn hear_nothing(&self) -> impl Drop + '_ {
        self.known.lock()
    }

    fn hear(&self, event: LeaseEvent) {
        let mut known = self.known.lock();
        match known.leases.get(&event.lease).map(Arc::clone) {
            Some(followed) => {
                drop(known);
                followed.deliver(event);
            }
            None if event.lease > known.last => known.early.entry(event.lease).or_default().push(event),
            None => {}
        }
    }

    fn end(&self, why: &Error) {
        let mut known = self.known.lock();
        known.is_over = true;
        let leases: Vec<Arc<Followed>> = known.leases.values().map(Arc::clone).collect();
        drop(known);
        if !leases.is_empty() {
            tracing::warn!(%why, leases = leases.len(), "a broker ended, and with it what it lent");
        }
        leases.iter().for_each(|followed| followed.deliver(gone(followed.lease)));
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // The thread that listens sees the end of the stream.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// The end of a lease, where the broker does not say so itself.
fn gone(lease: u64) -> LeaseEvent {
    let gone = LeaseEvent::new(lease, LeaseEventKind::Gone, 0);
    LeaseEvent { why: Some("the broker ended".into()), ..gone }
}

/// Tells the broker that a lease is over. What goes wrong is in the log: the lease is over for this process anyway.
pub(super) fn give_back(calls: &Calls, lease: u64) {
    let returned: Result<Done> = calls.call("Return", &OfLease { lease }, "return a lease");
    if let Err(error) = returned
        && !matches!(error.kind(), Kind::Gone | Kind::NotFound)
    {
        tracing::warn!(%error, lease, "a lease was not returned");
    }
}

/// A lease, as its events see it.
pub(super) struct Followed {
    lease: u64,
    calls: Arc<Calls>,
    revoker: Arc<Revoker>,
    device: Arc<LendingDevice>,
    memory: Arc<BorrowedMemory>,
    exporter: Arc<dyn Exporter>,
    mail: Mutex<Mail>,
    arrived: Condvar,
}

#[derive(Default)]
struct Mail {
    events: VecDeque<LeaseEvent>,
    /// A thread takes them.
    is_taken: bool,
    /// The lease is over for this process: nobody needs them.
    is_over: bool,
    /// The broker knows.
    is_returned: bool,
}

impl Followed {
    /// A lease whose memory is lent on in this process.
    pub fn new(
        lease: u64,
        calls: &Arc<Calls>,
        revoker: &Arc<Revoker>,
        memory: &Arc<BorrowedMemory>,
    ) -> Arc<Self> {
        let exporter: Arc<dyn Exporter> = Arc::clone(memory) as _;
        Arc::new(Self {
            lease,
            calls: Arc::clone(calls),
            revoker: Arc::clone(revoker),
            device: revoker.add_remote(&exporter, memory.remote()),
            memory: Arc::clone(memory),
            exporter,
            mail: Mutex::default(),
            arrived: Condvar::new(),
        })
    }

    /// Its number.
    pub fn lease(&self) -> u64 {
        self.lease
    }

    /// What it is of, for this process's revokes.
    pub fn device(&self) -> &Arc<LendingDevice> {
        &self.device
    }

    /// Gives it back, or says who is late.
    pub fn close(&self, options: RevokeOptions) -> Result<()> {
        self.close_locally(options)?;
        let Done {} = self.calls.call("Return", &OfLease { lease: self.lease }, "return a lease")?;
        self.mail.lock().is_returned = true;
        Ok(())
    }

    /// Takes it back from everybody in this process. What the broker takes back or gives back at this moment is over
    /// first: the caller cannot know of it.
    fn close_locally(&self, options: RevokeOptions) -> Result<()> {
        let deadline = deadline_after(options.timeout);
        loop {
            let exporter = Arc::clone(&self.exporter);
            let close = move || exporter.close_device().map(|()| Took::Memory);
            // What could wait for the kernel is the end of a descriptor, and that is on a thread of its own.
            let call = self.call(Change::Take(RevokeCause::ExporterGone), close);
            let call = Call { tried: "give memory back", after: Some(After::Closed), ..call };
            match self.revoker.change(call, options) {
                Err(error) if error.kind() == Kind::Busy && Instant::now() < deadline => pause(LOOK_INTERVAL),
                other => return other,
            }
        }
    }

    /// It is over for this process, whoever is late.
    pub fn end(&self) {
        let mut mail = self.mail.lock();
        mail.is_over = true;
        let is_returned = mail.is_returned;
        drop(mail);
        self.arrived.notify_all();
        self.revoker.close_dropped(&self.device, &self.exporter);
        if !is_returned {
            give_back(&self.calls, self.lease);
        }
    }

    /// Queues an event, and has a thread take what is queued.
    fn deliver(self: &Arc<Self>, event: LeaseEvent) {
        let mut mail = self.mail.lock();
        mail.events.push_back(event);
        self.arrived.notify_all();
        if std::mem::replace(&mut mail.is_taken, true) {
            return;
        }
        drop(mail);
        let followed = Arc::clone(self);
        if let Err((take_all, error)) = self.revoker.run(Box::new(move || followed.take_all())) {
            tracing::error!(%error, "no thread to follow a lease on: it is followed by the one that listens");
            take_all();
        }
    }

    fn take_all(self: &Arc<Self>) {
        loop {
            let mut mail = self.mail.lock();
            let Some(event) = mail.events.pop_front().filter(|_| !mail.is_over) else {
                mail.is_taken = false;
                return;
            };
            drop(mail);
            tracing::debug!(lease = self.lease, ?event, "a broker says");
            if let Err(error) = self.follow(event)
                && error.kind() != Kind::Gone
            {
                tracing::warn!(%error, lease = self.lease, "what a broker said was not done");
            }
        }
    }

    fn follow(self: &Arc<Self>, event: LeaseEvent) -> Result<()> {
        let cause = event.cause.as_deref().and_then(RevokeCause::from_code).unwrap_or(RevokeCause::Operator);
        let is_away = matches!(self.revoker.state_of(&self.device), Some(State::Away(_)));
        match event.event {
            LeaseEventKind::Draining => self.drain(&event, cause),
            // Where this process was late, it has called off by itself.
            LeaseEventKind::CalledOff => Ok(()),
            // It was late, and the broker went on.
            LeaseEventKind::Revoked if !is_away => self.take(cause, None),
            LeaseEventKind::Revoked => Ok(()),
            LeaseEventKind::Restored if is_away => {
                let memory = Arc::clone(&self.memory);
                let call = self.call(Change::Restore, move || {
                    memory.is_back(event.generation);
                    Ok(Took::Memory)
                });
                self.revoker.change(call, AT_ONCE)
            }
            LeaseEventKind::Restored => self.take(cause, Some(event.generation)),
            LeaseEventKind::Gone => {
                // Shut from here on, however long somebody is late.
                self.memory.is_away();
                self.revoker.fail(&self.device);
                self.revoker.close_dropped(&self.device, &self.exporter);
                Ok(())
            }
        }
    }

    /// The broker has taken the memory back; and given it back, if `restored` is its generation now.
    fn take(&self, cause: RevokeCause, restored: Option<u64>) -> Result<()> {
        let memory = Arc::clone(&self.memory);
        let call = self.call(Change::Take(cause), move || {
            match restored {
                Some(generation) => memory.is_back(generation),
                None => memory.is_away(),
            }
            Ok(Took::Memory)
        });
        self.revoker.change(call, AT_ONCE)
    }

    /// The broker is about to take the memory back: everybody here gets out, the broker is told, and says what became
    /// of it.
    fn drain(self: &Arc<Self>, event: &LeaseEvent, cause: RevokeCause) -> Result<()> {
        let (Some(drain), Some(deadline_ms)) = (event.drain, event.deadline_ms) else {
            let why = "a draining event has no drain, or no deadline";
            return Err(Error::new(Kind::Unsupported, TRIED, why).on(&self.device.name));
        };
        let timeout = Duration::from_millis(deadline_ms);
        let at_deadline = match event.at_deadline {
            Some(WireAtDeadline::GoOn) => AtDeadline::GoOn,
            _ => AtDeadline::CallOff,
        };
        let answer = Drained { lease: self.lease, drain, generation: event.generation };
        let deadline = deadline_after(timeout);
        let followed = Arc::clone(self);
        let call = self.call(Change::Take(cause), move || followed.answer_and_wait(answer, deadline));
        let late =
            self.revoker.change(call, RevokeOptions { timeout, at_deadline, call_limit: Duration::MAX });
        match late {
            // Who is late here makes this process late there: the broker decides.
            Err(error) if matches!(error.kind(), Kind::TimedOut | Kind::StillInUse) => {
                tracing::warn!(%error, lease = self.lease, "the broker is not answered");
                Ok(())
            }
            other => other,
        }
    }

    /// Tells the broker that nobody here is in the memory, and waits for what it did.
    fn answer_and_wait(&self, answer: Drained, deadline: Instant) -> Result<Took> {
        // After the deadline somebody here was torn, and the broker does not wait for an answer any more.
        if Instant::now() < deadline {
            // The broker's next event is the reply: also where it has called off meanwhile, and refuses the answer. A broker
            // that has ended says so by the end of its events.
            let _ = self.calls.tell("Drained", &answer, TRIED);
        }
        let mut mail = self.mail.lock();
        loop {
            if mail.is_over {
                self.memory.is_away();
                return Ok(Took::Memory);
            }
            let Some(event) = mail.events.pop_front() else {
                (mail, _) = wait_until(&self.arrived, mail, deadline_after(Duration::MAX));
                continue;
            };
            match event.event {
                LeaseEventKind::Draining => continue,
                LeaseEventKind::CalledOff => return Ok(Took::Nothing),
                LeaseEventKind::Restored => self.memory.is_back(event.generation),
                LeaseEventKind::Revoked => self.memory.is_away(),
                LeaseEventKind::Gone => {
                    // Taken again by whoever takes events, when this call is over.
                    mail.events.push_front(event);
                    self.memory.is_away();
                }
            }
            return Ok(Took::Memory);
        }
    }

    fn call(&self, what: Change, make: impl FnOnce() -> Result<Took> + Send + 'static) -> Call {
        Call {
            what,
            tried: TRIED,
            devices: vec![Arc::clone(&self.device)],
            // On a thread for the events of this lease.
            is_made_here: true,
            make: Box::new(make),
            after: None,
        }
    }
}
