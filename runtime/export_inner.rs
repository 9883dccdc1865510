//! `ExportInner`: what an [`Export`](crate::Export) and its attachments share.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use peervram_backends::topology::{Expected, MapType, SEVERAL_RANGES, Topology};
use peervram_backends::{Aperture, CpuAccess, DmaBuf, Error, Exporter, Importer, Kind, OnRevoke, Owner, pci};

use crate::foresight;
use crate::hook::guard_owner;
use crate::revoke::lending_device::LendingDevice;
use crate::revoke::machine::ExportId;
use crate::revoke::revoker::Revoker;
use crate::revoke::target::ExportedMemory;
use crate::{Path, Result};

/// Exported memory. Dropped with the last of its export and the attachments to it.
pub(crate) struct ExportInner {
    id: ExportId,
    revoker: Arc<Revoker>,
    device: Arc<LendingDevice>,
    aperture: Aperture,
    /// Where the exporter cannot make a dma-buf of these ranges, the reason. None once the export is closed, when nobody
    /// else has this.
    dma_buf: Option<Result<DmaBuf>>,
    /// The application has had the dma-buf: importers may have it that this process does not know.
    is_handed_out: AtomicBool,
}

impl ExportInner {
    /// Exports what `aperture` describes.
    ///
    /// # Errors
    /// As [`Exporter::export`]; but where no dma-buf can be made here, the memory can still be lent by address.
    pub fn new(
        revoker: &Arc<Revoker>,
        device: &Arc<LendingDevice>,
        exporter: &dyn Exporter,
        aperture: Aperture,
    ) -> Result<Arc<Self>> {
        let dma_buf = match exporter.export(aperture.ranges()) {
            Err(error) if error.kind().cannot_run_here() => Err(error),
            other => Ok(other?),
        };
        let aperture = guard_owner(aperture);
        Ok(revoker.export(device, |id| Self {
            id,
            revoker: Arc::clone(revoker),
            device: Arc::clone(device),
            aperture,
            dma_buf: Some(dma_buf),
            is_handed_out: AtomicBool::new(false),
        }))
    }

    /// Its number, for the revoke machine.
    pub fn id(&self) -> ExportId {
        self.id
    }

    /// The device that the memory is of.
    pub fn device(&self) -> &Arc<LendingDevice> {
        &self.device
    }

    /// The name of that device, for messages.
    pub fn device_name(&self) -> &str {
        &self.device.name
    }

    /// What takes the memory back.
    pub fn revoker(&self) -> &Arc<Revoker> {
        &self.revoker
    }

    /// What is lent, and its owner.
    pub fn aperture(&self) -> &Aperture {
        &self.aperture
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.aperture.ranges().size_bytes()
    }

    /// The dma-buf, for the application: importers may have it from now on that this process does not know.
    pub fn hand_out(&self) -> Result<&DmaBuf, &Error> {
        self.is_handed_out.store(true, Ordering::Relaxed);
        self.dma_buf_or_why().as_ref()
    }

    /// Takes the dma-buf out, to be closed; where there is one.
    pub fn take_dma_buf(&mut self) -> Option<DmaBuf> {
        self.dma_buf.take().and_then(Result::ok)
    }

    fn dma_buf_or_why(&self) -> &Result<DmaBuf> {
        self.dma_buf.as_ref().expect("the export is not closed while anybody has it")
    }

    /// Imports by `path`, one without a copy. `may_dare` says whether that may cost the importer its device, where
    /// nobody can say what the kernel will do.
    pub fn import<I: Importer>(
        &self,
        importer: &I,
        path: Path,
        may_dare: impl FnOnce() -> bool,
    ) -> Result<I::Memory> {
        match path {
            Path::Peer => {
                let dma_buf = self.dma_buf_or_why().as_ref().map_err(Error::clone)?;
                self.check_several_ranges(importer)?;
                self.announce(importer)?;
                let imported =
                    foresight::check(self, importer, may_dare).and_then(|()| importer.import(dma_buf));
                imported.map_err(|error| self.point_to_route(error, importer))
            }
            Path::HostPointer => {
                let device = self.device.exporter()?;
                importer.import_host_pointer(device.map(self.aperture.ranges())?)
            }
            Path::Staged => {
                Err(Error::new(Kind::InvalidInput, "import lent memory", "a copy is made, not imported"))
            }
        }
    }

