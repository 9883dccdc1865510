//! `Export`: memory that was made a dma-buf, ready to be attached to.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use peervram_backends::{Aperture, DmaBuf, Error, Exporter, Importer, Kind, OnRevoke, Owner, pci};

use crate::attachment::Attachment;
use crate::gate::Gate;
use crate::{Path, Result, Trust};

/// An exported range of memory.
///
/// It does not keep its device open: when the lender closes it, attachments refuse to be entered.
#[derive(Debug)]
pub struct Export(Arc<Lent>);

/// What an export and its attachments share.
pub(crate) struct Lent {
    device: Weak<dyn Exporter>,
    device_name: Arc<str>,
    pub(crate) gate: Arc<Gate>,
    aperture: Aperture,
    /// Absent where the exporter cannot make one of these ranges; the reason is kept.
    dma_buf: Result<DmaBuf>,
    /// Imports that must be freed before a revoking call.
    free_before: AtomicUsize,
}

impl Export {
    pub(crate) fn new(
        device: &Arc<dyn Exporter>,
        device_name: Arc<str>,
        gate: Arc<Gate>,
        aperture: Aperture,
    ) -> Result<Self> {
        let dma_buf = match device.export(aperture.ranges()) {
            // Without a dma-buf the memory can still be lent by address.
            Err(error) if error.kind().cannot_run_here() => Err(error),
            other => Ok(other?),
        };
        Ok(Self(Arc::new(Lent {
            device: Arc::downgrade(device),
            device_name,
            gate,
            aperture,
            dma_buf,
            free_before: AtomicUsize::new(0),
        })))
    }

    pub(crate) fn lent(&self) -> &Arc<Lent> {
        &self.0
    }

    /// What is exported, and who answers for it.
    pub fn aperture(&self) -> &Aperture {
        &self.0.aperture
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.0.aperture.ranges().size_bytes()
    }

    /// The generation of the memory: how often it was taken back.
    pub fn generation(&self) -> u64 {
        self.0.gate.generation()
    }

    /// The dma-buf, to hand to a stack that this crate does not know.
    ///
    /// Who imports it by other means is not told before a revoke, and the revoke waits for it.
    ///
    /// # Errors
    /// Why there is none: the kernel is too old, or the memory cannot be exported.
    pub fn dma_buf(&self) -> Result<&DmaBuf, &Error> {
        self.0.dma_buf.as_ref()
    }

    /// Attaches `importer`, by the first path that works, and keeps the reasons why others did not.
    ///
    /// # Errors
    /// The reasons of all paths, with the kind and errno of the first.
    pub fn attach<I: Importer>(&self, importer: Arc<I>, trust: Trust) -> Result<Attachment<I>> {
        Attachment::new(Arc::clone(&self.0), importer, trust)
    }

    /// Closes the dma-buf on this thread, which blocks while a revoke of its device is in flight.
    /// A dropped export is closed by a thread of its own instead, some time later.
    ///
    /// # Errors
    /// [`Kind::StillInUse`] while something is attached, with the export given back.
    pub fn close(self) -> Result<(), (Self, Error)> {
        let lent = Arc::try_unwrap(self.0).map_err(|shared| {
            let error = Error::new(Kind::StillInUse, "close an export", "it is attached to")
                .on(shared.device_name())
                .next("detach its importers first");
            (Self(shared), error)
        })?;
        if let Ok(dma_buf) = lent.dma_buf {
            dma_buf.close();
        }
        Ok(())
    }
}

impl Lent {
    /// Imports by `path`. Pairs with [`Lent::release`].
    pub(crate) fn import<I: Importer>(&self, importer: &I, path: Path) -> Result<I::Memory> {
        let memory = self.import_by(importer, path)?;
        if importer.on_revoke() == OnRevoke::FreeBefore {
            self.free_before.fetch_add(1, Ordering::Relaxed);
        }
        Ok(memory)
    }

