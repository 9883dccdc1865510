//! `LentDevice`: a device that is lent, as everyone but its lender has it.
//!
//! What takes memory back (resets, power, memory off, closing) is not here: it is the [`Lender`](crate::Lender)'s,
//! which tells everyone first.

use std::fmt;
#[cfg(feature = "vfio")]
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use peervram_backends::{
    CpuAccess, DmaBuf, DmaRanges, Error, Exporter, Kind, Mapping, NotReady, PciAddress, Region,
};

#[cfg(feature = "vfio")]
use peervram_backends::vfio;
#[cfg(feature = "vulkan")]
use peervram_backends::vulkan;

use crate::Result;

/// A device that is lent, by [`Lender::device`](crate::Lender::device): what can be seen of it and done with it
/// that takes nothing back.
///
/// ```compile_fail,E0599
/// # use peervram::{Lender, Result, backends::vfio};
/// fn behind_its_back(lender: &Lender<vfio::Device>) -> Result<()> {
///     lender.device().reset() // It blocks for importers that nobody told: `lender.reset(options)` tells them.
/// }
/// ```
/// ```compile_fail,E0599
/// # use peervram::{Lender, Result, backends::{Exporter, vfio}};
/// fn behind_its_back(lender: &Lender<vfio::Device>) -> Result<()> {
///     lender.device().close_device()
/// }
/// ```
/// ```
/// # use peervram::{Lender, Result, backends::{Region, vfio}};
/// fn vram(lender: &Lender<vfio::Device>) -> Result<&Region> {
///     lender.device().region(2)
/// }
/// ```
pub struct LentDevice<'l, E>(&'l E);

impl<E> Clone for LentDevice<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for LentDevice<'_, E> {}

impl<'l, E: Exporter> LentDevice<'l, E> {
    pub(crate) fn new(device: &'l E) -> Self {
        Self(device)
    }

    /// The device itself.
    #[cfg(all(test, feature = "host", not(feature = "shuttle")))]
    pub(crate) fn raw(self) -> &'l E {
        self.0
    }

    /// As [`Exporter::name`].
    pub fn name(self) -> String {
        self.0.name()
    }

    /// As [`Exporter::pci_address`].
    pub fn pci_address(self) -> Option<PciAddress> {
        self.0.pci_address()
    }

    /// As [`Exporter::regions`].
    pub fn regions(self) -> &'l [Region] {
        self.0.regions()
    }

    /// The region at `index`, with the meaning of a PCI BAR below 6 where the device is on the PCI bus.
    ///
    /// # Errors
    /// [`Kind::NotFound`] names the regions that there are.
    pub fn region(self, index: u32) -> Result<&'l Region> {
        let regions = self.0.regions();
        regions.iter().find(|region| region.index == index).ok_or_else(|| {
            let all: Vec<String> = regions.iter().map(|region| region.index.to_string()).collect();
            Error::new(Kind::NotFound, "find a region", format!("the device has no region {index}"))
                .on(self.0.name())
                .next(format!("its regions are {}", all.join(", ")))
        })
    }

    /// As [`Exporter::exports_new_memory`].
    pub fn exports_new_memory(self) -> bool {
        self.0.exports_new_memory()
    }

    /// As [`Exporter::map`]. The lender puts shadow memory under the mapping while the memory is away.
    ///
    /// # Errors
    /// As there.
    pub fn map(self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        self.0.map(ranges)
    }

    /// As [`Exporter::export`]: a dma-buf that the lender knows nothing of. Who imports it is not told before a
    /// revoke, which waits for them. [`Lender::export`](crate::Lender::export) is the way to lend.
    ///
    /// # Errors
    /// As there.
    pub fn export(self, ranges: &DmaRanges) -> Result<DmaBuf> {
        self.0.export(ranges)
    }

    /// As [`Exporter::check_reachable`].
    ///
    /// # Errors
    /// As there.
    pub fn check_reachable(self) -> Result<()> {
        self.0.check_reachable()
    }

    /// As [`Exporter::wait_until_ready`].
    ///
    /// # Errors
    /// As there.
    pub fn wait_until_ready(self, tell: &mut dyn FnMut(&NotReady)) -> Result<()> {
        self.0.wait_until_ready(tell)
    }

    /// As [`Exporter::cpu_access`].
    pub fn cpu_access(self, region_index: u32) -> CpuAccess {
        self.0.cpu_access(region_index)
    }
}

#[cfg(feature = "vfio")]
impl<'l, D: Exporter + AsRef<vfio::Device>> LentDevice<'l, D> {
    fn vfio(self) -> &'l vfio::Device {
        self.0.as_ref()
    }

    /// As [`vfio::Device::address`].
    pub fn address(self) -> PciAddress {
        self.vfio().address()
    }

    /// As [`vfio::Device::interface`].
    pub fn interface(self) -> Option<vfio::Interface> {
        self.vfio().interface()
    }

    /// As [`vfio::Device::address_space`].
    pub fn address_space(self) -> Option<&'l vfio::IoAddressSpace> {
        self.vfio().address_space()
    }

    /// As [`vfio::Device::is_adopted`].
    pub fn is_adopted(self) -> bool {
        self.vfio().is_adopted()
    }

    /// As [`vfio::Device::memory_enabled`].
    ///
    /// # Errors
    /// As there.
    pub fn memory_enabled(self) -> Result<bool> {
        self.vfio().memory_enabled()
    }

    /// As [`vfio::Device::power_state`].
    ///
    /// # Errors
    /// As there.
    pub fn power_state(self) -> Result<vfio::PowerState> {
        self.vfio().power_state()
    }

    /// As [`vfio::Device::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read(self, region_index: u32, offset_bytes: u64, into: &mut [u8]) -> Result<()> {
        self.vfio().read(region_index, offset_bytes, into)
    }
}

/// The descriptor, to be sent to another process. Whatever is done by it, nobody here hears of.
#[cfg(feature = "vfio")]
impl<D: AsRef<vfio::Device>> AsFd for LentDevice<'_, D> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_ref().as_fd()
    }
}

#[cfg(feature = "nvgrace")]
impl<'l> LentDevice<'l, crate::nvgrace::Device> {
    /// As [`nvgrace::Device::part`](crate::nvgrace::Device::part).
    pub fn part(self) -> Option<crate::nvgrace::Part> {
        self.0.part()
    }

    /// As [`nvgrace::Device::memories`](crate::nvgrace::Device::memories).
    pub fn memories(self) -> &'l [crate::nvgrace::Memory] {
        self.0.memories()
    }
}

#[cfg(feature = "vulkan")]
impl<'l> LentDevice<'l, vulkan::DeviceMemory> {
    /// As [`vulkan::DeviceMemory::buffer`].
    pub fn buffer(self) -> &'l vulkan::Buffer {
        self.0.buffer()
    }
}

impl<E: Exporter> fmt::Debug for LentDevice<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LentDevice").field(&self.0.name()).finish()
    }
}
