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

    fn begin_import(&self, ranges: &DmaRanges, importer: &str, must_be_freed: bool) -> Result<()> {
        let begin = || self.inner.begin_import(ranges, importer, must_be_freed);
        call(Hook::ExporterBeginImport, || self.inner.name(), begin)
    }

    fn end_export(&self, ranges: &DmaRanges) {
        ask(Hook::ExporterEndExport, || self.inner.name(), (), || self.inner.end_export(ranges));
    }

    fn exports_new_memory(&self) -> bool {
        let asked = || self.inner.exports_new_memory();
        ask(Hook::ExporterExportsNewMemory, || self.inner.name(), false, asked)
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
