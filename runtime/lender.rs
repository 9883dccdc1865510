//! `Lender`: a device whose memory we lend, and the only one who takes it back.
//!
//! Every call that revokes (reset, memory off, sleep, close) goes through here, because the order
//! matters: gates close, those inside finish, the owners quiesce, mapped memory is swapped for shadow
//! memory, and only then the kernel is asked. A revoking call made on the device directly would block for
//! importers that nobody told.

#[cfg(feature = "vfio")]
mod vfio;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use peervram_backends::{Aperture, Error, Exporter, Kind, NotClosed};

#[cfg(feature = "vfio")]
pub use vfio::ResetTogether;

use crate::Result;
use crate::export::Export;
use crate::hook::Guarded;
use crate::lent_device::LentDevice;
use crate::revoke::call::{Call, Took};
use crate::revoke::lending_device::LendingDevice;
use crate::revoke::machine::Change;
use crate::revoke::revoker::Revoker;
use crate::revoke::watch::{self, Watch, Watcher};
use crate::revoke::{Event, Events, RevokeCause, RevokeOptions, Subscription};

/// A device, or its stand-in, that lends memory.
///
/// Dropping it takes everything back for good and closes the device, whatever is late; it waits for
/// that up to a second. [`Lender::close`] says who is late instead.
pub struct Lender<E: Exporter + 'static> {
    device: Arc<E>,
    /// The same, with its hooks guarded.
    exporter: Arc<dyn Exporter>,
    revoker: Arc<Revoker>,
    lending: Arc<LendingDevice>,
    /// Ends with the lender.
    _watcher: Option<Watcher>,
}

impl<E: Exporter + 'static> Lender<E> {
    /// Lends memory of `device`. If its memory cannot be reached now, nothing can be attached until it
    /// is given back.
    ///
    /// Hears of the device's errors and of the kernel wanting it back from now on, where the device can
    /// tell ([`Exporter::interrupts`]): both take everything back, the second closes the device.
    pub fn new(device: E) -> Self {
        Self::with_revoker(Revoker::of_process(), device)
    }

    pub(crate) fn with_revoker(revoker: Arc<Revoker>, device: E) -> Self {
        let device = Arc::new(device);
        let exporter: Arc<dyn Exporter> = Arc::new(Guarded::new(Arc::clone(&device)));
        let reachable = exporter.check_reachable();
        if let Err(error) = &reachable {
            tracing::warn!(%error, "lending memory that cannot be reached");
        }
        let lending = revoker.add(&exporter, reachable.is_ok());
        let watcher = watch::interrupts(&revoker, &lending, &exporter);
        Self { device, exporter, revoker, lending, _watcher: watcher }
    }

    /// The device, without what would take its memory back.
    pub fn device(&self) -> LentDevice<'_, E> {
        LentDevice::new(&self.device)
    }

    /// Exports what `aperture` describes. The export does not keep the device open.
    ///
    /// # Errors
    /// As [`Exporter::export`]; [`Kind::Busy`] while the kernel is taking memory of the device back, which
    /// exporting would wait for.
    pub fn export(&self, aperture: Aperture) -> Result<Export> {
        if self.revoker.is_calling(&self.lending) {
            let why = "its memory is being taken back or given back now";
            return Err(Error::new(Kind::Busy, "export memory", why)
                .on(&self.lending.name)
                .next("wait for the event that ends it, and try again"));
        }
        Export::new(&self.revoker, &self.lending, &*self.exporter, aperture)
    }

    /// Whether revokes that others cause can be heard of.
    pub fn watch(&self) -> Watch {
        if self.lending.is_watched() { Watch::Watched } else { Watch::Unwatched }
    }

    /// How often the device's memory was taken back.
    pub fn generation(&self) -> u64 {
        self.lending.generation()
    }

    /// Calls back with everything that happens to the device's memory from now on, until the subscription
    /// is dropped. See [`Event`] for what a callback may do.
    #[track_caller]
    pub fn on_event(&self, callback: impl Fn(&Event) + Send + Sync + 'static) -> Subscription {
        self.lending.subscribers.call(callback)
    }

    /// Keeps everything that happens to the device's memory from now on, to be polled for and taken.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn events(&self) -> Result<Events> {
        self.lending.subscribers.poll()
    }

    /// Closes the device, so that another process can open it. Its dma-bufs are dead for good then, and
    /// mapped memory of it is shadow memory: all ones, and nobody's.
    ///
    /// # Errors
    /// Who is late, and nothing was taken back; or [`Kind::Stuck`], and it is closed
    /// when the kernel comes back. With the lender given back.
    pub fn close(self, options: impl Into<RevokeOptions>) -> Result<(), NotClosed<Self>> {
        // A lender that is closed already has nothing left to do.
        match self.end(options.into()) {
            Err(error) if error.kind() != Kind::Gone => Err(NotClosed::new(self, error)),
            _ => Ok(()),
        }
    }

    fn end(&self, options: RevokeOptions) -> Result<()> {
        self.revoker.close(&self.lending, &self.exporter, RevokeCause::ExporterGone, options)
    }

    /// Takes everything back around `call`, which may do what it likes with the memory or the device: for
    /// exporters that this crate has no call for, and for an operator who wants everyone out. `tried` says in
    /// messages what it is, as a verb phrase. Afterwards the memory is where
    /// [`Exporter::check_reachable`] says.
    ///
    /// # Errors
    /// Where somebody is late, or another revoke is under way, nothing was taken back. [`Kind::Stuck`]
    /// where `call` does not come back: it goes on. Otherwise what `call` says; everything was taken back all
    /// the same.
    pub fn revoke(
        &self,
        cause: RevokeCause,
        tried: &'static str,
        options: impl Into<RevokeOptions>,
        call: impl FnOnce(&E) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.change(Change::Take(cause), tried, options.into(), call)
    }

    /// Gives back what is away, by `call`, and lets in.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where it is not away; else as [`Lender::revoke`].
    pub fn restore(
        &self,
        tried: &'static str,
        call: impl FnOnce(&E) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.change(Change::Restore, tried, RevokeOptions::from(Duration::ZERO), call)
    }

    fn change(
        &self,
        what: Change,
        tried: &'static str,
        options: RevokeOptions,
        call: impl FnOnce(&E) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let device = Arc::clone(&self.device);
        let call = Call {
            what,
            tried,
            devices: vec![Arc::clone(&self.lending)],
            is_made_here: false,
            make: Box::new(move || call(&device).map(|()| Took::Memory)),
            after: None,
        };
        self.revoker.change(call, options)
    }
}

impl<E: Exporter + 'static> fmt::Debug for Lender<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lender")
            .field("device", &self.lending)
            .field("watch", &self.watch())
            .finish_non_exhaustive()
    }
}

impl<E: Exporter + 'static> Drop for Lender<E> {
    fn drop(&mut self) {
        self.revoker.close_dropped(&self.lending, &self.exporter);
    }
}
