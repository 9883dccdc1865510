//! Vulkan as an importer: a dma-buf, or mapped memory, becomes a `VkBuffer` or a `VkImage` of the application's; and as
//! an exporter: [`DeviceMemory`] is lent as a dma-buf, [`OpaqueMemory`] shared within one driver.
//!
//! Order of calls in an application that has a Vulkan device:
//! 1. ask [`required_extensions`] and [`optional_extensions`] before creating the device;
//! 2. [`Device::from_raw`] with its handles and its loader (`from_ash` behind the feature `ash`), and
//!    [`Device::with_queue_lock`], so that verification and staged copies may submit beside the application;
//! 3. [`Importer::import`](crate::Importer::import), or [`Device::import_dma_buf`] with options;
//! 4. record [`Device::record_acquire`] before and [`Device::record_release`] after its own work on
//!    [`Buffer::raw_buffer`], or let an [`Engine`] do ready-made work: a checksum, a copy, a picture;
//! 5. say what its own work signals at its end: a [`FenceSignal`] or a [`TimelineSignal`];
//! 6. drop the [`Buffer`], or [`Importer::release`](crate::Importer::release) it.
//!
//! For pictures, [`Device::for_images`] gives an importer whose memory is an [`Image`] that lies where the lender's
//! picture does, by the driver's own row pitch or by an explicit layout ([`Tiling`]). It is refused where the
//! driver would look for the pixels elsewhere. [`Device::record_acquire_image`] and
//! [`Device::record_release_image`] hand it over, and an [`Engine`] copies its pixels.
//!
//! Programs without a device of their own start at [`Instance::open`] and [`Instance::open_device`].
//!
//! Absent on purpose: images in several planes, views of images, making semaphores, and everything about
//! presentation. No type of the ash crate is public unless the feature
//! `ash` asks for it: its releases break them, ours should not.

mod buffer;
mod checksum;
mod commands;
mod copy;
mod copy_engine;
mod copy_image;
mod device;
mod device_memory;
mod engine;
mod exportable;
mod extensions;
mod failure;
mod image;
mod image_device;
mod image_import;
mod import;
mod instance;
mod memory;
mod memory_type;
mod opaque;
mod ownership;
mod paint;
mod physical_device;
mod pipeline;
mod queue;
mod selector;
mod signal;
mod staging;
mod stopwatch;

pub use buffer::{Buffer, BufferUsage, ImportOptions};
pub use checksum::checksum;
pub use device::{Device, GetInstanceProcAddr, RawDevice};
pub use device_memory::DeviceMemory;
pub use engine::Engine;
pub use extensions::{
    EXTENSIONS, Extension, Need, missing_extensions, optional_extensions, required_extensions,
};
pub use image::{Image, ImageOptions, ImageUsage, PixelFormat, Tiling};
pub use image_device::ImageDevice;
pub use instance::Instance;
pub use opaque::{OpaqueFd, OpaqueMemory};
pub use paint::paint;
pub use physical_device::{DrmNode, PhysicalDevice};
pub use selector::Selector;
pub use signal::{FenceSignal, TimelineSignal};
