//! `LendingDevice`: a device that lends, as its lender, its exports, their attachments and a revoking call share it.
//! It does not keep the device open.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use peervram_backends::{DmaRanges, Engine, Error, Exporter, Kind, NotReady};

use super::event::{Event, EventKind, Subscribers};
use super::machine::DeviceId;
use super::target::ExportedMemory;
use crate::Result;
use crate::gate::Origin;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What there is besides of a device whose memory another process lends to this one.
pub(crate) struct Remote {
    pub origin: Arc<dyn Origin>,
    /// Copies between its memory and this process.
    pub copier: Arc<dyn Engine<DmaRanges>>,
}

/// A device that lends.
pub(crate) struct LendingDevice {
    pub id: DeviceId,
    /// For messages. Kept, because asking the exporter for it was over a third of the library's part of a crossing.
    pub name: Arc<str>,
    pub subscribers: Subscribers,
    exporter: Weak<dyn Exporter>,
    /// None where this process owns it.
    remote: Option<Remote>,
    generation: AtomicU64,
    is_watched: AtomicBool,
    /// The kernel's call has returned, and the device is not ready yet.
    waits_for_device: AtomicBool,
    exports: Mutex<Vec<Weak<dyn ExportedMemory>>>,
}

impl LendingDevice {
    /// A device of which nothing is exported yet; `remote`, if another process lends it.
    pub fn new(id: DeviceId, exporter: &Arc<dyn Exporter>, remote: Option<Remote>) -> Self {
        Self {
            id,
            name: exporter.name().into(),
            subscribers: Subscribers::default(),
            exporter: Arc::downgrade(exporter),
            remote,
            generation: AtomicU64::new(0),
            is_watched: AtomicBool::new(false),
            waits_for_device: AtomicBool::new(false),
            exports: Mutex::default(),
        }
    }

    /// Where its memory comes from, if another process lends it.
    pub fn origin(&self) -> Option<Arc<dyn Origin>> {
        self.remote.as_ref().map(|remote| Arc::clone(&remote.origin))
    }

    /// Who copies between its memory and this process where this process cannot map it.
    pub fn copier(&self) -> Option<&dyn Engine<DmaRanges>> {
        self.remote.as_ref().map(|remote| &*remote.copier)
    }

    /// How often its memory was taken back.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Sets how often its memory was taken back.
    pub fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Release);
    }

    /// Whether revokes that others begin are noticed.
    pub fn is_watched(&self) -> bool {
        self.is_watched.load(Ordering::Acquire)
    }

    /// Revokes that others begin are noticed from now on.
    pub fn set_watched(&self) {
        self.is_watched.store(true, Ordering::Release);
    }

    /// Whether the kernel's call has returned and the device is not ready yet.
    pub fn waits_for_device(&self) -> bool {
        self.waits_for_device.load(Ordering::Acquire)
    }

    /// Tells all subscribers that the kernel's call has returned and the device is not ready yet.
    pub fn tell_not_ready(&self, why: &NotReady) {
        self.waits_for_device.store(true, Ordering::Release);
        tracing::info!(device = &*self.name, %why, "a device is waited for");
        self.queue(EventKind::NotReady(Arc::new(why.clone())));
        // Called once a second: a callback that takes longer delays the next report.
        self.subscribers.deliver(Duration::from_secs(1));
    }

    /// The device is ready, or its limit has passed.
    pub fn set_ready(&self) {
        self.waits_for_device.store(false, Ordering::Release);
    }

    /// The device, unless its lender is gone.
    ///
    /// # Errors
    /// [`Kind::Gone`].
    pub fn exporter(&self) -> Result<Arc<dyn Exporter>> {
        self.exporter.upgrade().ok_or_else(|| {
            Error::new(Kind::Gone, "use a device", "the lender closed it").on(Arc::clone(&self.name))
        })
    }

    /// Everything of it that is exported.
    pub fn exports(&self) -> Vec<Arc<dyn ExportedMemory>> {
        self.exports.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Some of its memory is exported from now on.
    pub fn add<E: ExportedMemory + 'static>(&self, export: &Arc<E>) {
        let mut exports = self.exports.lock();
        exports.retain(|export| export.strong_count() > 0);
        let weak: Weak<E> = Arc::downgrade(export);
        exports.push(weak);
    }

    /// Adds an event to every subscriber's queue. Calls no callback.
    pub fn queue(&self, kind: EventKind) {
        self.subscribers.queue(&Event {
            device: Arc::clone(&self.name),
            generation: self.generation(),
            kind,
        });
    }
}

impl fmt::Debug for LendingDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LendingDevice")
            .field("name", &self.name)
            .field("generation", &self.generation())
            .finish_non_exhaustive()
    }
}

/// The names of several devices, for messages.
pub(crate) fn names(devices: &[Arc<LendingDevice>]) -> String {
    let names: Vec<&str> = devices.iter().map(|device| &*device.name).collect();
    names.join(", ")
}
