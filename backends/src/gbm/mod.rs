//! gbm as an importer: what compositors make buffers by, and take other devices' buffers by.
//!
//! Order of calls: [`Device::open`] on a DRM node, or [`Device::on`] a compositor's -> [`Device::for_images`] with the layout of the picture ->
//! [`import`](crate::Importer::import) gives a [`BufferObject`] -> `ScanOut::start` of [`drm`](crate::drm) shows it,
//! or the compositor does what it does with a `gbm_bo`.
//!
//! A program with this module is linked against libgbm; that is why its feature is off unless asked for. What libgbm
//! says of a device proves nothing (it took `/dev/null` for one, seen), so the node is checked before.
//!
//! Not done here: allocation, surfaces, EGL.

mod buffer_object;
mod device;

pub use buffer_object::BufferObject;
pub use device::{Device, ImageDevice};
