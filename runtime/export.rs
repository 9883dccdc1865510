//! `Export`: memory that was made a dma-buf, ready to be attached to.

use std::sync::Arc;

use peervram_backends::{Aperture, DmaBuf, Error, Exporter, Importer, Kind, NotClosed};

use crate::Result;
use crate::attach_options::{AttachOptions, NotAttached};
use crate::attachment::Attachment;
use crate::export_inner::ExportInner;
use crate::revoke::lending_device::LendingDevice;
use crate::revoke::revoker::Revoker;
use crate::revoke::{Event, Events, Subscription};

/// An exported range of memory.
///
/// It does not keep its device open: when the lender closes it, attachments refuse to be entered.
#[derive(Debug)]
pub struct Export(Arc<ExportInner>);

impl Export {
    pub(crate) fn new(
        revoker: &Arc<Revoker>,
        device: &Arc<LendingDevice>,
        exporter: &dyn Exporter,
        aperture: Aperture,
    ) -> Result<Self> {
        Ok(Self(ExportInner::new(revoker, device, exporter, aperture)?))
    }

    /// What it shares with its attachments.
    #[cfg(feature = "broker")]
    pub(crate) fn inner(&self) -> &Arc<ExportInner> {
        &self.0
    }

    /// What is exported, and who answers for it.
    pub fn aperture(&self) -> &Aperture {
        self.0.aperture()
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    /// The generation of the memory: how often it was taken back.
    pub fn generation(&self) -> u64 {
        self.0.device().generation()
    }

    /// The dma-buf, to hand to a stack that this crate does not know.
    ///
    /// Who imports it by other means is not told before a revoke, and the revoke waits for it.
    ///
    /// # Errors
    /// Why there is none: the kernel is too old, or the memory cannot be exported.
    pub fn dma_buf(&self) -> Result<&DmaBuf, &Error> {
        self.0.hand_out()
    }

    /// Attaches `importer`, by the first path that works, and keeps the reasons why others did not. `options` are
    /// a [`Trust`](crate::Trust), or [`AttachOptions`].
    ///
    /// # Errors
    /// The reasons of all paths, as data in [`NotAttached::refused`] and, with the kind and errno of the first, as the
    /// [`Error`] that `?` makes of it; [`Kind::Revoked`], [`Kind::Busy`] or [`Kind::Gone`] where the memory is not there
    /// now.
    pub fn attach<I: Importer>(
        &self,
        importer: Arc<I>,
        options: impl Into<AttachOptions>,
    ) -> Result<Attachment<I>, NotAttached> {
        Attachment::new(&self.0, importer, options.into())
    }

    /// Calls back with everything that happens to the memory from now on, until the subscription is
    /// dropped. See [`Event`] for what a callback may do.
    #[track_caller]
    pub fn on_event(&self, callback: impl Fn(&Event) + Send + Sync + 'static) -> Subscription {
        self.0.device().subscribers.call(callback)
    }

    /// Keeps everything that happens to the memory from now on, to be polled for and taken.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn events(&self) -> Result<Events> {
        self.0.device().subscribers.poll()
    }

    /// Closes the dma-buf on this thread; while the kernel is taking memory of the device back, which
    /// closing would wait for, on another. A dropped export is always closed by another thread, some
    /// time later.
    ///
    /// # Errors
    /// [`Kind::StillInUse`] while something is attached, with the export given back.
    pub fn close(self) -> Result<(), NotClosed<Self>> {
        let revoker = Arc::clone(self.0.revoker());
        let mut inner = Arc::try_unwrap(self.0).map_err(|shared| {
            let error = Error::new(Kind::StillInUse, "close an export", "it is attached to")
                .on(shared.device_name())
                .next("detach its importers first");
            NotClosed::new(Self(shared), error)
        })?;
        let is_calling = revoker.is_calling(inner.device());
        if let (Some(dma_buf), false) = (inner.take_dma_buf(), is_calling) {
            dma_buf.close();
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "host"))]
pub(crate) mod tests {
    use peervram_backends::host::{Backing, HostMemory};
    use peervram_backends::{DmaRanges, OnRevoke};

    use super::*;
    use crate::Outcome;
    use crate::{Direction, Lender, Trust};

    /// Takes any dma-buf and does nothing with it.
    pub(crate) struct Anyone;

    impl Importer for Anyone {
        type Memory = ();

        fn name(&self) -> String {
            "anyone".into()
        }

        fn on_revoke(&self) -> OnRevoke {
            OnRevoke::Reimport
        }

        fn governed_by_p2pdma(&self) -> bool {
            false
        }

        fn import(&self, _: &DmaBuf) -> Result<()> {
            Ok(())
        }

        fn release(&self, (): ()) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_attached_to_is_not_closed() {
        let memory = HostMemory::with_backing(4096, Backing::Memfd).unwrap();
        let ranges = DmaRanges::whole(memory.region()).unwrap();
        let lender = Lender::new(memory);
        let export = lender.export(Aperture::unowned(ranges)).unwrap();
        let attachment = export.attach(Arc::new(Anyone), Trust::Unverified).unwrap();
        let (export, error) = export.close().unwrap_err().into_parts();
        assert_eq!(error.kind(), Kind::StillInUse);
        assert_eq!(error.device(), Some("host memory"));
        assert_eq!(attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
        attachment.detach().unwrap();
        export.close().unwrap();
    }
}
