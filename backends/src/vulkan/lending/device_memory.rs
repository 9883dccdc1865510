//! `DeviceMemory`: memory of a Vulkan device's own that it lends as a dma-buf.
//!
//! Order of calls: [`Device::allocate_exportable`], [`DmaRanges::whole`] of its only
//! [region](DeviceMemory::region), an [`Aperture`](crate::Aperture) with its [owner](DeviceMemory::owner), then
//! [`export`](Exporter::export). The device's own work on it goes through its [buffer](DeviceMemory::buffer), handed
//! over as an imported one is: [`Device::record_acquire`] before and [`Device::record_release`] after.
//!
//! Whether another driver takes the dma-buf is that driver's to say: most take one of a GPU's own kernel driver, and
//! Mesa's CPU driver takes what can be mapped. What the driver exports is a buffer, linear by nature; nothing here
//! is about images.
//!
//! Absent on purpose: revokes. Nobody takes this memory back, and it lives until the last descriptor of it is
//! closed. Ranges that are not all of it, in order, cannot be exported: a Vulkan driver exports an allocation.

use std::sync::Arc;
use std::time::Instant;

use ash::vk;

use crate::vulkan::buffers::buffer::Buffer;
use crate::vulkan::device::Device;
use crate::vulkan::memory::exportable::{Exportable, descriptor};
use crate::vulkan::memory::resource::Origin;
use crate::{
    CpuAccess, DmaBuf, DmaRanges, Engine, Error, Exporter, HostSlice, Importer, Kind, Mapping, Owner,
    PciAddress, Region, RegionFlags, Result,
};

const HANDLE: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;

/// Memory of a Vulkan device's own, with a buffer on all of it.
#[derive(Debug)]
pub struct DeviceMemory {
    buffer: Buffer,
    region: [Region; 1],
    cpu_access: CpuAccess,
}

impl Device {
    /// Allocates `size_bytes` of the device's own memory (a multiple of the page size) that can be lent as a dma-buf.
    ///
    /// # Errors
    /// [`Kind::VulkanMissing`] without the extensions for dma-bufs; [`Kind::Unsupported`] where the driver exports
    /// none; [`Kind::InvalidInput`] for a size that is none; [`Kind::Vulkan`] where the driver refuses, for want of
    /// memory mostly.
    pub fn allocate_exportable(&self, size_bytes: u64) -> Result<DeviceMemory> {
        const TRIED: &str = "allocate memory to lend";
        let allocate = || {
            if self.logical().dma_buf_functions().is_none() {
                let why = "VK_KHR_external_memory_fd or VK_EXT_external_memory_dma_buf is not enabled";
                return Err(Error::new(Kind::VulkanMissing, TRIED, why)
                    .next("enable what required_extensions() lists"));
            }
            Exportable::new(TRIED, self.logical(), size_bytes, HANDLE, Origin::DmaBuf)
        };
        let exportable = allocate().map_err(|error| error.on(self.name()))?;
        let flags = self.logical().memory_types()[exportable.memory_type_index as usize].property_flags;
        let is_visible = flags.contains(vk::MemoryPropertyFlags::HOST_VISIBLE);
        let cpu_access = match is_visible {
            true if flags.contains(vk::MemoryPropertyFlags::HOST_CACHED) => CpuAccess::Cached,
            true => CpuAccess::WriteCombined,
            false => CpuAccess::Uncached,
        };
        let region = Region {
            index: 0,
            size_bytes,
            file_offset_bytes: 0,
            flags: RegionFlags { read: false, write: false, mmap: is_visible },
            capabilities: Vec::new(),
        };
        Ok(DeviceMemory { buffer: Buffer::new(self, exportable.buffer), region: [region], cpu_access })
    }
}

impl DeviceMemory {
    /// Its only region.
    pub fn region(&self) -> &Region {
        &self.region[0]
    }

    /// The device's own buffer on all of it.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Who answers for it: the device, with the engine that it copies by. An application's device has one with a
    /// [lock](Device::with_queue_lock) for its queue.
    pub fn owner(&self) -> Arc<dyn Owner> {
        let buffer = self.buffer.share();
        Arc::new(Answering { name: self.name(), engine: OwnEngine { buffer } })
    }

