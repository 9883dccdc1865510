//! `Region`: one of a device's address ranges, as VFIO describes it.
//!
//! The capability chain that follows `struct vfio_region_info` is parsed here, from bytes. Those
//! bytes come from a kernel driver, possibly an out-of-tree one, so nothing in them is trusted: a
//! link that points backwards, outside, or into the fixed part ends the walk with an error.

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::{Error, Kind, Result};

/// Size of the fixed part, `struct vfio_region_info` in `include/uapi/linux/vfio.h`.
pub(crate) const INFO_BYTES: usize = 32;
const HEADER_BYTES: usize = 8;

const CAP_SPARSE_MMAP: u16 = 1;
const CAP_TYPE: u16 = 2;
const CAP_MSIX_MAPPABLE: u16 = 3;

/// What may be done with a region, `VFIO_REGION_INFO_FLAG_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RegionFlags {
    /// `read` works.
    pub read: bool,
    /// `write` works.
    pub write: bool,
    /// `mmap` works, for all of it or for the sparse areas.
    pub mmap: bool,
}

/// A part of a region that can be mapped, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseArea {
    /// Where it starts.
    pub offset_bytes: u64,
    /// How long it is.
    pub length_bytes: u64,
}

/// One entry of the capability chain.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Capability {
    /// Only these areas can be mapped (`VFIO_REGION_INFO_CAP_SPARSE_MMAP`).
    SparseMmap(Vec<SparseArea>),
    /// A device-specific region (`VFIO_REGION_INFO_CAP_TYPE`).
    Type {
        /// The type, a PCI vendor id where bit 31 is set.
        region_type: u32,
        /// The subtype.
        subtype: u32,
    },
    /// The MSI-X table may be mapped (`VFIO_REGION_INFO_CAP_MSIX_MAPPABLE`).
    MsixMappable,
    /// An id that this version does not know.
    Unknown(u16),
}

/// One of a device's address ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Its index: for PCI, BAR 0 to 5, then ROM and configuration space.
    pub index: u32,
    /// Its length in bytes; zero where the device has none at this index.
    pub size_bytes: u64,
    /// Where it starts in the device fd, for `pread`, `pwrite` and `mmap`.
    pub file_offset_bytes: u64,
    /// What may be done with it.
    pub flags: RegionFlags,
    /// Its capabilities, in chain order.
    pub capabilities: Vec<Capability>,
}

impl Region {
    /// Parses the answer to `VFIO_DEVICE_GET_REGION_INFO`: the fixed part and what follows it.
    ///
    /// # Errors
    /// [`Kind::Os`] where the bytes contradict themselves; the region is then unusable.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let broken = |why: &'static str| Error::new(Kind::Os, "read a region's description", why);
        if bytes.len() < INFO_BYTES {
            return Err(broken("it is shorter than struct vfio_region_info"));
        }
        let flags = u32_at(bytes, 4).unwrap_or(0);
        let capability_offset = u32_at(bytes, 12).unwrap_or(0) as usize;
        let has_capabilities = flags & 1 << 3 != 0;
        Ok(Self {
            index: u32_at(bytes, 8).unwrap_or(0),
            size_bytes: u64_at(bytes, 16).unwrap_or(0),
            file_offset_bytes: u64_at(bytes, 24).unwrap_or(0),
            flags: RegionFlags {
                read: flags & 1 != 0,
                write: flags & 1 << 1 != 0,
                mmap: flags & 1 << 2 != 0,
            },
            capabilities: if has_capabilities && capability_offset != 0 {
                parse_chain(bytes, capability_offset).map_err(broken)?
            } else {
                Vec::new()
            },
        })
    }

    /// Whether the device has anything at this index.
    pub fn is_present(&self) -> bool {
        self.size_bytes > 0
    }

    /// The parts that alone can be mapped; none where the driver names no parts.
    pub fn sparse_areas(&self) -> Option<&[SparseArea]> {
        self.capabilities.iter().find_map(|capability| match capability {
            Capability::SparseMmap(areas) => Some(&areas[..]),
            _ => None,
        })
    }

    /// Whether all of `offset_bytes..offset_bytes + length_bytes` can be mapped.
    pub fn can_map(&self, offset_bytes: u64, length_bytes: u64) -> bool {
        let inside = |start: u64, length: u64| {
            let end = offset_bytes.checked_add(length_bytes);
            offset_bytes >= start && end.is_some() && end <= start.checked_add(length)
        };
        self.flags.mmap
            && match self.sparse_areas() {
                Some(areas) => areas.iter().any(|area| inside(area.offset_bytes, area.length_bytes)),
                None => inside(0, self.size_bytes),
            }
    }
}

fn parse_chain(bytes: &[u8], first: usize) -> Result<Vec<Capability>, &'static str> {
    let mut capabilities = Vec::new();
    let mut floor = INFO_BYTES;
    let mut offset = first;
    while offset != 0 {
        // Every link points forward, past the header before it. That bounds the walk.
        if offset < floor {
            return Err("a capability points backwards");
        }
        let header = (u16_at(bytes, offset), u32_at(bytes, offset.saturating_add(4)));
        let (Some(id), Some(next)) = header else {
            return Err("a capability lies outside the description");
        };
        capabilities.push(parse_capability(bytes, offset, id)?);
        floor = offset + HEADER_BYTES;
        offset = next as usize;
    }
    Ok(capabilities)
}

