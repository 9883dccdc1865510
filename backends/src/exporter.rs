//! `Exporter`: who makes dma-bufs of its memory.

use std::sync::Arc;

use crate::{DmaBuf, DmaRanges, Mapping, PciAddress, Region, Result};

/// A device, or a stand-in for one, that lends memory.
///
/// Order of calls: [`regions`](Exporter::regions), [`DmaRanges::new`] on one of them, then
/// [`export`](Exporter::export) or [`map`](Exporter::map). An exporter outlives neither its
/// dma-bufs nor its mappings: the former die with it (the kernel revokes them for good), the
/// latter keep it open.
pub trait Exporter: Send + Sync {
    /// Which device, for messages: a PCI address, or what stands in for one.
    fn name(&self) -> String;

    /// Where it sits on the PCI bus, if it does.
    fn pci_address(&self) -> Option<PciAddress>;

    /// Its regions, absent ones (size zero) left out.
    fn regions(&self) -> &[Region];

    /// Makes a dma-buf of `ranges`. Does not block. The descriptor is the caller's.
    ///
    /// # Errors
    /// Why this device, this kernel or this region cannot be exported; nothing is left open.
    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf>;

    /// Maps `ranges` into this process, one after the other. Does not touch the memory.
    ///
    /// # Errors
    /// Why they cannot be mapped; nothing stays mapped.
    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>>;

    /// Whether the memory can be reached now.
    ///
    /// # Errors
    /// [`Kind::MemoryDisabled`](crate::Kind::MemoryDisabled) or [`Kind::Gone`](crate::Kind::Gone).
    fn check_reachable(&self) -> Result<()>;
}
