//! `Reservation`: addresses of this process that are reserved for a mapping, and what is placed there.
//!
//! Reserved once, with nothing in it; then files, zeros, and files again are placed over all of it or a part of it,
//! always at the same addresses: each file is mapped [`MappedPiece`] first, and moved. Dropping it undoes the
//! reservation and all that lies in it.
#![expect(unsafe_code, reason = "mmap at fixed addresses, inside a reservation of our own")]

use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mremap_fixed, munmap,
};

use crate::{Error, Kind, Result};

/// Where a large mapping starts, so that the kernel can map it by huge pages.
pub(super) const HUGE_PAGE_BYTES: usize = 2 << 20;

pub(super) const TRIED: &str = "map memory";

/// Addresses that are ours.
pub(super) struct Reservation {
    reserved: NonNull<c_void>,
    reserved_bytes: usize,
    start: NonNull<u8>,
    length_bytes: usize,
    /// Whether memory of somebody else's may lie in it.
    is_given_up: AtomicBool,
}

// SAFETY: the pointers refer to a mapping that this value alone changes and unmaps. All access goes
// through volatile reads and writes of plain bytes, from any thread, as with any shared memory. What lies
// behind an address may be exchanged at any time, as a device may change its bytes at any time; that
// something lies there does not change until the value is dropped.
unsafe impl Send for Reservation {}
// SAFETY: see `Send`.
unsafe impl Sync for Reservation {}

impl Reservation {
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
        Ok(Self { reserved, reserved_bytes, start, length_bytes, is_given_up: AtomicBool::new(false) })
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
        // SAFETY: exactly the range of this reservation; the advice changes no byte.
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
        // SAFETY: exactly the range of this reservation; no reference into it was
        // given out, and reads and writes through pointers are volatile accesses of plain bytes.
        let placed =
            unsafe { mmap_anonymous(self.start.as_ptr().cast(), self.length_bytes, protection, flags) };
        placed.map(drop).inspect_err(|_| self.hold(0, self.length_bytes))
    }

    /// Puts `piece` at `at` in the range, in the place of what is there.
    ///
    /// # Errors
    /// The kernel is short of memory, or of entries in the memory map. No file is asked any more.
    pub(super) fn place(&self, at: usize, piece: MappedPiece) -> Result<(), Errno> {
        let length_bytes = piece.length_bytes;
        assert!(
            at.checked_add(length_bytes).is_some_and(|end| end <= self.length_bytes),
            "pieces lie inside the mapping"
        );
        // SAFETY: `piece` is a whole mapping that nobody else knows of. `at + length_bytes` is at most
        // `length_bytes` of the reservation, so what it replaces lies inside this reservation. No reference into
        // that was ever given out: what lies there may change under the volatile accesses of other threads,
        // and the kernel exchanges the one for the other under the lock of the address space, so that they
        // meet no hole.
        let moved = unsafe {
            mremap_fixed(
                piece.start.as_ptr(),
                length_bytes,
                length_bytes,
                MremapFlags::MAYMOVE,
                self.start.as_ptr().add(at).cast(),
            )
        };
        match moved {
            Ok(_) => {
                // The moved mapping no longer owns an address range.
                std::mem::forget(piece);
                Ok(())
            }
            Err(errno) => {
                self.hold(at, length_bytes);
                Err(errno)
            }
        }
    }

    /// Reserves again what a call that failed may have unmapped (`mremap_to` and `__mmap_region` unmap before
    /// their last allocations). If something lies there, it is either what was there before, or memory that
    /// another thread was given meanwhile. Which one cannot be told, so this reservation never unmaps anything then.
    fn hold(&self, at: usize, length_bytes: usize) {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: NOREPLACE: nothing is replaced, whoever it belongs to.
        let held = unsafe {
            let address = self.start.as_ptr().add(at).cast();
            mmap_anonymous(address, length_bytes, ProtFlags::empty(), flags)
        };
        if let Err(errno) = held {
            tracing::warn!(%errno, length_bytes, "addresses of a mapping are given up for good");
            self.is_given_up.store(true, Ordering::Relaxed);
        }
    }
}

