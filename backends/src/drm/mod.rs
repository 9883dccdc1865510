//! DRM: a kernel graphics driver that imports dma-bufs and can show them.
//!
//! Order of calls: [`Node::open`] -> [`import`](crate::Importer::import) gives a [`BufferObject`]
//! -> [`ScanOut::start`] shows it on a screen, [`ScanOut::show`] the next one.
//!
//! Whether a driver can take memory of another PCI device at all is data: [`import_support()`](crate::import_support()),
//! and [`Node::import_support`] for the mode that a node's device is in.
//! Not done here: rendering, page flips that nobody waits for, anything with a driver's own ioctls.

mod buffer_object;
pub(crate) mod handles;
mod node;
mod scan_out;

pub use buffer_object::BufferObject;
pub use node::Node;
pub use scan_out::{ScanOut, ScanOutBuffer};
