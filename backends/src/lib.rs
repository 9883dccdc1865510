//! Mechanism: who can make a dma-buf of device memory, and who can map one.
//!
//! An [`Exporter`] (a VFIO device, host memory) turns [`DmaRanges`] of a [`Region`] into a
//! [`DmaBuf`]. An [`Importer`] (Vulkan, DRM, gbm) turns that into memory of its own. Each lives in a
//! module behind a feature of the same name: `vfio`, `host`, `vulkan`, `drm`, `gbm`.
//!
//! Absent on purpose: who *may* use what, until when, and by which path. That is policy and lives
//! in the `peervram` crate. Nothing here prints, exits, or keeps state between processes.

mod aperture;
mod bytes;
mod deadline;
mod dma_buf;
#[cfg(feature = "drm")]
pub mod drm;
mod engine;
mod error;
mod exporter;
#[cfg(feature = "gbm")]
pub mod gbm;
pub mod holders;
#[cfg(feature = "host")]
pub mod host;
mod image;
mod import_support;
mod importer;
mod kernel_log;
mod mapping;
mod not_closed;
pub mod pci;
mod peer;
mod ranges;
mod reaper;
mod region;
mod shared_words;
pub mod signal;
pub mod topology;
mod uapi;
#[cfg(feature = "vfio")]
pub mod vfio;
#[cfg(feature = "vulkan")]
pub mod vulkan;

pub use aperture::{Aperture, Owner, RawBytes};
pub use deadline::deadline_after;
pub use dma_buf::DmaBuf;
pub use engine::{Engine, HostSlice};
pub use error::{Error, Kind, Result};
pub use exporter::{CpuAccess, Exporter, Interrupts, NotReady};
pub use image::ImageLayout;
pub use import_support::{
    Governor, ImportSupport, ScanOutSupport, import_modes, import_support, import_support_of,
};
pub use importer::{Importer, OnRefusal, OnRevoke};
pub use kernel_log::{KERNEL_LOG, KernelLog, Logged};
pub use mapping::{Mapping, Source};
pub use not_closed::NotClosed;
pub use pci::PciAddress;
pub use peer::Peer;
pub use ranges::{DmaRange, DmaRanges, MAX_RANGES, page_size_bytes};
pub use region::{Capability, Region, RegionFlags, SparseArea};
pub use shared_words::{Life, SharedWords, SharedWordsView};
pub use signal::{Flag, Signal, SyncFile};
