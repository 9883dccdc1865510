//! `DmaRanges`: page-aligned slices of one region, checked once.
//!
//! Whatever is wrong with a range is said here, in words, before the kernel is asked; what the
//! kernel answers afterwards is then about the device and not about arithmetic.
//!
//! The rules are the kernel's (`drivers/vfio/pci/vfio_pci_dmabuf.c`, `validate_dmabuf_input` and
//! `vfio_pci_core_fill_phys_vec`): at least one range, none empty, offset and length multiples of
//! the page size, the end inside the region, the sum representable. One is ours: ranges may not
//! overlap, because two views of the same bytes in one buffer are never what was meant.

use std::sync::Arc;

use crate::{Error, Kind, Region, Result};

/// The most ranges that one dma-buf may have here.
///
/// The kernel sets no limit of its own and allocates two arrays of this length; a thousand extents
/// are more than any allocator of VRAM should hand out for one buffer.
pub const MAX_RANGES: usize = 1024;

/// One slice of a region, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DmaRange {
    /// Where it starts, a multiple of the page size.
    pub offset_bytes: u64,
    /// How long it is, a multiple of the page size and not zero.
    pub length_bytes: u64,
}

impl DmaRange {
    /// A range from `offset_bytes` on, `length_bytes` long. Not checked until [`DmaRanges::new`].
    pub fn new(offset_bytes: u64, length_bytes: u64) -> Self {
        Self { offset_bytes, length_bytes }
    }

    fn end_bytes(self) -> Option<u64> {
        self.offset_bytes.checked_add(self.length_bytes)
    }
}

/// Page-aligned, non-empty, non-overlapping slices inside one region, in the order given.
///
/// Byte 0 of a buffer made of them is the first byte of the first range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DmaRanges {
    region_index: u32,
    /// Shared: an export, its owner's guard and whoever lends it have the same ones.
    ranges: Arc<[DmaRange]>,
    size_bytes: u64,
}

impl DmaRanges {
    /// Checks `ranges` against `region`.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] names the first range that is wrong and the rule it breaks.
    pub fn new(region: &Region, ranges: &[DmaRange]) -> Result<Self> {
        Self::check(region.index, region.size_bytes, page_size_bytes(), ranges)
    }

    /// The whole region as one range.
    ///
    /// # Errors
    /// As [`DmaRanges::new`]: a BAR smaller than a page has no range that could be exported.
    pub fn whole(region: &Region) -> Result<Self> {
        Self::new(region, &[DmaRange::new(0, region.size_bytes)])
    }

    fn check(region_index: u32, region_bytes: u64, page_bytes: u64, ranges: &[DmaRange]) -> Result<Self> {
        let refuse = |why: String| {
            let next = format!(
                "ranges are multiples of {page_bytes} bytes inside region {region_index}, which has {region_bytes:#x} bytes"
            );
            Err(Error::new(Kind::InvalidInput, "take ranges of a region", why).next(next))
        };
        if ranges.is_empty() {
            return refuse("no range was given".into());
        }
        if ranges.len() > MAX_RANGES {
            return refuse(format!("{} ranges are more than {MAX_RANGES}", ranges.len()));
        }
        for range in ranges {
            let (offset, length) = (range.offset_bytes, range.length_bytes);
            if length == 0 {
                return refuse(format!("the range at {offset:#x} is empty"));
            }
            if offset % page_bytes != 0 {
                return refuse(format!("offset {offset:#x} is not a multiple of the page size"));
            }
            if length % page_bytes != 0 {
                return refuse(format!("length {length:#x} is not a multiple of the page size"));
            }
            match range.end_bytes() {
                None => return refuse(format!("{offset:#x} + {length:#x} overflows")),
                Some(end) if end > region_bytes => {
                    return refuse(format!("{offset:#x} + {length:#x} ends beyond the region"));
                }
                Some(_) => {}
            }
        }
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable_by_key(|range| range.offset_bytes);
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].end_bytes() > Some(pair[1].offset_bytes)) {
            return refuse(format!(
                "the ranges at {:#x} and {:#x} overlap",
                pair[0].offset_bytes, pair[1].offset_bytes
            ));
        }
        // Ranges that do not overlap and lie inside the region cannot sum to more than its size.
        let size_bytes = ranges.iter().map(|range| range.length_bytes).sum();
        Ok(Self { region_index, ranges: ranges.into(), size_bytes })
    }

    /// The region they are slices of.
    pub fn region_index(&self) -> u32 {
        self.region_index
    }

    /// The slices, in buffer order.
    pub fn as_slice(&self) -> &[DmaRange] {
        &self.ranges
    }

    /// The sum of their lengths: the size of a dma-buf made of them.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether they are of a region like `region`: they were checked against *a* region, maybe another
    /// device's.
    pub fn fit(&self, region: &Region) -> bool {
        let fits = |range: &DmaRange| range.end_bytes().is_some_and(|end| end <= region.size_bytes);
        self.region_index == region.index && self.ranges.iter().all(fits)
    }

    /// Says so where they are not of `region`, the exporter's own. The caller names the exporter.
    #[cfg(any(feature = "host", feature = "vulkan"))]
    pub(crate) fn check_fit(&self, tried: &'static str, region: &Region) -> Result<()> {
        if self.fit(region) {
            return Ok(());
        }
        let why = format!("the ranges are of region {} of another device", self.region_index);
        Err(Error::new(Kind::InvalidInput, tried, why).next("make them of this exporter's own region"))
    }

    /// Whether they are all of `region`, in order.
    pub fn are_all_of(&self, region: &Region) -> bool {
        let after = |end, range: &DmaRange| (range.offset_bytes == end).then(|| end + range.length_bytes);
        self.fit(region) && self.ranges.iter().try_fold(0, after) == Some(region.size_bytes)
    }

    /// Where in the region `length_bytes` of a buffer made of them lie, from byte `offset_bytes` of the
    /// buffer on: pieces in buffer order, which need not begin or end at pages.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] beyond the end of the buffer.
    pub fn pieces(&self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<DmaRange>> {
        if offset_bytes.checked_add(length_bytes).is_none_or(|end| end > self.size_bytes) {
            let why = format!(
                "{length_bytes:#x} bytes from {offset_bytes:#x} on are not in {:#x}",
                self.size_bytes
            );
            return Err(Error::new(Kind::InvalidInput, "take part of a buffer", why));
        }
        let (mut skip, mut left) = (offset_bytes, length_bytes);
        let mut pieces = Vec::new();
        for range in self.as_slice() {
            let part = range.length_bytes.saturating_sub(skip).min(left);
            if part > 0 {
                pieces.push(DmaRange::new(range.offset_bytes + skip, part));
                left -= part;
            }
            skip = skip.saturating_sub(range.length_bytes);
        }
        Ok(pieces)
    }
}

