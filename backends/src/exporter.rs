//! `Exporter`: who makes dma-bufs of its memory.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::{DmaBuf, DmaRanges, Mapping, PciAddress, Region, Result};

/// A device, or a stand-in for one, that lends memory.
///
/// Order of calls: [`regions`](Exporter::regions), [`DmaRanges::new`] on one of them, then
/// [`export`](Exporter::export) or [`map`](Exporter::map). An exporter outlives neither its
/// dma-bufs nor its mappings: the former die with it (the kernel revokes them for good), the
/// latter keep it open until they are [retired](Exporter::retire_mappings).
///
/// A lender owns its exporter, and lets nobody else take memory back. One of your own that wraps another exporter should
/// own that, too: whoever keeps an [`Arc`] of it besides can reset the device behind the lender's back, which blocks
/// until importers have unmapped whom nobody told. No type can forbid that.
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

    /// An importer of this process is about to import the dma-buf of `ranges`; `must_be_freed` says that its import has
    /// to be freed before the memory is taken back. Exporters whose memory is another process's tell that process. May
    /// block for that.
    ///
    /// # Errors
    /// The import is not to be: why.
    fn begin_import(&self, ranges: &DmaRanges, importer: &str, must_be_freed: bool) -> Result<()> {
        let _ = (ranges, importer, must_be_freed);
        Ok(())
    }

    /// Nobody in this process uses the dma-buf of `ranges` any more: an export of these ranges ended, one of several
    /// perhaps. Does not block.
    fn end_export(&self, ranges: &DmaRanges) {
        let _ = ranges;
    }

    /// Whether each export after [`end_export`](Exporter::end_export) is new memory, all zeros, whatever range it is of. Of
    /// a device it is the same memory as before, with what was written to it.
    fn exports_new_memory(&self) -> bool {
        false
    }

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

    /// Waits until memory that came back may be touched: after a reset some devices train a link or their
    /// memory first. `tell` is called at once where there is something to wait for, and again every second.
    /// A device that is ready when it can be reached does not wait.
    ///
    /// # Errors
    /// [`Kind::TimedOut`](crate::Kind::TimedOut) after the limit that the device gives itself, with the
    /// reason; else what looking at the device says.
    fn wait_until_ready(&self, tell: &mut dyn FnMut(&NotReady)) -> Result<()> {
        let _ = tell;
        Ok(())
    }

    /// What the CPU's caches do about memory of that region.
    fn cpu_access(&self, region_index: u32) -> CpuAccess {
        let _ = region_index;
        CpuAccess::Uncached
    }

    /// The BAR whose peer-to-peer provider the kernel asks about memory of that region, where it has one:
    /// mostly the region's own.
    fn provider_bar(&self, region_index: u32) -> u32 {
        region_index
    }

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

    /// Shadows every live mapping for good and has it let go of the device ([`Mapping::retire`]), so that
    /// closing the device closes it. Nothing can be mapped afterwards.
    ///
    /// # Errors
    /// As [`shadow`](Exporter::shadow): a mapping that could not be swapped keeps the device open.
    fn retire_mappings(&self) -> Result<()> {
        Ok(())
    }

    /// Retires every mapping and closes the device, while this value lives on: whatever is asked of it
    /// afterwards is an error. Its dma-bufs are dead for good. **Blocks without a limit** until their
    /// importers have unmapped.
    ///
    /// # Errors
    /// As [`retire_mappings`](Exporter::retire_mappings), or no descriptor was free: the device may be open then.
    fn close_device(&self) -> Result<()> {
        self.retire_mappings()
    }

    /// Has the kernel tell of what nobody here asked for. A second call replaces what the first gave.
    ///
    /// # Errors
    /// What the kernel says. A device that cannot tell is no error.
    fn interrupts(&self) -> Result<Interrupts> {
        Ok(Interrupts::default())
    }
}

/// Why a device's memory may not be touched yet, and for how long that has been so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotReady {
    /// What is waited for, in words.
    pub reason: String,
    /// How long it was waited for.
    pub waited: Duration,
    /// When it is given up.
    pub limit: Duration,
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (waited, limit) = (self.waited.as_secs_f32(), self.limit.as_secs());
        write!(f, "not ready after {waited:.1} s of at most {limit} s: {}", self.reason)
    }
}

/// What the CPU's caches do about a region's memory, where it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CpuAccess {
    /// Nothing: each access goes to the device by itself. Reads are very slow; so is a copy by the CPU.
    Uncached,
    /// Writes are gathered; reads are as slow as uncached ones.
    WriteCombined,
    /// As with ordinary memory, and coherent with the device: a copy by the CPU is as fast as memory is.
    Cached,
}

impl CpuAccess {
    /// A stable name for scripts and `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uncached => "uncached",
            Self::WriteCombined => "write-combined",
            Self::Cached => "cached",
        }
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
