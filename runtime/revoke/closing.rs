//! Closing a device: everything is taken back for good, and the device let go.

use std::sync::Arc;
use std::time::Duration;

use peervram_backends::{Exporter, Kind};

use super::RevokeCause;
use super::call::{Call, Took};
use super::lending_device::LendingDevice;
use super::machine::{After, AtDeadline, Change, RevokeOptions};
use super::revoker::Revoker;
use crate::Result;
use crate::sync::{self, Thread, pause};

/// How long a lender that is dropped waits.
const PATIENCE: RevokeOptions = RevokeOptions {
    timeout: Duration::from_millis(500),
    at_deadline: AtDeadline::GoOn,
    call_limit: Duration::from_millis(500),
};

impl Revoker {
    /// Takes everything back for good and lets go of the device.
    ///
    /// # Errors
    /// As [`Revoker::change`].
    pub fn close(
        self: &Arc<Self>,
        device: &Arc<LendingDevice>,
        exporter: &Arc<dyn Exporter>,
        cause: RevokeCause,
        options: RevokeOptions,
    ) -> Result<()> {
        let exporter = Arc::clone(exporter);
        let call = Call {
            what: Change::Take(cause),
            tried: "close a device",
            devices: vec![Arc::clone(device)],
            is_made_here: false,
            make: Box::new(move || exporter.close_device().map(|()| Took::Memory)),
            after: Some(After::Closed),
        };
        self.change(call, options)
    }

    /// Closes a device whose lender is dropped: at once where that is possible, else on a thread of its own, as often
    /// as it takes. Where no thread can be started, one is tried for whenever something is detached.
    pub fn close_dropped(self: &Arc<Self>, device: &Arc<LendingDevice>, exporter: &Arc<dyn Exporter>) {
        if self.is_closed_now(device, exporter) {
            return;
        }
        // Whoever is in the way must not hold this thread, and the device must not be left open.
        self.orphans.lock().push((Arc::clone(device), Arc::clone(exporter)));
        self.close_orphans();
    }

    /// Starts a thread for each device that is to be closed and has none.
    pub(super) fn close_orphans(self: &Arc<Self>) {
        loop {
            let orphan = self.orphans.lock().pop();
            let Some((device, exporter)) = orphan else { return };
            let close = {
                let (revoker, device, exporter) =
                    (Arc::clone(self), Arc::clone(&device), Arc::clone(&exporter));
                move || {
                    while !revoker.is_closed_now(&device, &exporter) {
                        pause(PATIENCE.timeout);
                    }
                }
            };
            if let Err(error) = sync::start(Thread::Close, close) {
                tracing::error!(%error, device = &*device.name, "no thread to close a device on: it stays open");
                self.orphans.lock().push((device, exporter));
                return;
            }
        }
    }

    /// Tries to close a device. Returns whether it is closed, or the kernel is at it.
    fn is_closed_now(self: &Arc<Self>, device: &Arc<LendingDevice>, exporter: &Arc<dyn Exporter>) -> bool {
        match self.close(device, exporter, RevokeCause::ExporterGone, PATIENCE) {
            Ok(()) => true,
            Err(error) => matches!(error.kind(), Kind::Gone | Kind::Stuck),
        }
    }
}
