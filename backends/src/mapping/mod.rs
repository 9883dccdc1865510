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
#![expect(unsafe_code, reason = "volatile access to memory that a device may change at any time")]

mod backing;
mod barrier;
mod reservation;
mod shadow_file;

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::uapi::dma_buf;
use crate::{Error, Kind, Result};
use backing::Backing;
use reservation::{Reservation, TRIED};

/// What is mapped: a file whose descriptor it keeps open, and whatever else must live as long.
pub trait Source: AsFd + Send + Sync {}

impl<T: AsFd + Send + Sync> Source for T {}

/// Memory of a device or file, readable and writable, until dropped.
///
/// A mapping of a VFIO region keeps the device open: closing every other handle does not close it
/// (seen on Linux 7.3). It therefore holds its source, and the source can tell that it is held.
pub struct Mapping {
    /// First, so that it is unmapped before the source is let go of.
    reservation: Reservation,
    /// Locked around every change of what lies behind the addresses, and by nobody who reads or writes: the addresses
    /// are mapped at any time, so an access meets the one memory or the other.
    backing: Mutex<Backing>,
    /// Whether its source is a dma-buf, which is told of each access of the CPU.
    is_of_dma_buf: bool,
}

/// What the CPU does with memory.
#[derive(Debug, Clone, Copy)]
enum CpuUse {
    Reads,
    Writes,
}

