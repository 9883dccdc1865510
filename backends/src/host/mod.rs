//! `HostMemory`: an exporter of ordinary memory, standing in for VRAM.
//!
//! It is the embedded default: the same trait, importers and tests as with a VFIO device, on any
//! machine. The memory is a sealed memfd, seen as one region with index 0. How its ranges become a
//! dma-buf depends on the machine ([`Backing`]): through `/dev/udmabuf` where that opens, which
//! makes a dma-buf in every sense; else the memfd itself, which importers that map by CPU take for
//! one (Mesa's lavapipe, from version 25 on).
//!
//! Order of calls: [`HostMemory::new`], [`DmaRanges::new`](crate::DmaRanges::new) on its only
//! region, then [`export`](Exporter::export) or [`map`](Exporter::map).
//!
//! Absent on purpose: revokes. Nobody takes this memory back; a dma-buf or mapping of it stays
//! good after the exporter is gone.

mod pool;
pub(crate) mod udmabuf;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

pub use pool::HostPool;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::ranges::check_whole_pages;
use crate::{
    CpuAccess, DmaBuf, DmaRanges, Error, Exporter, Kind, Mapping, PciAddress, Region, RegionFlags, Result,
};

const NAME: &str = "host memory";

/// What a dma-buf of host memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backing {
    /// `/dev/udmabuf`: a dma-buf of the kernel's, of one or several ranges.
    Udmabuf,
    /// The memfd itself: only as a whole, and only for importers that map by CPU.
    Memfd,
}

impl Backing {
    /// Opens what it takes.
    fn open(self) -> Result<Option<OwnedFd>> {
        match self {
            Self::Udmabuf => udmabuf::open().map(Some),
            Self::Memfd => Ok(None),
        }
    }

    /// What it is with that device, or without it.
    fn of(udmabuf: Option<&OwnedFd>) -> Self {
        match udmabuf {
            Some(_) => Self::Udmabuf,
            None => Self::Memfd,
        }
    }
}