fn parse_capability(bytes: &[u8], offset: usize, id: u16) -> Result<Capability, &'static str> {
    const CUT_SHORT: &str = "a capability is cut short";
    let body = offset + HEADER_BYTES;
    Ok(match id {
        CAP_SPARSE_MMAP => {
            let count = u32_at(bytes, body).ok_or(CUT_SHORT)? as usize;
            let first = body + 8;
            // Compared before anything is allocated: the count may be a lie.
            if count > bytes.len().saturating_sub(first) / 16 {
                return Err("a sparse-mmap capability claims more areas than it has");
            }
            let area = |i: usize| {
                Some(SparseArea {
                    offset_bytes: u64_at(bytes, first + 16 * i)?,
                    length_bytes: u64_at(bytes, first + 16 * i + 8)?,
                })
            };
            Capability::SparseMmap((0..count).map(area).collect::<Option<_>>().ok_or(CUT_SHORT)?)
        }
        CAP_TYPE => Capability::Type {
            region_type: u32_at(bytes, body).ok_or(CUT_SHORT)?,
            subtype: u32_at(bytes, body + 4).ok_or(CUT_SHORT)?,
        },
        CAP_MSIX_MAPPABLE => Capability::MsixMappable,
        other => Capability::Unknown(other),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A description of region 2, 1 MiB, readable, writable and mappable, with `capabilities` behind it.
    fn description(capability_offset: u32, capabilities: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let flags: u32 = if capability_offset == 0 { 0b0111 } else { 0b1111 };
        for word in [(INFO_BYTES + capabilities.len()) as u32, flags, 2, capability_offset] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend((1_u64 << 20).to_ne_bytes());
        bytes.extend((2_u64 << 40).to_ne_bytes());
        bytes.extend(capabilities);
        bytes
    }

    fn header(id: u16, next: u32) -> Vec<u8> {
        let mut bytes = id.to_ne_bytes().to_vec();
        bytes.extend(1_u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes
    }

    fn sparse(next: u32, count: u32, areas: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = header(CAP_SPARSE_MMAP, next);
        bytes.extend(count.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        for (offset, length) in areas {
            bytes.extend(offset.to_ne_bytes());
            bytes.extend(length.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn a_plain_region_can_be_mapped_whole() {
        let region = Region::parse(&description(0, &[])).unwrap();
        assert_eq!((region.index, region.size_bytes), (2, 1 << 20));
        assert!(region.can_map(0, 1 << 20));
        assert!(!region.can_map(4096, 1 << 20));
        assert!(!region.can_map(u64::MAX, 2));
    }

    #[test]
    fn sparse_areas_limit_what_can_be_mapped() {
        let mut chain = sparse(32 + 48, 2, &[(0, 0x1000), (0x4000, 0x2000)]);
        chain.extend(header(CAP_MSIX_MAPPABLE, 0));
        let region = Region::parse(&description(32, &chain)).unwrap();
        assert_eq!(region.capabilities.len(), 2);
        assert!(region.can_map(0x5000, 0x1000));
        assert!(!region.can_map(0, 0x2000), "two areas do not make one mapping");
    }

    #[test]
    fn hostile_chains_are_refused() {
        let refused =
            |offset, chain: &[u8]| Region::parse(&description(offset, chain)).unwrap_err().why().to_owned();
        assert_eq!(refused(32, &header(9, 32)), "a capability points backwards");
        assert_eq!(refused(8, &header(9, 0)), "a capability points backwards");
        assert_eq!(refused(u32::MAX, &[]), "a capability lies outside the description");
        assert_eq!(refused(32, &header(9, 0)[..6]), "a capability lies outside the description");
        assert_eq!(refused(32, &header(CAP_TYPE, 0)), "a capability is cut short");
        assert_eq!(
            refused(32, &sparse(0, u32::MAX, &[(0, 1)])),
            "a sparse-mmap capability claims more areas than it has"
        );
    }

    proptest! {
        /// No input panics, hangs, or yields more capabilities than its bytes could hold.
        #[test]
        fn any_bytes_are_survived(offset in 0_u32..200, chain in prop::collection::vec(any::<u8>(), 0..160)) {
            if let Ok(region) = Region::parse(&description(offset, &chain)) {
                prop_assert!(region.capabilities.len() <= chain.len() / HEADER_BYTES);
            }
        }

        /// Chains whose links are plausible reach the deep end of the walk more often.
        #[test]
        fn plausible_links_are_survived(links in prop::collection::vec((0_u16..5, 0_u32..20), 1..16)) {
            let chain: Vec<u8> = links.iter().flat_map(|&(id, next)| header(id, next * 8)).collect();
            if let Ok(region) = Region::parse(&description(32, &chain)) {
                prop_assert!(region.capabilities.len() <= links.len());
            }
        }
    }
}
