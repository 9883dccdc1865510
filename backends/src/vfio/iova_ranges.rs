//! Which IO virtual addresses mappings may have: what the kernel allows, without what PCI buses answer themselves.
//!
//! A request is routed by its address before an IOMMU sees it: a switch whose ports do not redirect (ACS) hands one
//! that names a neighbour's BAR to that neighbour, and what was to be read from memory is read from a device. The
//! kernel keeps the addresses of drivers clear of that (`iova_reserve_pci_windows` in `drivers/iommu/dma-iommu.c`)
//! and leaves it to user space for VFIO: neither `IOMMU_IOAS_IOVA_RANGES` nor type1's ranges take account of it.
//!
//! Read from sysfs are the BARs of all functions (those of virtual functions, too) and the windows of all bridges, and
//! as root, from `/proc/iomem`, the windows of host bridges, in which devices that are plugged in later get theirs.
//! They are addresses as the CPU has them. Where a host bridge translates them (seen on no x86 machine; some arm64
//! ones do below 4 GiB), a bus has others.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::{Error, Result};

/// Addresses from the first to the last.
pub(super) type Addresses = RangeInclusive<u64>;

// include/uapi/linux/vfio.h
const VFIO_IOMMU_INFO_CAPS: u32 = 1 << 1;
const VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: u16 = 1;
const TYPE1_INFO_BYTES: usize = 24;

/// Reads the ranges in a `struct vfio_iommu_type1_info` with its capabilities. None where the kernel names no ranges.
pub(super) fn parse_type1_info(bytes: &[u8]) -> Result<Option<Vec<Addresses>>, &'static str> {
    const CUT_SHORT: &str = "the container's description is cut short";
    let flags = u32_at(bytes, 4).ok_or(CUT_SHORT)?;
    let mut at = u32_at(bytes, 16).ok_or(CUT_SHORT)? as usize;
    if flags & VFIO_IOMMU_INFO_CAPS == 0 {
        return Ok(None);
    }
    let mut floor = TYPE1_INFO_BYTES;
    while at != 0 {
        // Every link points forward, past the header before it. That bounds the walk.
        if at < floor {
            return Err("a capability of the container points backwards");
        }
        let (id, next) = (u16_at(bytes, at).ok_or(CUT_SHORT)?, u32_at(bytes, at + 4).ok_or(CUT_SHORT)?);
        if id == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
            let count = u32_at(bytes, at + 8).ok_or(CUT_SHORT)? as usize;
            let first = at + 16;
            // Compared before anything is allocated: the count may be a lie.
            if count > bytes.len().saturating_sub(first) / 16 {
                return Err(CUT_SHORT);
            }
            let range = |i: usize| Some(u64_at(bytes, first + 16 * i)?..=u64_at(bytes, first + 16 * i + 8)?);
            return (0..count).map(range).collect::<Option<_>>().map(Some).ok_or(CUT_SHORT);
        }
        floor = at + 8;
        at = next as usize;
    }
    Ok(None)
}

/// The addresses that PCI buses of this machine answer themselves.
pub(super) fn read_bus_addresses() -> Result<Vec<Addresses>> {
    read_bus_addresses_under(Path::new("/"))
}

fn read_bus_addresses_under(root: &Path) -> Result<Vec<Addresses>> {
    let devices = root.join("sys/bus/pci/devices");
    let entries =
        fs::read_dir(&devices).map_err(|error| Error::os("list PCI devices", error).on(devices.display()))?;
    // A device that goes meanwhile is left out, with its addresses.
    let resources = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("resource")).ok());
    let mut addresses: Vec<Addresses> = resources.flat_map(|text| parse_resource(&text)).collect();
    // Whoever is not root reads zeros there, or nothing; the windows of bridges are known all the same.
    let iomem = fs::read_to_string(root.join("proc/iomem")).unwrap_or_default();
    addresses.extend(parse_iomem(&iomem));
    Ok(addresses)
}

