//! `HostPool`: an exporter of ordinary memory of which every export is memory of its own.
//!
//! What a broker lends where there is no device: a stand-in for a device with `size_bytes` of VRAM. A range is a sealed
//! memfd from its first use until the last export of it ends; the next export of the same range is a new one, all
//! zeros. So who keeps a descriptor of an export that ended has memory that nobody else is given, and memory that is
//! not lent costs nothing.
//!
//! Order of calls: [`HostPool::new`], [`DmaRanges::new`] on its only region, then [`export`](Exporter::export) and
//! [`map`](Exporter::map), in any order. Ranges are exported as they are asked for, each list of them as a whole: two
//! lists that overlap and are not the same are not the same memory.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Backing, NAME, region_of, sealed, udmabuf};
use crate::ranges::check_whole_pages;
use crate::{CpuAccess, DmaBuf, DmaRange, DmaRanges, Error, Exporter, Mapping, PciAddress, Region, Result};

/// Host memory in the place of a device's VRAM, each export its own.
#[derive(Debug)]
pub struct HostPool {
    udmabuf: Option<OwnedFd>,
    region: [Region; 1],
    files: Mutex<BTreeMap<RangesKey, File>>,
}

/// What a list of ranges is known by: offsets and lengths.
type RangesKey = Box<[(u64, u64)]>;

/// The memory of one list of ranges.
#[derive(Debug)]
struct File {
    memory: Arc<OwnedFd>,
    exports: usize,
}

impl HostPool {
    /// Of up to `size_bytes`, a multiple of the page size. No memory is taken before it is exported, and no page before
    /// it is touched. Exports are udmabufs where `/dev/udmabuf` opens, else memfds: see [`HostPool::backing`].
    ///
    /// # Errors
    /// [`Kind::InvalidInput`](crate::Kind::InvalidInput) for a size of zero, off the page size, or beyond what a file
    /// can have.
    pub fn new(size_bytes: u64) -> Result<Self> {
        Self::with_udmabuf(size_bytes, udmabuf::open().ok())
    }

    /// As [`HostPool::new`], with the given backing.
    ///
    /// # Errors
    /// As [`HostPool::new`]; and why `/dev/udmabuf` does not open, where that was asked for.
    pub fn with_backing(size_bytes: u64, backing: Backing) -> Result<Self> {
        Self::with_udmabuf(size_bytes, backing.open()?)
    }

    fn with_udmabuf(size_bytes: u64, udmabuf: Option<OwnedFd>) -> Result<Self> {
        check_whole_pages("make host memory", size_bytes)?;
        Ok(Self { udmabuf, region: [region_of(size_bytes)], files: Mutex::default() })
    }

    /// The only region.
    pub fn region(&self) -> &Region {
        &self.region[0]
    }

    /// What its dma-bufs are made of.
    pub fn backing(&self) -> Backing {
        Backing::of(self.udmabuf.as_ref())
    }

    /// The memory of `ranges`, made where there is none; `exports` more exports of it.
    fn file(&self, tried: &'static str, ranges: &DmaRanges, exports: usize) -> Result<Arc<OwnedFd>> {
        ranges.check_fit(tried, self.region()).map_err(|error| error.on(NAME))?;
        let mut files = self.files.lock();
        if let Some(file) = files.get_mut(&key(ranges)) {
            file.exports += exports;
            return Ok(Arc::clone(&file.memory));
        }
        let memory = Arc::new(sealed(ranges.size_bytes()).map_err(|errno| Error::os(tried, errno).on(NAME))?);
        files.insert(key(ranges), File { memory: Arc::clone(&memory), exports });
        Ok(memory)
    }

    #[cfg(test)]
    fn files(&self) -> usize {
        self.files.lock().len()
    }
}

fn key(ranges: &DmaRanges) -> RangesKey {
    ranges.as_slice().iter().map(|range| (range.offset_bytes, range.length_bytes)).collect()
}

