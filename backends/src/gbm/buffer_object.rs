//! `BufferObject`: an imported dma-buf with the picture in it, as a `gbm_bo`.
#![expect(unsafe_code, reason = "reading the handle out of a union of C")]

use std::fmt;

use gbm::AsRaw;

use super::Device;
use crate::ImageLayout;
use crate::drm::{Node, ScanOutBuffer};

/// A `gbm_bo`, destroyed with this value.
pub struct BufferObject {
    device: Device,
    /// Empty only while being dropped.
    bo: Option<gbm::BufferObject<()>>,
    layout: ImageLayout,
    size_bytes: u64,
}

impl BufferObject {
    pub(super) fn new(
        device: Device,
        bo: gbm::BufferObject<()>,
        layout: ImageLayout,
        size_bytes: u64,
    ) -> Self {
        Self { device, bo: Some(bo), layout, size_bytes }
    }

    /// `struct gbm_bo *`, for calls of the application's own; they must not run while another thread uses the same
    /// [`Device`]. Valid as long as this value.
    pub fn raw_bo(&self) -> *mut std::ffi::c_void {
        self.bo().as_raw().cast_mut().cast()
    }

    /// The GEM handle of the picture's plane, for the driver's own ioctls. Valid as long as this value.
    pub fn raw_handle(&self) -> u32 {
        let handle = self.bo().handle_for_plane(0);
        // SAFETY: on a DRM node, which the device's is, gbm's drivers fill in this field of the union
        // (Mesa's gbm_dri.c, gbm_dri_bo_get_handle_for_plane).
        unsafe { handle.u32_ }
    }

    /// The size of the dma-buf in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Where the picture lies in the lent memory.
    pub fn layout(&self) -> ImageLayout {
        self.layout
    }

    /// The device that it was imported by.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn bo(&self) -> &gbm::BufferObject<()> {
        self.bo.as_ref().expect("empty only while being dropped")
    }
}

impl ScanOutBuffer for BufferObject {
    fn node(&self) -> &Node {
        self.device.node()
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
        // libgbm's drivers do not say that they may be called by two threads at once.
        let _guard = self.device.lock();
        drop(self.bo.take());
    }
}

impl fmt::Debug for BufferObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferObject")
            .field("device", &self.device)
            .field("layout", &self.layout)
            .field("size_bytes", &self.size_bytes)
            .finish()
    }
}
