//! `Room`: addresses of this process that are reserved for a mapping, and what is placed there.
//!
//! Reserved once, with nothing in it; then files, zeros, and files again are placed over all of it or a part of it,
//! always at the same addresses. Dropping it undoes the reservation and all that lies in it.
#![expect(unsafe_code, reason = "mmap at fixed addresses, inside a reservation of our own")]

use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::{Error, Kind, Result};

/// Where a large mapping starts, so that the kernel can map it by huge pages.
pub(super) const HUGE_PAGE_BYTES: usize = 2 << 20;

pub(super) const TRIED: &str = "map memory";

/// Addresses that are ours.
pub(super) struct Room {
    reserved: NonNull<c_void>,
    reserved_bytes: usize,
    start: NonNull<u8>,
    length_bytes: usize,
}

// SAFETY: the pointers refer to a mapping that this value alone changes and unmaps. All access goes
// through volatile reads and writes of plain bytes, from any thread, as with any shared memory. What lies
// behind an address may be exchanged at any time, as a device may change its bytes at any time; that
// something lies there does not change until the value is dropped.
unsafe impl Send for Room {}
// SAFETY: see `Send`.
unsafe impl Sync for Room {}

impl Room {
    /// For `length_bytes`, with nothing in it yet.
    pub(super) fn new(length_bytes: usize) -> Result<Self> {
        let slack = if length_bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 };
        let reserved_bytes = length_bytes
            .checked_add(slack)
            .ok_or_else(|| Error::new(Kind::InvalidInput, TRIED, "the length is beyond the address space"))?;

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
        Ok(Self { reserved, reserved_bytes, start, length_bytes })
    }

    /// Its first address.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Its length in bytes.
    pub(super) fn length_bytes(&self) -> usize {
        self.length_bytes
    }

    /// Asks for huge pages: each page may be an entry of an IOMMU, so the fewer the better, and no harm where there
    /// are none so large.
    pub(super) fn advise_huge_pages(&self) {
        // SAFETY: exactly the range of this room; the advice changes no byte.
        let advised =
            unsafe { madvise(self.start.as_ptr().cast(), self.length_bytes, Advice::LinuxHugepage) };
        if let Err(errno) = advised {
            tracing::debug!(%errno, "no huge pages for host memory");
        }
    }

    /// Maps one anonymous piece over the whole range: it needs no more entries than there are.
    pub(super) fn place_zeros(&self) -> Result<(), Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: exactly the range of this room, inside our own reservation; no reference into it was
        // given out, and reads and writes through pointers are volatile accesses of plain bytes.
        unsafe { mmap_anonymous(self.start.as_ptr().cast(), self.length_bytes, protection, flags) }.map(drop)
    }

    /// Maps `length` bytes of `file` at `at` in the range, in the place of what is there.
    pub(super) fn place(
        &self,
        file: BorrowedFd<'_>,
        at: usize,
        length: usize,
        offset: u64,
        sharing: MapFlags,
    ) -> Result<(), Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        debug_assert!(at + length <= self.length_bytes, "pieces lie inside the mapping");
        // SAFETY: `at + length` is at most `length_bytes`, so the fixed address range lies inside our own
        // reservation and replaces nothing else. No reference into it was ever given out: what lies there
        // may change under the volatile accesses of other threads, and the kernel exchanges the one for
        // the other under the lock of the address space, so that they meet no hole.
        unsafe {
            mmap(
                self.start.as_ptr().add(at).cast(),
                length,
                protection,
                sharing | MapFlags::FIXED,
                file,
                offset,
            )
        }
        .map(drop)
    }

    /// Maps each piece of `file` somewhere and takes it away again: whether it could be mapped.
    pub(super) fn try_file(file: BorrowedFd<'_>, pieces: &[(u64, usize)]) -> Result<(), Errno> {
        for &(offset, length) in pieces {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a fresh mapping at an address the kernel picks overlaps nothing.
            let trial = unsafe { mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, file, offset) }?;
            // SAFETY: it was made here, and nobody else knows of it.
            unsafe { munmap(trial, length) }?;
        }
        Ok(())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours, and nobody can hold a reference into it: none is given out.
        if let Err(errno) = unsafe { munmap(self.reserved.as_ptr(), self.reserved_bytes) } {
            tracing::error!(%errno, length_bytes = self.length_bytes, "could not unmap memory");
        }
    }
}
