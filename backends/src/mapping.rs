//! `Mapping`: device or host memory in this process's address space.
//!
//! Several ranges of one file appear one after the other, as they do in a dma-buf made of them, so
//! byte 0 of the mapping is byte 0 of the buffer. Pages are mapped when they are touched: making a
//! mapping costs the same for 4 KiB and for 256 MiB.
//!
//! Touching a mapped BAR whose device has memory decoding off, or sleeps, raises SIGBUS (seen on
//! Linux 7.3). Whoever turns memory off must first see to it that nobody touches the mapping, or put
//! *shadow memory* under it: [`Mapping::shadow`] -> the call that takes the memory away -> the one that
//! brings it back -> [`Mapping::unshadow`]. Meanwhile reads give all ones, as from a device that is not
//! there, and writes go nowhere. A copy that reports an error instead goes through the device:
//! `vfio::Device::read` and `write`.
//!
//! Swap while the memory can still be reached. During the revoking call an access to a BAR waits in the
//! kernel with a lock on the mapping, which a swap would wait for in turn.
#![expect(unsafe_code, reason = "mmap, and volatile access to memory that a device may change at any time")]

use std::ffi::c_void;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::shadow::Shadow;
use crate::{Error, Kind, Result};

/// Where a large mapping starts, so that the kernel can map it by huge pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

const TRIED: &str = "map memory";

/// What is mapped: a file whose descriptor it keeps open, and whatever else must live as long.
pub trait Source: AsFd + Send + Sync {}

impl<T: AsFd + Send + Sync> Source for T {}

/// Memory of a device or file, readable and writable, until dropped.
///
/// A mapping of a VFIO region keeps the device open: closing every other handle does not close it
/// (seen on Linux 7.3). It therefore holds its source, and the source can tell that it is held.
pub struct Mapping {
    reserved: NonNull<c_void>,
    reserved_bytes: usize,
    start: NonNull<u8>,
    length_bytes: usize,
    /// Offset and length in the file of each piece, in bytes, in the order in which they lie here.
    pieces: Box<[(u64, usize)]>,
    behind: Mutex<Behind>,
}

/// What lies behind the addresses now. Locked around every change of it, and by nobody who reads or writes:
/// the addresses are mapped at any time, so an access meets the one memory or the other.
struct Behind {
    /// None once it was let go for good, and for memory that never was anything else's.
    source: Option<Arc<dyn Source>>,
    is_shadowed: bool,
}

