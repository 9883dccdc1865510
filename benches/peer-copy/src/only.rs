//! `Only`: an importer that takes one path and no other, so that each can be measured.

use std::sync::Arc;

use peervram::backends::{DmaBuf, Engine, Importer, Mapping, OnRevoke, PciAddress};
use peervram::{Error, Kind, Path, Result};

/// An importer, held to one path.
pub struct Only<I> {
    /// The importer.
    pub importer: Arc<I>,
    /// The path.
    pub path: Path,
}

impl<I: Importer> Only<I> {
    fn check(&self, path: Path) -> Result<()> {
        if self.path == path {
            return Ok(());
        }
        Err(Error::new(Kind::Unsupported, "import", "another path is measured").on(self.name()))
    }
}

impl<I: Importer> Importer for Only<I> {
    type Memory = I::Memory;

    fn name(&self) -> String {
        self.importer.name()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.importer.pci_address()
    }

    fn driver(&self) -> Option<String> {
        self.importer.driver()
    }

    fn on_revoke(&self) -> OnRevoke {
        self.importer.on_revoke()
    }

    fn governed_by_p2pdma(&self) -> bool {
        self.importer.governed_by_p2pdma()
    }

    fn import(&self, dma_buf: &DmaBuf) -> Result<I::Memory> {
        self.check(Path::Peer)?;
        self.importer.import(dma_buf)
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<I::Memory> {
        self.check(Path::HostPointer)?;
        self.importer.import_host_pointer(mapping)
    }

    fn stage(&self, size_bytes: u64) -> Result<I::Memory> {
        self.check(Path::Staged)?;
        self.importer.stage(size_bytes)
    }

    fn host_memory(&self, memory: &I::Memory) -> Option<Arc<Mapping>> {
        self.importer.host_memory(memory)
    }

    fn engines(&self) -> Vec<&dyn Engine<I::Memory>> {
        self.importer.engines()
    }

    fn engine_names(&self) -> Vec<String> {
        self.importer.engine_names()
    }

    fn release(&self, memory: I::Memory) -> Result<()> {
        self.importer.release(memory)
    }
}
