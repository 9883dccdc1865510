//! `ImageDevice`: a Vulkan device that imports lent memory as images of one layout.
//!
//! [`Device::for_images`] -> `Export::attach` -> an [`Image`] in every access. Everything else is as with buffers:
//! the same paths, the same gate, the same answer to a revoke. An image has no [`Engine`](crate::Engine), so nobody
//! can test a path by it. It has the device's name, and the device's certificates count for it: verify the path with
//! the [`Device`] itself.

use std::fmt;
use std::sync::Arc;

use super::image::{Image, ImageOptions};
use super::import;
use crate::vulkan::device::Device;
use crate::{DmaBuf, Error, ImageLayout, Importer, Kind, Mapping, OnRefusal, OnRevoke, PciAddress, Result};

/// A [`Device`] whose imports are images. Cheap to clone.
#[derive(Clone)]
pub struct ImageDevice {
    device: Device,
    layout: ImageLayout,
    options: ImageOptions,
}

impl Device {
    /// The same device, importing memory as images that lie at `layout` in it.
    pub fn for_images(&self, layout: ImageLayout, options: ImageOptions) -> ImageDevice {
        ImageDevice { device: self.clone(), layout, options }
    }
}

impl ImageDevice {
    /// The device itself.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Importer for ImageDevice {
    type Memory = Image;

    fn name(&self) -> String {
        self.device.name()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.device.pci_address()
    }

    fn driver(&self) -> Option<String> {
        self.device.driver()
    }

    fn on_revoke(&self) -> OnRevoke {
        self.device.on_revoke()
    }

    fn on_refusal(&self) -> OnRefusal {
        self.device.on_refusal()
    }

    fn governed_by_p2pdma(&self) -> bool {
        self.device.governed_by_p2pdma()
    }

    /// [`Kind::InvalidInput`] where the picture does not fit the memory, or the driver's rows are not the lender's;
    /// [`Kind::Unsupported`] where the driver makes no such image; [`Kind::ImporterCannot`] where it takes none of
    /// this memory; [`Kind::VulkanMissing`] without an extension.
    fn import(&self, dma_buf: &DmaBuf) -> Result<Image> {
        import::dma_buf(&self.device, dma_buf, self.layout, self.options)
            .map_err(|error| error.on(self.name()))
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<Image> {
        import::host_pointer(&self.device, mapping, self.layout, self.options)
            .map_err(|error| error.on(self.name()))
    }

    /// An image on host memory: no engine of the device's fills it, the lender's engine or the CPU does.
    fn stage(&self, size_bytes: u64) -> Result<Image> {
        let length_bytes = usize::try_from(size_bytes).map_err(|_| {
            Error::new(Kind::InvalidInput, "make staging memory", "it is larger than the address space")
        })?;
        self.import_host_pointer(Arc::new(Mapping::of_host_memory(length_bytes)?))
    }

    fn host_memory(&self, memory: &Image) -> Option<Arc<Mapping>> {
        memory.mapping().cloned()
    }

    /// An image has no engine, and is reached by the device's.
    fn engine_names(&self) -> Vec<String> {
        self.device.engine_names()
    }

    /// [`Kind::StillInUse`] where work that missed its deadline still runs on the image: it is freed when that work
    /// ends.
    fn release(&self, memory: Image) -> Result<()> {
        memory.release().map_err(|error| error.on(self.name()))
    }
}

impl fmt::Debug for ImageDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageDevice")
            .field("device", &self.device)
            .field("layout", &self.layout)
            .field("options", &self.options)
            .finish()
    }
}
