//! What the kernel says: a real DRM node is asked, by system calls that drm-shim does not see.
#![expect(unsafe_code, reason = "a request of DRM")]

use core::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Updater, opcode};

/// `struct drm_prime_handle`, include/uapi/drm/drm.h.
#[repr(C)]
pub struct PrimeHandle {
    pub handle: u32,
    flags: u32,
    pub fd: c_int,
}

const PRIME_FD_TO_HANDLE: rustix::ioctl::Opcode = opcode::read_write::<PrimeHandle>(b'd', 0x2e);

/// Whether a descriptor of which DRM is asked is drm-shim's, which opens `/dev/null` for its node.
pub fn is_shims(file: c_int) -> bool {
    let null = rustix::fs::makedev(1, 3);
    borrowed(file).and_then(|file| rustix::fs::fstat(file).ok()).is_some_and(|file| file.st_rdev == null)
}

/// Which dma-buf a descriptor is of, whatever its number: the inode.
pub fn identity(dma_buf: BorrowedFd<'_>) -> Result<u64, Errno> {
    Ok(rustix::fs::fstat(dma_buf)?.st_ino)
}

/// Has the real node attach to a dma-buf and map it. What comes back holds that import.
///
/// A new file each time: to one that has imported it, the kernel gives the old handle and does not look.
pub fn import(dma_buf: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let node = std::env::var("PEERVRAM_DRM_NODE").map_err(|_| Errno::NODEV)?;
    let node = rustix::fs::open(node, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let mut asked = PrimeHandle { handle: 0, flags: 0, fd: dma_buf.as_raw_fd() };
    // SAFETY: the request reads and writes this structure.
    let request = unsafe { Updater::<PRIME_FD_TO_HANDLE, _>::new(&mut asked) };
    // SAFETY: the kernel keeps its own hold of what it is given.
    unsafe { rustix::ioctl::ioctl(&node, request) }?;
    Ok(node)
}

/// A descriptor of the driver's, for the length of one request.
pub fn borrowed<'a>(fd: c_int) -> Option<BorrowedFd<'a>> {
    // SAFETY: the driver keeps it open while its request runs; a number that is no descriptor is an EBADF.
    (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
}
