//! A guarded exporter.

use std::sync::Arc;

use peervram_backends::{
    CpuAccess, DmaBuf, DmaRanges, Exporter, Interrupts, Mapping, NotReady, PciAddress, Region,
};

use super::{Guarded, Hook, ask, call};
use crate::Result;

#[deny(clippy::missing_trait_methods)]
impl<E: Exporter> Exporter for Guarded<E> {
    fn name(&self) -> String {
        ask(Hook::ExporterName, String::new, "a device".into(), || self.inner.name())
    }

    fn pci_address(&self) -> Option<PciAddress> {
        ask(Hook::ExporterPciAddress, || self.inner.name(), None, || self.inner.pci_address())
    }

    fn regions(&self) -> &[Region] {
        ask(Hook::ExporterRegions, || self.inner.name(), &[], || self.inner.regions())
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        call(Hook::ExporterExport, || self.inner.name(), || self.inner.export(ranges))
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        call(Hook::ExporterMap, || self.inner.name(), || self.inner.map(ranges))
    }

    fn check_reachable(&self) -> Result<()> {
        call(Hook::ExporterCheckReachable, || self.inner.name(), || self.inner.check_reachable())
    }

    fn wait_until_ready(&self, tell: &mut dyn FnMut(&NotReady)) -> Result<()> {
        call(Hook::ExporterWaitUntilReady, || self.inner.name(), || self.inner.wait_until_ready(tell))
    }

    fn cpu_access(&self, region_index: u32) -> CpuAccess {
        let asked = || self.inner.cpu_access(region_index);
        ask(Hook::ExporterCpuAccess, || self.inner.name(), CpuAccess::Uncached, asked)
    }

    fn provider_bar(&self, region_index: u32) -> u32 {
        let asked = || self.inner.provider_bar(region_index);
        ask(Hook::ExporterProviderBar, || self.inner.name(), region_index, asked)
    }

    fn shadow(&self) -> Result<()> {
        call(Hook::ExporterShadow, || self.inner.name(), || self.inner.shadow())
    }

    fn unshadow(&self) -> Result<()> {
        call(Hook::ExporterUnshadow, || self.inner.name(), || self.inner.unshadow())
    }

    fn retire_mappings(&self) -> Result<()> {
        call(Hook::ExporterRetireMappings, || self.inner.name(), || self.inner.retire_mappings())
    }

    fn close_device(&self) -> Result<()> {
        call(Hook::ExporterCloseDevice, || self.inner.name(), || self.inner.close_device())
    }

    fn interrupts(&self) -> Result<Interrupts> {
        call(Hook::ExporterInterrupts, || self.inner.name(), || self.inner.interrupts())
    }
}
