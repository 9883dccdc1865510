//! Dma-bufs that a driver has imported, and what the kernel says of each.
//!
//! amdgpu, as xe, attaches when it imports and maps later (`amdgpu_gem_prime_import` in `amdgpu_dma_buf.c`,
//! `xe_gem_prime_import` in `xe_dma_buf.c`, Linux 7.3.4). A topology that the kernel refuses is an EINVAL of the map. So is a
//! memory that is away an ENODEV of both, for VFIO looks at that when somebody attaches, too (`vfio_pci_dma_buf_attach`). The real
//! node's driver, virtio-gpu, does both at once; which of the two refused is told by the errno.

use core::ffi::c_int;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::{Driver, kernel};

/// An imported dma-buf.
struct Import {
    file: c_int,
    handle: u32,
    size_bytes: u64,
    inode: u64,
    dma_buf: OwnedFd,
    /// The real import, which is there from the start on where the kernel maps it: a revoke and `holders` see it.
    _real: Option<OwnedFd>,
}

fn imports() -> MutexGuard<'static, Vec<Import>> {
    static IMPORTS: Mutex<Vec<Import>> = Mutex::new(Vec::new());
    IMPORTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `PRIME_FD_TO_HANDLE`: attaches, and gives a handle of the file.
pub fn import(driver: &dyn Driver, file: c_int, fd: c_int) -> Result<u32, Errno> {
    let dma_buf = kernel::borrowed(fd).ok_or(Errno::BADF)?;
    let inode = kernel::identity(dma_buf)?;
    let mut imports = imports();
    // A file has one handle for a dma-buf, as the kernel has it (`drm_gem_prime_fd_to_handle`).
    if let Some(known) = imports.iter().find(|import| import.file == file && import.inode == inode) {
        return Ok(known.handle);
    }
    let real = match kernel::import(dma_buf) {
        Ok(real) => Some(real),
        Err(Errno::INVAL) => None,
        Err(refused) => return Err(refused),
    };
    let size_bytes = rustix::fs::seek(dma_buf, rustix::fs::SeekFrom::End(0))?;
    let handle = driver.stand_in(file, size_bytes)?;
    let dma_buf = rustix::io::fcntl_dupfd_cloexec(dma_buf, 0)?;
    imports.push(Import { file, handle, size_bytes, inode, dma_buf, _real: real });
    Ok(handle)
}

/// `GEM_CLOSE`: what was imported under that handle is let go.
pub fn close(file: c_int, handle: u32) {
    let mut imports = imports();
    let found = imports.iter().position(|import| import.file == file && import.handle == handle);
    let import = found.map(|at| imports.swap_remove(at));
    drop(imports);
    // Without the lock: it may be the last one who holds the dma-buf.
    drop(import);
}

/// The handles of all that was imported into that file.
pub fn of(file: c_int) -> Vec<u32> {
    imports().iter().filter(|import| import.file == file).map(|import| import.handle).collect()
}

/// The size of what was imported under that handle; none of any other.
pub fn size_bytes(file: c_int, handle: u32) -> Option<u64> {
    let imports = imports();
    imports
        .iter()
        .find(|import| import.file == file && import.handle == handle)
        .map(|import| import.size_bytes)
}

/// Has the kernel map what was imported under that handle now; nothing to be said of any other.
pub fn map(file: c_int, handle: u32) -> Option<Result<(), Errno>> {
    let imports = imports();
    let import = imports.iter().find(|import| import.file == file && import.handle == handle)?;
    Some(kernel::import(import.dma_buf.as_fd()).map(drop))
}