/// The page size of the running kernel, in bytes.
pub fn page_size_bytes() -> u64 {
    rustix::param::page_size() as u64
}

/// Refuses a size of memory that is to be made: none, one that is no whole pages, or one that no file can have
/// (`loff_t` is signed).
pub(crate) fn check_whole_pages(tried: &'static str, size_bytes: u64) -> Result<()> {
    let page_bytes = page_size_bytes();
    let why = match size_bytes {
        0 => "its size is 0".to_owned(),
        _ if i64::try_from(size_bytes).is_err() => format!("{size_bytes} bytes are more than any file has"),
        _ if !size_bytes.is_multiple_of(page_bytes) => format!("{size_bytes} bytes are no whole pages"),
        _ => return Ok(()),
    };
    let next = format!("use a multiple of the page size, {page_bytes} bytes");
    Err(Error::new(Kind::InvalidInput, tried, why).next(next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_memory_are_whole_pages() {
        let page_bytes = page_size_bytes();
        let refused = |size_bytes| check_whole_pages("make memory", size_bytes).unwrap_err().to_string();
        assert!(check_whole_pages("make memory", page_bytes).is_ok());
        assert!(check_whole_pages("make memory", 3 * page_bytes).is_ok());
        assert!(refused(0).contains("its size is 0"));
        assert!(refused(page_bytes + 1).contains(&format!("{} bytes are no whole pages", page_bytes + 1)));
        assert!(refused(u64::MAX - page_bytes + 1).contains("more than any file"));
    }
    use crate::RegionFlags;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn check(region_bytes: u64, ranges: &[(u64, u64)]) -> Result<DmaRanges> {
        let ranges: Vec<_> = ranges.iter().map(|&(offset, length)| DmaRange::new(offset, length)).collect();
        DmaRanges::check(2, region_bytes, PAGE, &ranges)
    }

    fn why(region_bytes: u64, ranges: &[(u64, u64)]) -> String {
        check(region_bytes, ranges).unwrap_err().why().to_owned()
    }

    #[test]
    fn each_bad_range_is_named() {
        let region = 16 * PAGE;
        assert_eq!(why(region, &[]), "no range was given");
        assert_eq!(why(region, &[(0, 0)]), "the range at 0x0 is empty");
        assert_eq!(why(region, &[(1, PAGE)]), "offset 0x1 is not a multiple of the page size");
        assert_eq!(why(region, &[(0, PAGE + 1)]), "length 0x1001 is not a multiple of the page size");
        assert_eq!(why(region, &[(PAGE, region)]), "0x1000 + 0x10000 ends beyond the region");
        assert_eq!(why(region, &[(u64::MAX - PAGE + 1, PAGE)]), "0xfffffffffffff000 + 0x1000 overflows");
        assert_eq!(
            why(region, &[(4 * PAGE, 2 * PAGE), (0, PAGE), (5 * PAGE, PAGE)]),
            "the ranges at 0x4000 and 0x5000 overlap"
        );
        assert_eq!(why(256, &[(0, PAGE)]), "0x0 + 0x1000 ends beyond the region");
    }

    #[test]
    fn too_many_ranges_are_refused_before_they_are_looked_at() {
        let many = vec![(0, 0); MAX_RANGES + 1];
        assert_eq!(why(PAGE, &many), "1025 ranges are more than 1024");
        let as_many_as_there_may_be: Vec<(u64, u64)> =
            (0..MAX_RANGES as u64).map(|page| (page * PAGE, PAGE)).collect();
        let ranges = check(MAX_RANGES as u64 * PAGE, &as_many_as_there_may_be).unwrap();
        assert_eq!((ranges.region_index(), ranges.size_bytes()), (2, MAX_RANGES as u64 * PAGE));
    }

    #[test]
    fn order_is_kept_because_it_is_the_order_of_the_buffer() {
        let ranges = check(16 * PAGE, &[(8 * PAGE, PAGE), (0, 2 * PAGE)]).unwrap();
        assert_eq!(ranges.as_slice()[0].offset_bytes, 8 * PAGE);
        assert_eq!(ranges.size_bytes(), 3 * PAGE);
    }

    #[test]
    fn bytes_of_a_buffer_lie_in_pieces_of_the_region() {
        let ranges = check(16 * PAGE, &[(8 * PAGE, 2 * PAGE), (PAGE, PAGE)]).unwrap();
        let pieces = |offset, length| ranges.pieces(offset, length).unwrap();
        assert_eq!(pieces(0, 3 * PAGE), ranges.as_slice());
        assert_eq!(pieces(0x1800, 0x1000), [DmaRange::new(0x9800, 0x800), DmaRange::new(0x1000, 0x800)]);
        assert_eq!(pieces(0x2100, 0x10), [DmaRange::new(0x1100, 0x10)]);
        assert_eq!(ranges.pieces(0x2000, 0x1001).unwrap_err().kind(), Kind::InvalidInput);
        assert_eq!(ranges.pieces(u64::MAX, 2).unwrap_err().kind(), Kind::InvalidInput);
    }

    #[test]
    fn ranges_know_whose_they_can_be() {
        let region = |index, pages: u64| Region {
            index,
            size_bytes: pages * PAGE,
            file_offset_bytes: 0,
            flags: RegionFlags::default(),
            capabilities: Vec::new(),
        };
        let page = page_size_bytes();
        let whole = DmaRanges::whole(&Region { size_bytes: 3 * page, ..region(4, 0) }).unwrap();
        assert_eq!((whole.region_index(), whole.as_slice()), (4, &[DmaRange::new(0, 3 * page)][..]));
        let ranges = check(16 * PAGE, &[(0, PAGE), (PAGE, 3 * PAGE)]).unwrap();
        assert!(ranges.fit(&region(2, 4)) && ranges.are_all_of(&region(2, 4)));
        assert!(ranges.fit(&region(2, 5)) && !ranges.are_all_of(&region(2, 5)));
        assert!(!ranges.fit(&region(2, 3)) && !ranges.fit(&region(1, 4)));
        let turned = check(16 * PAGE, &[(PAGE, 3 * PAGE), (0, PAGE)]).unwrap();
        assert!(turned.fit(&region(2, 4)) && !turned.are_all_of(&region(2, 4)));
    }

    proptest! {
        /// Whatever is accepted obeys every rule; whatever is refused breaks one.
        #[test]
        fn accepted_exactly_when_every_rule_holds(
            region_pages in 0_u64..64,
            raw in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 0..6),
        ) {
            let region = region_pages * PAGE;
            // Half of the ranges are near the region, where the rules bite; half are anywhere.
            let ranges: Vec<_> = raw
                .iter()
                .map(|&(a, b, near)| if near { ((a % 70) * PAGE, (b % 20) * PAGE) } else { (a, b) })
                .collect();
            let fits = |&(offset, length): &(u64, u64)| {
                length > 0
                    && offset % PAGE == 0
                    && length % PAGE == 0
                    && offset as u128 + length as u128 <= region as u128
            };
            let disjoint = ranges.iter().enumerate().all(|(i, a)| {
                ranges[i + 1..].iter().all(|b| {
                    a.0 as u128 + a.1 as u128 <= b.0 as u128 || b.0 as u128 + b.1 as u128 <= a.0 as u128
                })
            });
            let expected = !ranges.is_empty() && ranges.iter().all(fits) && disjoint;
            prop_assert_eq!(check(region, &ranges).is_ok(), expected);
        }
    }
}
