//! A user-space driver of the lab's model GPU: the worked example of "how I teach peervram my own
//! driver". It uses what peervram makes public and nothing else.
//!
//! What a driver brings is small: it maps its registers and its rings through
//! [`Exporter::map`](peervram::backends::Exporter::map), and it answers for the memory that it lends by the
//! hooks of [`Owner`](peervram::backends::Owner). Its copy engine as an
//! [`Engine`](peervram::backends::Engine) makes copies through host memory and lets paths be verified, and
//! [`ImportingGpu`] is the device on the other side. Lending, choosing a path and taking back are peervram's.
//!
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//! use peervram::backends::{Aperture, DmaRange, DmaRanges, vfio};
//! use peervram::{Direction, Lender, Trust};
//! use peervram_model_driver::{Descriptor, ImportingGpu, ModelGpu, VRAM_BAR};
//!
//! # fn main() -> peervram::Result<()> {
//! // The lender: its driver owns what lies behind the BAR.
//! let device = vfio::Device::open("0000:01:00.0".parse()?)?;
//! let driver = Arc::new(ModelGpu::new(&device)?);
//! let ranges = DmaRanges::new(device.region(VRAM_BAR)?, &[DmaRange::new(0, 64 << 20)])?;
//! let lender = Lender::new(device);
//! let export = lender.export(Aperture::owned(ranges, driver))?;
//!
//! // The other GPU: an engine that reaches the lent memory by DMA.
//! let space = vfio::IoAddressSpace::new(vfio::Interface::Cdev)?;
//! let other = vfio::Device::open_into(&space, "0000:02:00.0".parse()?)?;
//! let gpu = Arc::new(ModelGpu::new(&other)?);
//! let importer = Arc::new(ImportingGpu::new(&other, gpu, 128 << 20..192 << 20)?);
//! let attachment = export.attach(Arc::clone(&importer), Trust::Verified(Direction::Write))?;
//! let access = attachment.enter(Direction::Write)?;
//! importer.store(0, access.memory(), 0, 64 << 20, Duration::from_secs(10))?;
//! access.finish().check()?;
//! # let _ = Descriptor::nothing(0);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod copy_engine;
mod gpu;
mod importing_gpu;
mod reached;
mod ring;
mod span;
mod vram_room;

pub use gpu::{ModelGpu, REGISTER_BAR, VRAM_BAR};
pub use importing_gpu::{GpuMemory, ImportingGpu};
pub use peervram_model::registers::{Descriptor, operation};
pub use reached::Reached;
pub use vram_room::VramPiece;
