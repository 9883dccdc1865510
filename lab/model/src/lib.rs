//! A model GPU: a PCI device with video memory, a copy engine and a draw engine, served over the
//! vfio-user protocol to QEMU's `vfio-user-pci`.
//!
//! The rooms, from the outside in:
//!
//! - [`registers`]: what the driver in the guest sees. It depends on nothing else here.
//! - [`protocol`], [`dma_message`]: bytes to typed messages and back. Pure.
//! - [`dispatch`]: one request to one answer, on a [`dispatch::Backend`]. No socket.
//! - [`socket`], [`peer`], [`server`]: the shell around it: descriptors, threads, the accept loop.
//! - [`configuration`], [`state`] (with `engine_registers`), [`operation`], [`draw`], [`windows`]: what the device decides. Pure.
//! - [`vram`], [`dma`], [`interrupts`], [`engine`], [`device`]: what it does.
//! - [`misbehaviour`], [`request`], [`control`]: how it is told to go wrong, and looked at from behind.
//!
//! There is no unsafe code: video memory and the guest's memory are files, read and written at
//! offsets. Nothing is mapped, so a client that truncates its memory cannot end this process with
//! SIGBUS, and thousands of windows cost no mappings.

#![forbid(unsafe_code)]

pub mod registers;

#[cfg(feature = "device")]
pub mod configuration;
#[cfg(feature = "device")]
pub mod control;
#[cfg(feature = "device")]
pub mod device;
#[cfg(feature = "device")]
pub mod dispatch;
#[cfg(feature = "device")]
pub mod dma;
#[cfg(feature = "device")]
pub mod dma_message;
#[cfg(feature = "device")]
pub mod draw;
#[cfg(feature = "device")]
pub mod engine;
#[cfg(feature = "device")]
mod engine_registers;
#[cfg(feature = "device")]
pub mod interrupts;
#[cfg(feature = "requests")]
pub mod misbehaviour;
#[cfg(feature = "device")]
pub mod operation;
#[cfg(feature = "device")]
pub mod peer;
#[cfg(feature = "device")]
pub mod protocol;
#[cfg(feature = "requests")]
pub mod request;
#[cfg(feature = "device")]
pub mod server;
#[cfg(feature = "device")]
pub mod socket;
#[cfg(feature = "device")]
pub mod state;
#[cfg(feature = "device")]
pub mod vram;
#[cfg(feature = "device")]
pub mod windows;
