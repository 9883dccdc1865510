//! `Importer`: who maps dma-bufs made by somebody else.

use std::sync::Arc;

use crate::{DmaBuf, Engine, Error, Kind, Mapping, PciAddress, Result};

/// What an import needs when the exporter takes its memory back and returns it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnRevoke {
    /// The import must be freed *before* the revoking call: the call would wait for it (xe), or the kernel would not
    /// take it away at all (type1), or while it is away everything else of the device fails (amdgpu). Right for all.
    FreeBefore,
    /// The driver maps again by itself at its next use, and what else its device does is not disturbed meanwhile (mlx5).
    SelfHeals,
    /// The import is dead afterwards and must be made again (virtio-gpu, iommufd, host pointers).
    Reimport,
}

/// What becomes of an importer where the kernel refuses to map what it has imported: the topology, mostly (EINVAL).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnRefusal {
    /// The import fails, and nothing else: it may be tried to see whether it works.
    ImportFails,
    /// Its device is lost, with all that was made of it: at the import (ANV on xe), or at the next submission (RADV).
    /// So nothing is imported that the kernel is expected to refuse.
    LosesDevice,
}

/// A device, or an application's Vulkan device, that maps dma-bufs.
///
/// A revoke may free an import on another thread than the one that made it.
pub trait Importer: Send + Sync + 'static {
    /// What an import is: a buffer object, a `VkBuffer` with its memory.
    type Memory: Send + Sync;

    /// Which device, for messages.
    fn name(&self) -> String;

    /// Where it sits on the PCI bus, if it does and that is known.
    fn pci_address(&self) -> Option<PciAddress> {
        None
    }

    /// The user-space driver behind it with its version, where that is known: another one may copy otherwise.
    fn driver(&self) -> Option<String> {
        None
    }

    /// What an import needs around a revoke.
    fn on_revoke(&self) -> OnRevoke;

    /// What becomes of it where the kernel refuses to map an import. A lender looks first where that would be its end.
    fn on_refusal(&self) -> OnRefusal {
        OnRefusal::ImportFails
    }

    /// Whether the kernel asks `pci_p2pdma_map_type` about this importer. Where it does not
    /// (iommufd, type1, a CPU), the topology between the devices forbids nothing.
    fn governed_by_p2pdma(&self) -> bool;

    /// Maps `dma_buf`. The descriptor stays the caller's: what a driver wants to own is duplicated.
    ///
    /// # Errors
    /// Which driver refused, and why. Nothing is left imported.
    fn import(&self, dma_buf: &DmaBuf) -> Result<Self::Memory>;

    /// Imports memory that is mapped into this process, for importers that are CPUs.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] unless the importer can.
    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<Self::Memory> {
        drop(mapping);
        Err(Error::new(Kind::Unsupported, "import a host pointer", "this importer takes dma-bufs only")
            .on(self.name()))
    }

    /// Memory of the importer's own (or host memory that it reaches), of `size_bytes`, a multiple of the
    /// page size: what lent memory is copied to where the importer cannot reach it.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] unless the importer can; else what its driver says.
    fn stage(&self, size_bytes: u64) -> Result<Self::Memory> {
        let _ = size_bytes;
        Err(Error::new(Kind::Unsupported, "make staging memory", "this importer has none").on(self.name()))
    }

    /// Where memory that [`stage`](Importer::stage) made is host memory: its mapping, which others can fill
    /// and empty without an engine of this importer. None where it is the device's own.
    fn host_memory(&self, memory: &Self::Memory) -> Option<Arc<Mapping>> {
        let _ = memory;
        None
    }

    /// The engines by which its device reaches an import, the one for bulk copies first. None where the
    /// device has none that this process may use: then nobody can tell what it sees.
    fn engines(&self) -> Vec<&dyn Engine<Self::Memory>> {
        Vec::new()
    }

    /// The names of the engines by which its device reaches an import, also of those that this process may not use.
    /// A test that was passed by all of them holds for this importer, whoever made it. Where the names are those of
    /// [`engines`](Importer::engines), there is nothing to say.
    fn engine_names(&self) -> Vec<String> {
        self.engines().iter().map(|engine| engine.name().to_owned()).collect()
    }

    /// Frees an import. The device must have finished with it.
    ///
    /// # Errors
    /// What the driver says; the import is gone all the same.
    fn release(&self, memory: Self::Memory) -> Result<()>;
}
