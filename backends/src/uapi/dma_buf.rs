//! `include/uapi/linux/dma-buf.h`.
#![expect(unsafe_code, reason = "ioctl, and the descriptor that one returns")]

use std::ffi::{CStr, c_void};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::io::Result;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode};

/// `DMA_BUF_SET_NAME_B`: the number says eight bytes, on every architecture, and means a pointer.
const SET_NAME: Opcode = opcode::write::<u64>(b'b', 1);

/// The longest name, its terminator included (`DMA_BUF_NAME_LEN`).
pub const NAME_BYTES_MAX: usize = 32;

/// Gives a dma-buf a name, which `/proc/PID/fdinfo` and debugfs show. A longer one than
/// [`NAME_BYTES_MAX`] is EINVAL.
pub fn set_name(dma_buf: impl AsFd, name: &CStr) -> Result<()> {
    // SAFETY: the kernel reads a string up to its terminator.
    unsafe { ioctl(dma_buf, SetName(name)) }
}

struct SetName<'name>(&'name CStr);

// SAFETY: DMA_BUF_SET_NAME_B reads a string and writes nothing (dma_buf_set_name).
unsafe impl Ioctl for SetName<'_> {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        SET_NAME
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_ptr().cast_mut().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> Result<()> {
        Ok(())
    }
}

/// `DMA_BUF_IOCTL_SYNC`.
const SYNC: Opcode = opcode::write::<Sync>(b'b', 0);
/// `DMA_BUF_SYNC_END`; a start is its absence.
const SYNC_END: u64 = 1 << 2;

/// `struct dma_buf_sync`.
#[repr(C)]
struct Sync {
    flags: u64,
}

/// Begins CPU access to a mapped dma-buf, or ends it: `access` is [`SYNC_READ`], [`SYNC_WRITE`] or both. A beginning
/// waits for the fences of those whose work conflicts. EINTR and EAGAIN ask for another try; ENOTTY is no dma-buf.
pub fn sync(dma_buf: impl AsFd, access: u32, is_end: bool) -> Result<()> {
    let flags = u64::from(access) | if is_end { SYNC_END } else { 0 };
    // SAFETY: the kernel reads one dma_buf_sync.
    unsafe { ioctl(dma_buf, Setter::<SYNC, _>::new(Sync { flags })) }
}

/// `DMA_BUF_MAGIC` of `include/uapi/linux/magic.h`: the file system that dma-bufs are files of.
pub const MAGIC: u64 = 0x444d_4142;

/// `DMA_BUF_IOCTL_EXPORT_SYNC_FILE`.
const EXPORT_SYNC_FILE: Opcode = opcode::read_write::<ExportSyncFile>(b'b', 2);

/// `DMA_BUF_SYNC_READ`.
pub const SYNC_READ: u32 = 1;
/// `DMA_BUF_SYNC_WRITE`.
pub const SYNC_WRITE: u32 = 2;

/// `struct dma_buf_export_sync_file`.
#[repr(C)]
struct ExportSyncFile {
    flags: u32,
    fd: i32,
}

/// The fences that `flags` must wait for, as a sync_file, which is close-on-exec.
pub fn export_sync_file(dma_buf: impl AsFd, flags: u32) -> Result<OwnedFd> {
    let mut request = ExportSyncFile { flags, fd: -1 };
    // SAFETY: the kernel reads and writes one dma_buf_export_sync_file.
    unsafe { ioctl(dma_buf, Updater::<EXPORT_SYNC_FILE, _>::new(&mut request)) }?;
    // SAFETY: it succeeded, so this is a descriptor that the kernel just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(request.fd) })
}

/// What the above says of the kernel's header, for the test that compiles it.
#[cfg(all(test, feature = "vfio", feature = "host"))]
pub fn claims() -> [(&'static str, usize); 11] {
    use std::mem::offset_of;
    [
        ("DMA_BUF_SET_NAME_B", SET_NAME as usize),
        ("DMA_BUF_IOCTL_SYNC", SYNC as usize),
        ("DMA_BUF_SYNC_END", SYNC_END as usize),
        ("sizeof(struct dma_buf_sync)", size_of::<Sync>()),
        ("DMA_BUF_MAGIC", MAGIC as usize),
        ("DMA_BUF_IOCTL_EXPORT_SYNC_FILE", EXPORT_SYNC_FILE as usize),
        ("DMA_BUF_SYNC_READ", SYNC_READ as usize),
        ("DMA_BUF_SYNC_WRITE", SYNC_WRITE as usize),
        ("sizeof(struct dma_buf_export_sync_file)", size_of::<ExportSyncFile>()),
        ("offsetof(struct dma_buf_export_sync_file, flags)", offset_of!(ExportSyncFile, flags)),
        ("offsetof(struct dma_buf_export_sync_file, fd)", offset_of!(ExportSyncFile, fd)),
    ]
}
