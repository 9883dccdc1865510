//! `Memory`: what a region is that the driver shows in the place of a BAR.
//!
//! A BAR's size is a power of two, the memory's length is not: the driver reports the next power of two, and
//! tells the real length by the one area that can be mapped (`nvgrace_gpu_ioctl_get_region_info`). Beyond it
//! reads are all ones and writes are dropped; exporting and mapping are refused there.

use peervram_backends::{
    Capability, CpuAccess, DmaRange, DmaRanges, Error, Kind, Region, Result, SparseArea, page_size_bytes,
};

/// The region that shows the usable memory: BARs 4 and 5 (`USEMEM_REGION_INDEX`).
pub const USABLE_REGION: u32 = 4;
/// The region that shows the reserved memory: BARs 2 and 3 (`RESMEM_REGION_INDEX`).
pub const RESERVED_REGION: u32 = 2;
/// The BAR whose peer-to-peer provider the kernel takes for both (`nvgrace_get_dmabuf_phys`).
pub const PROVIDER_BAR: u32 = 0;
/// The block in which a virtual machine's driver adds usable memory to its kernel (`MEMBLK_SIZE`, fixed
/// between firmware and drivers).
pub const BLOCK_BYTES: u64 = 512 << 20;

/// What a memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Use {
    /// For everything: the GPU's memory.
    Usable,
    /// For partitions of the GPU (MIG), which on this hardware must not be cached: the end of the GPU's
    /// memory, a gigabyte or more.
    Reserved,
}

impl Use {
    /// A stable name for scripts and `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Usable => "usable",
            Self::Reserved => "reserved",
        }
    }

    fn of_region(index: u32) -> Option<Self> {
        match index {
            USABLE_REGION => Some(Self::Usable),
            RESERVED_REGION => Some(Self::Reserved),
            _ => None,
        }
    }
}

/// One of the GPU's memories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Memory {
    /// The region that shows it.
    pub region_index: u32,
    /// What it is for.
    pub used_for: Use,
    /// How much of it there is: what can be exported and mapped.
    pub length_bytes: u64,
    /// What the region says that it has, a power of two.
    pub reported_bytes: u64,
}

impl Memory {
    /// What `region` is. None where it is an ordinary BAR: it has no area that alone can be mapped.
    ///
    /// # Errors
    /// [`Kind::Os`] where the region's description is none that the driver gives.
    pub fn of(region: &Region) -> Result<Option<Self>> {
        let Some(used_for) = Use::of_region(region.index) else { return Ok(None) };
        let is_sparse = |capability: &Capability| matches!(capability, Capability::SparseMmap(_));
        if !region.capabilities.iter().any(is_sparse) {
            return Ok(None);
        }
        let area = match region.sparse_areas() {
            Some(&[area]) if is_a_memory(area, region.size_bytes) => area,
            other => {
                let why = format!("of {:#x} bytes it shows {other:x?}", region.size_bytes);
                return Err(Error::new(Kind::Os, "read a region's description", why));
            }
        };
        Ok(Some(Self {
            region_index: region.index,
            used_for,
            // A page that is only partly backed by memory cannot be exported.
            length_bytes: area.length_bytes - area.length_bytes % page_size_bytes(),
            reported_bytes: region.size_bytes,
        }))
    }

    /// What the CPU's caches do about it (`nvgrace_gpu_mmap`).
    pub fn cpu_access(&self) -> CpuAccess {
        match self.used_for {
            Use::Usable => CpuAccess::Cached,
            // Normal memory that is not cached, as Arm says.
            Use::Reserved => CpuAccess::WriteCombined,
        }
    }

    /// How many whole blocks of [`BLOCK_BYTES`] there are. Beside a reserved memory the usable one has nothing
    /// but whole blocks; alone it may have a rest that a virtual machine does not add.
    pub fn whole_blocks(&self) -> u64 {
        self.length_bytes / BLOCK_BYTES
    }

    /// Fails where a range has no memory behind it. `next` is what lies behind this one, if anything does.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`].
    pub fn check(&self, ranges: &DmaRanges, next: Option<&Memory>) -> Result<()> {
        let end = |range: &DmaRange| range.offset_bytes + range.length_bytes;
        let Some(range) = ranges.as_slice().iter().find(|range| end(range) > self.length_bytes) else {
            return Ok(());
        };
        let (offset, length, real) = (range.offset_bytes, range.length_bytes, self.length_bytes);
        let place = format!(
            "region {} reports {:#x} bytes and has {real:#x}",
            self.region_index, self.reported_bytes
        );
        let why = match next {
            Some(next) if offset < real => format!(
                "{offset:#x} + {length:#x} crosses the end of the {} memory at {real:#x}; what follows is {}, in region {}",
                self.used_for.name(),
                next.used_for.name(),
                next.region_index,
            ),
            _ => format!("{offset:#x} + {length:#x} ends beyond the memory: {place}"),
        };
        Err(Error::new(Kind::InvalidInput, "take ranges of coherent memory", why)
            .next(format!("stay below {real:#x}; beyond it reads are all ones and writes are dropped")))
    }
}

