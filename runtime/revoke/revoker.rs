//! `Revoker`: does what the [`machine`](super::machine) decides, for all devices of a process.
//!
//! Here devices, exports and attachments are made known to the machine; [`change`](super::change) takes memory back
//! and gives it back; [`closing`](super::closing) ends a device.
//!
//! There is one revoker for a process, because one call may reset several devices. Its lock is held for decisions and
//! for opening and closing gates, so that gates move in the order of the decisions; never while a thread waits, a
//! callback runs or the kernel is asked.

use std::fmt;
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use peervram_backends::Exporter;

use super::call_threads::CallThreads;
use super::lending_device::{LendingDevice, Remote};
use super::machine::{AttachmentId, DeviceId, ExportId, Input, State};
use super::state::{RevokerState, explain};
use super::target::{ExportedMemory, RevokeTarget};
use crate::Result;
use crate::sync::Mutex;

/// Decides and acts for all devices of a process.
pub(crate) struct Revoker {
    start: Instant,
    pub(super) state: Mutex<RevokerState>,
    pub(super) threads: CallThreads,
    /// Devices to be closed for which no thread could be started.
    pub(super) orphans: Mutex<Vec<Orphan>>,
}

/// A device whose lender is gone.
pub(super) type Orphan = (Arc<LendingDevice>, Arc<dyn Exporter>);

impl Default for Revoker {
    fn default() -> Self {
        let start = Instant::now();
        Self {
            start,
            state: Mutex::new(RevokerState::since(start)),
            threads: CallThreads::default(),
            orphans: Mutex::default(),
        }
    }
}

impl fmt::Debug for Revoker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Revoker").finish_non_exhaustive()
    }
}

impl Revoker {
    /// The one of this process.
    pub fn of_process() -> Arc<Self> {
        static PROCESS: LazyLock<Arc<Revoker>> = LazyLock::new(Arc::default);
        Arc::clone(&PROCESS)
    }

    /// A device lends from now on. Where its memory cannot be reached, nothing can be attached until it is
    /// given back.
    pub fn add(&self, exporter: &Arc<dyn Exporter>, is_reachable: bool) -> Arc<LendingDevice> {
        self.add_as(exporter, is_reachable, None)
    }

    /// A device whose memory another process lends to this one lends it on from now on.
    #[cfg(feature = "broker")]
    pub fn add_remote(&self, exporter: &Arc<dyn Exporter>, remote: Remote) -> Arc<LendingDevice> {
        self.add_as(exporter, true, Some(remote))
    }

    fn add_as(
        &self,
        exporter: &Arc<dyn Exporter>,
        is_reachable: bool,
        remote: Option<Remote>,
    ) -> Arc<LendingDevice> {
        // The exporter is asked for its name before the lock is taken.
        let id = DeviceId(new_id());
        let device = Arc::new(LendingDevice::new(id, exporter, remote));
        let mut state = self.state.lock();
        state.devices.insert(id, Arc::clone(&device));
        self.handle(&mut state, Input::Add { device: id, reachable: is_reachable });
        device
    }

