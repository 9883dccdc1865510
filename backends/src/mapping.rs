//! `Mapping`: device or host memory in this process's address space.
//!
//! Several ranges of one file appear one after the other, as they do in a dma-buf made of them, so
//! byte 0 of the mapping is byte 0 of the buffer. Pages are mapped when they are touched: making a
//! mapping costs the same for 4 KiB and for 256 MiB.
//!
//! Touching a mapped BAR whose device has memory decoding off raises SIGBUS (seen on Linux 7.3).
//! Whoever turns memory off must first see to it that nobody touches the mapping. A copy that
//! reports this as an error instead goes through the device: `vfio::Device::read` and `write`.
#![expect(unsafe_code, reason = "mmap, and volatile access to memory that a device may change at any time")]

use std::ffi::c_void;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::{Error, Kind, Result};

/// Where a large mapping starts, so that the kernel can map it by huge pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Memory of a device or file, readable and writable, until dropped.
///
/// A mapping of a VFIO region keeps the device open: closing every other handle does not close it
/// (seen on Linux 7.3). It therefore holds its parent, and the parent can tell that it is held.
pub struct Mapping {
    reserved: NonNull<c_void>,
    reserved_bytes: usize,
    start: NonNull<u8>,
    length_bytes: usize,
    _parent: Arc<dyn Send + Sync>,
}

