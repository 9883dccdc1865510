//! `BufferObject`: an imported dma-buf, as a GEM handle on one node.

use drm::buffer::Handle;

use super::{Node, ScanOutBuffer};
use crate::{Error, Result};

/// A GEM handle that is closed with this value.
///
/// Importing one dma-buf twice gives the same handle twice; it lives until the last of its
/// `BufferObject`s is gone.
#[derive(Debug)]
pub struct BufferObject {
    node: Node,
    handle: Option<Handle>,
    size_bytes: u64,
}

impl BufferObject {
    pub(super) fn new(node: Node, handle: Handle, size_bytes: u64) -> Self {
        Self { node, handle: Some(handle), size_bytes }
    }

    /// The size of the dma-buf in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The node that it was imported on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The GEM handle, for the driver's own ioctls. Valid as long as this value.
    pub fn raw_handle(&self) -> u32 {
        self.handle.expect("empty only while being closed").into()
    }

    pub(super) fn close(mut self) -> Result<()> {
        self.close_handle()
            .map_err(|error| Error::os("close a GEM handle", error).on(self.node.path().display()))
    }

    fn close_handle(&mut self) -> std::io::Result<()> {
        self.handle.take().map_or(Ok(()), |handle| self.node.release_handle(handle))
    }
}

impl ScanOutBuffer for BufferObject {
    fn node(&self) -> &Node {
        self.node()
    }

    fn raw_handle(&self) -> u32 {
        self.raw_handle()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes()
    }
}

impl Drop for BufferObject {
    fn drop(&mut self) {
        if let Err(error) = self.close_handle() {
            tracing::error!(%error, node = %self.node.path().display(), "could not close a GEM handle");
        }
    }
}
