//! Lend one GPU's VRAM to another GPU.
//!
//! One GPU is bound to `vfio-pci`. Its VRAM is exported as a dma-buf and imported by another
//! device's Vulkan or DRM stack, without a copy through system memory.
//!
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//! use peervram::backends::{Aperture, DmaRange, DmaRanges, RawBytes, drm, vfio};
//! use peervram::{Direction, Lender, Trust};
//!
//! # fn main() -> peervram::Result<()> {
//! let lender = Lender::new(vfio::Device::open("0000:01:00.0".parse()?)?);
//! let ranges = DmaRanges::new(lender.device().region(2)?, &[DmaRange::new(0, 16 << 20)])?;
//! let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
//!
//! let screen = Arc::new(drm::Node::open("/dev/dri/card0".as_ref())?);
//! let attachment = export.attach(screen, Trust::Unverified)?;
//! println!("by {}", attachment.path());
//!
//! let access = attachment.enter(Direction::Read)?; // refused while the memory is taken back
//! let _handle = access.memory().raw_handle();
//! access.finish().check()?;
//!
//! attachment.detach()?;
//! lender.close(Duration::from_secs(1))?;
//! Ok(())
//! # }
//! ```
//!
//! The life of a buffer: [`Lender`] -> [`Export`] -> [`Attachment`] -> [`Access`], each made by the
//! one before. What happens when the kernel takes the memory back is told by [`Event`]s. The mechanism underneath is [`backends`]; this crate is the policy: by which path, with
//! which trust, until when.

#![forbid(unsafe_code)]

mod access;
mod attach_options;
mod attachment;
mod attachment_inner;
mod attempt;
#[cfg(feature = "broker")]
pub mod broker;
mod export;
mod export_inner;
mod foresight;
mod gate;
mod hook;
mod import;
mod in_flight;
mod lender;
mod lent_device;
mod path;
mod piece_lock;
mod plan;
mod relay;
mod revoke;
mod round_trip;
pub mod route;
mod staged;
#[cfg(all(test, feature = "host", not(feature = "shuttle")))]
mod staged_tests;
mod staging;
mod sync;
pub mod verify;

pub use peervram_backends as backends;
pub use peervram_backends::{Error, Kind, NotClosed, Result};
#[cfg(feature = "nvgrace")]
pub use peervram_nvgrace as nvgrace;

pub use access::{Access, Refused};
pub use attach_options::{AttachOptions, NotAttached};
pub use attachment::Attachment;
pub use export::Export;
pub use gate::Outcome;
pub use import::Import;
pub use in_flight::InFlight;
pub use lender::Lender;
#[cfg(feature = "vfio")]
pub use lender::ResetTogether;
pub use lent_device::LentDevice;
pub use path::{Direction, Path, Trust};
pub use revoke::{
    AtDeadline, Event, EventKind, Events, RevokeCause, RevokeOptions, SlowCallback, Stuck, Subscription,
    Watch,
};
pub use staging::{Mover, Staging};

/// The program in the README compiles.
#[cfg(all(doctest, feature = "vfio", feature = "vulkan"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// The programs in the book compile.
#[cfg(all(doctest, feature = "vfio", feature = "vulkan"))]
#[doc = include_str!("../docs/revoke.md")]
struct Revoke;
#[cfg(all(doctest, feature = "vfio", feature = "vulkan", feature = "drm"))]
#[doc = include_str!("../docs/lend-a-buffer.md")]
struct LendABuffer;
#[cfg(all(doctest, feature = "vulkan"))]
#[doc = include_str!("../docs/verify.md")]
struct Verify;
#[cfg(all(doctest, feature = "nvgrace", feature = "drm"))]
#[doc = include_str!("../docs/nvgrace.md")]
struct Nvgrace;
#[cfg(all(doctest, feature = "broker"))]
#[doc = include_str!("../docs/broker.md")]
struct Broker;

/// The programs for newcomers compile.
#[cfg(all(doctest, feature = "host", feature = "vfio", feature = "vulkan"))]
#[doc = include_str!("../docs/start-here.md")]
struct StartHere;
