//! The kernel's software timeline (`sw_sync`): sync_files that fire when the test says so.
//!
//! ```text
//! Timeline::open -> fence(value) -> (nothing) -> advance(by) -> the fence fires
//! ```
//! A dropped timeline fires what is left, with an error (`sw_sync_debugfs_release`).
//!
//! The only unsafe code of the lab's guest. Nothing that an application needs makes fences, so the
//! calls do not belong into the library; and no crate has safe ones.
#![expect(unsafe_code, reason = "ioctls of test interfaces of the kernel")]

use anyhow::{Context, Result};
use bytemuck::{Pod, Zeroable};
use peervram::backends::DmaBuf;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const PATH: &str = "/sys/kernel/debug/sync/sw_sync";

/// `SW_SYNC_IOC_CREATE_FENCE` (drivers/dma-buf/sw_sync.c).
const CREATE_FENCE: Opcode = opcode::read_write::<CreateFence>(b'W', 0);
/// `SW_SYNC_IOC_INC`.
const INCREMENT: Opcode = opcode::write::<u32>(b'W', 1);
/// `DMA_BUF_IOCTL_IMPORT_SYNC_FILE` (include/uapi/linux/dma-buf.h).
const IMPORT_SYNC_FILE: Opcode = opcode::write::<ImportSyncFile>(b'b', 3);

/// `struct sw_sync_create_fence_data`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CreateFence {
    value: u32,
    name: [u8; 32],
    fence: i32,
}

/// `struct dma_buf_import_sync_file`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ImportSyncFile {
    flags: u32,
    fd: i32,
}

/// What the work behind a fence does with a buffer.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// `DMA_BUF_SYNC_READ`.
    Reads = 1,
    /// `DMA_BUF_SYNC_WRITE`.
    Writes = 2,
}

/// A timeline that begins at zero.
#[derive(Debug)]
pub struct Timeline(File);

impl Timeline {
    /// A new one.
    pub fn open() -> Result<Timeline> {
        Ok(Timeline(OpenOptions::new().read(true).write(true).open(PATH).context(PATH)?))
    }

    /// A sync_file that fires when the timeline reaches `value`.
    pub fn fence(&self, value: u32) -> Result<OwnedFd> {
        let mut request = CreateFence { value, name: [0; 32], fence: -1 };
        // SAFETY: the kernel reads and writes one sw_sync_create_fence_data.
        unsafe { ioctl(&self.0, Updater::<CREATE_FENCE, _>::new(&mut request)) }.context("making a fence")?;
        // SAFETY: it succeeded, so this is a descriptor that the kernel just made for us.
        Ok(unsafe { OwnedFd::from_raw_fd(request.fence) })
    }

    /// Moves the timeline on.
    pub fn advance(&self, by: u32) -> Result<()> {
        // SAFETY: the kernel reads one u32.
        unsafe { ioctl(&self.0, Setter::<INCREMENT, u32>::new(by)) }.context("advancing the timeline")
    }
}

/// Leaves `fence` in a buffer, as an importer does with the fence of its work.
pub fn leave(fence: impl AsFd, buffer: &DmaBuf, work: Work) -> Result<()> {
    let request = ImportSyncFile { flags: work as u32, fd: fence.as_fd().as_raw_fd() };
    // SAFETY: the kernel reads one dma_buf_import_sync_file, and takes a reference of its own.
    unsafe { ioctl(buffer, Setter::<IMPORT_SYNC_FILE, _>::new(request)) }.context("leaving a fence")
}
