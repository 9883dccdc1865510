//! A guarded importer.

use std::sync::Arc;

use peervram_backends::{DmaBuf, Engine, Importer, Mapping, OnRefusal, OnRevoke, PciAddress};

use super::{Guarded, Hook, ask, call};
use crate::Result;

#[deny(clippy::missing_trait_methods)]
impl<I: Importer> Importer for Guarded<I> {
    type Memory = I::Memory;

    fn name(&self) -> String {
        ask(Hook::ImporterName, String::new, "an importer".into(), || self.inner.name())
    }

    fn pci_address(&self) -> Option<PciAddress> {
        ask(Hook::ImporterPciAddress, || self.inner.name(), None, || self.inner.pci_address())
    }

    fn driver(&self) -> Option<String> {
        ask(Hook::ImporterDriver, || self.inner.name(), None, || self.inner.driver())
    }

    fn on_revoke(&self) -> OnRevoke {
        self.on_revoke_once()
    }

    /// Of one that does not say: what is right for every driver.
    fn on_refusal(&self) -> OnRefusal {
        let asked = || self.inner.on_refusal();
        ask(Hook::ImporterOnRefusal, || self.inner.name(), OnRefusal::LosesDevice, asked)
    }

    fn governed_by_p2pdma(&self) -> bool {
        let asked = || self.inner.governed_by_p2pdma();
        ask(Hook::ImporterGovernedByP2pdma, || self.inner.name(), true, asked)
    }

    fn import(&self, dma_buf: &DmaBuf) -> Result<I::Memory> {
        call(Hook::ImporterImport, || self.inner.name(), || self.inner.import(dma_buf))
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<I::Memory> {
        let import = || self.inner.import_host_pointer(mapping);
        call(Hook::ImporterImportHostPointer, || self.inner.name(), import)
    }

    fn stage(&self, size_bytes: u64) -> Result<I::Memory> {
        call(Hook::ImporterStage, || self.inner.name(), || self.inner.stage(size_bytes))
    }

    fn host_memory(&self, memory: &I::Memory) -> Option<Arc<Mapping>> {
        ask(Hook::ImporterHostMemory, || self.inner.name(), None, || self.inner.host_memory(memory))
    }

    fn engines(&self) -> Vec<&dyn Engine<I::Memory>> {
        let count = ask(Hook::ImporterEngines, || self.inner.name(), 0, || self.inner.engines().len());
        self.engines.first(&self.inner, count)
    }

    fn engine_names(&self) -> Vec<String> {
        let asked = || self.inner.engine_names();
        ask(Hook::ImporterEngineNames, || self.inner.name(), Vec::new(), asked)
    }

    fn release(&self, memory: I::Memory) -> Result<()> {
        call(Hook::ImporterRelease, || self.inner.name(), || self.inner.release(memory))
    }
}