/// Reads sysfs's `resource`: BARs, the ROM, virtual functions' BARs, and of bridges their windows, one in each line:
/// "start end flags".
fn parse_resource(text: &str) -> Vec<Addresses> {
    // include/linux/ioport.h
    const IORESOURCE_MEM: u64 = 0x200;
    const IORESOURCE_DISABLED: u64 = 0x1000_0000;
    const IORESOURCE_UNSET: u64 = 0x2000_0000;
    let parse = |line: &str| {
        let mut numbers =
            line.split_whitespace().map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
        let (start, last, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let is_decoded = flags & (IORESOURCE_MEM | IORESOURCE_DISABLED | IORESOURCE_UNSET) == IORESOURCE_MEM;
        (is_decoded && start <= last).then_some(start..=last)
    };
    text.lines().filter_map(parse).collect()
}

/// Reads the windows of buses in `/proc/iomem`: "4000000000-7fffffffff : PCI Bus 0000:00".
fn parse_iomem(text: &str) -> Vec<Addresses> {
    let parse = |line: &str| {
        let (range, name) = line.split_once(" : ")?;
        let (start, last) = range.trim().split_once('-')?;
        let (start, last) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(last, 16).ok()?);
        (name.starts_with("PCI Bus ") && start < last).then_some(start..=last)
    };
    text.lines().filter_map(parse).collect()
}

/// What of `allowed` is not in `taken`, in order.
pub(super) fn without(allowed: &[Addresses], taken: &[Addresses]) -> Vec<Addresses> {
    let mut taken: Vec<&Addresses> = taken.iter().filter(|range| !range.is_empty()).collect();
    taken.sort_unstable_by_key(|range| *range.start());
    let mut left = Vec::new();
    for range in allowed {
        // Where the next range that is left begins; none where that is beyond all addresses.
        let mut begin = Some(*range.start());
        for obstacle in &taken {
            let Some(from) = begin else { break };
            if obstacle.end() < &from || obstacle.start() > range.end() {
                continue;
            }
            if obstacle.start() > &from {
                left.push(from..=obstacle.start() - 1);
            }
            begin = obstacle.end().checked_add(1);
        }
        left.extend(begin.map(|from| from..=*range.end()).filter(|range| !range.is_empty()));
    }
    left.sort_unstable_by_key(|range| *range.start());
    left
}

