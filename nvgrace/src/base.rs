//! `Base`: what a GPU's device is built on. Always the VFIO device, but in tests, which have no such GPU.

use peervram_backends::pci::Function;
use peervram_backends::{Exporter, PciAddress, Region, Result, vfio};

/// A device that its driver shows region by region.
pub trait Base: Exporter {
    /// As [`vfio::Device::address`].
    fn address(&self) -> PciAddress;

    /// What sysfs says of it now.
    ///
    /// # Errors
    /// As [`Function::read`].
    fn function(&self) -> Result<Function>;

    /// As [`vfio::Device::region`], with the length that is reported.
    ///
    /// # Errors
    /// As there.
    fn region(&self, index: u32) -> Result<&Region>;

    /// As [`vfio::Device::read`].
    ///
    /// # Errors
    /// As there.
    fn read(&self, region_index: u32, offset_bytes: u64, into: &mut [u8]) -> Result<()>;
}

impl Base for vfio::Device {
    fn address(&self) -> PciAddress {
        self.address()
    }

    fn function(&self) -> Result<Function> {
        Function::read(self.address())
    }

    fn region(&self, index: u32) -> Result<&Region> {
        self.region(index)
    }

    fn read(&self, region_index: u32, offset_bytes: u64, into: &mut [u8]) -> Result<()> {
        self.read(region_index, offset_bytes, into)
    }
}
