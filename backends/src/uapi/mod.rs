//! Kernel interfaces: one file per header, one thin function per ioctl, typed in and out.
//!
//! Structs come from `vfio-bindings`; what is written by hand here (ioctl numbers, and requests
//! with a flexible array) is compared with the real kernel headers by `header_check`.
//! Functions return the errno and explain nothing: that is for the nouns above.

pub mod dma_buf;
#[cfg(feature = "drm")]
pub mod fcntl;
#[cfg(feature = "vfio")]
pub mod iommufd;
pub mod socket;
pub mod sync_file;
#[cfg(feature = "vfio")]
pub mod vfio;

#[cfg(all(test, feature = "vfio", feature = "host"))]
mod header_check;