// SAFETY: the pointers refer to a shared mapping that this value alone unmaps. All access goes
// through volatile reads and writes of plain bytes, from any thread, as with any shared memory.
unsafe impl Send for Mapping {}
// SAFETY: see `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `pieces` (offset and length in the file, in bytes, multiples of the page size) of
    /// `file`, one after the other, and keeps `parent` alive as long as the mapping.
    ///
    /// The descriptor is borrowed; the mapping does not need it afterwards.
    ///
    /// # Errors
    /// What `mmap` says, with its errno; nothing stays mapped then.
    pub fn new(file: BorrowedFd<'_>, pieces: &[(u64, u64)], parent: Arc<dyn Send + Sync>) -> Result<Self> {
        const TRIED: &str = "map memory";
        let length_bytes = pieces
            .iter()
            .try_fold(0_u64, |sum, &(_, length)| sum.checked_add(length))
            .and_then(|sum| usize::try_from(sum).ok())
            .filter(|&sum| sum > 0 && sum < usize::MAX - HUGE_PAGE_BYTES)
            .ok_or_else(|| {
                Error::new(Kind::InvalidInput, TRIED, "the length is zero or beyond the address space")
            })?;
        let slack = if length_bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 };
        let reserved_bytes = length_bytes + slack;

        // SAFETY: a fresh private reservation at an address the kernel picks overlaps nothing.
        let reserved = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                reserved_bytes,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|errno| Error::os(TRIED, errno))?;
        let reserved = NonNull::new(reserved)
            .ok_or_else(|| Error::new(Kind::Os, TRIED, "the kernel reserved address zero"))?;
        let start = if slack == 0 {
            reserved.cast::<u8>()
        } else {
            let skip = reserved.cast::<u8>().as_ptr().align_offset(HUGE_PAGE_BYTES);
            // SAFETY: `skip` is below HUGE_PAGE_BYTES, which is the slack of the reservation.
            unsafe { reserved.cast::<u8>().add(skip) }
        };
        // From here on, dropping `mapping` undoes the reservation and all that lies in it.
        let mapping = Self { reserved, reserved_bytes, start, length_bytes, _parent: parent };

        let mut at = 0;
        for &(offset, length) in pieces {
            let length = length as usize;
            // SAFETY: `at + length` is at most `length_bytes`, so the fixed address range lies
            // inside our own reservation and replaces nothing else.
            unsafe {
                mmap(
                    mapping.start.as_ptr().add(at).cast(),
                    length,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::FIXED,
                    file,
                    offset,
                )
            }
            .map_err(|errno| Error::os(TRIED, errno))?;
            at += length;
        }
        Ok(mapping)
    }

    /// The first byte. Valid until the mapping is dropped; see the module for when it may be touched.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.length_bytes
    }

    /// Never true: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        self.length_bytes == 0
    }

    /// Copies from the mapping, beginning `offset_bytes` into it, until `into` is full.
    ///
    /// Aligned eight-byte accesses where possible: an uncached BAR answers each one separately.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the copy would leave the mapping.
    pub fn read(&self, offset_bytes: usize, into: &mut [u8]) -> Result<()> {
        self.check(offset_bytes, into.len())?;
        // SAFETY: `check` found `offset_bytes + into.len()` inside the mapping.
        let mut from = unsafe { self.start.as_ptr().add(offset_bytes) };
        let (head, words) = into.split_at_mut(edge(from, into.len()));
        for byte in head {
            // SAFETY: inside the mapping, by the check above; so is one past it.
            unsafe {
                *byte = from.read_volatile();
                from = from.add(1);
            }
        }
        let mut chunks = words.chunks_exact_mut(8);
        for chunk in &mut chunks {
            // SAFETY: inside the mapping and aligned to eight by `edge`.
            unsafe {
                chunk.copy_from_slice(&from.cast::<u64>().read_volatile().to_ne_bytes());
                from = from.add(8);
            }
        }
        for byte in chunks.into_remainder() {
            // SAFETY: inside the mapping, by the check above; so is one past it.
            unsafe {
                *byte = from.read_volatile();
                from = from.add(1);
            }
        }
        Ok(())
    }

    /// Copies `bytes` into the mapping, beginning `offset_bytes` into it. As [`Mapping::read`].
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the copy would leave the mapping.
    pub fn write(&self, offset_bytes: usize, bytes: &[u8]) -> Result<()> {
        self.check(offset_bytes, bytes.len())?;
        // SAFETY: `check` found `offset_bytes + bytes.len()` inside the mapping.
        let mut to = unsafe { self.start.as_ptr().add(offset_bytes) };
        let (head, words) = bytes.split_at(edge(to, bytes.len()));
        for &byte in head {
            // SAFETY: inside the mapping, by the check above; so is one past it.
            unsafe {
                to.write_volatile(byte);
                to = to.add(1);
            }
        }
        let (words, tail) = words.as_chunks::<8>();
        for &word in words {
            // SAFETY: inside the mapping and aligned to eight by `edge`.
            unsafe {
                to.cast::<u64>().write_volatile(u64::from_ne_bytes(word));
                to = to.add(8);
            }
        }
        for &byte in tail {
            // SAFETY: inside the mapping, by the check above; so is one past it.
            unsafe {
                to.write_volatile(byte);
                to = to.add(1);
            }
        }
        Ok(())
    }

    /// Reads one 32-bit word in one access, as a device's registers want it.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where `offset_bytes` is no multiple of four or beyond the mapping.
    pub fn load_u32(&self, offset_bytes: usize) -> Result<u32> {
        // SAFETY: `word` found it inside the mapping and aligned.
        Ok(u32::from_le(unsafe { self.word(offset_bytes)?.read_volatile() }))
    }

    /// Writes one 32-bit word in one access, after everything that was written before it.
    ///
    /// # Errors
    /// As [`Mapping::load_u32`].
    pub fn store_u32(&self, offset_bytes: usize, value: u32) -> Result<()> {
        let word = self.word(offset_bytes)?;
        // A doorbell must not overtake the descriptors that it announces.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        // SAFETY: `word` found it inside the mapping and aligned.
        unsafe { word.write_volatile(value.to_le()) };
        Ok(())
    }

    fn word(&self, offset_bytes: usize) -> Result<*mut u32> {
        self.check(offset_bytes, 4)?;
        if !offset_bytes.is_multiple_of(4) {
            let why = format!("{offset_bytes:#x} is no multiple of four");
            return Err(Error::new(Kind::InvalidInput, "access a register", why));
        }
        // SAFETY: `check` found it inside the mapping, whose start is aligned to a page.
        Ok(unsafe { self.start.as_ptr().add(offset_bytes) }.cast())
    }

    fn check(&self, offset_bytes: usize, length_bytes: usize) -> Result<()> {
        match offset_bytes.checked_add(length_bytes) {
            Some(end) if end <= self.length_bytes => Ok(()),
            _ => Err(Error::new(
                Kind::InvalidInput,
                "copy through a mapping",
                format!("{offset_bytes:#x} + {length_bytes:#x} is beyond its {:#x} bytes", self.length_bytes),
            )),
        }
    }
}

