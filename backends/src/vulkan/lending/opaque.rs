//! `OpaqueMemory`: memory that one `VkDevice` shares with another one of the same driver and physical device.
//!
//! Order of calls: [`Device::allocate_opaque`] on the one, [`OpaqueMemory::export`], and
//! [`Device::import_opaque`] on the other. The descriptor (`VK_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD_BIT`) says
//! nothing to anybody else, not even its size, so an [`OpaqueFd`] carries what the importer must repeat.
//!
//! It is how two applications share memory of *one* GPU: between two GPUs it cannot be used, and no `Lender`
//! lends it. It stands beside dma-bufs for comparison: `peer-copy` measures against it, and it is here and not there since
//! its buffers are made of what is private to this module, and `unsafe` calls of Vulkan belong into the backends.
#![expect(unsafe_code, reason = "creating Vulkan objects, and handing a descriptor to the driver")]

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};

use ash::vk;

use crate::vulkan::buffers::buffer::Buffer;
use crate::vulkan::device::Device;
use crate::vulkan::memory::exportable::{Exportable, descriptor};
use crate::vulkan::memory::raw_buffer::RawBuffer;
use crate::vulkan::memory::resource::{Handle, Origin};
use crate::vulkan::usage::BufferUsage;
use crate::{Error, Importer, Kind, Result};

const HANDLE: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD;

/// Memory of a Vulkan device's own that another device of the same driver can import.
#[derive(Debug)]
pub struct OpaqueMemory {
    buffer: Buffer,
    allocation_bytes: u64,
    memory_type_index: u32,
    is_dedicated: bool,
}

/// A descriptor of such memory, with what its importer has to repeat.
#[derive(Debug)]
pub struct OpaqueFd {
    fd: OwnedFd,
    size_bytes: u64,
    allocation_bytes: u64,
    memory_type_index: u32,
    is_dedicated: bool,
    identity: Identity,
}

/// Which driver and device: `deviceUUID` and `driverUUID`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: [u8; vk::UUID_SIZE],
    driver: [u8; vk::UUID_SIZE],
}

impl Device {
    /// Allocates `size_bytes` of the device's own memory (a multiple of the page size) to share with another
    /// `VkDevice` of the same driver.
    ///
    /// # Errors
    /// As [`Device::allocate_exportable`].
    pub fn allocate_opaque(&self, size_bytes: u64) -> Result<OpaqueMemory> {
        const TRIED: &str = "allocate memory to share";
        let allocate = || {
            if self.logical().memory_fd().is_none() {
                let why = "VK_KHR_external_memory_fd is not enabled";
                return Err(Error::new(Kind::VulkanMissing, TRIED, why).next("enable it in vkCreateDevice"));
            }
            Exportable::new(TRIED, self.logical(), size_bytes, HANDLE, Origin::SameDriver)
        };
        let Exportable { buffer, allocation_bytes, memory_type_index, is_dedicated } =
            allocate().map_err(|error| error.on(self.name()))?;
        let buffer = Buffer::new(self, buffer);
        Ok(OpaqueMemory { buffer, allocation_bytes, memory_type_index, is_dedicated })
    }

    /// Imports memory of another `VkDevice` of the same driver and physical device as a buffer. The descriptor is
    /// the driver's if the import succeeds, and closed if it fails.
    ///
    /// # Errors
    /// [`Kind::ImporterCannot`] where the memory is of another device or another driver;
    /// [`Kind::VulkanMissing`] without the extension; [`Kind::Vulkan`] where the driver refuses.
    pub fn import_opaque(&self, memory: OpaqueFd) -> Result<Buffer> {
        import(self, memory).map_err(|error| error.on(self.name()))
    }

    fn identity(&self) -> Identity {
        let (instance, physical) = self.logical().ash_instance();
        let mut ids = vk::PhysicalDeviceIDProperties::default();
        let mut all = vk::PhysicalDeviceProperties2::default().push_next(&mut ids);
        // SAFETY: the device is of Vulkan 1.1, and so knows the structure, which outlives the call.
        unsafe { instance.get_physical_device_properties2(physical, &mut all) };
        Identity { device: ids.device_uuid, driver: ids.driver_uuid }
    }
}

impl OpaqueMemory {
    /// The device's own buffer on all of it.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// A descriptor of it, for one import.
    ///
    /// # Errors
    /// [`Kind::Vulkan`]: mostly that the process has too many files open.
    pub fn export(&self) -> Result<OpaqueFd> {
        let device = self.buffer.device();
        let fd = descriptor("export memory to share", self.buffer.raw(), HANDLE)
            .map_err(|error| error.on(device.name()))?;
        Ok(OpaqueFd {
            fd,
            size_bytes: self.buffer.size_bytes(),
            allocation_bytes: self.allocation_bytes,
            memory_type_index: self.memory_type_index,
            is_dedicated: self.is_dedicated,
            identity: device.identity(),
        })
    }
}

fn import(device: &Device, memory: OpaqueFd) -> Result<Buffer> {
    const TRIED: &str = "import shared memory";
    if device.logical().memory_fd().is_none() {
        return Err(Error::new(Kind::VulkanMissing, TRIED, "VK_KHR_external_memory_fd is not enabled"));
    }
    // VUID-VkMemoryAllocateInfo-memoryTypeIndex-00645 and VUID-VkImportMemoryFdInfoKHR-fd-00668 ask for the same
    // device; VUID-vkBindBufferMemory-memory-02985 for the same handle type.
    if memory.identity != device.identity() {
        let why = "the memory is of another device, or of another driver";
        return Err(Error::new(Kind::ImporterCannot, TRIED, why).next("export a dma-buf"));
    }
    let (logical, usage) = (device.logical(), BufferUsage::default());
    let mut buffer = RawBuffer::new(TRIED, logical, usage, HANDLE, memory.size_bytes, Origin::SameDriver)?;
    if buffer.needs().size_bytes > memory.allocation_bytes {
        let why = "the driver needs more for the buffer than was allocated for the other";
        return Err(Error::new(Kind::Vulkan, TRIED, why));
    }
    let mut import = vk::ImportMemoryFdInfoKHR::default().handle_type(HANDLE).fd(memory.fd.as_raw_fd());
    let mut dedicate = buffer.handle().dedicate();
    // VUID-VkMemoryAllocateInfo-allocationSize-01742: size and type as it was exported with.
    let mut info = vk::MemoryAllocateInfo::default()
        .allocation_size(memory.allocation_bytes)
        .memory_type_index(memory.memory_type_index)
        .push_next(&mut import);
    if memory.is_dedicated {
        info = info.push_next(&mut dedicate);
    }
    // SAFETY: the chain is initialised and outlives the call; size and type are those of the same buffer of the same
    // driver; the descriptor is open and nobody else's. Only when memory was allocated is it the driver's.
    unsafe {
        buffer.resource.allocate(TRIED, &info, 0, || {
            let _ = memory.fd.into_raw_fd();
        })
    }?;
    Ok(Buffer::new(device, buffer))
}