impl Mapping {
    /// Maps `pieces` (offset and length in the file, in bytes, multiples of the page size) of
    /// `source`, one after the other, and keeps `source` as long as the mapping lives or until
    /// [`Mapping::retire`].
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
            .filter(|&sum| sum > 0)
            .ok_or_else(beyond)?;
        let reservation = Reservation::new(length_bytes)?;
        // Recognised by its file system: an ioctl would wake a sleeping device if the source were one.
        let is_of_dma_buf =
            rustix::fs::fstatfs(source.as_fd()).is_ok_and(|file| file.f_type as u64 == dma_buf::MAGIC);
        let backing =
            Backing::source(source, pieces, &reservation).map_err(|errno| Error::os(TRIED, errno))?;
        Ok(Self { reservation, backing: Mutex::new(backing), is_of_dma_buf })
    }

    /// `length_bytes` of ordinary memory, zeros, a multiple of the page size: what devices copy to and from
    /// on the way between two memories that do not reach each other. Pages come when they are touched.
    ///
    /// The memory is private to this process: not shared, and without a file behind it, since some drivers take
    /// no other memory by address (amdgpu: `AMDGPU_GEM_USERPTR_ANONONLY`). Shadowed, it is lost.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for a length of zero or off the page size; else what the kernel says.
    pub fn of_host_memory(length_bytes: usize) -> Result<Self> {
        const TRIED: &str = "allocate host memory";
        crate::ranges::check_whole_pages(TRIED, length_bytes as u64)?;
        let reservation = Reservation::new(length_bytes)?;
        reservation.place_zeros().map_err(|errno| Error::os(TRIED, errno))?;
        reservation.advise_huge_pages();
        Ok(Self { reservation, backing: Mutex::new(Backing::nothing()), is_of_dma_buf: false })
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
        self.backing.lock().shadow(&self.reservation)
    }

    /// Maps the device's memory back at the same addresses. What was written to the shadow is gone.
    /// Nothing happens where there is no shadow. The memory must be reachable before anybody touches it.
    ///
    /// # Errors
    /// [`Kind::Gone`] after [`Mapping::retire`]; else what `mmap` says. Shadow memory is under all of it then.
    pub fn unshadow(&self) -> Result<()> {
        self.backing.lock().unshadow(&self.reservation)
    }

    /// Puts shadow memory over the mapping for good, and lets go of the device or file, which can be
    /// closed then although this value lives on. If nobody else holds the source, it is closed here.
    ///
    /// # Errors
    /// As [`Mapping::shadow`]; the source is kept then.
    pub fn retire(&self) -> Result<()> {
        let source = self.backing.lock().retire(&self.reservation)?;
        // Closing a device can block; nobody who asks what lies here should wait for it.
        drop(source);
        Ok(())
    }

    /// Whether shadow memory lies here now.
    pub fn is_shadowed(&self) -> bool {
        self.backing.lock().is_shadowed()
    }

    /// The first byte. Valid until the mapping is dropped; see the module for when it may be touched.
    ///
    /// On arm64 a BAR is mapped as Device memory (`pgprot_noncached` in `vfio_pci_core_mmap`), where an access that is not
    /// aligned to its size is SIGBUS, and so is an instruction that zeroes a cache line: a library's `memcpy` and
    /// `memset` may have either. [`Mapping::read`] and [`Mapping::write`] have neither.
    pub fn as_ptr(&self) -> *mut u8 {
        self.reservation.as_ptr()
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.reservation.length_bytes()
    }

    /// Never true: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        self.reservation.length_bytes() == 0
    }

    /// Copies from the mapping, beginning `offset_bytes` into it, until `into` is full.
    ///
    /// Aligned eight-byte accesses where possible: an uncached BAR answers each one separately.
    ///
    /// Of a dma-buf its exporter is told before and after (`DMA_BUF_IOCTL_SYNC`): caches are seen to, and the first
    /// waits, without a limit, for work of devices that has left its fence in the dma-buf. Whoever reads or writes
    /// through [`as_ptr`](Mapping::as_ptr) has that to do.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the copy would leave the mapping; else what the exporter of a dma-buf says.
    pub fn read(&self, offset_bytes: usize, into: &mut [u8]) -> Result<()> {
        self.check(offset_bytes, into.len())?;
        self.told(CpuUse::Reads, || self.copy_out(offset_bytes, into))
    }

    /// Has the exporter of a dma-buf told of what `access` does; of other memory there is nobody to tell.
    fn told<T>(&self, use_: CpuUse, access: impl FnOnce() -> T) -> Result<T> {
        if !self.is_of_dma_buf {
            return Ok(access());
        }
        let Some(source) = self.backing.lock().what() else { return Ok(access()) };
        let flag = match use_ {
            CpuUse::Reads => dma_buf::SYNC_READ,
            CpuUse::Writes => dma_buf::SYNC_WRITE,
        };
        let tell = |is_end| loop {
            match dma_buf::sync(source.as_fd(), flag, is_end) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                result => break result.map_err(|errno| Error::os("access a dma-buf by CPU", errno)),
            }
        };
        tell(false)?;
        let done = access();
        tell(true)?;
        Ok(done)
    }

    /// A range that was checked to lie inside the mapping.
    fn copy_out(&self, offset_bytes: usize, into: &mut [u8]) {
        // SAFETY: the caller found `offset_bytes + into.len()` inside the mapping.
        let mut from = unsafe { self.reservation.as_ptr().add(offset_bytes) };
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
    }

    /// Copies `bytes` into the mapping, beginning `offset_bytes` into it. As [`Mapping::read`].
    ///
    /// # Errors
    /// As [`Mapping::read`].
    pub fn write(&self, offset_bytes: usize, bytes: &[u8]) -> Result<()> {
        self.check(offset_bytes, bytes.len())?;
        self.told(CpuUse::Writes, || self.copy_in(offset_bytes, bytes))
    }

    /// A range that was checked to lie inside the mapping.
    fn copy_in(&self, offset_bytes: usize, bytes: &[u8]) {
        // SAFETY: the caller found `offset_bytes + bytes.len()` inside the mapping.
        let mut to = unsafe { self.reservation.as_ptr().add(offset_bytes) };
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
    }

    /// Reads one 32-bit word in one access, as a device's registers want it, before everything that is read after it:
    /// what the device had stored when it set a status is seen by who has seen the status.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where `offset_bytes` is no multiple of four or beyond the mapping; else as
    /// [`Mapping::read`].
    pub fn load_u32(&self, offset_bytes: usize) -> Result<u32> {
        let word = self.word(offset_bytes)?;
        // SAFETY: `word` found it inside the mapping and aligned.
        let value = self.told(CpuUse::Reads, || unsafe { word.read_volatile() })?;
        barrier::after_status();
        Ok(u32::from_le(value))
    }

    /// Writes one 32-bit word in one access, after everything that was written before it: a doorbell does not overtake
    /// the descriptors that it announces, in host memory or in write-combined memory of a device.
    ///
    /// # Errors
    /// As [`Mapping::load_u32`].
    pub fn store_u32(&self, offset_bytes: usize, value: u32) -> Result<()> {
        let word = self.word(offset_bytes)?;
        barrier::before_doorbell();
        // SAFETY: `word` found it inside the mapping and aligned.
        self.told(CpuUse::Writes, || unsafe { word.write_volatile(value.to_le()) })
    }

    fn word(&self, offset_bytes: usize) -> Result<*mut u32> {
        self.check(offset_bytes, 4)?;
        if !offset_bytes.is_multiple_of(4) {
            let why = format!("{offset_bytes:#x} is no multiple of four");
            return Err(Error::new(Kind::InvalidInput, "access a register", why));
        }
        // SAFETY: `check` found it inside the mapping, whose start is aligned to a page.
        Ok(unsafe { self.reservation.as_ptr().add(offset_bytes) }.cast())
    }

    fn check(&self, offset_bytes: usize, length_bytes: usize) -> Result<()> {
        match offset_bytes.checked_add(length_bytes) {
            Some(end) if end <= self.reservation.length_bytes() => Ok(()),
            _ => Err(Error::new(
                Kind::InvalidInput,
                "copy through a mapping",
                format!(
                    "{offset_bytes:#x} + {length_bytes:#x} is beyond its {:#x} bytes",
                    self.reservation.length_bytes()
                ),
            )),
        }
    }
}

