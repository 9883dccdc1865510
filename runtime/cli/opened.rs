//! `Opened`: the device that a command is about, as what it is: a VFIO device, or a GPU whose memory is coherent.

use std::sync::Arc;

use peervram::backends::{
    CpuAccess, DmaBuf, DmaRanges, Exporter, Interrupts, Mapping, NotReady, PciAddress, Region, vfio,
};
use peervram::{Result, nvgrace};

use super::arguments::largest_memory;
use peervram_programs::note;

/// A device of either kind.
pub enum Opened {
    Plain(vfio::Device),
    Coherent(nvgrace::Device),
}

impl Opened {
    /// Opens `address`, which resets it. What a GPU is waited for goes to standard error.
    pub fn open(address: PciAddress) -> Result<Self> {
        if !nvgrace::Device::is_bound(address) {
            return Ok(Self::Plain(vfio::Device::open(address)?));
        }
        let tell = &mut |why: &NotReady| note!("{address}: {why}");
        Ok(Self::Coherent(nvgrace::Device::open(address, tell)?))
    }

    /// The region at `index`, with the length that it has.
    pub fn region(&self, index: u32) -> Result<&Region> {
        match self {
            Self::Plain(device) => device.region(index),
            Self::Coherent(device) => device.region(index),
        }
    }

    /// The region that is VRAM.
    pub fn memory(&self) -> Result<&Region> {
        match self {
            Self::Coherent(device) if device.fall_back().is_none() => {
                device.region(device.usable()?.region_index)
            }
            _ => largest_memory(self.as_ref()),
        }
    }

    fn exporter(&self) -> &dyn Exporter {
        match self {
            Self::Plain(device) => device,
            Self::Coherent(device) => device,
        }
    }
}

impl AsRef<vfio::Device> for Opened {
    fn as_ref(&self) -> &vfio::Device {
        match self {
            Self::Plain(device) => device,
            Self::Coherent(device) => device.as_ref(),
        }
    }
}

impl Exporter for Opened {
    fn name(&self) -> String {
        self.exporter().name()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.exporter().pci_address()
    }

    fn regions(&self) -> &[Region] {
        self.exporter().regions()
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        self.exporter().export(ranges)
    }

    fn begin_import(&self, ranges: &DmaRanges, importer: &str, must_be_freed: bool) -> Result<()> {
        self.exporter().begin_import(ranges, importer, must_be_freed)
    }

    fn end_export(&self, ranges: &DmaRanges) {
        self.exporter().end_export(ranges);
    }

    fn exports_new_memory(&self) -> bool {
        self.exporter().exports_new_memory()
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        self.exporter().map(ranges)
    }

    fn check_reachable(&self) -> Result<()> {
        self.exporter().check_reachable()
    }

    fn wait_until_ready(&self, tell: &mut dyn FnMut(&NotReady)) -> Result<()> {
        self.exporter().wait_until_ready(tell)
    }

    fn cpu_access(&self, region_index: u32) -> CpuAccess {
        self.exporter().cpu_access(region_index)
    }

    fn provider_bar(&self, region_index: u32) -> u32 {
        self.exporter().provider_bar(region_index)
    }

    fn shadow(&self) -> Result<()> {
        self.exporter().shadow()
    }

    fn unshadow(&self) -> Result<()> {
        self.exporter().unshadow()
    }

    fn retire_mappings(&self) -> Result<()> {
        self.exporter().retire_mappings()
    }

    fn close_device(&self) -> Result<()> {
        self.exporter().close_device()
    }

    fn interrupts(&self) -> Result<Interrupts> {
        self.exporter().interrupts()
    }
}