/// A file of zeros that keeps its size: an importer's mapping must not lose its pages. udmabuf demands F_SEAL_SHRINK and
/// refuses F_SEAL_WRITE (drivers/dma-buf/udmabuf.c, check_memfd_seals).
fn sealed(size_bytes: u64) -> rustix::io::Result<OwnedFd> {
    let memory = memfd_create("peervram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&memory, size_bytes)?;
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(memory)
}

/// The only region of host memory.
fn region_of(size_bytes: u64) -> Region {
    Region {
        index: 0,
        size_bytes,
        file_offset_bytes: 0,
        flags: RegionFlags { read: true, write: true, mmap: true },
        capabilities: Vec::new(),
    }
}

/// Memory of this machine in the place of a device's VRAM.
#[derive(Debug)]
pub struct HostMemory {
    memory: Arc<OwnedFd>,
    udmabuf: Option<OwnedFd>,
    region: [Region; 1],
}

impl HostMemory {
    /// `size_bytes` of zeros, a multiple of the page size. Pages are allocated when touched.
    ///
    /// Uses `/dev/udmabuf` where it opens, else the memfd: see [`HostMemory::backing`].
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for a size of zero, off the page size, or beyond what a file can
    /// have; else what `memfd_create`, `ftruncate` or `fcntl` say.
    pub fn new(size_bytes: u64) -> Result<Self> {
        // No such file, or no permission: both mean that this machine has none for us.
        Self::with_udmabuf(size_bytes, udmabuf::open().ok())
    }

    /// Like [`HostMemory::new`], with the given backing.
    ///
    /// # Errors
    /// As [`HostMemory::new`]; and why `/dev/udmabuf` does not open, where that was asked for.
    pub fn with_backing(size_bytes: u64, backing: Backing) -> Result<Self> {
        Self::with_udmabuf(size_bytes, backing.open()?)
    }

    fn with_udmabuf(size_bytes: u64, udmabuf: Option<OwnedFd>) -> Result<Self> {
        const TRIED: &str = "allocate host memory";
        check_whole_pages(TRIED, size_bytes)?;
        let memory = sealed(size_bytes).map_err(|errno| Error::os(TRIED, errno))?;
        Ok(Self { memory: Arc::new(memory), udmabuf, region: [region_of(size_bytes)] })
    }

    /// The only region.
    pub fn region(&self) -> &Region {
        &self.region[0]
    }

    /// What its dma-bufs are made of.
    pub fn backing(&self) -> Backing {
        Backing::of(self.udmabuf.as_ref())
    }

    fn check(&self, tried: &'static str, ranges: &DmaRanges) -> Result<()> {
        ranges.check_fit(tried, self.region()).map_err(|error| error.on(NAME))
    }
}

impl Exporter for HostMemory {
    fn name(&self) -> String {
        NAME.into()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        None
    }

    fn regions(&self) -> &[Region] {
        &self.region
    }

    fn cpu_access(&self, _: u32) -> CpuAccess {
        CpuAccess::Cached
    }

    /// With [`Backing::Memfd`] only the whole, in order, can be exported: [`Kind::Unsupported`]
    /// otherwise, since one file cannot show its parts in another order.
    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        const TRIED: &str = "export a dma-buf";
        self.check(TRIED, ranges)?;
        let fd = match &self.udmabuf {
            Some(udmabuf) => udmabuf::create(udmabuf.as_fd(), self.memory.as_fd(), ranges.as_slice())?,
            None if ranges.are_all_of(self.region()) => {
                self.memory.try_clone().map_err(|error| Error::os(TRIED, error).on(NAME))?
            }
            None => {
                let why = "without /dev/udmabuf only the whole memory, in order, can be a dma-buf";
                return Err(Error::new(Kind::Unsupported, TRIED, why)
                    .on(NAME)
                    .next("load the udmabuf module, or map the ranges and import the host pointer"));
            }
        };
        DmaBuf::from_fd(fd)
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        self.check("map memory", ranges)?;
        let pieces: Vec<_> =
            ranges.as_slice().iter().map(|range| (range.offset_bytes, range.length_bytes)).collect();
        let source = Arc::clone(&self.memory);
        let mapping = Mapping::new(source, &pieces).map_err(|error| error.on(NAME))?;
        Ok(Arc::new(mapping))
    }

    fn check_reachable(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DmaRange;
    use std::io::Write;

    const PAGE: u64 = 4096;

    fn memory(pages: u64) -> HostMemory {
        HostMemory::with_backing(pages * PAGE, Backing::Memfd).unwrap()
    }

    fn ranges(memory: &HostMemory, pages: &[(u64, u64)]) -> DmaRanges {
        let ranges: Vec<_> =
            pages.iter().map(|&(offset, length)| DmaRange::new(offset * PAGE, length * PAGE)).collect();
        DmaRanges::new(memory.region(), &ranges).unwrap()
    }

    #[test]
    fn the_dma_buf_and_the_mapping_are_one_memory() {
        let memory = memory(4);
        let buffer = memory.export(&ranges(&memory, &[(0, 1), (1, 3)])).unwrap();
        assert_eq!(buffer.size_bytes(), 4 * PAGE);
        let mapping = memory.map(&ranges(&memory, &[(3, 1), (0, 1)])).unwrap();
        drop(memory);
        mapping.write(0, b"last page").unwrap();
        let mut seen = [0; 9];
        rustix::io::pread(&buffer, &mut seen, 3 * PAGE).unwrap();
        assert_eq!(&seen, b"last page");
    }

    #[test]
    fn a_memfd_is_exported_whole_and_in_order_or_not_at_all() {
        let memory = memory(4);
        for parts in [&[(0, 3)][..], &[(1, 3)], &[(2, 2), (0, 2)]] {
            let error = memory.export(&ranges(&memory, parts)).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported, "{parts:?}");
            assert!(error.to_string().contains("host pointer"), "{error}");
        }
    }

    #[test]
    fn the_file_cannot_shrink_under_an_importer() {
        let memory = memory(2);
        let buffer = memory.export(&ranges(&memory, &[(0, 2)])).unwrap();
        assert_eq!(ftruncate(&buffer, PAGE).unwrap_err(), rustix::io::Errno::PERM);
    }

    #[test]
    fn sizes_and_foreign_ranges_are_refused() {
        for size_bytes in [0, 1, PAGE + 1, u64::MAX - PAGE + 1] {
            assert_eq!(
                HostMemory::new(size_bytes).unwrap_err().kind(),
                Kind::InvalidInput,
                "{size_bytes:#x}"
            );
        }
        let (small, large) = (memory(1), memory(8));
        let beyond = ranges(&large, &[(0, 8)]);
        assert_eq!(small.export(&beyond).unwrap_err().kind(), Kind::InvalidInput);
        assert_eq!(small.map(&beyond).unwrap_err().kind(), Kind::InvalidInput);
    }

    #[test]
    fn several_ranges_make_one_udmabuf() {
        let memory = match HostMemory::with_backing(4 * PAGE, Backing::Udmabuf) {
            Ok(memory) => memory,
            Err(error) => {
                // Not by `eprintln`, which the test harness swallows.
                let _ = writeln!(std::io::stderr(), "skipped: several_ranges_make_one_udmabuf: {error}");
                return;
            }
        };
        let parts = ranges(&memory, &[(2, 2), (0, 1)]);
        memory.map(&parts).unwrap().write(2 * PAGE as usize, b"first").unwrap();
        let buffer = memory.export(&parts).unwrap();
        assert_eq!(buffer.size_bytes(), 3 * PAGE);
        let seen = Mapping::new(Arc::new(buffer), &[(0, 3 * PAGE)]).unwrap();
        let mut bytes = [0; 5];
        seen.read(2 * PAGE as usize, &mut bytes).unwrap();
        assert_eq!(&bytes, b"first");
    }
}
