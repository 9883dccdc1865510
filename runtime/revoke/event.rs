//! `Event`: what happens to lent memory, told by a callback or by a descriptor to poll.
//!
//! Each subscriber hears every event of its device once, in order. A callback runs on whatever thread
//! the news came from, one event at a time, with no lock of this crate held: it may enter, take the
//! current import, or subscribe. It must not wait for whoever takes the memory back, who waits for it:
//! when a revoke returns, every callback has heard of its end, or has had the call's limit to hear of it.
//! One that is slow is named.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::Location;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use peervram_backends::{Error, NotReady, deadline_after};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{RevokeCause, Stuck};
use crate::Result;
use crate::hook::{self, Hook};
use crate::sync::Mutex;

/// No callback is slow that is back after this.
const BRIEFLY: Duration = Duration::from_millis(10);

/// Something that happened to a device's lent memory.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Event {
    /// The device that lends.
    pub device: Arc<str>,
    /// The generation of its memory from this event on.
    pub generation: u64,
    /// What happened.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum EventKind {
    /// The memory is about to be taken back: finish what is in flight. Nobody is let in any more.
    Draining {
        /// Why.
        cause: RevokeCause,
        /// Until when, counted from when the revoke was asked for. What callbacks take is of that time.
        deadline: Instant,
    },
    /// Somebody did not finish in time.
    Late {
        /// Who, in words.
        who: Vec<String>,
    },
    /// Nothing was taken back after all; go on as before.
    CalledOff,
    /// The kernel's call has not come back. Nothing of this device can be used until it does.
    Stuck(Arc<Stuck>),
    /// The kernel has come back, and the device is not ready: it trains a link, or its memory. Told at once and
    /// then every second. Nobody is let in before it is ready; it has a limit.
    NotReady(Arc<NotReady>),
    /// The memory was taken back, and is away.
    Revoked {
        /// Why.
        cause: RevokeCause,
    },
    /// The memory is there again, its content unknown. What must be imported again is stale: take
    /// [`Attachment::current`](crate::Attachment::current) and rebuild what was made of it.
    Restored,
    /// The memory was taken back for good.
    Gone,
    /// A callback took longer than the change could wait for it: the rest of the time that everyone had to
    /// finish, or the limit of the call. Told when it is back.
    SlowCallback(SlowCallback),
}

/// A callback that held a change up.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SlowCallback {
    /// Where in the application's source it was given.
    pub given_at: &'static Location<'static>,
    /// The [`EventKind::code`] of the event that it was called with.
    pub event: &'static str,
    /// How long it took.
    pub took: Duration,
}

impl fmt::Display for SlowCallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (event, took_ms) = (self.event, self.took.as_millis());
        write!(f, "the callback given at {} took {took_ms} ms over `{event}`", self.given_at)
    }
}

impl EventKind {
    /// A stable name for scripts and `--json`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Draining { .. } => "draining",
            Self::Late { .. } => "late",
            Self::CalledOff => "called-off",
            Self::Stuck(_) => "stuck",
            Self::NotReady(_) => "not-ready",
            Self::Revoked { .. } => "revoked",
            Self::Restored => "restored",
            Self::Gone => "gone",
            Self::SlowCallback(_) => "slow-callback",
        }
    }
}

type Callback = Box<dyn Fn(&Event) + Send + Sync>;

/// Who is told of a device's events.
#[derive(Default)]
pub(crate) struct Subscribers(Mutex<Vec<Subscriber>>);

#[derive(Clone)]
struct Subscriber {
    channel: Arc<Channel>,
    /// What it does with them; dead when the subscription is dropped. Taken hold of where no lock is held:
    /// what a callback keeps alive may end with it.
    to: Weak<To>,
}

/// Events on their way.
#[derive(Default)]
struct Channel {
    queue: Mutex<Queue>,
    /// Readable while there are events.
    poll: Option<OwnedFd>,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<Event>,
    /// Some thread is calling back; it takes what is added meanwhile too.
    delivering: bool,
    /// Nobody wants any more.
    is_over: bool,
}

enum To {
    Callback(Callback, &'static Location<'static>),
    Poll,
}

impl Subscribers {
    /// Adds an event to everyone's queue. Calls nobody and ends nothing, so it may be done under a lock.
    pub fn queue(&self, event: &Event) {
        let mut subscribers = self.0.lock();
        subscribers.retain(|subscriber| subscriber.to.strong_count() > 0);
        for subscriber in subscribers.iter() {
            subscriber.channel.add(event.clone());
        }
    }