/// How many of `length_bytes` lie before the next address that is a multiple of eight.
fn edge(pointer: *const u8, length_bytes: usize) -> usize {
    pointer.align_offset(8).min(length_bytes)
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("start", &self.reservation.as_ptr())
            .field("length_bytes", &self.len())
            .field("is_shadowed", &self.is_shadowed())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    pub(super) const PAGE: u64 = 4096;

    pub(super) fn file(pages: u64) -> Arc<std::fs::File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * PAGE).unwrap();
        Arc::new(file)
    }

    /// Drivers refuse host pointers that have one (amdgpu: `AMDGPU_GEM_USERPTR_ANONONLY`).
    #[test]
    fn host_memory_has_no_file_behind_it() {
        let backing = |mapping: &Mapping| {
            let (at, maps) = (mapping.as_ptr().addr(), std::fs::read_to_string("/proc/self/maps").unwrap());
            let line = maps.lines().find(|line| {
                let (start, rest) = line.split_once('-').unwrap();
                let (end, _) = rest.split_once(' ').unwrap();
                let [start, end] = [start, end].map(|text| usize::from_str_radix(text, 16).unwrap());
                (start..end).contains(&at)
            });
            // "address permissions offset device inode": an inode of 0 is no file (proc_pid_maps(5)).
            line.unwrap().split_whitespace().nth(4).unwrap().to_owned()
        };
        assert_eq!(backing(&Mapping::of_host_memory(4096).unwrap()), "0");
        assert_eq!(backing(&Mapping::of_host_memory(8 << 20).unwrap()), "0");
        assert_ne!(backing(&Mapping::new(file(1), &[(0, 4096)]).unwrap()), "0");
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
        assert_eq!(mapping.as_ptr().addr() % super::reservation::HUGE_PAGE_BYTES, 0);
        mapping.write((4 << 20) - 1, &[7]).unwrap();
    }

    #[test]
    fn a_mapping_that_fails_leaves_nothing_behind() {
        let directory = Arc::new(std::fs::File::open("/").unwrap());
        let error = Mapping::new(directory.clone(), &[(0, 4096)]).unwrap_err();
        assert!(error.raw_os_error().is_some());
        assert_eq!(Mapping::new(directory.clone(), &[]).unwrap_err().kind(), Kind::InvalidInput);
    }

    #[test]
    fn a_mapping_that_fails_takes_no_memory_of_others() {
        // Only its driver refuses a socket, as VFIO's refuses a region that cannot be mapped: after the kernel has
        // emptied a fixed address. Memory that other threads are given there would be unmapped with the failure.
        let socket = Arc::new(std::os::unix::net::UnixDatagram::unbound().unwrap());
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let others: Vec<_> = (0..2_u64)
                .map(|thread| {
                    let is_over = &is_over;
                    scope.spawn(move || {
                        // Many are held at once, so that each new one lies in the highest hole that there is.
                        let mut round = thread;
                        loop {
                            let held: Vec<Mapping> =
                                (0..256).map(|_| Mapping::of_host_memory(PAGE as usize).unwrap()).collect();
                            for (place, memory) in held.iter().enumerate() {
                                memory.write(8 * place, &(round << 8 | place as u64).to_ne_bytes()).unwrap();
                            }
                            for (place, memory) in held.iter().enumerate() {
                                let mut seen = [0; 8];
                                memory.read(8 * place, &mut seen).unwrap();
                                assert_eq!(u64::from_ne_bytes(seen), round << 8 | place as u64);
                            }
                            round += 2;
                            if is_over.load(Ordering::Relaxed) {
                                break;
                            }
                        }
                    })
                })
                .collect();
            for _ in 0..20_000 {
                let error = Mapping::new(socket.clone(), &[(0, PAGE)]).unwrap_err();
                assert!(error.raw_os_error().is_some());
            }
            is_over.store(true, Ordering::Relaxed);
            others.into_iter().for_each(|other| other.join().unwrap());
        });
    }

    pub(super) fn is_all(mapping: &Mapping, value: u8) -> bool {
        let mut bytes = vec![!value; mapping.len()];
        mapping.read(0, &mut bytes).unwrap();
        bytes.iter().all(|&byte| byte == value)
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
}