    /// Memory of a device is exported. `make` is given its number.
    pub fn export<E: ExportedMemory + 'static>(
        &self,
        device: &LendingDevice,
        make: impl FnOnce(ExportId) -> E,
    ) -> Arc<E> {
        let mut state = self.state.lock();
        let export = ExportId(new_id());
        self.handle(&mut state, Input::Export { export, device: device.id });
        drop(state);
        let exported = Arc::new(make(export));
        device.add(&exported);
        exported
    }

    /// An export ended.
    pub fn unexport(&self, export: ExportId) {
        self.handle(&mut self.state.lock(), Input::Unexport { export });
    }

    /// An importer attaches, and is inside from now on. `make` is given its number and the generation.
    ///
    /// # Errors
    /// [`Kind::Revoked`](crate::Kind::Revoked), [`Kind::Busy`](crate::Kind::Busy) or
    /// [`Kind::Gone`](crate::Kind::Gone).
    pub fn attach<T: RevokeTarget + 'static>(
        &self,
        device: &LendingDevice,
        export: ExportId,
        free_before: bool,
        make: impl FnOnce(AttachmentId, u64) -> T,
    ) -> Result<Arc<T>> {
        let mut state = self.state.lock();
        let attachment = AttachmentId(new_id());
        let now = self.now(&state);
        if let Some(why) = state.refusal(Input::Attach { attachment, export, free_before }, now) {
            return Err(explain(why, "attach to lent memory").on(&device.name));
        }
        let target = Arc::new(make(attachment, device.generation()));
        let weak: Weak<T> = Arc::downgrade(&target);
        state.targets.insert(attachment, (target.admission(), weak));
        Ok(target)
    }

    /// The import of an attachment must be freed before its memory is taken back, from now on.
    #[cfg(feature = "broker")]
    pub fn must_be_freed(&self, attachment: AttachmentId) {
        self.handle(&mut self.state.lock(), Input::MustBeFreed { attachment });
    }

    /// An attachment ended.
    pub fn detach(self: &Arc<Self>, attachment: AttachmentId) {
        let mut state = self.state.lock();
        let target = state.targets.remove(&attachment);
        self.handle(&mut state, Input::Detach { attachment });
        drop(state);
        // Work of the attachment that is still in flight may be the last holder of an export.
        drop(target);
        self.close_orphans();
    }

    /// Where a device is; none where it is closed.
    pub fn state_of(&self, device: &LendingDevice) -> Option<State> {
        self.state.lock().machine.state(device.id)
    }

    /// Whether a call is being made on a device: whatever needs its memory lock in the kernel waits for that.
    pub fn is_calling(&self, device: &LendingDevice) -> bool {
        matches!(self.state_of(device), Some(State::Calling(_)))
    }

    /// The device of that name that lends, if there is one.
    #[cfg(feature = "vfio")]
    pub fn find(&self, name: &str) -> Option<Arc<LendingDevice>> {
        self.state.lock().devices.values().find(|device| &*device.name == name).cloned()
    }

    /// Does `work` on a thread for calls, at once.
    ///
    /// # Errors
    /// As [`CallThreads::run`].
    #[cfg(feature = "broker")]
    pub fn run(
        &self,
        work: super::call_threads::Work,
    ) -> Result<(), (super::call_threads::Work, std::io::Error)> {
        self.threads.run(work)
    }

    /// A device failed: nobody is let in before it has been taken back.
    pub fn fail(&self, device: &LendingDevice) {
        self.handle(&mut self.state.lock(), Input::Fail { device: device.id });
    }

    /// Whether it failed, and has not been taken back since.
    pub fn has_failed(&self, device: &LendingDevice) -> bool {
        self.state.lock().machine.has_failed(device.id)
    }

    /// The attachment of that number, unless it ended.
    pub(super) fn target(&self, attachment: AttachmentId) -> Option<Arc<dyn RevokeTarget>> {
        self.state.lock().targets.get(&attachment)?.1.upgrade()
    }

    /// Hands an input to the machine, and does what it says.
    pub(super) fn handle(&self, state: &mut RevokerState, input: Input) {
        let now = self.now(state);
        state.handle(input, now);
    }

    /// The time, as the machine counts it. The clock is read only while a change is under way: the machine compares
    /// times with the deadlines of changes alone.
    pub(super) fn now(&self, state: &RevokerState) -> Duration {
        if state.machine.is_changing() { self.start.elapsed() } else { Duration::ZERO }
    }

    /// The time at which a change begins.
    pub(super) fn clock(&self) -> Duration {
        self.start.elapsed()
    }
}

/// A number that nobody has had, in any revoker: a thread remembers which devices it is inside of.
pub(super) fn new_id() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
