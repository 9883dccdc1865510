//! `Exporter`: who makes dma-bufs of its memory.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::{DmaBuf, DmaRanges, Mapping, PciAddress, Region, Result};

/// A device, or a stand-in for one, that lends memory.
///
/// Order of calls: [`regions`](Exporter::regions), [`DmaRanges::new`] on one of them, then
/// [`export`](Exporter::export) or [`map`](Exporter::map). An exporter outlives neither its
/// dma-bufs nor its mappings: the former die with it (the kernel revokes them for good), the
/// latter keep it open until they are [buried](Exporter::bury).
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

    /// Swaps every live mapping of this device for shadow memory ([`Mapping::shadow`]), and every mapping
    /// made until [`unshadow`](Exporter::unshadow). Call it while the memory can still be reached, before
    /// the call that takes it away. An exporter whose memory nobody takes away does nothing.
    ///
    /// # Errors
    /// The first mapping that could not be swapped; the others were, and stay so until `unshadow`.
    fn shadow(&self) -> Result<()> {
        Ok(())
    }

    /// Maps the device's memory back into every live mapping ([`Mapping::unshadow`]). Call it when the
    /// memory can be reached again.
    ///
    /// # Errors
    /// The first mapping that could not be mapped back and stays shadowed; the others are back. Asking again
    /// tries those that are left.
    fn unshadow(&self) -> Result<()> {
        Ok(())
    }

    /// Shadows every live mapping for good and has it let go of the device ([`Mapping::bury`]), so that
    /// closing the device closes it. Nothing can be mapped afterwards.
    ///
    /// # Errors
    /// As [`shadow`](Exporter::shadow): a mapping that could not be swapped keeps the device open.
    fn bury(&self) -> Result<()> {
        Ok(())
    }

    /// Buries every mapping and closes the device, while this value lives on: whatever is asked of it
    /// afterwards is an error. Its dma-bufs are dead for good. **Blocks without a limit** until their
    /// importers have unmapped.
    ///
    /// # Errors
    /// As [`bury`](Exporter::bury), or no descriptor was free: the device may be open then.
    fn let_go(&self) -> Result<()> {
        self.bury()
    }

    /// Has the kernel tell of what nobody here asked for. A second call replaces what the first gave.
    ///
    /// # Errors
    /// What the kernel says. A device that cannot tell is no error.
    fn interrupts(&self) -> Result<Interrupts> {
        Ok(Interrupts::default())
    }
}

/// What the kernel tells the owner of a device unasked: two eventfds that it signals. They are nonblocking: reading eight bytes gives how often it did
/// since the last read, or EAGAIN. `poll` says when there is something to read.
///
/// Dropping them undoes nothing and needs not to: the kernel keeps its own hold of an eventfd until the
/// device is closed, and signals one that nobody reads.
#[derive(Debug, Default)]
pub struct Interrupts {
    /// The device reported an error that cannot be corrected (PCIe AER). Its memory is not to be trusted;
    /// a reset, or a new boot, is next. None where the device cannot tell.
    pub error: Option<OwnedFd>,
    /// Somebody unbinds the device's driver or removes it, and waits, without a limit, until it is closed
    /// (`vfio_unregister_group_dev`): the kernel asks again every ten seconds. None where the kernel
    /// does not ask.
    pub request: Option<OwnedFd>,
}
