//! Revokes that others begin: the kernel wants a device back, the device failed, or the process that owns it ended.
//!
//! A thread for each lender waits for the descriptors that tell of these. Each takes everything back, whoever is
//! late, since it cannot be called off. Where it cannot be done at once (another change is under way, or an import that
//! must be freed first is in use) it is tried again until it is done; nobody is let in to a device that failed
//! meanwhile.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use peervram_backends::{Error, Exporter};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::RevokeCause;
use super::call::{Call, Took};
use super::lending_device::LendingDevice;
use super::machine::{After, AtDeadline, Change, RevokeOptions};
use super::revoker::Revoker;
use crate::sync::{self, Thread};
use crate::{Kind, Result};

/// Whether revokes that others cause can be heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Watch {
    /// The device tells of its errors, and the kernel when it wants it back.
    Watched,
    /// Nobody tells: the device belongs to another process, or has no way to. What its owner does to it
    /// is found out by using it.
    Unwatched,
}

/// How long accesses have to end, where the memory goes in any case.
const TERMS: RevokeOptions = RevokeOptions {
    timeout: Duration::from_secs(5),
    at_deadline: AtDeadline::GoOn,
    call_limit: Duration::from_secs(10),
};

/// After which time a revoke that did not succeed is tried again; less than a second.
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

/// The device of a watcher, which does not keep it open.
struct WatchedDevice {
    revoker: Arc<Revoker>,
    device: Arc<LendingDevice>,
    exporter: Weak<dyn Exporter>,
}

/// Waits for the device's own interrupts, where it has any.
pub(crate) fn interrupts(
    revoker: &Arc<Revoker>,
    device: &Arc<LendingDevice>,
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
    let unheard = |error: &Error| tracing::error!(%error, device = &*device.name, "nobody watches");
    let watcher = start(revoker, device, exporter, watched).inspect_err(unheard).ok()?;
    device.set_watched();
    Some(watcher)
}

/// Waits for the end of the process that owns an adopted device. `owner` is its pidfd.
///
/// # Errors
/// Nobody waits: no thread or no descriptor was to be had.
#[cfg(feature = "vfio")]
pub(crate) fn owner(
    revoker: &Arc<Revoker>,
    device: &Arc<LendingDevice>,
    exporter: &Arc<dyn Exporter>,
    owner: OwnedFd,
) -> Result<Watcher> {
    start(revoker, device, exporter, vec![(owner, RevokeCause::ExporterGone)])
}

fn start(
    revoker: &Arc<Revoker>,
    device: &Arc<LendingDevice>,
    exporter: &Arc<dyn Exporter>,
    watched: Vec<(OwnedFd, RevokeCause)>,
) -> Result<Watcher> {
    let watched_device = WatchedDevice {
        revoker: Arc::clone(revoker),
        device: Arc::clone(device),
        exporter: Arc::downgrade(exporter),
    };
    let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| Error::os("make an eventfd", errno))?;
    let watcher = Watcher { stop: Arc::new(stop) };
    let stop = Arc::clone(&watcher.stop);
    sync::start(Thread::Watch, move || watch(&stop, &watched, &watched_device))
        .map_err(|error| Error::os("start a thread that watches a device", error).on(&device.name))?;
    Ok(watcher)
}

fn watch(stop: &OwnedFd, watched: &[(OwnedFd, RevokeCause)], watched_device: &WatchedDevice) {
    // Causes whose revoke has not succeeded yet: another change is under way, or an import is in use.
    let mut pending: Vec<RevokeCause> = Vec::new();
    loop {
        let again = Timespec { tv_sec: 0, tv_nsec: i64::from(AGAIN.subsec_nanos()) };
        let heard = match hear(stop, watched, &pending, (!pending.is_empty()).then_some(again)) {
            Ok(Heard::Stop) => return,
            Ok(Heard::Causes(causes)) => causes,
            Err(errno) => {
                tracing::error!(%errno, "a watcher cannot wait");
                return;
            }
        };
        if heard.contains(&RevokeCause::DeviceError) {
            // At once: whoever delays the revoke must not be let in meanwhile.
            watched_device.revoker.fail(&watched_device.device);
        }
        pending.extend(heard);
        pending.dedup();
        let mut is_over = false;
        pending.retain(|&cause| match watched_device.take_back(cause) {
            Ok(()) => {
                is_over |= cause != RevokeCause::DeviceError;
                false
            }
            Err(error) => {
                tracing::error!(%error, device = &*watched_device.device.name, "not given up: it is tried again");
                true
            }
        });
        if is_over {
            return;
        }
    }
}

/// What a watcher heard.
enum Heard {
    Stop,
    Causes(Vec<RevokeCause>),
}

/// Waits for what there is to hear, at most as long as `limit` says.
fn hear(
    stop: &OwnedFd,
    watched: &[(OwnedFd, RevokeCause)],
    pending: &[RevokeCause],
    limit: Option<Timespec>,
) -> Result<Heard, Errno> {
    // The pidfd of an owner that ended says so for ever.
    let is_heard = |cause: RevokeCause| cause == RevokeCause::ExporterGone && pending.contains(&cause);
    let watched: Vec<_> = watched.iter().filter(|(_, cause)| !is_heard(*cause)).collect();
    let mut fds: Vec<PollFd<'_>> = std::iter::once(stop.as_fd())
        .chain(watched.iter().map(|(fd, _)| fd.as_fd()))
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    match poll(&mut fds, limit.as_ref()) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok(Heard::Causes(Vec::new())),
        Err(errno) => return Err(errno),
    }
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    if ready[0] {
        return Ok(Heard::Stop);
    }
    let mut causes = Vec::new();
    for ((fd, cause), _) in watched.into_iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
        if *cause != RevokeCause::ExporterGone {
            // Read empty, so that it tells again.
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
        causes.push(*cause);
    }
    Ok(Heard::Causes(causes))
}

impl WatchedDevice {
    fn take_back(&self, cause: RevokeCause) -> Result<()> {
        let Some(exporter) = self.exporter.upgrade() else { return Ok(()) };
        let result = if cause == RevokeCause::DeviceError {
            // Somebody may have reset the device since.
            if !self.revoker.has_failed(&self.device) {
                return Ok(());
            }
            let call = Call {
                what: Change::Take(cause),
                tried: "take memory of a failed device back",
                devices: vec![Arc::clone(&self.device)],
                // What the kernel does about the error is its own; a reset gives the memory back.
                is_made_here: false,
                make: Box::new(|| Ok(Took::Memory)),
                after: Some(After::Away),
            };
            self.revoker.change(call, TERMS)
        } else {
            self.revoker.close(&self.device, &exporter, cause, TERMS)
        };
        match result {
            Err(error) if error.kind() == Kind::Gone => Ok(()),
            other => other,
        }
    }
}
