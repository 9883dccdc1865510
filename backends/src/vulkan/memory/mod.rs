//! `VkDeviceMemory`, and the buffer or the image that it is bound to: imported, exported or allocated, and handed over to
//! the device and back.

pub(crate) mod buffer_import;
pub(crate) mod exportable;
pub(crate) mod handover;
pub(crate) mod import;
pub(crate) mod memory_type;
pub(crate) mod raw_buffer;
pub(crate) mod resource;
