//! The lab: virtual machines with a real Linux kernel, a device that lends its memory and a GPU
//! that imports it, on any x86-64 Linux machine, without a GPU, KVM or changes to the host. Some of them are of 64-bit Arm.
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

mod architecture;
pub mod browser;
mod folder;
pub mod kernel;
mod lab;
pub mod machine;
pub mod machines;
pub mod progress;
pub mod root;
mod run;
mod vm;

pub use kernel::holder;
pub use lab::{Absent, GuestPrograms, LAYERS, Lab, Programs, kernels};
pub use machine::{Machine, tree};
pub use progress::Progress;
pub use root::{cache, host};
pub use run::{report, routes, suite};
pub use vm::{Clock, Exit, Vm, change, driver, link, validation, wire};
