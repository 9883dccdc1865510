//! `Export`: memory that was made a dma-buf, ready to be attached to.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use peervram_backends::topology::{Expected, MapType, Topology};
use peervram_backends::{
    Aperture, CpuAccess, DmaBuf, Error, Exporter, Importer, Kind, NotClosed, Owner, pci,
};

use crate::attachment::{AttachOptions, Attachment};
use crate::hook::guard_owner;
use crate::revoke::entry::Entry;
use crate::revoke::keeper::Keeper;
use crate::revoke::machine::ExportId;
use crate::revoke::{Event, Events, Subscription};
use crate::{Path, Result};

/// An exported range of memory.
///
/// It does not keep its device open: when the lender closes it, attachments refuse to be entered.
#[derive(Debug)]
pub struct Export(Arc<Lent>);

/// What an export and its attachments share.
pub(crate) struct Lent {
    id: ExportId,
    keeper: Arc<Keeper>,
    entry: Arc<Entry>,
    aperture: Aperture,
    /// Absent where the exporter cannot make one of these ranges; the reason is kept.
    dma_buf: Result<DmaBuf>,
    /// Somebody was given the dma-buf: who imports it by other means is not known here.
    is_handed_out: AtomicBool,
}

impl Export {
    pub(crate) fn new(
        keeper: &Arc<Keeper>,
        entry: &Arc<Entry>,
        device: &dyn Exporter,
        aperture: Aperture,
    ) -> Result<Self> {
        let dma_buf = match device.export(aperture.ranges()) {
            // Without a dma-buf the memory can still be lent by address.
            Err(error) if error.kind().cannot_run_here() => Err(error),
            other => Ok(other?),
        };
        let (keeper, entry) = (Arc::clone(keeper), Arc::clone(entry));
        let aperture = guard_owner(aperture);
        Ok(Self(Arc::clone(&keeper).export(&Arc::clone(&entry), |id| Lent {
            id,
            keeper,
            entry,
            aperture,
            dma_buf,
            is_handed_out: AtomicBool::new(false),
        })))
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
        self.0.entry.generation()
    }

    /// The dma-buf, to hand to a stack that this crate does not know.
    ///
    /// Who imports it by other means is not told before a revoke, and the revoke waits for it.
    ///
    /// # Errors
    /// Why there is none: the kernel is too old, or the memory cannot be exported.
    pub fn dma_buf(&self) -> Result<&DmaBuf, &Error> {
        self.0.is_handed_out.store(true, Ordering::Relaxed);
        self.0.dma_buf.as_ref()
    }

    /// Attaches `importer`, by the first path that works, and keeps the reasons why others did not. `options` are
    /// a [`Trust`](crate::Trust), or [`AttachOptions`].
    ///
    /// # Errors
    /// The reasons of all paths, with the kind and errno of the first; [`Kind::Revoked`],
    /// [`Kind::Busy`] or [`Kind::Gone`] where the memory is not there now.
    pub fn attach<I: Importer>(
        &self,
        importer: Arc<I>,
        options: impl Into<AttachOptions>,
    ) -> Result<Attachment<I>> {
        Attachment::new(Arc::clone(&self.0), importer, options.into())
    }

    /// Calls back with everything that happens to the memory from now on, until the subscription is
    /// dropped. See [`Event`] for what a callback may do.
    #[track_caller]
    pub fn on_event(&self, callback: impl Fn(&Event) + Send + Sync + 'static) -> Subscription {
        self.0.entry.subscribers.call(callback)
    }

    /// Keeps everything that happens to the memory from now on, to be polled for and taken.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn events(&self) -> Result<Events> {
        self.0.entry.subscribers.poll()
    }

    /// Closes the dma-buf on this thread; while the kernel is taking memory of the device back, which
    /// closing would wait for, on another. A dropped export is always closed by another thread, some
    /// time later.
    ///
    /// # Errors
    /// [`Kind::StillInUse`] while something is attached, with the export given back.
    pub fn close(self) -> Result<(), NotClosed<Self>> {
        let keeper = Arc::clone(&self.0.keeper);
        let mut lent = Arc::try_unwrap(self.0).map_err(|shared| {
            let error = Error::new(Kind::StillInUse, "close an export", "it is attached to")
                .on(&shared.entry.name)
                .next("detach its importers first");
            NotClosed::new(Self(shared), error)
        })?;
        let is_calling = keeper.is_calling(&lent.entry);
        let closed = Error::new(Kind::Gone, "use a dma-buf", "its export was closed");
        if let (Ok(dma_buf), false) = (std::mem::replace(&mut lent.dma_buf, Err(closed)), is_calling) {
            dma_buf.close();
        }
        Ok(())
    }
}

impl Lent {
    /// Its number, for the revoke machine.
    pub(crate) fn id(&self) -> ExportId {
        self.id
    }

    /// The device that it is memory of.
    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// Who takes its memory back.
    pub(crate) fn keeper(&self) -> &Arc<Keeper> {
        &self.keeper
    }

    /// The inode of its dma-buf, if it has one.
    pub(crate) fn inode(&self) -> Option<u64> {
        self.dma_buf.as_ref().ok()?.inode().ok()
    }

