//! `Entry`: a device that lends, as everyone who holds a part of it sees it: its lender, its exports, their
//! attachments, and the thread of a call. It does not keep the device open.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use peervram_backends::{Error, Exporter, Kind, NotReady};

use super::event::{Event, Subscribers, What};
use super::machine::DeviceId;
use super::watch::Watch;
use crate::Result;
use crate::export::Lent;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A device that lends, as everyone who holds a part of it sees it.
pub(crate) struct Entry {
    pub id: DeviceId,
    /// For messages. Spelling it anew was over a third of what the library adds to a crossing.
    pub name: Arc<str>,
    pub subscribers: Subscribers,
    exporter: Weak<dyn Exporter>,
    generation: AtomicU64,
    watched: AtomicBool,
    /// The kernel has come back from a call, and the device is not ready yet.
    waits_for_device: AtomicBool,
    lent: Mutex<Vec<Weak<Lent>>>,
}

impl Entry {
    /// One of which nothing is exported yet.
    pub fn new(id: DeviceId, exporter: &Arc<dyn Exporter>) -> Self {
        Self {
            id,
            name: exporter.name().into(),
            subscribers: Subscribers::default(),
            exporter: Arc::downgrade(exporter),
            generation: AtomicU64::new(0),
            watched: AtomicBool::new(false),
            waits_for_device: AtomicBool::new(false),
            lent: Mutex::default(),
        }
    }

    /// How often its memory was taken back.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Its memory is of that generation.
    pub fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Release);
    }

    /// Whether revokes that others cause can be heard of.
    pub fn watch(&self) -> Watch {
        if self.watched.load(Ordering::Acquire) { Watch::Watched } else { Watch::Unwatched }
    }

    /// They can.
    pub fn set_watched(&self) {
        self.watched.store(true, Ordering::Release);
    }

    /// Whether the kernel has come back from a call, and the device is waited for.
    pub fn waits_for_device(&self) -> bool {
        self.waits_for_device.load(Ordering::Acquire)
    }

    /// Tells everyone that the memory is there, and may not be touched yet.
    pub fn tell_not_ready(&self, why: &NotReady) {
        self.waits_for_device.store(true, Ordering::Release);
        tracing::info!(device = &*self.name, %why, "a device is waited for");
        self.queue(What::NotReady(Arc::new(why.clone())));
        // Told every second, so that what is slow is told anew.
        self.subscribers.deliver(Duration::from_secs(1));
    }

    /// The device is not waited for any more.
    pub fn set_ready(&self) {
        self.waits_for_device.store(false, Ordering::Release);
    }

    /// The device, unless its lender is gone.
    pub fn exporter(&self) -> Result<Arc<dyn Exporter>> {
        self.exporter.upgrade().ok_or_else(|| {
            Error::new(Kind::Gone, "use a device", "the lender closed it").on(Arc::clone(&self.name))
        })
    }

    /// Everything of it that is exported.
    pub fn lent(&self) -> Vec<Arc<Lent>> {
        self.lent.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Some of its memory is exported.
    pub fn add(&self, lent: &Arc<Lent>) {
        let mut all = self.lent.lock();
        all.retain(|lent| lent.strong_count() > 0);
        all.push(Arc::downgrade(lent));
    }

    /// Adds to everyone's events; calls nobody.
    pub fn queue(&self, what: What) {
        self.subscribers.queue(&Event {
            device: Arc::clone(&self.name),
            generation: self.generation(),
            what,
        });
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("name", &self.name)
            .field("generation", &self.generation())
            .finish_non_exhaustive()
    }
}

/// Several devices, for messages.
pub(crate) fn names(entries: &[Arc<Entry>]) -> String {
    let names: Vec<&str> = entries.iter().map(|entry| &*entry.name).collect();
    names.join(", ")
}
