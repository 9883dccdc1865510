//! Memory of the device that QEMU maps: a file, read and written at offsets.
//!
//! A memory file of our own is sealed against shrinking, so that no client can make another's
//! mapping of it fault. The engine goes through `pread` and `pwrite`, which the kernel keeps coherent
//! with every mapping of the file and which cannot fault.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

/// Video memory, or other memory behind a BAR.
#[derive(Debug)]
pub struct Vram {
    file: OwnedFd,
    size_bytes: u64,
}

impl Vram {
    /// Fresh memory, all zeros.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(name: &str, size_bytes: u64) -> Result<Self, Errno> {
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, size_bytes)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Vram { file, size_bytes })
    }

    /// An existing file of at least `size_bytes`, which others may map as well.
    ///
    /// # Errors
    /// What the kernel says; `EINVAL` if the file is smaller.
    pub fn open(path: &Path, size_bytes: u64) -> Result<Self, Errno> {
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let present = rustix::fs::fstat(&file)?.st_size;
        if u64::try_from(present).is_ok_and(|present| present >= size_bytes) {
            Ok(Vram { file, size_bytes })
        } else {
            Err(Errno::INVAL)
        }
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// `EFAULT` outside the memory.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.check(offset, buffer.len())?;
        read_exact_at(self.file.as_fd(), offset, buffer)
    }

    /// Writes `data` from `offset` on.
    ///
    /// # Errors
    /// `EFAULT` outside the memory.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.check(offset, data.len())?;
        write_all_at(self.file.as_fd(), offset, data)
    }

    /// Forgets everything: zeros.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clear(&self) -> Result<(), Errno> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, mode, 0, self.size_bytes)
    }

    fn check(&self, offset: u64, bytes: usize) -> Result<(), Errno> {
        match offset.checked_add(bytes as u64) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(Errno::FAULT),
        }
    }
}

impl AsFd for Vram {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// `pread` until `buffer` is full.
///
/// # Errors
/// What the kernel says; `EFAULT` at the end of the file.
pub fn read_exact_at(file: BorrowedFd<'_>, mut offset: u64, mut buffer: &mut [u8]) -> Result<(), Errno> {
    while !buffer.is_empty() {
        match rustix::io::pread(file, &mut *buffer, offset) {
            Ok(0) => return Err(Errno::FAULT),
            Ok(bytes) => {
                offset = offset.saturating_add(bytes as u64);
                buffer = &mut buffer[bytes..];
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// `pwrite` until all of `data` is written.
///
/// # Errors
/// What the kernel says.
pub fn write_all_at(file: BorrowedFd<'_>, mut offset: u64, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match rustix::io::pwrite(file, data, offset) {
            Ok(0) => return Err(Errno::FAULT),
            Ok(bytes) => {
                offset = offset.saturating_add(bytes as u64);
                data = &data[bytes..];
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
