//! [`ImageDevice`](super::ImageDevice), an importer of images.

pub(crate) mod image;
pub(crate) mod image_device;
pub(crate) mod import;
