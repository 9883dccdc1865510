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
        self.check(offset, buffer.len() as u64)?;
        read_exact_at(self.file.as_fd(), offset, buffer)
    }

    /// Writes `data` from `offset` on.
    ///
    /// # Errors
    /// `EFAULT` outside the memory.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.check(offset, data.len() as u64)?;
        write_all_at(self.file.as_fd(), offset, data)
    }

    /// The checksum of a range, as [`crate::request::Request::Checksum`] defines it.
    ///
    /// # Errors
    /// `EFAULT` outside the memory.
    pub fn checksum(&self, offset: u64, bytes: u64) -> Result<u32, Errno> {
        const PIECE: u64 = 1 << 20;
        self.check(offset, bytes)?;
        let mut buffer = vec![0; bytes.min(PIECE) as usize];
        let (mut sum, mut factor) = (0_u32, 1_u32);
        let mut done = 0;
        while done < bytes {
            let length = (bytes - done).min(PIECE) as usize;
            read_exact_at(self.file.as_fd(), offset + done, &mut buffer[..length])?;
            for part in buffer[..length].chunks(4) {
                let mut word = [0; 4];
                word[..part.len()].copy_from_slice(part);
                sum = sum.wrapping_add(u32::from_le_bytes(word).wrapping_mul(factor));
                factor = factor.wrapping_add(2);
            }
            done += length as u64;
        }
        Ok(sum)
    }

    /// Forgets everything: zeros.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clear(&self) -> Result<(), Errno> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, mode, 0, self.size_bytes)
    }

    fn check(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        match offset.checked_add(bytes) {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Twin of the test of `peervram-backends`, whose checksum is the same.
    fn checksum(bytes: &[u8]) -> u32 {
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(4), 0);
        let (words, _) = padded.as_chunks::<4>();
        (0_u32..).zip(words).fold(0, |sum: u32, (i, word)| {
            sum.wrapping_add(u32::from_le_bytes(*word).wrapping_mul(i.wrapping_mul(2).wrapping_add(1)))
        })
    }

    #[test]
    fn checksums_are_of_the_range_and_of_all_of_it() {
        let vram = Vram::new("test", 4 << 20).unwrap();
        assert_eq!(vram.checksum(0, 4 << 20), Ok(0));
        vram.write(8, &[1, 0, 0, 0, 2, 0, 0, 0]).unwrap();
        assert_eq!(vram.checksum(8, 8), Ok(1 + 2 * 3));
        assert_eq!(vram.checksum(0, 16), Ok(5 + 2 * 7));
        let bytes: Vec<u8> = (0..3_000_001_u32).map(|i| (i * 7 + i / 251) as u8).collect();
        vram.write(5, &bytes).unwrap();
        assert_eq!(vram.checksum(5, bytes.len() as u64), Ok(checksum(&bytes)));
        assert_eq!(vram.checksum(0, (4 << 20) + 1), Err(Errno::FAULT));
        assert_eq!(vram.checksum(u64::MAX, 2), Err(Errno::FAULT));
    }
}