    /// Whether importers may have its dma-buf that this process knows nothing of.
    pub(crate) fn is_handed_out(&self) -> bool {
        self.is_handed_out.load(Ordering::Relaxed)
    }

    /// What is lent, and who answers for it.
    pub(crate) fn aperture(&self) -> &Aperture {
        &self.aperture
    }

    /// Imports by `path`, one without a copy.
    pub(crate) fn import<I: Importer>(&self, importer: &I, path: Path) -> Result<I::Memory> {
        match path {
            Path::Peer => {
                let dma_buf = self.dma_buf.as_ref().map_err(Error::clone)?;
                self.check_several_ranges(importer)?;
                importer.import(dma_buf).map_err(|error| self.point_to_route(error, importer))
            }
            Path::HostPointer => {
                let device = self.entry.exporter()?;
                importer.import_host_pointer(device.map(self.aperture.ranges())?)
            }
            Path::Staged => {
                Err(Error::new(Kind::InvalidInput, "import lent memory", "a copy is made, not imported"))
            }
        }
    }

    /// Refuses what the kernel would map wrongly: it gives every range the same IO addresses
    /// (`dma_buf_phys_vec_to_sgt`). VT-d then says EADDRINUSE; virtio-iommu says nothing, and the importer
    /// gets addresses with nothing behind them (both seen on Linux 7.3).
    fn check_several_ranges<I: Importer>(&self, importer: &I) -> Result<()> {
        if self.aperture.ranges().as_slice().len() < 2 {
            return Ok(());
        }
        let exporter = self.entry.exporter().ok().and_then(|device| device.pci_address());
        let (Some(exporter), Some(address)) = (exporter, importer.pci_address()) else { return Ok(()) };
        if !importer.governed_by_p2pdma() || !pci::is_translated(address) {
            return Ok(());
        }
        // Bridges that redirect (ACS) send requests up to the host bridge, though they are above both. Where
        // that may not be read, the kernel is asked.
        let expected =
            Topology::read_above(&[exporter, address])?.expected_map_type(exporter, address).expected;
        let may_stay_below = match &expected {
            Expected::Known(map_type) => *map_type == MapType::BusAddress,
            Expected::Unknown { possible, .. } => possible.contains(&MapType::BusAddress),
        };
        if may_stay_below {
            return Ok(());
        }
        let why = "the kernel maps only the first of several ranges through an IOMMU and a host bridge";
        Err(Error::new(Kind::RouteRefused, "import a dma-buf", why)
            .on(importer.name())
            .next(format!("export one range; what else would help: peervram route {exporter} {address}")))
    }

    /// A refused route is explained by a command that knows both ends.
    fn point_to_route<I: Importer>(&self, error: Error, importer: &I) -> Error {
        let exporter = self.entry.exporter().ok().and_then(|device| device.pci_address());
        match (exporter, importer.pci_address()) {
            (Some(exporter), Some(address)) if error.kind() == Kind::RouteRefused => {
                error.next(format!("peervram route {exporter} {address} says why, and what would change it"))
            }
            _ => error,
        }
    }

    /// Which device, for messages.
    pub(crate) fn device_name(&self) -> &str {
        &self.entry.name
    }

    /// What the CPU has of the memory when it is mapped. Of a device that is gone, nothing good.
    pub(crate) fn cpu_access(&self) -> CpuAccess {
        let region_index = self.aperture.ranges().region_index();
        self.entry.exporter().map_or(CpuAccess::Uncached, |device| device.cpu_access(region_index))
    }

    /// Makes what the device wrote visible to an importer.
    pub(crate) fn flush(&self) -> Result<()> {
        self.aperture.owner().map_or(Ok(()), |owner| owner.flush(self.aperture.ranges()))
    }

    /// Makes what an importer wrote visible to the device; says whether it is.
    pub(crate) fn invalidate(&self) -> bool {
        let told = self.tell("invalidate", |owner| owner.invalidate(self.aperture.ranges()));
        told.is_ok()
    }

    /// Stops the device's own work on the memory.
    ///
    /// # Errors
    /// What the owner says, which is in the log.
    pub(crate) fn quiesce(&self) -> Result<()> {
        self.tell("quiesce", |owner| owner.quiesce(self.aperture.ranges()))
    }

    /// Has the device's own work start again on memory whose content is unknown.
    pub(crate) fn resume(&self) -> Result<()> {
        self.aperture.owner().map_or(Ok(()), |owner| owner.resume(self.aperture.ranges()))
    }

    fn tell(&self, hook: &str, call: impl FnOnce(&dyn Owner) -> Result<()>) -> Result<()> {
        let Some(owner) = self.aperture.owner() else { return Ok(()) };
        call(owner)
            .inspect_err(|error| tracing::error!(%error, owner = owner.name(), hook, "an owner failed"))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.keeper.unexport(self.id);
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent")
            .field("device", &self.entry.name)
            .field("aperture", &self.aperture)
            .field("dma_buf", &self.dma_buf)
            .finish_non_exhaustive()
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