/// From the start of the region on, and not longer than it.
fn is_a_memory(area: SparseArea, region_bytes: u64) -> bool {
    area.offset_bytes == 0 && (page_size_bytes()..=region_bytes).contains(&area.length_bytes)
}

/// `region` with the length that it has, so that ranges are checked against that.
pub(crate) fn as_it_is(region: &Region, memory: Option<&Memory>) -> Region {
    let size_bytes = memory.map_or(region.size_bytes, |memory| memory.length_bytes);
    Region { size_bytes, ..region.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peervram_backends::RegionFlags;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn region(index: u32, size_bytes: u64, areas: Option<Vec<SparseArea>>) -> Region {
        Region {
            index,
            size_bytes,
            file_offset_bytes: u64::from(index) << 40,
            flags: RegionFlags { read: true, write: true, mmap: true },
            capabilities: areas.map(Capability::SparseMmap).into_iter().collect(),
        }
    }

    fn area(offset_bytes: u64, length_bytes: u64) -> SparseArea {
        SparseArea { offset_bytes, length_bytes }
    }

    /// What the driver shows of 1600 MiB with the hardware bug.
    fn usable() -> Region {
        region(4, 1024 * MIB, Some(vec![area(0, 512 * MIB)]))
    }

    fn reserved() -> Region {
        region(2, 2048 * MIB, Some(vec![area(0, 1088 * MIB)]))
    }

    #[test]
    fn regions_are_what_the_driver_shows() {
        let usable = Memory::of(&usable()).unwrap().unwrap();
        assert_eq!((usable.used_for, usable.length_bytes), (Use::Usable, 512 * MIB));
        assert_eq!((usable.reported_bytes, usable.whole_blocks()), (1024 * MIB, 1));
        assert_eq!(usable.cpu_access(), CpuAccess::Cached);
        let reserved = Memory::of(&reserved()).unwrap().unwrap();
        assert_eq!((reserved.used_for, reserved.length_bytes), (Use::Reserved, 1088 * MIB));
        assert_eq!(reserved.whole_blocks(), 2);
        assert_eq!(reserved.cpu_access(), CpuAccess::WriteCombined);
    }

    #[test]
    fn real_bars_are_no_memories() {
        assert_eq!(Memory::of(&region(4, 32 * MIB, None)).unwrap(), None);
        assert_eq!(Memory::of(&region(0, 16 * MIB, Some(vec![area(0, MIB)]))).unwrap(), None);
    }

    #[test]
    fn descriptions_that_no_driver_gives_are_refused() {
        let page = page_size_bytes();
        for areas in [
            vec![],
            vec![area(page, page)],
            vec![area(0, 0)],
            vec![area(0, 2 * MIB)],
            vec![area(0, page), area(2 * page, page)],
            vec![area(0, u64::MAX)],
        ] {
            let error = Memory::of(&region(4, MIB, Some(areas))).unwrap_err();
            assert_eq!(error.kind(), Kind::Os, "{error}");
        }
    }

    #[test]
    fn ranges_stay_inside_what_is_there() {
        let (shown, behind) = (usable(), Memory::of(&reserved()).unwrap().unwrap());
        let memory = Memory::of(&shown).unwrap().unwrap();
        let check = |offset, length, next: Option<&Memory>| {
            // Against what is reported, as somebody would who knows nothing of this family.
            memory.check(&DmaRanges::new(&shown, &[DmaRange::new(offset, length)]).unwrap(), next)
        };
        check(0, 512 * MIB, None).unwrap();
        check(256 * MIB, 256 * MIB, None).unwrap();
        let why = |offset, length, next| check(offset, length, next).unwrap_err().why().to_owned();
        assert_eq!(
            why(511 * MIB, 2 * MIB, Some(&behind)),
            "0x1ff00000 + 0x200000 crosses the end of the usable memory at 0x20000000; what follows is reserved, in region 2"
        );
        assert_eq!(
            why(512 * MIB, MIB, Some(&behind)),
            "0x20000000 + 0x100000 ends beyond the memory: region 4 reports 0x40000000 bytes and has 0x20000000"
        );
        assert!(why(511 * MIB, 2 * MIB, None).contains("ends beyond the memory"));
        assert_eq!(as_it_is(&shown, Some(&memory)).size_bytes, 512 * MIB);
    }

    #[test]
    fn a_page_that_is_there_in_part_is_left_out() {
        let page = page_size_bytes();
        for (shown, real) in
            [(page, page), (3 * page, 3 * page), (3 * page + 1, 3 * page), (4 * page - 1, 3 * page)]
        {
            let memory = Memory::of(&region(4, 8 * page, Some(vec![area(0, shown)]))).unwrap().unwrap();
            assert_eq!(memory.length_bytes, real, "{shown:#x}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_lies_inside(size in 1_u64..64, areas in prop::collection::vec((0_u64..80, 0_u64..80), 0..3)) {
            let areas = areas.into_iter().map(|(offset, length)| area(offset * 2048, length * 2048)).collect();
            let shown = region(4, size * 4096, Some(areas));
            if let Ok(Some(memory)) = Memory::of(&shown) {
                prop_assert!(memory.length_bytes > 0 && memory.length_bytes <= shown.size_bytes);
                prop_assert!(shown.can_map(0, memory.length_bytes));
            }
        }
    }
}
