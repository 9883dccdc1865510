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
//! The parts, each standing on those before it:
//! `discovery` (instance, physical devices), `logical` (a `VkDevice`, its queues and commands), `memory` (what is bound to
//! a buffer or an image), `copying` (engines), `device` ([`Device`], with its engines), `buffers` and `images` (importers),
//! `work` (an [`Engine`]), `lending` and `application` (barriers, signals).
//!
//! Absent on purpose: images in several planes, views of images, making semaphores, and everything about
//! presentation. No type of the ash crate is public unless the feature
//! `ash` asks for it: its releases break them, ours should not.

mod application;
mod buffers;
mod copying;
mod device;
mod discovery;
mod failure;
mod images;
mod lending;
mod logical;
mod memory;
mod usage;
mod work;

pub use application::signal::{FenceSignal, TimelineSignal};
pub use buffers::buffer::Buffer;
pub use device::{Device, GetInstanceProcAddr, RawDevice};
pub use discovery::extensions::{
    EXTENSIONS, Extension, Need, missing_extensions, optional_extensions, required_extensions,
};
pub use discovery::import_policy::{Evidence, ImportPolicy, Rows, Source, Submissions};
pub use discovery::instance::Instance;
pub use discovery::physical_device::{DrmNode, PhysicalDevice};
pub use discovery::selector::Selector;
pub use images::image::{Image, ImageOptions, PixelFormat, Tiling};
pub use images::image_device::ImageDevice;
pub use lending::device_memory::DeviceMemory;
pub use lending::opaque::{OpaqueFd, OpaqueMemory};
pub use memory::buffer_import::ImportOptions;
pub use usage::{BufferUsage, ImageUsage};
pub use work::checksum::checksum;
pub use work::engine::Engine;
pub use work::paint::paint;
