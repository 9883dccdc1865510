//! [`Device`](super::Device) as an importer of buffers.

pub(crate) mod buffer;
pub(crate) mod importer;
