//! [`Device`] as an [`Importer`] of buffers, and its engines on them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffer::Buffer;
use crate::vulkan::copying::copy_engine::{CopyEngine, HostCopy};
use crate::vulkan::device::Device;
use crate::vulkan::memory::buffer_import::{self, ImportOptions};
use crate::vulkan::memory::memory_type;
use crate::vulkan::memory::raw_buffer::RawBuffer;
use crate::{
    DmaBuf, Engine, Error, HostSlice, Importer, Kind, Mapping, OnRefusal, OnRevoke, PciAddress, Result,
};

impl Device {
    /// Imports `dma_buf` as a buffer. The descriptor stays the caller's: the driver gets a
    /// duplicate, which it owns if the import succeeds and which is closed if it fails.
    ///
    /// Blocks for as long as the kernel driver needs to map the memory.
    ///
    /// # Errors
    /// [`Kind::VulkanMissing`] without the extensions; [`Kind::InvalidInput`] for a buffer larger
    /// than the dma-buf; [`Kind::ImporterCannot`] where the driver cannot map this exporter's
    /// memory; [`Kind::Vulkan`] for anything else. Nothing is left imported.
    pub fn import_dma_buf(&self, dma_buf: &DmaBuf, options: &ImportOptions) -> Result<Buffer> {
        buffer_import::dma_buf(self.logical(), dma_buf, options).map(|raw| Buffer::new(self, raw)).map_err(|error| {
            let error = error.on(self.name());
            if error.kind() != Kind::ImporterCannot || self.description().imports_foreign_dma_bufs() {
                return error;
            }
            error.next("Venus takes its own renderer's memory alone: let it lend and the other driver import, or copy")
        })
    }

    /// Imports mapped memory as a buffer, which keeps the mapping.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the device imports no host pointers; [`Kind::InvalidInput`] for
    /// a pointer or length off the device's alignment, or a buffer larger than the mapping;
    /// [`Kind::ImporterCannot`] or [`Kind::Vulkan`] where the driver refuses. Nothing is left imported.
    pub fn import_mapping(&self, mapping: Arc<Mapping>, options: &ImportOptions) -> Result<Buffer> {
        let imported = buffer_import::host_pointer(self.logical(), mapping, options);
        imported.map(|raw| Buffer::new(self, raw)).map_err(|error| error.on(self.name()))
    }
}

impl Importer for Device {
    type Memory = Buffer;

    fn name(&self) -> String {
        self.logical().name()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.description().pci_address
    }

    fn driver(&self) -> Option<String> {
        let description = self.description();
        let text = format!("{} {}", description.driver_name, description.driver_version);
        (!text.trim().is_empty()).then(|| text.trim().to_owned())
    }

    fn on_revoke(&self) -> OnRevoke {
        self.description().on_revoke()
    }

    fn on_refusal(&self) -> OnRefusal {
        self.description().on_refusal()
    }

    fn governed_by_p2pdma(&self) -> bool {
        !self.description().is_cpu
    }

    fn import(&self, dma_buf: &DmaBuf) -> Result<Buffer> {
        self.import_dma_buf(dma_buf, &ImportOptions::default())
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<Buffer> {
        self.import_mapping(mapping, &ImportOptions::default())
    }

    /// Memory of the device's own, where it has engines to fill it; host memory for a CPU, which has no other,
    /// and for an application's device without a [lock](Device::with_queue_lock) for its queue.
    fn stage(&self, size_bytes: u64) -> Result<Buffer> {
        const TRIED: &str = "make staging memory";
        if self.copy_engines().is_some() && !self.description().is_cpu {
            return RawBuffer::own(TRIED, self.logical(), size_bytes, memory_type::for_device_access)
                .map(|raw| Buffer::new(self, raw))
                .map_err(|error| error.on(self.name()));
        }
        let length_bytes = usize::try_from(size_bytes)
            .map_err(|_| Error::new(Kind::InvalidInput, TRIED, "it is larger than the address space"))?;
        self.import_host_pointer(Arc::new(Mapping::of_host_memory(length_bytes)?))
    }

    fn host_memory(&self, memory: &Buffer) -> Option<Arc<Mapping>> {
        memory.mapping().cloned()
    }

    fn engines(&self) -> Vec<&dyn Engine<Buffer>> {
        self.copy_engines().into_iter().flatten().map(|engine| engine as &dyn Engine<Buffer>).collect()
    }

    /// An application's queue has engines, too, where nobody here may submit to it.
    fn engine_names(&self) -> Vec<String> {
        let device = if self.copy_engines().is_some() { self.clone() } else { self.clone().with_engines() };
        device.copy_engines().into_iter().flatten().map(|engine| engine.name().to_owned()).collect()
    }

    /// [`Kind::StillInUse`] where work that missed its deadline still runs on the buffer: it is
    /// freed when that work ends.
    fn release(&self, memory: Buffer) -> Result<()> {
        memory.release().map_err(|error| error.on(self.name()))
    }
}

impl Engine<Buffer> for CopyEngine {
    fn name(&self) -> &str {
        self.name()
    }

    fn read(&self, memory: &Buffer, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.carry((memory.raw(), offset_bytes), host, HostCopy::ToHost, deadline)
            .map_err(|error| error.on(self.device().name()))
    }

    fn write(&self, memory: &Buffer, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.carry((memory.raw(), offset_bytes), host, HostCopy::ToDevice, deadline)
            .map_err(|error| error.on(self.device().name()))
    }

    fn copy(
        &self,
        (from, from_bytes): (&Buffer, u64),
        (to, to_bytes): (&Buffer, u64),
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        self.copy_within((from.raw(), from_bytes), (to.raw(), to_bytes), length_bytes, deadline)
            .map_err(|error| error.on(self.device().name()))
    }
}