/// What the above says of the kernel's header.
#[cfg(all(test, feature = "host"))]
pub(super) fn claims() -> [(&'static str, usize); 8] {
    [
        ("VFIO_IOMMU_INFO_CAPS", VFIO_IOMMU_INFO_CAPS as usize),
        ("VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE", VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE.into()),
        ("sizeof(struct vfio_iommu_type1_info)", TYPE1_INFO_BYTES),
        ("offsetof(struct vfio_iommu_type1_info, flags)", 4),
        ("offsetof(struct vfio_iommu_type1_info, cap_offset)", 16),
        ("offsetof(struct vfio_iommu_type1_info_cap_iova_range, nr_iovas)", 8),
        ("offsetof(struct vfio_iommu_type1_info_cap_iova_range, iova_ranges)", 16),
        ("sizeof(struct vfio_iova_range)", 16),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A container's description, with capabilities of `(id, ranges)`.
    fn description(capabilities: &[(u16, &[(u64, u64)])]) -> Vec<u8> {
        let mut bytes = vec![0; TYPE1_INFO_BYTES];
        bytes[4..8].copy_from_slice(&3_u32.to_ne_bytes());
        let mut link = 16;
        for (id, ranges) in capabilities {
            let at = bytes.len() as u32;
            bytes[link..link + 4].copy_from_slice(&at.to_ne_bytes());
            link = bytes.len() + 4;
            bytes.extend(id.to_ne_bytes());
            bytes.extend([1, 0, 0, 0, 0, 0]);
            bytes.extend((ranges.len() as u32).to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(
                ranges.iter().flat_map(|(start, last)| [start.to_ne_bytes(), last.to_ne_bytes()]).flatten(),
            );
        }
        bytes
    }

    #[test]
    fn the_ranges_of_a_container_are_read() {
        let ranges: &[(u64, u64)] = &[(0, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)];
        let bytes = description(&[(3, &[(1, 2)]), (1, ranges), (1, &[(5, 6)])]);
        assert_eq!(
            parse_type1_info(&bytes).unwrap().unwrap(),
            [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]
        );
        assert_eq!(parse_type1_info(&description(&[(3, &[])])).unwrap(), None);
        let mut without_capabilities = bytes.clone();
        without_capabilities[4] = 1;
        assert_eq!(parse_type1_info(&without_capabilities).unwrap(), None);
    }

    #[test]
    fn a_container_that_lies_is_refused() {
        let bytes = description(&[(1, &[(1, 2)])]);
        assert!(parse_type1_info(&bytes[..bytes.len() - 1]).is_err());
        assert!(parse_type1_info(&[]).is_err());
        let mut backwards = description(&[(3, &[])]);
        let at = TYPE1_INFO_BYTES as u32;
        backwards[TYPE1_INFO_BYTES + 4..TYPE1_INFO_BYTES + 8].copy_from_slice(&at.to_ne_bytes());
        assert!(parse_type1_info(&backwards).is_err());
        let mut into_the_header = bytes;
        into_the_header[16] = TYPE1_INFO_BYTES as u8 - 4;
        assert!(parse_type1_info(&into_the_header).is_err());
    }

    #[test]
    fn bars_and_windows_of_the_whole_machine_are_read() {
        let root = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put(
            "sys/bus/pci/devices/0000:02:00.0/resource",
            "0x0000000080000000 0x0000000080ffffff 0x0000000000040200\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x000000c000000000 0x000000c00fffffff 0x000000000014220c\n\
             0x0000000000003000 0x000000000000307f 0x0000000000040101\n\
             0x0000000000000000 0x0000000fffffffff 0x000000002014220c\n",
        );
        // A bridge: two windows, the second is switched off.
        put(
            "sys/bus/pci/devices/0000:00:01.0/resource",
            &format!(
                "{}0x0000000080000000 0x0000000081ffffff 0x0000000000000200\n\
                 0x0000001000000000 0x0000001fffffffff 0x0000000010102208\n",
                "0x0000000000000000 0x0000000000000000 0x0000000000000000\n".repeat(13)
            ),
        );
        let seen = |root: &Path| {
            let mut seen = read_bus_addresses_under(root).unwrap();
            seen.sort_unstable_by_key(|range| (*range.start(), *range.end()));
            seen
        };
        let of_sysfs =
            [0x8000_0000..=0x80ff_ffff, 0x8000_0000..=0x81ff_ffff, 0xc0_0000_0000..=0xc0_0fff_ffff];
        assert_eq!(seen(root.path()), of_sysfs);
        // As root, and as anybody else.
        put(
            "proc/iomem",
            "80000000-afffffff : PCI Bus 0000:00\n  80000000-80ffffff : 0000:02:00.0\n\
             100000000-4ffffffff : System RAM\n4000000000-7fffffffff : PCI Bus 0000:00\n",
        );
        assert!(seen(root.path()).contains(&(0x40_0000_0000..=0x7f_ffff_ffff)));
        assert_eq!(seen(root.path()).len(), 5);
        put("proc/iomem", "00000000-00000000 : PCI Bus 0000:00\n");
        assert_eq!(seen(root.path()), of_sysfs);
        assert!(read_bus_addresses_under(&root.path().join("proc")).is_err());
    }

    #[test]
    fn what_buses_answer_is_cut_out() {
        let allowed = [0..=0xff, 0x200..=u64::MAX];
        assert_eq!(without(&allowed, &[]), allowed);
        // In the middle, over both ends, on top of each other, between the two, and up to the last address.
        let taken = [0x40..=0x4f, 0x48..=0x5f, 0xf0..=0x20f, 0x180..=0x18f, u64::MAX - 1..=u64::MAX];
        assert_eq!(without(&allowed, &taken), [0..=0x3f, 0x60..=0xef, 0x210..=u64::MAX - 2]);
        assert_eq!(without(&allowed, &[0..=u64::MAX]), []);
        assert_eq!(without(&[5..=5], &[6..=6, 4..=4]), [5..=5]);
        assert_eq!(without(&[5..=5], &[5..=5]), []);
    }

    proptest! {
        #[test]
        fn an_address_is_left_if_it_is_allowed_and_not_taken(
            allowed in prop::collection::vec((0_u64..60, 0_u64..20), 0..4),
            taken in prop::collection::vec((0_u64..60, 0_u64..20), 0..6),
        ) {
            let ranges = |pairs: &[(u64, u64)]| -> Vec<Addresses> {
                pairs.iter().map(|&(start, more)| start..=start + more).collect()
            };
            let (allowed, taken) = (ranges(&allowed), ranges(&taken));
            let left = without(&allowed, &taken);
            for address in 0..100 {
                let is_in = |ranges: &[Addresses]| ranges.iter().any(|range| range.contains(&address));
                prop_assert_eq!(is_in(&left), is_in(&allowed) && !is_in(&taken), "{}", address);
            }
        }

        #[test]
        fn any_description_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_type1_info(&bytes);
        }
    }
}
