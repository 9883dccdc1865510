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
//! Not done here: interrupts, binding drivers, and any decision about *when* a device may be reset
//! or its memory switched off. Those calls revoke every dma-buf of the device and block until its
//! importers have let go.

mod address_space;
mod config_space;
mod container;
mod device;
mod dma_buf_export;
mod iova_allocator;
mod iova_mapping;
mod live_mappings;

pub use address_space::{Interface, IoAddressSpace};
pub use device::Device;
pub use dma_buf_export::{DmaBufSupport, check_kernel_exports_dma_bufs, kernel_release};
pub use iova_mapping::IovaMapping;