/// A piece of a file, mapped at an address of the kernel's choice on its way to a place in a [`Reservation`].
///
/// The kernel takes away what is at a fixed address *before* it asks the file whether it can be mapped there
/// (`__mmap_region` in `mm/vma.c`), so a refusal would leave a hole, and another thread's memory could come to
/// lie in it. Files are therefore asked here, where nothing is.
pub(super) struct MappedPiece {
    start: NonNull<c_void>,
    length_bytes: usize,
}

impl MappedPiece {
    /// Maps `length_bytes` of `file` from `offset_bytes` on.
    pub(super) fn map(
        file: BorrowedFd<'_>,
        offset_bytes: u64,
        length_bytes: usize,
        sharing: MapFlags,
    ) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address the kernel picks overlaps nothing.
        let start = unsafe { mmap(ptr::null_mut(), length_bytes, protection, sharing, file, offset_bytes) }?;
        let start = NonNull::new(start).ok_or(Errno::FAULT)?;
        Ok(Self { start, length_bytes })
    }
}

impl Drop for MappedPiece {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `map`, was not moved, and nobody else knows of it.
        if let Err(errno) = unsafe { munmap(self.start.as_ptr(), self.length_bytes) } {
            tracing::error!(%errno, length_bytes = self.length_bytes, "could not unmap memory");
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if *self.is_given_up.get_mut() {
            return;
        }
        // SAFETY: the reservation is ours, with all that lies in it (see `hold`), and nobody can hold a reference into it: none is given out.
        if let Err(errno) = unsafe { munmap(self.reserved.as_ptr(), self.reserved_bytes) } {
            tracing::error!(%errno, length_bytes = self.length_bytes, "could not unmap memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    const PAGE: usize = 4096;

    /// Whether all of a reservation's range is mapped, by whatever.
    fn is_mapped(reservation: &Reservation) -> bool {
        // SAFETY: the advice changes no byte; the kernel answers ENOMEM where something is unmapped.
        unsafe { madvise(reservation.as_ptr().cast(), reservation.length_bytes(), Advice::Normal) }.is_ok()
    }

    /// The kernel finds out only from its driver that it cannot be mapped, as with a VFIO device.
    fn unmappable() -> UnixDatagram {
        UnixDatagram::unbound().unwrap()
    }

    #[test]
    fn a_file_that_refuses_is_refused_elsewhere() {
        let reservation = Reservation::new(2 * PAGE).unwrap();
        assert!(is_mapped(&reservation));
        let file = unmappable();
        assert!(MappedPiece::map(file.as_fd(), 0, PAGE, MapFlags::SHARED).is_err());
        assert!(is_mapped(&reservation));
    }

    #[test]
    fn what_a_failed_call_unmapped_is_held_again() {
        let reservation = Reservation::new(2 * PAGE).unwrap();
        // SAFETY: inside the reservation, as a call that fails half-way leaves it.
        unsafe { munmap(reservation.as_ptr().add(PAGE).cast(), PAGE) }.unwrap();
        assert!(!is_mapped(&reservation));
        reservation.hold(PAGE, PAGE);
        assert!(is_mapped(&reservation) && !reservation.is_given_up.load(Ordering::Relaxed));
    }

    #[test]
    fn memory_that_came_into_a_hole_is_never_unmapped() {
        let reservation = Reservation::new(2 * PAGE).unwrap();
        // SAFETY: inside the reservation, as a call that fails half-way leaves it.
        let hole = unsafe { reservation.as_ptr().add(PAGE) };
        // SAFETY: in the hole, as the memory of another thread may be.
        let stranger = unsafe {
            munmap(hole.cast(), PAGE).unwrap();
            let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
            mmap_anonymous(hole.cast(), PAGE, ProtFlags::READ | ProtFlags::WRITE, flags).unwrap()
        };
        // SAFETY: mapped above, a page long.
        unsafe { stranger.cast::<u64>().write_volatile(0x1122_3344_5566_7788) };
        reservation.hold(PAGE, PAGE);
        drop(reservation);
        // SAFETY: as before, and still mapped, which is what is tested.
        assert_eq!(unsafe { stranger.cast::<u64>().read_volatile() }, 0x1122_3344_5566_7788);
    }
}
