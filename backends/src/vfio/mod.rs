//! VFIO: the exporter of a real device's memory, and the importer for a VFIO device's own DMA.
//!
//! [`Device::open`] takes whichever of VFIO's two interfaces the kernel has: the character device
//! with an iommufd, or the group with a container. Either way a device is opened *into* an
//! [`IoAddressSpace`], which several devices may share when one is to reach another's memory.
//!
//! Order of calls: [`Device::open`] -> [`regions`](crate::Exporter::regions) ->
//! [`DmaRanges::new`](crate::DmaRanges::new) -> [`export`](crate::Exporter::export) or
//! [`map`](crate::Exporter::map) -> ... -> [`Device::close`].
//!
//! An address space is also an importer: memory of another device becomes an [`IovaMapping`], which the
//! engines of the devices in it can reach.
//!
//! What takes memory back is in `config_space` (decoding), `power` and `reset`. Every such call revokes
//! every dma-buf of the device and **blocks without a limit** until its importers have let go. Mapped BARs
//! are to be shadowed around it ([`Exporter::shadow`](crate::Exporter::shadow)).
//!
//! A device that another process owns is *adopted* ([`Device::adopt`]): its memory can be exported and
//! mapped, and nothing about it can be changed.
//!
//! Not done here: the device's own interrupts, binding drivers, and any decision about *when* memory is
//! taken back.

mod address_space;
mod adopt;
mod capability;
mod close_device;
mod config_space;
mod container;
mod device;
mod dma_buf_export;
mod interrupts;
mod iova_allocator;
mod iova_mapping;
mod iova_ranges;
mod live_mappings;
mod power;
mod reset;

pub use address_space::{Interface, IoAddressSpace};
pub use device::Device;
pub use dma_buf_export::{DmaBufSupport, check_kernel_exports_dma_bufs, kernel_release};
pub use iova_mapping::IovaMapping;
pub use power::PowerState;

/// What these modules say of the kernel's headers, for the test that compiles it.
#[cfg(all(test, feature = "host"))]
pub(crate) fn header_claims() -> impl Iterator<Item = (&'static str, usize)> {
    (capability::claims().into_iter())
        .chain(iova_ranges::claims())
        .chain(power::claims())
        .chain(reset::claims())
}