    /// Tells the exporter who is about to import.
    fn announce<I: Importer>(&self, importer: &I) -> Result<()> {
        let must_be_freed = importer.on_revoke() == OnRevoke::FreeBefore;
        self.device.exporter()?.begin_import(self.aperture.ranges(), &importer.name(), must_be_freed)
    }

    /// Refuses what a kernel with the fault [`SEVERAL_RANGES`] would map wrongly. VT-d then says EADDRINUSE; virtio-iommu says
    /// nothing, and the importer gets addresses with nothing behind them (both seen on Linux 7.3).
    fn check_several_ranges<I: Importer>(&self, importer: &I) -> Result<()> {
        if self.aperture.ranges().as_slice().len() < 2 {
            return Ok(());
        }
        let exporter = self.device.exporter().ok().and_then(|device| device.pci_address());
        let (Some(exporter), Some(address)) = (exporter, importer.pci_address()) else { return Ok(()) };
        if !importer.governed_by_p2pdma() || !pci::is_translated(address) {
            return Ok(());
        }
        // Bridges that redirect (ACS) send requests up to the host bridge, though they are above both. Where
        // that may not be read, the kernel is asked.
        let topology = Topology::read_above(&[exporter, address])?;
        if !topology.has_fault(&SEVERAL_RANGES) {
            return Ok(());
        }
        let expected = topology.expected_map_type(exporter, address).expected;
        let may_stay_below = match &expected {
            Expected::Known(map_type) => *map_type == MapType::BusAddress,
            Expected::Unknown { possible, .. } => possible.contains(&MapType::BusAddress),
        };
        if may_stay_below {
            return Ok(());
        }
        Err(Error::new(Kind::RouteRefused, "import a dma-buf", SEVERAL_RANGES.what)
            .on(importer.name())
            .next(format!("export one range; what else would help: peervram route {exporter} {address}")))
    }

    /// Adds to the error of a refused route the command that explains it.
    fn point_to_route<I: Importer>(&self, error: Error, importer: &I) -> Error {
        let exporter = self.device.exporter().ok().and_then(|device| device.pci_address());
        match (exporter, importer.pci_address()) {
            (Some(exporter), Some(address)) if error.kind() == Kind::RouteRefused => {
                error.next(format!("peervram route {exporter} {address} says why, and what would change it"))
            }
            _ => error,
        }
    }

    /// How the CPU has the memory when it is mapped. Of a device that is gone, uncached.
    pub fn cpu_access(&self) -> CpuAccess {
        let region_index = self.aperture.ranges().region_index();
        self.device.exporter().map_or(CpuAccess::Uncached, |device| device.cpu_access(region_index))
    }

    /// Makes what the device wrote visible to an importer.
    pub fn flush(&self) -> Result<()> {
        self.aperture.owner().map_or(Ok(()), |owner| owner.flush(self.aperture.ranges()))
    }

    /// Makes what an importer wrote visible to the device. Returns whether it is.
    pub fn invalidate(&self) -> bool {
        let told = self.tell_owner("invalidate", |owner| owner.invalidate(self.aperture.ranges()));
        told.is_ok()
    }

    fn tell_owner(&self, hook: &str, call: impl FnOnce(&dyn Owner) -> Result<()>) -> Result<()> {
        let Some(owner) = self.aperture.owner() else { return Ok(()) };
        call(owner)
            .inspect_err(|error| tracing::error!(%error, owner = owner.name(), hook, "an owner failed"))
    }
}

impl ExportedMemory for ExportInner {
    fn quiesce(&self) -> Result<()> {
        self.tell_owner("quiesce", |owner| owner.quiesce(self.aperture.ranges()))
    }

    fn resume(&self) -> Result<()> {
        self.aperture.owner().map_or(Ok(()), |owner| owner.resume(self.aperture.ranges()))
    }

    fn inode(&self) -> Option<u64> {
        self.dma_buf_or_why().as_ref().ok()?.inode().ok()
    }

    fn is_handed_out(&self) -> bool {
        self.is_handed_out.load(Ordering::Relaxed)
    }
}

impl Drop for ExportInner {
    fn drop(&mut self) {
        self.revoker.unexport(self.id);
        // The descriptor goes first: what an exporter keeps for it is not needed any more.
        drop(self.dma_buf.take());
        if let Ok(exporter) = self.device.exporter() {
            exporter.end_export(self.aperture.ranges());
        }
    }
}

impl fmt::Debug for ExportInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExportInner")
            .field("device", &self.device.name)
            .field("aperture", &self.aperture)
            .field("dma_buf", &self.dma_buf)
            .finish_non_exhaustive()
    }
}