    fn check(&self, tried: &'static str, ranges: &DmaRanges) -> Result<()> {
        ranges.check_fit(tried, self.region()).map_err(|error| error.on(self.name()))
    }

    fn dma_buf(&self) -> Result<DmaBuf> {
        DmaBuf::from_fd(descriptor("export a dma-buf", self.buffer.raw(), HANDLE)?)
            .map_err(|error| error.on(self.name()))
    }
}

impl Exporter for DeviceMemory {
    fn name(&self) -> String {
        format!("memory of {}", self.buffer.device().name())
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.buffer.device().pci_address()
    }

    fn regions(&self) -> &[Region] {
        &self.region
    }

    fn cpu_access(&self, _: u32) -> CpuAccess {
        self.cpu_access
    }

    /// Only the whole, in order: [`Kind::Unsupported`] otherwise. Each call gives a descriptor of the same memory.
    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        const TRIED: &str = "export a dma-buf";
        self.check(TRIED, ranges)?;
        if !ranges.are_all_of(self.region()) {
            return Err(Error::new(
                Kind::Unsupported,
                TRIED,
                "a Vulkan driver exports an allocation as a whole",
            )
            .on(self.name())
            .next("lend all of it, or allocate memory for each part"));
        }
        self.dma_buf()
    }

    /// By mapping the dma-buf, which the kernel driver behind it has to allow.
    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        const TRIED: &str = "map memory";
        self.check(TRIED, ranges)?;
        if !self.region().flags.mmap {
            return Err(Error::new(Kind::Unsupported, TRIED, "its memory is not visible to the CPU")
                .on(self.name())
                .next("import its dma-buf"));
        }
        let pieces: Vec<_> =
            ranges.as_slice().iter().map(|range| (range.offset_bytes, range.length_bytes)).collect();
        let mapping =
            Mapping::new(Arc::new(self.dma_buf()?), &pieces).map_err(|error| error.on(self.name()))?;
        Ok(Arc::new(mapping))
    }

    fn check_reachable(&self) -> Result<()> {
        Ok(())
    }
}

/// The device that the memory is of, as its owner. Handing over to the outside flushes and invalidates, with each piece
/// of its work.
struct Answering {
    name: String,
    engine: OwnEngine,
}

impl Owner for Answering {
    fn name(&self) -> &str {
        &self.name
    }

    fn flush(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn invalidate(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn quiesce(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn engine(&self) -> Option<&dyn Engine<DmaRanges>> {
        self.engine.first().map(|_| &self.engine as _)
    }
}

/// The first engine of the buffer's device, on ranges of the buffer.
struct OwnEngine {
    buffer: Buffer,
}

impl OwnEngine {
    fn first(&self) -> Option<&dyn Engine<Buffer>> {
        self.buffer.device().engines().into_iter().next()
    }

    fn carry(
        &self,
        ranges: &DmaRanges,
        offset_bytes: u64,
        host: &HostSlice,
        carry: impl Fn(&dyn Engine<Buffer>, u64, &HostSlice) -> Result<()>,
    ) -> Result<()> {
        let engine = self.first().ok_or_else(|| {
            let why = "the queue is the application's, and nobody said under which lock to submit to it";
            Error::new(Kind::Unsupported, "copy by a Vulkan device", why)
                .next("give the lock: vulkan::Device::with_queue_lock")
        })?;
        let mut done = 0;
        for piece in ranges.pieces(offset_bytes, host.length_bytes() as u64)? {
            let length = piece.length_bytes as usize;
            let part = HostSlice::new(Arc::clone(host.mapping()), host.offset_bytes() + done, length)?;
            carry(engine, piece.offset_bytes, &part)?;
            done += length;
        }
        Ok(())
    }
}

impl Engine<DmaRanges> for OwnEngine {
    fn name(&self) -> &str {
        self.first().map_or("no engine", |engine| engine.name())
    }

    fn read(&self, ranges: &DmaRanges, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.carry(ranges, offset_bytes, host, |engine, at, part| {
            engine.read(&self.buffer, at, part, deadline)
        })
    }

    fn write(
        &self,
        ranges: &DmaRanges,
        offset_bytes: u64,
        host: &HostSlice,
        deadline: Instant,
    ) -> Result<()> {
        self.carry(ranges, offset_bytes, host, |engine, at, part| {
            engine.write(&self.buffer, at, part, deadline)
        })
    }
}
