//! `BufferObject`: an imported dma-buf with the picture in it, as a `gbm_bo`.
#![expect(unsafe_code, reason = "reading the handle out of a union of C")]

use std::fmt;
use std::num::NonZeroU32;

use drm::buffer::Handle;
use gbm::AsRaw;

use super::Device;
use crate::ImageLayout;
use crate::drm::handles::Handles;
use crate::drm::{Node, ScanOutBuffer};

/// A `gbm_bo`, destroyed with this value.
pub struct BufferObject {
    device: Device,
    /// Empty only while being dropped.
    bo: Option<gbm::BufferObject<()>>,
    layout: ImageLayout,
    size_bytes: u64,
    /// Its handle on the node, counted there; none where libgbm made it without one of its own.
    handle: Option<Handle>,
}

impl BufferObject {
    /// Counts the handle of what libgbm imported under the lock of `handles`.
    pub(super) fn new(
        device: Device,
        bo: gbm::BufferObject<()>,
        layout: ImageLayout,
        size_bytes: u64,
        handles: &mut Handles,
    ) -> Self {
        let user = device.user();
        let mut object = Self { device, bo: Some(bo), layout, size_bytes, handle: None };
        // libgbm's drivers for CPUs map what the kernel does not take, a memfd, and then have no handle: -1, as
        // gbm.h says.
        if let Some(raw) = NonZeroU32::new(object.raw_handle()).filter(|raw| raw.get() != u32::MAX) {
            object.handle = handles.take(Handle::from(raw), user).is_ok().then(|| Handle::from(raw));
        }
        object
    }

    /// Whether it has a handle on the node.
    pub(super) fn has_handle(&self) -> bool {
        self.handle.is_some()
    }

    /// Where gbm has its plane: its offset and stride in bytes.
    pub(super) fn place(&self) -> (u64, u32) {
        (u64::from(self.bo().offset(0)), self.bo().stride())
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
        let mut handles = self.device.node().handles();
        drop(self.bo.take());
        // Dropping the buffer object closed libgbm's handle; here it is only counted off.
        self.handle.map(|handle| handles.give_back(handle));
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