// SAFETY: the pointers refer to a mapping that this value alone changes and unmaps. All access goes
// through volatile reads and writes of plain bytes, from any thread, as with any shared memory. What lies
// behind an address may be exchanged at any time, as a device may change its bytes at any time; that
// something lies there does not change until the value is dropped.
unsafe impl Send for Mapping {}
// SAFETY: see `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `pieces` (offset and length in the file, in bytes, multiples of the page size) of
    /// `source`, one after the other, and keeps `source` as long as the mapping lives or until
    /// [`Mapping::bury`].
    ///
    /// # Errors
    /// What `mmap` says, with its errno; nothing stays mapped then.
    pub fn new(source: Arc<dyn Source>, pieces: &[(u64, u64)]) -> Result<Self> {
        let beyond =
            || Error::new(Kind::InvalidInput, TRIED, "the length is zero or beyond the address space");
        let pieces: Box<[(u64, usize)]> = (pieces.iter())
            .map(|&(offset, length)| Ok((offset, usize::try_from(length).map_err(|_| beyond())?)))
            .collect::<Result<_>>()?;
        let length_bytes = pieces
            .iter()
            .try_fold(0_usize, |sum, &(_, length)| sum.checked_add(length))
            .filter(|&sum| sum > 0 && sum < usize::MAX - HUGE_PAGE_BYTES)
            .ok_or_else(beyond)?;
        let mapping = Self::reserve(length_bytes, pieces, Some(Arc::clone(&source)))?;
        mapping.place_source(source.as_fd()).map_err(|errno| Error::os(TRIED, errno))?;
        Ok(mapping)
    }

    /// `length_bytes` of ordinary memory, zeros, a multiple of the page size: what devices copy to and from
    /// on the way between two memories that do not reach each other. Pages come when they are touched.
    ///
    /// It is nobody's but this process's: not shared, and without a file behind it, since some drivers take
    /// no other memory by address (amdgpu: `AMDGPU_GEM_USERPTR_ANONONLY`). Shadowed, it is lost.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for a length of zero or off the page size; else what the kernel says.
    pub fn of_host_memory(length_bytes: usize) -> Result<Self> {
        const TRIED: &str = "allocate host memory";
        let page_bytes = crate::page_size_bytes() as usize;
        if length_bytes == 0 || !length_bytes.is_multiple_of(page_bytes) {
            return Err(Error::new(
                Kind::InvalidInput,
                TRIED,
                format!("{length_bytes:#x} bytes are no size"),
            )
            .next(format!("use a multiple of the page size, {page_bytes:#x}")));
        }
        let mapping = Self::reserve(length_bytes, Box::default(), None)?;
        mapping.place_zeros().map_err(|errno| Error::os(TRIED, errno))?;
        // Each page may be an entry of an IOMMU: the fewer the better, and no harm where there are none so large.
        // SAFETY: exactly the range of this mapping; the advice changes no byte.
        let advised = unsafe { madvise(mapping.start.as_ptr().cast(), length_bytes, Advice::LinuxHugepage) };
        if let Err(errno) = advised {
            tracing::debug!(%errno, "no huge pages for host memory");
        }
        Ok(mapping)
    }

    /// Room for `length_bytes`, with nothing in it yet. Dropping it undoes the reservation and all that lies
    /// in it.
    fn reserve(
        length_bytes: usize,
        pieces: Box<[(u64, usize)]>,
        source: Option<Arc<dyn Source>>,
    ) -> Result<Self> {
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
        let behind = Mutex::new(Behind { source, is_shadowed: false });
        Ok(Self { reserved, reserved_bytes, start, length_bytes, pieces, behind })
    }

    /// Puts shadow memory over the whole mapping, at the same addresses: reads give all ones, as from a
    /// device that is not there; writes change pages of this process that go with the shadow. Nothing
    /// happens where that was done before.
    ///
    /// Whoever reads or writes meanwhile meets the one memory or the other, page by page, and never a
    /// hole. What a pinned page is (a container's DMA mapping) stays what it was.
    ///
    /// Where the process has no room in its memory map for the pieces, the shadow is zeros instead, and the
    /// log says so: that nobody meets a hole comes first.
    ///
    /// # Errors
    /// What the kernel says, mostly that memory is short. The mapping then counts as not shadowed, and must
    /// not be touched while its memory is away.
    pub fn shadow(&self) -> Result<()> {
        let mut behind = self.behind.lock();
        if !behind.is_shadowed {
            self.place_shadow()?;
            behind.is_shadowed = true;
        }
        Ok(())
    }

    /// Maps the device's memory back at the same addresses. What was written to the shadow is gone.
    /// Nothing happens where there is no shadow. The memory must be reachable before anybody touches it.
    ///
    /// # Errors
    /// [`Kind::Gone`] after [`Mapping::bury`]; else what `mmap` says. Shadow memory is under all of it then.
    pub fn unshadow(&self) -> Result<()> {
        const TRIED: &str = "map memory back";
        let mut behind = self.behind.lock();
        let Some(source) = &behind.source else {
            return Err(Error::new(Kind::Gone, TRIED, "its device was let go of")
                .next("open the device again, and map its memory anew"));
        };
        if !behind.is_shadowed {
            return Ok(());
        }
        // The kernel takes away what was at a fixed address before it asks the file, so a refusal would
        // leave a hole for others to fall into: the file is asked elsewhere first.
        let result =
            Self::try_source(source.as_fd(), &self.pieces).and_then(|()| self.place_source(source.as_fd()));
        if let Err(errno) = result {
            let error = Error::os(TRIED, errno);
            return Err(match self.place_shadow() {
                Ok(()) => error.next("it is shadow memory as before; try again"),
                Err(worse) => worse,
            });
        }
        behind.is_shadowed = false;
        Ok(())
    }

    /// Puts shadow memory over the mapping for good, and lets go of the device or file, which can be
    /// closed then although this value lives on. If nobody else holds the source, it is closed here.
    ///
    /// # Errors
    /// As [`Mapping::shadow`]; the source is kept then.
    pub fn bury(&self) -> Result<()> {
        let mut behind = self.behind.lock();
        if !behind.is_shadowed {
            self.place_shadow()?;
            behind.is_shadowed = true;
        }
        let source = behind.source.take();
        drop(behind);
        // Closing a device can block; nobody who asks what lies here should wait for it.
        drop(source);
        Ok(())
    }

    /// Whether shadow memory lies here now.
    pub fn is_shadowed(&self) -> bool {
        self.behind.lock().is_shadowed
    }

    /// Maps the pieces of `file` over the whole range.
    fn place_source(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut at = 0;
        for &(offset, length) in &self.pieces {
            self.place(file, at, length, offset, MapFlags::SHARED)?;
            at += length;
        }
        Ok(())
    }

    /// Maps each piece of `file` somewhere and takes it away again: whether it could be mapped.
    fn try_source(file: BorrowedFd<'_>, pieces: &[(u64, usize)]) -> Result<(), Errno> {
        for &(offset, length) in pieces {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a fresh mapping at an address the kernel picks overlaps nothing.
            let trial = unsafe { mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, file, offset) }?;
            // SAFETY: it was made here, and nobody else knows of it.
            unsafe { munmap(trial, length) }?;
        }
        Ok(())
    }

    /// Maps shadow memory over the whole range.
    fn place_shadow(&self) -> Result<()> {
        let shadow = Shadow::for_length(self.length_bytes)?;
        let mut at = 0;
        while at < self.length_bytes {
            let length = shadow.size_bytes().min(self.length_bytes - at);
            if let Err(errno) = self.place(shadow.as_fd(), at, length, 0, MapFlags::PRIVATE) {
                tracing::warn!(%errno, length_bytes = self.length_bytes, "shadow memory is zeros, not ones");
                return self.place_zeros().map_err(|errno| {
                    Error::os("put shadow memory under a mapping", errno).next(
                        "raise vm.max_map_count, or free memory; let nobody touch the mapping meanwhile",
                    )
                });
            }
            at += length;
        }
        Ok(())
    }

    /// Maps one anonymous piece over the whole range: it needs no more entries than there are.
    fn place_zeros(&self) -> Result<(), Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: exactly the range of this mapping, inside our own reservation; no reference into it was
        // given out, and reads and writes through pointers are volatile accesses of plain bytes.
        unsafe { mmap_anonymous(self.start.as_ptr().cast(), self.length_bytes, protection, flags) }.map(drop)
    }

    /// Maps `length` bytes of `file` at `at` in the range, in the place of what is there.
    fn place(
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
            .field("is_shadowed", &self.is_shadowed())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    const PAGE: u64 = 4096;

    fn file(pages: u64) -> Arc<std::fs::File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * PAGE).unwrap();
        Arc::new(file)
    }

    #[test]
    fn pieces_follow_each_other_in_the_order_given() {
        let file = file(4);
        file.write_all_at(b"last", 3 * 4096).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        let mapping = Mapping::new(file.clone(), &[(3 * 4096, 4096), (0, 4096)]).unwrap();
        let mut seen = [0; 5];
        mapping.read(4096, &mut seen).unwrap();
        assert_eq!(&seen, b"first");
        mapping.read(0, &mut seen[..4]).unwrap();
        assert_eq!(&seen[..4], b"last");
    }

    #[test]
    fn odd_offsets_and_lengths_copy_exactly() {
        let file = file(1);
        let mapping = Mapping::new(file.clone(), &[(0, 4096)]).unwrap();
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
        let mapping = Mapping::new(file.clone(), &[(0, 4096)]).unwrap();
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
        let mapping = Mapping::new(file.clone(), &[(0, 4096)]).unwrap();
        assert_eq!(mapping.write(4090, &[0; 7]).unwrap_err().kind(), Kind::InvalidInput);
        assert_eq!(mapping.read(usize::MAX, &mut [0; 2]).unwrap_err().kind(), Kind::InvalidInput);
    }

    #[test]
    fn large_mappings_start_at_a_huge_page() {
        let file = file(1024);
        let mapping = Mapping::new(file.clone(), &[(0, 4 << 20)]).unwrap();
        assert_eq!(mapping.as_ptr().addr() % HUGE_PAGE_BYTES, 0);
        mapping.write((4 << 20) - 1, &[7]).unwrap();
    }

    #[test]
    fn a_mapping_that_fails_leaves_nothing_behind() {
        let directory = Arc::new(std::fs::File::open("/").unwrap());
        let error = Mapping::new(directory.clone(), &[(0, 4096)]).unwrap_err();
        assert!(error.raw_os_error().is_some());
        assert_eq!(Mapping::new(directory.clone(), &[]).unwrap_err().kind(), Kind::InvalidInput);
    }

    fn is_all(mapping: &Mapping, value: u8) -> bool {
        let mut bytes = vec![!value; mapping.len()];
        mapping.read(0, &mut bytes).unwrap();
        bytes.iter().all(|&byte| byte == value)
    }

    #[test]
    fn under_a_shadow_reads_are_ones_and_writes_are_private() {
        let file = file(1027);
        // More than one piece of the file, more than one of the shadow, and neither at its borders.
        let mapping =
            Mapping::new(file.clone(), &[(3 * PAGE, PAGE), (0, PAGE), (4 * PAGE, 1023 * PAGE)]).unwrap();
        mapping.write(0, b"before").unwrap();
        assert!(!mapping.is_shadowed());
        for _ in 0..2 {
            mapping.shadow().unwrap();
            assert!(mapping.is_shadowed());
        }
        assert!(is_all(&mapping, 0xFF));
        mapping.write(0, b"lost").unwrap();
        mapping.write(mapping.len() - 4, b"lost").unwrap();
        let mut seen = [0; 6];
        mapping.read(0, &mut seen).unwrap();
        assert_eq!(&seen[..4], b"lost");
        // Neither the file nor the next shadow has seen it.
        file.read_exact_at(&mut seen, 3 * PAGE).unwrap();
        assert_eq!(&seen, b"before");
        for _ in 0..2 {
            mapping.unshadow().unwrap();
            assert!(!mapping.is_shadowed());
        }
        mapping.read(0, &mut seen).unwrap();
        assert_eq!(&seen, b"before");
        mapping.write(PAGE as usize, b"after").unwrap();
        file.read_exact_at(&mut seen[..5], 0).unwrap();
        assert_eq!(&seen[..5], b"after");
        mapping.shadow().unwrap();
        assert!(is_all(&mapping, 0xFF));
    }

    #[test]
    fn what_cannot_be_mapped_back_stays_shadowed() {
        // A memfd that is sealed against writing while nothing writable maps it.
        let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = Arc::new(rustix::fs::memfd_create("test", flags).unwrap());
        rustix::fs::ftruncate(&file, 2 * PAGE).unwrap();
        let mapping = Mapping::new(file.clone(), &[(PAGE, PAGE), (0, PAGE)]).unwrap();
        mapping.shadow().unwrap();
        rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::WRITE).unwrap();
        let error = mapping.unshadow().unwrap_err();
        assert!(error.raw_os_error().is_some() && error.next_step().is_some(), "{error}");
        assert!(mapping.is_shadowed() && is_all(&mapping, 0xFF));
        mapping.write(0, &[1]).unwrap();
    }

    #[test]
    fn bury_lets_go_of_the_source_for_good() {
        let file = file(2);
        let mapping = Mapping::new(file.clone(), &[(0, 2 * PAGE)]).unwrap();
        assert_eq!(Arc::strong_count(&file), 2);
        for _ in 0..2 {
            mapping.bury().unwrap();
            assert_eq!(Arc::strong_count(&file), 1);
        }
        assert!(mapping.is_shadowed() && is_all(&mapping, 0xFF));
        assert_eq!(mapping.unshadow().unwrap_err().kind(), Kind::Gone);
        mapping.shadow().unwrap();
        assert!(is_all(&mapping, 0xFF));
    }

    #[test]
    fn host_memory_is_zeros_and_keeps_what_is_written() {
        for length_bytes in [0, 1, usize::MAX] {
            let error = Mapping::of_host_memory(length_bytes).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{length_bytes:#x}");
        }
        for pages in [1, 1024] {
            let mapping = Mapping::of_host_memory(pages * PAGE as usize).unwrap();
            assert!(is_all(&mapping, 0));
            mapping.write(mapping.len() - 3, b"end").unwrap();
            let mut seen = [0; 3];
            mapping.read(mapping.len() - 3, &mut seen).unwrap();
            assert_eq!(&seen, b"end");
        }
    }

    #[test]
    fn readers_and_writers_meet_no_hole_while_memory_is_swapped() {
        let file = file(1024);
        file.write_all_at(&vec![7; 1024 * PAGE as usize], 0).unwrap();
        let mapping = Mapping::new(file.clone(), &[(512 * PAGE, 512 * PAGE), (0, 512 * PAGE)]).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (mapping, stop) = (&mapping, &stop);
                scope.spawn(move || {
                    let mut word = [0; 8];
                    // Every page, with a stride that does not follow the swap.
                    for page in (0..1024_usize).cycle().step_by(37 + thread) {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let at = page * PAGE as usize + 64 * thread;
                        mapping.read(at, &mut word).unwrap();
                        assert!(word == [7; 8] || word == [0xFF; 8], "{word:?} on page {page}");
                        mapping.write(at, &word).unwrap();
                        if word == [0xFF; 8] {
                            // It may have landed in the file.
                            mapping.write(at, &[7; 8]).unwrap();
                        }
                    }
                });
            }
            for _ in 0..200 {
                mapping.shadow().unwrap();
                mapping.unshadow().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(!mapping.is_shadowed());
    }

    #[test]
    fn swaps_that_race_with_each_other_end_in_one_state() {
        let file = file(512);
        let mapping = Mapping::new(file.clone(), &[(0, 512 * PAGE)]).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..50).for_each(|_| mapping.shadow().unwrap()));
                scope.spawn(|| (0..50).for_each(|_| mapping.unshadow().unwrap()));
            }
        });
        assert!(is_all(&mapping, if mapping.is_shadowed() { 0xFF } else { 0 }));
    }
}
