//! The lab: virtual machines with a real Linux kernel, a device that lends its memory and a GPU
//! that imports it, on any x86-64 Linux machine, without a GPU, KVM or changes to the host.
//!
//! ```text
//! Lab::open      the private root: Debian's QEMU, busybox and Mesa in the user's cache folder
//!   .boot        a row of the machine table: kernel, initramfs, QEMU, the agent in the guest
//!     Vm::test   one test of the guest program
//!     Vm::run    any other program: its output, its exit code
//!     Vm::screendump
//! ```
//!
//! [`browser`] looks at a page that was made here. [`suite`] runs many tests on many machines and [`report`] tells about it.

#![forbid(unsafe_code)]

pub mod browser;
pub mod cache;
pub mod change;
mod cpio;
mod device;
mod folder;
mod grace;
pub mod holder;
pub mod host;
mod initrd;
pub mod kernel;
mod kernel_source;
mod lab;
pub mod link;
pub mod machine;
pub mod machines;
mod model;
mod modules;
pub mod own_kernel;
pub mod picture;
pub mod progress;
mod qemu;
mod qmp;
pub mod report;
mod root;
pub mod routes;
mod schedule;
pub mod shape;
mod ssdt;
pub mod suite;
mod table;
mod topology;
pub mod tree;
pub mod validation;
mod vm;
pub mod wire;

pub use lab::{LAYERS, Lab, Programs, kernels};
pub use machine::Machine;
pub use picture::Picture;
pub use progress::Progress;
pub use vm::{Exit, Vm};
