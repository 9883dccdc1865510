//! `ShadowFile`: the file of shadow memory, which is put under a mapping while its device's memory cannot be touched.
//!
//! A sealed file of 0xFF, mapped privately: reads see what a device that is not there answers, writes
//! land in pages of this process that nobody else sees. A mapping takes the file in pieces, again and
//! again. Each piece is one entry of the process's memory map, of which it may have some 65 thousand
//! (`vm.max_map_count`): so the file is larger for a large mapping, and there is one for the process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;

use crate::{Error, Result};

/// The smallest file: enough for a mapping of 8 GiB in [`PIECES_MAX`] pieces.
const LEAST_BYTES: usize = 2 << 20;
/// More pieces than this are not needed for one mapping.
const PIECES_MAX: usize = 4096;

/// A file of ones.
#[derive(Debug)]
pub(super) struct ShadowFile {
    file: OwnedFd,
    size_bytes: usize,
}

impl ShadowFile {
    /// The file that a mapping of that length takes its pieces from.
    pub(super) fn for_length(length_bytes: usize) -> Result<Arc<Self>> {
        static LARGEST: Mutex<Option<Arc<ShadowFile>>> = Mutex::new(None);
        let wanted_bytes = wanted_bytes(length_bytes);
        let mut largest = LARGEST.lock();
        if let Some(ones) = largest.as_ref().filter(|ones| ones.size_bytes >= wanted_bytes) {
            return Ok(Arc::clone(ones));
        }
        let ones = Self::new(wanted_bytes)
            .map_err(|errno| Error::os("make shadow memory", errno).next("free memory, and try again"))?;
        // A smaller one lives on under the mappings that have it.
        let ones = Arc::new(ones);
        *largest = Some(Arc::clone(&ones));
        Ok(ones)
    }

    fn new(size_bytes: usize) -> Result<Self, Errno> {
        let file = memfd_create("peervram-shadow", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let block = vec![0xFF_u8; LEAST_BYTES];
        let mut done = 0;
        while done < size_bytes {
            let chunk = &block[..LEAST_BYTES.min(size_bytes - done)];
            done += rustix::io::pwrite(&file, chunk, done as u64)?;
        }
        // Nothing can lose its pages, and nobody can write to what all shadows share. A private
        // mapping stays writable: its writes go to copies (mm/memfd.c, memfd_check_seals_mmap).
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
        Ok(Self { file, size_bytes })
    }

    /// The file's size: the length of the largest piece.
    pub(super) fn size_bytes(&self) -> usize {
        self.size_bytes
    }
}

impl AsFd for ShadowFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn wanted_bytes(length_bytes: usize) -> usize {
    length_bytes.div_ceil(PIECES_MAX).next_power_of_two().max(LEAST_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_of_any_size_takes_few_pieces() {
        for length_bytes in [4096, 2 << 20, 256 << 20, 8 << 30, 24 << 30, 192 << 30] {
            let size_bytes = wanted_bytes(length_bytes);
            assert!(length_bytes.div_ceil(size_bytes) <= PIECES_MAX, "{length_bytes:#x}");
            assert!(size_bytes <= (length_bytes / 2048).max(LEAST_BYTES), "{length_bytes:#x}");
        }
    }

    #[test]
    fn the_file_is_all_ones_and_stays_so() {
        let ones = ShadowFile::for_length(4096).unwrap();
        let mut seen = [0; 4096];
        rustix::io::pread(&ones, &mut seen, (LEAST_BYTES - 4096) as u64).unwrap();
        assert_eq!(seen, [0xFF; 4096]);
        assert_eq!(rustix::io::pwrite(&ones, &[0], 0).unwrap_err(), Errno::PERM);
        assert_eq!(rustix::fs::ftruncate(&ones, 0).unwrap_err(), Errno::PERM);
    }
}