    /// Frees an import of `importer`.
    pub(crate) fn release<I: Importer>(&self, importer: &I, memory: I::Memory) -> Result<()> {
        let result = importer.release(memory);
        if importer.on_revoke() == OnRevoke::FreeBefore {
            self.free_before.fetch_sub(1, Ordering::Release);
        }
        result
    }

    /// How many imports must be freed before a revoking call: it would wait for them without a limit,
    /// or leave them in place.
    pub(crate) fn free_before(&self) -> usize {
        self.free_before.load(Ordering::Acquire)
    }

    fn import_by<I: Importer>(&self, importer: &I, path: Path) -> Result<I::Memory> {
        match path {
            Path::Peer => {
                let dma_buf = self.dma_buf.as_ref().map_err(Error::clone)?;
                self.check_several_ranges(importer)?;
                importer.import(dma_buf)
            }
            Path::HostPointer => {
                let device = self.device.upgrade().ok_or_else(|| {
                    Error::new(Kind::Gone, "map memory", "the lender closed the device").on(&self.device_name)
                })?;
                importer.import_host_pointer(device.map(self.aperture.ranges())?)
            }
        }
    }

    /// Refuses what the kernel would map wrongly: it gives every range the same IO addresses
    /// (`dma_buf_phys_vec_to_sgt`). VT-d then says EADDRINUSE; virtio-iommu says nothing, and the importer
    /// gets addresses with nothing behind them (both seen on Linux 7.3).
    fn check_several_ranges<I: Importer>(&self, importer: &I) -> Result<()> {
        let exporter = self.device.upgrade().and_then(|device| device.pci_address());
        let (Some(exporter), Some(address)) = (exporter, importer.pci_address()) else { return Ok(()) };
        let several = self.aperture.ranges().as_slice().len() > 1;
        if several
            && importer.governed_by_p2pdma()
            && pci::is_translated(address)
            && !pci::share_a_bridge(exporter, address)
        {
            let why = "the kernel maps only the first of several ranges through an IOMMU and a host bridge";
            return Err(Error::new(Kind::RouteRefused, "import a dma-buf", why)
                .on(importer.name())
                .next("export one range, put both devices behind one PCIe switch, or boot with iommu=pt"));
        }
        Ok(())
    }

    /// Which device, for messages.
    pub(crate) fn device_name(&self) -> &str {
        &self.device_name
    }

    /// Makes what the device wrote visible to an importer.
    pub(crate) fn flush(&self) -> Result<()> {
        self.aperture.owner().map_or(Ok(()), |owner| owner.flush(self.aperture.ranges()))
    }

    /// Makes what an importer wrote visible to the device.
    pub(crate) fn invalidate(&self) {
        self.tell("invalidate", |owner| owner.invalidate(self.aperture.ranges()));
    }

    /// Stops the device's own work on the memory.
    pub(crate) fn quiesce(&self) {
        self.tell("quiesce", |owner| owner.quiesce(self.aperture.ranges()));
    }

    fn tell(&self, hook: &str, call: impl FnOnce(&dyn Owner) -> Result<()>) {
        if let Some(owner) = self.aperture.owner()
            && let Err(error) = call(owner)
        {
            tracing::error!(%error, owner = owner.name(), hook, "an owner failed");
        }
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent")
            .field("device", &self.device_name)
            .field("aperture", &self.aperture)
            .field("dma_buf", &self.dma_buf)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, feature = "host"))]
mod tests {
    use peervram_backends::host::{Backing, HostMemory};
    use peervram_backends::{DmaRanges, OnRevoke};

    use super::*;
    use crate::Lender;

    /// Takes any dma-buf and does nothing with it.
    struct Anyone;

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
        let (export, error) = export.close().unwrap_err();
        assert_eq!(error.kind(), Kind::StillInUse);
        assert_eq!(error.device(), Some("host memory"));
        attachment.enter().unwrap().finish();
        attachment.detach().unwrap();
        export.close().map_err(|(_, error)| error).unwrap();
    }
}
