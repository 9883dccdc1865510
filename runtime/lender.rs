//! `Lender`: a device whose memory we lend, and the only one who takes it back.
//!
//! Every call that revokes (reset, memory off, close) goes through here, because the order matters:
//! the gate closes, those inside finish, the owners quiesce, and only then the kernel is asked. A
//! revoking call made on the device directly would block for importers that nobody told.

use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;

use parking_lot::Mutex;
use peervram_backends::{Aperture, Exporter};
#[cfg(feature = "vfio")]
use peervram_backends::{Error, Kind, vfio};

use crate::Result;
use crate::export::{Export, Lent};
use crate::gate::{Gate, RevokeCause};

/// A device, or its stand-in, that lends memory.
///
/// Dropping it closes the gate of everything it lent. The device itself closes then, unless a
/// mapping of its memory is still alive; [`Lender::close`] says so instead.
#[derive(Debug)]
pub struct Lender<E: Exporter + 'static> {
    device: Option<Arc<E>>,
    /// The device's name, shared by all exports, which outlive the device. Spelling it anew was over
    /// a third of what the library adds to a crossing.
    name: Arc<str>,
    gate: Arc<Gate>,
    lent: Mutex<Vec<Weak<Lent>>>,
}

impl<E: Exporter + 'static> Lender<E> {
    /// Lends memory of `device`. If its memory cannot be reached now, nothing can be entered until
    /// it is switched on.
    pub fn new(device: E) -> Self {
        let gate = Arc::new(Gate::open());
        if let Err(error) = device.check_reachable() {
            tracing::warn!(%error, "lending memory that cannot be reached");
            gate.close(RevokeCause::MemoryDisabled);
        }
        let name = device.name().into();
        Self { device: Some(Arc::new(device)), name, gate, lent: Mutex::default() }
    }

    /// The device. Do not reset it or switch its memory off behind the lender's back.
    pub fn device(&self) -> &E {
        // Empty only inside `close`, which consumes the lender.
        self.device.as_ref().expect("a lender has its device")
    }

    /// Exports what `aperture` describes. The export does not keep the device open.
    ///
    /// # Errors
    /// As [`Exporter::export`].
    pub fn export(&self, aperture: Aperture) -> Result<Export> {
        let device: Arc<dyn Exporter> =
            Arc::clone(self.device.as_ref().expect("a lender has its device")) as _;
        let export = Export::new(&device, Arc::clone(&self.name), Arc::clone(&self.gate), aperture)?;
        let mut lent = self.lent.lock();
        lent.retain(|lent| lent.strong_count() > 0);
        lent.push(Arc::downgrade(export.lent()));
        Ok(export)
    }

    /// Tells every owner to stop its device's work on lent memory.
    fn quiesce(&self) {
        for lent in self.lent.lock().iter().filter_map(Weak::upgrade) {
            lent.quiesce();
        }
    }
}

#[cfg(feature = "vfio")]
impl Lender<vfio::Device> {
    /// Switches the device's memory decoding.
    ///
    /// Off takes everything back: it waits up to `timeout` until nobody is inside, then makes the
    /// call, which blocks until the kernel's importers have unmapped. On opens the gate with the
    /// next generation; attachments of earlier ones are renewed with
    /// [`Attachment::renew`](crate::Attachment::renew).
    ///
    /// # Errors
    /// [`Kind::TimedOut`] where somebody stayed inside, [`Kind::StillInUse`] where an attachment must be
    /// detached first ([`OnRevoke::FreeBefore`](peervram_backends::OnRevoke::FreeBefore)); nothing was
    /// revoked then. Otherwise what the device says.
    pub fn set_memory_enabled(&self, enabled: bool, timeout: Duration) -> Result<()> {
        if enabled == self.device().memory_enabled()? {
            return Ok(());
        }
        if enabled {
            self.device().set_memory_enabled(true)?;
            self.gate.advance(true);
            return Ok(());
        }
        self.revoke(RevokeCause::MemoryDisabled, timeout, |device| device.set_memory_enabled(false))
    }

    /// Resets the device. Its memory's content is unknown afterwards. As
    /// [`set_memory_enabled`](Lender::set_memory_enabled), off and on.
    ///
    /// # Errors
    /// [`Kind::TimedOut`] and [`Kind::StillInUse`] as there; nothing was revoked then. Otherwise what
    /// the device says; then everything was revoked all the same.
    pub fn reset(&self, timeout: Duration) -> Result<()> {
        self.revoke(RevokeCause::Reset, timeout, vfio::Device::reset)
    }

    /// Closes the device, so that another process can open it. Its dma-bufs are dead for good then.
    ///
    /// # Errors
    /// [`Kind::TimedOut`] or [`Kind::StillInUse`], with the lender given back. The gate is open again
    /// then: nothing was revoked.
    pub fn close(mut self, timeout: Duration) -> Result<(), (Self, Error)> {
        if let Err(error) = self.drain(RevokeCause::ExporterGone, timeout) {
            return Err((self, error));
        }
        self.quiesce();
        let device = match self.device.take().map(Arc::try_unwrap) {
            Some(Ok(device)) => device,
            // Only who is inside the gate holds it, and nobody is.
            Some(Err(shared)) => {
                let error = Error::new(Kind::StillInUse, "close a VFIO device", "another thread holds it")
                    .on(shared.address());
                self.device = Some(shared);
                self.gate.reopen();
                return Err((self, error));
            }
            None => return Ok(()),
        };
        device.close().map_err(|(device, error)| {
            self.device = Some(Arc::new(device));
            self.gate.reopen();
            (self, error)
        })
    }

    /// Takes everything back around `call`. The generation moves on whether or not it succeeds: a
    /// revoking call that fails has revoked first (`vfio_pci_core_ioctl_reset`).
    fn revoke(
        &self,
        cause: RevokeCause,
        timeout: Duration,
        call: impl FnOnce(&vfio::Device) -> Result<()>,
    ) -> Result<()> {
        self.drain(cause, timeout)?;
        self.quiesce();
        let result = call(self.device());
        self.gate.advance(self.device().check_reachable().is_ok());
        result
    }

    fn drain(&self, cause: RevokeCause, timeout: Duration) -> Result<()> {
        self.gate.close(cause);
        let free_before: usize =
            self.lent.lock().iter().filter_map(Weak::upgrade).map(|lent| lent.free_before()).sum();
        if free_before > 0 {
            self.gate.reopen();
            let why = format!("{free_before} attachment(s) must be detached first");
            return Err(Error::new(Kind::StillInUse, "take memory back", why)
                .on(self.device().address())
                .next("detach them: the kernel would wait for them, or leave them mapped (xe, type1)"));
        }
        match self.gate.wait_idle(timeout) {
            0 => Ok(()),
            inside => {
                self.gate.reopen();
                Err(Error::new(
                    Kind::TimedOut,
                    "take memory back",
                    format!("{inside} access(es) did not finish within {} ms", timeout.as_millis()),
                )
                .on(self.device().address())
                .next("finish what is in flight, or wait longer"))
            }
        }
    }
}

impl<E: Exporter + 'static> Drop for Lender<E> {
    fn drop(&mut self) {
        self.gate.close(RevokeCause::ExporterGone);
    }
}
