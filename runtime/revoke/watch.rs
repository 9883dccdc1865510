//! What is not ours: the kernel wants a device back, the device failed, or the process that owns it ended.
//!
//! A thread of its own for each lender waits for the descriptors that tell. What it hears takes
//! everything back, whoever is late: nobody could call it off.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use peervram_backends::{Error, Exporter};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::RevokeCause;
use super::call::Call;
use super::entry::Entry;
use super::keeper::Keeper;
use super::machine::{After, AtDeadline, Change, Terms};
use crate::lender::close;
use crate::{Kind, Result};

/// Whether revokes that others cause can be heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Watch {
    /// The device tells of its errors, and the kernel when it wants it back.
    Watched,
    /// Nobody tells: the device belongs to another process, or has no way to. What its owner does to it
    /// is found out by using it.
    Unwatched,
}

/// How long those inside have, where the memory goes in any case.
const TERMS: Terms = Terms {
    timeout: Duration::from_secs(5),
    at_deadline: AtDeadline::GoOn,
    call_limit: Duration::from_secs(10),
};

/// When what could not be given up is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// A thread that waits. Dropping it ends the thread, but for a revoke that it is in.
pub(crate) struct Watcher {
    stop: Arc<OwnedFd>,
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watcher").finish_non_exhaustive()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Err(errno) = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes()) {
            tracing::error!(%errno, "could not end a watcher");
        }
    }
}

/// What a watcher needs of a lender, which it does not keep.
struct Lent {
    keeper: Arc<Keeper>,
    entry: Arc<Entry>,
    exporter: Weak<dyn Exporter>,
}

/// Waits for the device's own interrupts, where it has any.
pub(crate) fn interrupts(
    keeper: &Arc<Keeper>,
    entry: &Arc<Entry>,
    exporter: &Arc<dyn Exporter>,
) -> Option<Watcher> {
    let interrupts = exporter.interrupts().unwrap_or_else(|error| {
        tracing::warn!(%error, "a device cannot tell of its errors, nor the kernel that it wants it back");
        Default::default()
    });
    let error = interrupts.error.map(|fd| (fd, RevokeCause::DeviceError));
    let request = interrupts.request.map(|fd| (fd, RevokeCause::DeviceRequested));
    let watched: Vec<_> = error.into_iter().chain(request).collect();
    if watched.is_empty() {
        return None;
    }
    start(keeper, entry, exporter, watched).inspect(|_| entry.set_watched())
}

/// Waits for the end of the process that owns an adopted device. `owner` is its pidfd.
#[cfg(feature = "vfio")]
pub(crate) fn owner(
    keeper: &Arc<Keeper>,
    entry: &Arc<Entry>,
    exporter: &Arc<dyn Exporter>,
    owner: OwnedFd,
) -> Option<Watcher> {
    start(keeper, entry, exporter, vec![(owner, RevokeCause::ExporterGone)])
}

fn start(
    keeper: &Arc<Keeper>,
    entry: &Arc<Entry>,
    exporter: &Arc<dyn Exporter>,
    watched: Vec<(OwnedFd, RevokeCause)>,
) -> Option<Watcher> {
    let lent =
        Lent { keeper: Arc::clone(keeper), entry: Arc::clone(entry), exporter: Arc::downgrade(exporter) };
    let started = || -> Result<Watcher> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| Error::os("make an eventfd", errno))?;
        let watcher = Watcher { stop: Arc::new(stop) };
        let stop = Arc::clone(&watcher.stop);
        std::thread::Builder::new()
            .name("peervram-watch".into())
            .spawn(move || watch(&stop, &watched, &lent))
            .map_err(|error| Error::os("start a watcher", error))?;
        Ok(watcher)
    };
    started().inspect_err(|error| tracing::error!(%error, device = &*entry.name, "nobody watches")).ok()
}

fn watch(stop: &OwnedFd, watched: &[(OwnedFd, RevokeCause)], lent: &Lent) {
    loop {
        let mut fds: Vec<PollFd<'_>> = std::iter::once(stop.as_fd())
            .chain(watched.iter().map(|(fd, _)| fd.as_fd()))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => {
                tracing::error!(%errno, "a watcher cannot wait");
                return;
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            return;
        }
        let Some(at) = ready[1..].iter().position(|&ready| ready) else { continue };
        let (fd, cause) = &watched[at];
        if *cause != RevokeCause::ExporterGone {
            // An eventfd is read empty, so that it tells again; a pidfd stays as it is.
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
        match lent.take_back(*cause) {
            // The kernel asks again every ten seconds, until it has the device. An owner that ended says no
            // more than that.
            Err(error) => {
                tracing::error!(%error, device = &*lent.entry.name, "not given up");
                std::thread::sleep(AGAIN);
            }
            Ok(()) if *cause == RevokeCause::DeviceError => {}
            Ok(()) => return,
        }
    }
}

impl Lent {
    fn take_back(&self, cause: RevokeCause) -> Result<()> {
        let Some(exporter) = self.exporter.upgrade() else { return Ok(()) };
        let result = if cause == RevokeCause::DeviceError {
            let call = Call {
                what: Change::Take(cause),
                tried: "take memory of a failed device back",
                entries: vec![Arc::clone(&self.entry)],
                // What the kernel does about the error is its own; a reset gives the memory back.
                make: Box::new(|| Ok(())),
                after: Some(After::Away),
            };
            self.keeper.change(call, TERMS)
        } else {
            close(&self.keeper, &self.entry, &exporter, cause, TERMS)
        };
        match result {
            Err(error) if error.kind() == Kind::Gone => Ok(()),
            other => other,
        }
    }
}