impl Exporter for HostPool {
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

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        const TRIED: &str = "export a dma-buf";
        let memory = self.file(TRIED, ranges, 1)?;
        let exported = match &self.udmabuf {
            Some(udmabuf) => {
                udmabuf::create(udmabuf.as_fd(), memory.as_fd(), &[DmaRange::new(0, ranges.size_bytes())])
            }
            None => memory.try_clone().map_err(|error| Error::os(TRIED, error).on(NAME)),
        };
        exported.and_then(DmaBuf::from_fd).inspect_err(|_| self.end_export(ranges))
    }

    fn end_export(&self, ranges: &DmaRanges) {
        let mut files = self.files.lock();
        let Some(file) = files.get_mut(&key(ranges)) else { return };
        file.exports = file.exports.saturating_sub(1);
        if file.exports == 0 {
            files.remove(&key(ranges));
        }
    }

    fn exports_new_memory(&self) -> bool {
        true
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        let memory = self.file("map memory", ranges, 0)?;
        let mapping = Mapping::new(memory, &[(0, ranges.size_bytes())]).map_err(|error| error.on(NAME))?;
        Ok(Arc::new(mapping))
    }

    fn check_reachable(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    const PAGE: u64 = 4096;

    fn pool() -> HostPool {
        HostPool::with_backing(1 << 40, Backing::Memfd).unwrap()
    }

    fn ranges(pool: &HostPool, pages: &[(u64, u64)]) -> DmaRanges {
        let ranges: Vec<_> =
            pages.iter().map(|&(offset, length)| DmaRange::new(offset * PAGE, length * PAGE)).collect();
        DmaRanges::new(pool.region(), &ranges).unwrap()
    }

    fn first_bytes(buffer: &DmaBuf) -> [u8; 3] {
        let mut seen = [0; 3];
        rustix::io::pread(buffer, &mut seen, 0).unwrap();
        seen
    }

    #[test]
    fn an_export_and_its_mapping_are_one_memory_of_its_own() {
        let pool = pool();
        let (first, second) = (ranges(&pool, &[(0, 4)]), ranges(&pool, &[(9, 1), (4, 3)]));
        let (one, two) = (pool.export(&first).unwrap(), pool.export(&second).unwrap());
        assert_eq!((one.size_bytes(), two.size_bytes()), (4 * PAGE, 4 * PAGE));
        pool.map(&second).unwrap().write(0, b"two").unwrap();
        assert_eq!((first_bytes(&one), &first_bytes(&two)), ([0; 3], b"two"));
        assert_eq!(&first_bytes(&pool.export(&second).unwrap()), b"two");
    }

    #[test]
    fn after_the_last_export_a_range_is_new_memory() {
        let pool = pool();
        let ranges = ranges(&pool, &[(3, 1)]);
        let kept = pool.export(&ranges).unwrap();
        let again = pool.export(&ranges).unwrap();
        pool.map(&ranges).unwrap().write(0, b"old").unwrap();
        pool.end_export(&ranges);
        assert_eq!(&first_bytes(&again), b"old");
        pool.end_export(&ranges);
        assert_eq!(pool.files(), 0);
        assert_eq!((first_bytes(&pool.export(&ranges).unwrap()), &first_bytes(&kept)), ([0; 3], b"old"));
        // One end too many costs nobody anything.
        pool.end_export(&ranges);
        pool.end_export(&ranges);
        assert_eq!(pool.files(), 0);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let pool = HostPool::with_backing(2 * PAGE, Backing::Memfd).unwrap();
        let beyond = ranges(&self::pool(), &[(0, 3)]);
        assert_eq!(pool.export(&beyond).unwrap_err().kind(), Kind::InvalidInput);
        assert_eq!(pool.map(&beyond).unwrap_err().kind(), Kind::InvalidInput);
        assert_eq!(HostPool::new(1).unwrap_err().kind(), Kind::InvalidInput);
        assert_eq!(pool.files(), 0);
    }
}
