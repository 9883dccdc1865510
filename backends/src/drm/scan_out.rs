//! `ScanOut`: a picture in an imported buffer, shown on a screen.
//!
//! The buffer is one of the node's, or a gbm one: whatever has a GEM handle ([`ScanOutBuffer`]).

use drm::buffer::{DrmFourcc, DrmModifier, Handle, PlanarBuffer};
use drm::control::connector::State;
use drm::control::{ClipRect, Device as _, FbCmd2Flags, Mode, connector, crtc, framebuffer};

use std::num::NonZeroU32;

use rustix::io::Errno;

use super::Node;
use crate::{Error, ImageLayout, Kind, Result, ScanOutSupport};

/// What a screen can show: a GEM handle on a node.
pub trait ScanOutBuffer {
    /// The node that the handle is of, by the open file that it was made in.
    fn node(&self) -> &Node;

    /// The GEM handle, for the driver's own ioctls. Valid as long as this value.
    fn raw_handle(&self) -> u32;

    /// The size of the memory in bytes.
    fn size_bytes(&self) -> u64;
}

/// A framebuffer on a screen, from [`start`](ScanOut::start) until dropped.
///
/// Meanwhile the node's open file is DRM master, and no compositor can show on the device: one that has the screen is to
/// be ended before, or to give its own open file ([`Node::from_fd`]).
#[derive(Debug)]
pub struct ScanOut<'a> {
    /// The buffer's, which so outlives this.
    node: &'a Node,
    connector: connector::Handle,
    mode: Mode,
    crtc: crtc::Handle,
    /// All of the picture, for `flush`.
    whole: ClipRect,
    // Fields drop in this order, after the screen was switched off.
    framebuffer: Framebuffer<'a>,
    _master: Master<'a>,
}

/// A framebuffer of a node, removed with this value: it would keep the import, whatever else became of it.
#[derive(Debug)]
struct Framebuffer<'a> {
    node: &'a Node,
    handle: framebuffer::Handle,
}

impl Drop for Framebuffer<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.node.destroy_framebuffer(self.handle) {
            tracing::error!(%error, node = %self.node.path().display(), "could not remove a framebuffer");
        }
    }
}

/// Being DRM master, until dropped.
#[derive(Debug)]
struct Master<'a>(&'a Node);

impl<'a> Master<'a> {
    fn take(node: &'a Node) -> Result<Self> {
        node.take_master().map_err(|errno| match errno {
            // drm_setmaster_ioctl: BUSY where another is, ACCESS (or PERM before Linux 5.8) where this file never was.
            Errno::BUSY | Errno::ACCESS | Errno::PERM | Errno::INVAL => {
                let why = "another program has the screen (it is DRM master)";
                Error::new(Kind::PermissionDenied, "take the screen", why)
                    .on(node.path().display())
                    .errno(errno)
                    .next("end the compositor on this node, open the node anew, or show by the compositor's own open file")
            }
            errno => Error::os("take the screen", errno)
                .on(node.path().display())
                .next("scan-out needs a card node, not a render node"),
        })?;
        Ok(Self(node))
    }
}

impl Drop for Master<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.give_master_back() {
            tracing::error!(%error, node = %self.0.path().display(), "could not give the screen back");
        }
    }
}

/// A linear XRGB8888 picture, as the drm crate wants to be told.
struct Picture {
    handle: Handle,
    layout: ImageLayout,
    offset_bytes: u32,
}

impl PlanarBuffer for Picture {
    fn size(&self) -> (u32, u32) {
        (self.layout.width, self.layout.height)
    }

    fn format(&self) -> DrmFourcc {
        DrmFourcc::Xrgb8888
    }

    fn modifier(&self) -> Option<DrmModifier> {
        None
    }

    fn pitches(&self) -> [u32; 4] {
        [self.layout.stride_bytes, 0, 0, 0]
    }

    fn handles(&self) -> [Option<Handle>; 4] {
        [Some(self.handle), None, None, None]
    }

    fn offsets(&self) -> [u32; 4] {
        [self.offset_bytes, 0, 0, 0]
    }
}

impl<'a> ScanOut<'a> {
    /// Shows the picture that lies at `layout` in `buffer` on the node's first connected screen,
    /// in the mode of the picture's size.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the picture does not fit the buffer or no mode has its size;
    /// [`Kind::NotFound`] without a screen; [`Kind::PermissionDenied`] where another program is
    /// DRM master; [`Kind::ImporterCannot`] (EINVAL) where the driver does not show the buffer: of imports amdgpu and xe
    /// show none on a discrete GPU. Some drivers map the buffer only now, so a refused route can also show here.
    /// After each kind of error nothing is left behind, and the screen shows what it showed before.
    pub fn start(buffer: &'a impl ScanOutBuffer, layout: ImageLayout) -> Result<Self> {
        let node = buffer.node();
        // First: whether a screen is connected is looked up for the DRM master only (`drm_mode_getconnector`), and
        // others are told what was seen last, which is nothing on a machine without a console on the GPU.
        let master = Master::take(node)?;
        let (connector, crtc) = find_screen(node)?;
        let mode = find_mode(node, &connector, layout)?;
        let framebuffer = Framebuffer { node, handle: make_framebuffer(buffer, layout)? };
        let connector = connector.handle();
        set(node, crtc, connector, mode, &framebuffer)?;
        let whole = ClipRect::new(0, 0, layout.width as u16, layout.height as u16);
        let scan_out = Self { node, connector, mode, crtc, whole, framebuffer, _master: master };
        scan_out.flush()?;
        Ok(scan_out)
    }

