//! Coherent memory: what the regions of a Grace Hopper or Grace Blackwell GPU are, and when they are ready.
//!
//! The memory of these GPUs is not behind a BAR. It is part of the machine's physical memory, reached over a
//! link of its own (C2C), and `nvgrace_gpu_vfio_pci`, a variant of vfio-pci, shows it as if it were BARs:
//!
//! ```text
//!   region 4  usable     cached, coherent with the CPU
//!   region 2  reserved   not cached; only where the hardware cannot partition (MIG) with a cached one
//!   region 0  registers  a real BAR, and the peer-to-peer provider of all three
//! ```
//!
//! Order of calls: [`Device::open`] -> [`Device::memories`] -> as with any
//! [`Exporter`](peervram_backends::Exporter).
//!
//! Everything here is data about one family and arithmetic on it. Absent on purpose: ioctls, which are
//! [`vfio::Device`](peervram_backends::vfio::Device)'s, and any decision about who uses the memory.
//!
//! What is cited as the driver is Linux 7.3, `drivers/vfio/pci/nvgrace-gpu/main.c`.

#![forbid(unsafe_code)]

mod base;
mod device;
#[cfg(test)]
mod device_tests;
mod dvsec;
mod memory;
mod part;
mod readiness;

pub use device::{DRIVER, Device};
pub use memory::{BLOCK_BYTES, Memory, PROVIDER_BAR, RESERVED_REGION, USABLE_REGION, Use};
pub use part::{PARTS, Part};