    /// Calls back with what is queued, and says which calls took longer than `patience`. No lock may be held.
    pub fn deliver(&self, patience: Duration) -> Vec<SlowCallback> {
        let mut slow = Vec::new();
        let subscribers: Vec<Subscriber> = self.0.lock().clone();
        for Subscriber { channel, to } in subscribers {
            if let Some(to) = to.upgrade()
                && let To::Callback(callback, given_at) = &*to
            {
                let took = channel.deliver(callback).into_iter();
                let is_slow = |(_, took): &(&'static str, Duration)| *took > patience.max(BRIEFLY);
                slow.extend(took.filter(is_slow).map(|(event, took)| SlowCallback { given_at, event, took }));
            }
        }
        slow
    }

    /// Calls `callback` with each event from now on, until the subscription is dropped.
    #[track_caller]
    pub fn call(&self, callback: impl Fn(&Event) + Send + Sync + 'static) -> Subscription {
        let channel = Arc::new(Channel::default());
        let to = self.add(&channel, To::Callback(Box::new(callback), Location::caller()));
        Subscription { channel, _to: to }
    }

    /// Keeps each event from now on until it is taken.
    pub fn poll(&self) -> Result<Events> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = eventfd(0, flags).map_err(|errno| Error::os("make an eventfd", errno))?;
        let channel = Arc::new(Channel { poll: Some(fd), ..Channel::default() });
        let to = self.add(&channel, To::Poll);
        Ok(Events { channel, _to: to })
    }

    fn add(&self, channel: &Arc<Channel>, to: To) -> Arc<To> {
        let to = Arc::new(to);
        self.0.lock().push(Subscriber { channel: Arc::clone(channel), to: Arc::downgrade(&to) });
        to
    }
}

impl fmt::Debug for Subscribers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Subscribers").field(&self.0.lock().len()).finish()
    }
}

impl Channel {
    fn add(&self, event: Event) {
        let mut queue = self.queue.lock();
        queue.events.push_back(event);
        if let Some(fd) = &self.poll {
            // Under the lock, as it is read. It can only fail where the counter is full, and then it is
            // readable as it should be.
            let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
        }
    }

    /// Calls back, one event at a time; says how long each call took.
    fn deliver(&self, callback: &Callback) -> Vec<(&'static str, Duration)> {
        let mut took = Vec::new();
        loop {
            let mut queue = self.queue.lock();
            if queue.delivering || queue.is_over {
                return took;
            }
            let Some(event) = queue.events.pop_front() else { return took };
            queue.delivering = true;
            drop(queue);
            let begun = Instant::now();
            hook::ask(Hook::Callback, || event.device.to_string(), (), || callback(&event));
            took.push((event.kind.code(), begun.elapsed()));
            self.queue.lock().delivering = false;
        }
    }
}

/// Keeps a callback alive. Dropping it ends the calls, but for one that is under way.
#[must_use = "a subscription that is dropped hears nothing"]
pub struct Subscription {
    channel: Arc<Channel>,
    _to: Arc<To>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.channel.queue.lock().is_over = true;
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").finish_non_exhaustive()
    }
}

/// Events to be taken one by one. Its descriptor can be polled: readable while there is one.
pub struct Events {
    channel: Arc<Channel>,
    _to: Arc<To>,
}

impl Events {
    /// The next event, if there is one. Does not block.
    pub fn try_next(&self) -> Option<Event> {
        let mut queue = self.channel.queue.lock();
        let event = queue.events.pop_front();
        if queue.events.is_empty() {
            // Under the lock: an event that comes after is signalled anew.
            let _ = rustix::io::read(self, &mut [0; 8]);
        }
        event
    }

    /// The next event; waits for it at most `timeout`.
    ///
    /// # Errors
    /// What `poll` says.
    pub fn next_within(&self, timeout: Duration) -> Result<Option<Event>> {
        let deadline = deadline_after(timeout);
        loop {
            if let Some(event) = self.try_next() {
                return Ok(Some(event));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let left = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(self, PollFlags::IN)], left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Error::os("wait for an event", errno)),
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.poll.as_ref().expect("what is polled has an eventfd").as_fd()
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("fd", &self.as_fd()).finish()
    }
}