    /// Shows another picture of the same size in the place of this one: buffers that take turns. Returns when it
    /// is on the screen and the one before is not.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for a picture of another size, or a buffer of another open file; else as
    /// [`start`](ScanOut::start). The one before is shown on.
    pub fn show(&mut self, buffer: &'a impl ScanOutBuffer, layout: ImageLayout) -> Result<()> {
        let refuse = |why: &'static str| {
            Err(Error::new(Kind::InvalidInput, "show another picture", why).on(self.node.path().display()))
        };
        if (layout.width as u16, layout.height as u16) != (self.whole.x2(), self.whole.y2()) {
            return refuse("it has another size than the one before");
        }
        if !self.node.is_same(buffer.node()) {
            return refuse("its handle is of another open file");
        }
        let framebuffer = Framebuffer { node: self.node, handle: make_framebuffer(buffer, layout)? };
        set(self.node, self.crtc, self.connector, self.mode, &framebuffer)?;
        // The one before goes, now that it is on no screen.
        self.framebuffer = framebuffer;
        self.flush()
    }

    /// Tells the device that the picture changed. Devices that scan memory out by themselves do
    /// not need it; virtual ones copy when told.
    ///
    /// # Errors
    /// What the driver says.
    pub fn flush(&self) -> Result<()> {
        self.node
            .dirty_framebuffer(self.framebuffer.handle, &[self.whole])
            .map_err(|error| Error::os("show a changed picture", error).on(self.node.path().display()))
    }
}

impl Drop for ScanOut<'_> {
    fn drop(&mut self) {
        // Refused where the screen was lost, by a switch of consoles: removing the framebuffer takes it off then.
        if let Err(error) = self.node.set_crtc(self.crtc, None, (0, 0), &[], None) {
            tracing::warn!(%error, node = %self.node.path().display(), "could not switch a screen off");
        }
    }
}

fn set(
    node: &Node,
    crtc: crtc::Handle,
    connector: connector::Handle,
    mode: Mode,
    framebuffer: &Framebuffer<'_>,
) -> Result<()> {
    node.set_crtc(crtc, Some(framebuffer.handle), (0, 0), &[connector], Some(mode))
        .map_err(|error| explain(node, "show a framebuffer", error))
}

fn make_framebuffer(buffer: &impl ScanOutBuffer, layout: ImageLayout) -> Result<framebuffer::Handle> {
    const TRIED: &str = "make a framebuffer";
    layout.check(buffer.size_bytes())?;
    let node = buffer.node();
    let refuse = |why: String| Error::new(Kind::InvalidInput, TRIED, why).on(node.path().display());
    let offset_bytes = u32::try_from(layout.offset_bytes)
        .map_err(|_| refuse(format!("it starts at {:#x}, and DRM counts in 32 bits", layout.offset_bytes)))?;
    let handle = NonZeroU32::new(buffer.raw_handle())
        .ok_or_else(|| refuse("the buffer has no handle on the node".into()))?;
    let picture = Picture { handle: Handle::from(handle), layout, offset_bytes };
    node.add_planar_framebuffer(&picture, FbCmd2Flags::empty()).map_err(|error| explain(node, TRIED, error))
}

fn explain(node: &Node, tried: &'static str, error: std::io::Error) -> Error {
    let error = Error::os(tried, error).on(node.path().display());
    match error.kind() {
        Kind::PermissionDenied => error.next("end the compositor on this node; one program shows at a time"),
        // The layout and the mode were checked before.
        Kind::InvalidInput => refuses(node, tried).errno(Errno::INVAL),
        _ => error,
    }
}

/// Why a driver shows no import, as far as that is known.
fn refuses(node: &Node, tried: &'static str) -> Error {
    let known = node.import_support().map(|row| row.scan_out);
    let why = match known {
        Some(support @ ScanOutSupport::IntegratedOnly(_)) => {
            format!("the driver {} shows imported memory {support}", node.driver())
        }
        _ => format!("the driver {} refuses to show this buffer", node.driver()),
    };
    let next = "have the GPU copy it to a buffer of its own, and show that; the kernel's log may say more (drm.debug=0x4)";
    Error::new(Kind::ImporterCannot, tried, why).on(node.path().display()).next(next)
}

fn find_screen(node: &Node) -> Result<(connector::Info, crtc::Handle)> {
    const TRIED: &str = "find a screen";
    let failed = |error: std::io::Error| {
        Error::os(TRIED, error)
            .on(node.path().display())
            .next("scan-out needs a card node, not a render node")
    };
    let resources = node.resource_handles().map_err(failed)?;
    for &handle in resources.connectors() {
        let connector = node.get_connector(handle, true).map_err(failed)?;
        if connector.state() != State::Connected {
            continue;
        }
        let crtc = (connector.encoders().iter())
            .filter_map(|&encoder| node.get_encoder(encoder).ok())
            .flat_map(|encoder| resources.filter_crtcs(encoder.possible_crtcs()))
            .next();
        if let Some(crtc) = crtc {
            return Ok((connector, crtc));
        }
    }
    Err(Error::new(Kind::NotFound, TRIED, "none is connected").on(node.path().display()))
}

fn find_mode(node: &Node, connector: &connector::Info, layout: ImageLayout) -> Result<Mode> {
    let wanted = (layout.width, layout.height);
    let size = |mode: &Mode| (u32::from(mode.size().0), u32::from(mode.size().1));
    connector.modes().iter().find(|&mode| size(mode) == wanted).copied().ok_or_else(|| {
        let mut sizes: Vec<String> =
            connector.modes().iter().map(|mode| format!("{}x{}", mode.size().0, mode.size().1)).collect();
        sizes.dedup();
        Error::new(
            Kind::InvalidInput,
            "find a mode",
            format!("the screen has no mode of {}x{}", wanted.0, wanted.1),
        )
        .on(node.path().display())
        .next(format!("it has {}", sizes.join(", ")))
    })
}