/// How many of `length_bytes` lie before the next address that is a multiple of eight.
fn edge(pointer: *const u8, length_bytes: usize) -> usize {
    pointer.align_offset(8).min(length_bytes)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours, and nobody can hold a reference into it: none is given out.
        if let Err(errno) = unsafe { munmap(self.reserved.as_ptr(), self.reserved_bytes) } {
            tracing::error!(%errno, length_bytes = self.length_bytes, "could not unmap memory");
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("start", &self.start)
            .field("length_bytes", &self.length_bytes)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    fn file(pages: u64) -> std::fs::File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * 4096).unwrap();
        file
    }

    #[test]
    fn pieces_follow_each_other_in_the_order_given() {
        let file = file(4);
        file.write_all_at(b"last", 3 * 4096).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        let mapping = Mapping::new(file.as_fd(), &[(3 * 4096, 4096), (0, 4096)], Arc::new(())).unwrap();
        let mut seen = [0; 5];
        mapping.read(4096, &mut seen).unwrap();
        assert_eq!(&seen, b"first");
        mapping.read(0, &mut seen[..4]).unwrap();
        assert_eq!(&seen[..4], b"last");
    }

    #[test]
    fn odd_offsets_and_lengths_copy_exactly() {
        let file = file(1);
        let mapping = Mapping::new(file.as_fd(), &[(0, 4096)], Arc::new(())).unwrap();
        let bytes: Vec<u8> = (0..100).collect();
        for (offset, length) in [(0, 0), (1, 3), (3, 29), (8, 64), (13, 100)] {
            mapping.write(offset, &bytes[..length]).unwrap();
            let mut back = vec![0xFF; length];
            mapping.read(offset, &mut back).unwrap();
            assert_eq!(back, bytes[..length], "{length} bytes at {offset}");
        }
    }

    #[test]
    fn words_are_read_and_written_whole() {
        let file = file(1);
        let mapping = Mapping::new(file.as_fd(), &[(0, 4096)], Arc::new(())).unwrap();
        mapping.store_u32(4, 0x0403_0201).unwrap();
        let mut bytes = [0; 8];
        mapping.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(mapping.load_u32(4).unwrap(), 0x0403_0201);
        for offset in [2, 4096, 4094, usize::MAX] {
            assert_eq!(mapping.load_u32(offset).unwrap_err().kind(), Kind::InvalidInput);
        }
    }

    #[test]
    fn copies_cannot_leave_the_mapping() {
        let file = file(1);
        let mapping = Mapping::new(file.as_fd(), &[(0, 4096)], Arc::new(())).unwrap();
        assert_eq!(mapping.write(4090, &[0; 7]).unwrap_err().kind(), Kind::InvalidInput);
        assert_eq!(mapping.read(usize::MAX, &mut [0; 2]).unwrap_err().kind(), Kind::InvalidInput);
    }

    #[test]
    fn large_mappings_start_at_a_huge_page() {
        let file = file(1024);
        let mapping = Mapping::new(file.as_fd(), &[(0, 4 << 20)], Arc::new(())).unwrap();
        assert_eq!(mapping.as_ptr().addr() % HUGE_PAGE_BYTES, 0);
        mapping.write((4 << 20) - 1, &[7]).unwrap();
    }

    #[test]
    fn a_mapping_that_fails_leaves_nothing_behind() {
        let directory = std::fs::File::open("/").unwrap();
        let error = Mapping::new(directory.as_fd(), &[(0, 4096)], Arc::new(())).unwrap_err();
        assert!(error.raw_os_error().is_some());
        assert_eq!(
            Mapping::new(directory.as_fd(), &[], Arc::new(())).unwrap_err().kind(),
            Kind::InvalidInput
        );
    }
}
