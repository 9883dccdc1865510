//! `Device`: a gbm device on a DRM node; `ImageDevice`: the same, importing pictures of one layout.

use std::fmt;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use drm::control::Device as _;
use gbm::{BufferObjectFlags, Format, Modifier};
use parking_lot::{Mutex, MutexGuard};

use super::BufferObject;
use crate::drm::Node;
use crate::drm::handles::{Handles, User};
use crate::{DmaBuf, Error, ImageLayout, Importer, Kind, OnRevoke, PciAddress, Result};

/// A `gbm_device`. Cheap to clone; buffer objects hold it.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    node: Node,
    gbm: gbm::Device<Node>,
    /// Which user of the node's handles it is.
    number: u64,
    /// Held around every call of libgbm: a revoke may free an import on another thread.
    calls: Mutex<()>,
}

impl Device {
    /// Opens the node at `path`, and a gbm device on it, whose handles are nobody else's.
    ///
    /// # Errors
    /// As [`Node::open`], before libgbm is asked; else as [`Device::on`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::on(Node::open(path)?)
    }

    /// A gbm device on that node. For a compositor, one of its own open file ([`Node::from_fd`]): there it is DRM
    /// master, and there the handles of buffer objects are good.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where libgbm has no driver for the node.
    pub fn on(node: Node) -> Result<Self> {
        let gbm = gbm::Device::new(node.clone()).map_err(|error| {
            Error::new(
                Kind::Unsupported,
                "open a gbm device",
                format!("libgbm has no driver for it: {error}"),
            )
            .on(node.name())
            .next("install Mesa's: libgbm1 on Debian and Ubuntu, mesa-libgbm on Fedora")
        })?;
        static MADE: AtomicU64 = AtomicU64::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        Ok(Self(Arc::new(Inner { node, gbm, number, calls: Mutex::new(()) })))
    }

    /// The node that it is on.
    pub fn node(&self) -> &Node {
        &self.0.node
    }

    /// The same device, importing dma-bufs whose picture lies at `layout`, row by row (`DRM_FORMAT_MOD_LINEAR`).
    pub fn for_images(&self, layout: ImageLayout) -> ImageDevice {
        ImageDevice { device: self.clone(), layout }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ()> {
        self.0.calls.lock()
    }

    pub(super) fn user(&self) -> User {
        User::Gbm(self.0.number)
    }

    /// Fails where somebody else has the handle that `dma_buf` has in this open file: libgbm would close it under them.
    fn check_handle(&self, handles: &Handles, dma_buf: &DmaBuf) -> Result<()> {
        if !handles.are_used_by_others(self.user()) {
            return Ok(());
        }
        // A refusal of the kernel's is libgbm's to tell.
        let Ok(handle) = self.node().handle_of(dma_buf) else { return Ok(()) };
        if handles.is_used(handle) {
            return handles.check(handle, self.user()).map_err(|error| error.on(self.node().name()));
        }
        // This handle exists only because libgbm was asked for it.
        self.node()
            .close_buffer(handle)
            .map_err(|error| Error::os("close a GEM handle", error).on(self.node().path().display()))
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(self.node()).finish()
    }
}

/// A [`Device`] whose imports are pictures of one layout. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageDevice {
    device: Device,
    layout: ImageLayout,
}

impl ImageDevice {
    const TRIED: &str = "import a dma-buf by gbm";

    /// The device itself.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Why libgbm gave nothing. Its drivers keep the kernel's reason to themselves: the kernel is asked again, by an
    /// open file in which nobody else has handles.
    fn explain(&self, dma_buf: &DmaBuf, said: &std::io::Error) -> Error {
        let kernel = Node::open(self.device.node().path()).and_then(|node| node.import(dma_buf));
        match kernel {
            Err(refused) => refused,
            Ok(_) => {
                let why = format!("the kernel takes it, and libgbm's driver does not: {said}");
                Error::new(Kind::ImporterCannot, Self::TRIED, why)
                    .on(self.name())
                    .next("import it by the node itself (drm::Node), which can show it, too")
            }
        }
    }

    fn refuse(&self, why: String) -> Error {
        Error::new(Kind::InvalidInput, Self::TRIED, why).on(self.name())
    }
}

impl Importer for ImageDevice {
    type Memory = BufferObject;

    fn name(&self) -> String {
        format!("{}, by gbm", self.device.node().name())
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.device.node().pci_address()
    }

    /// The kernel's driver decides, as without gbm.
    fn on_revoke(&self) -> OnRevoke {
        self.device.node().on_revoke()
    }

    fn governed_by_p2pdma(&self) -> bool {
        self.device.node().governed_by_p2pdma()
    }

    /// [`Kind::InvalidInput`] where the picture does not fit the dma-buf, or gbm has its pixels elsewhere; what the
    /// kernel says where it refuses, as [`Node`]'s import does; [`Kind::ImporterCannot`] where only gbm does.
    fn import(&self, dma_buf: &DmaBuf) -> Result<BufferObject> {
        let layout = self.layout;
        layout.check(dma_buf.size_bytes())?;
        // gbm counts in signed words of 32 bits (struct gbm_import_fd_modifier_data).
        let narrow = |what: &str, value: u64| {
            i32::try_from(value)
                .map_err(|_| self.refuse(format!("{what}, {value:#x}, has more than 31 bits")))
        };
        let offset = narrow("the picture's offset", layout.offset_bytes)?;
        let stride = narrow("the picture's stride", u64::from(layout.stride_bytes))?;
        let guard = self.device.lock();
        let mut handles = self.device.node().handles();
        self.device.check_handle(&handles, dma_buf)?;
        let bo = self.device.0.gbm.import_buffer_object_from_dma_buf_with_modifiers::<()>(
            1,
            [Some(dma_buf.as_fd()), None, None, None],
            layout.width,
            layout.height,
            Format::Xrgb8888,
            BufferObjectFlags::empty(),
            [stride, 0, 0, 0],
            [offset, 0, 0, 0],
            Modifier::Linear,
        );
        let bo = bo
            .map(|bo| BufferObject::new(self.device.clone(), bo, layout, dma_buf.size_bytes(), &mut handles));
        drop((handles, guard));
        let bo = bo.map_err(|said| self.explain(dma_buf, &said))?;
        let (offset_bytes, stride_bytes) = bo.place();
        if !bo.has_handle() {
            let said =
                std::io::Error::other("it made a buffer object without a handle of its own on the node");
            return Err(self.explain(dma_buf, &said));
        }
        if (offset_bytes, stride_bytes) != (layout.offset_bytes, layout.stride_bytes) {
            let why = format!(
                "gbm has the picture at {offset_bytes:#x} with a stride of {stride_bytes} bytes, the lender at {:#x} \
                 with {}",
                layout.offset_bytes, layout.stride_bytes
            );
            return Err(self.refuse(why).next(
                "lend from the picture on, with gbm's stride; or import it by the node itself (drm::Node)",
            ));
        }
        Ok(bo)
    }

    /// As a node's: the kernel maps its memory in a way that no other device's DMA can pin.
    fn stage(&self, _: u64) -> Result<BufferObject> {
        let why = "memory of a DRM node cannot be pinned for the engine that would copy to it";
        Err(Error::new(Kind::Unsupported, "make staging memory", why)
            .on(self.name())
            .next("stage to a Vulkan device, and show what that has"))
    }

    fn release(&self, memory: BufferObject) -> Result<()> {
        drop(memory);
        Ok(())
    }
}
