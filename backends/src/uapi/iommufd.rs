//! `include/uapi/linux/iommufd.h`: what `iommufd-ioctls` does not have.
#![expect(unsafe_code, reason = "ioctl")]

use std::os::fd::AsFd;

use iommufd_bindings::{iommu_ioas_iova_ranges, iommu_iova_range};
use rustix::io::{Errno, Result};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// The ioctl numbers used here, by their kernel names.
#[cfg(all(test, feature = "host"))]
pub const OPCODES: [(&str, Opcode); 1] = [("IOMMU_IOAS_IOVA_RANGES", IOAS_IOVA_RANGES)];

const IOAS_IOVA_RANGES: Opcode = opcode::none(b';', 0x84);

/// The addresses that an IO address space may have mappings at: first and last of each range. Devices that are
/// attached make it less.
pub fn ioas_iova_ranges(iommufd: impl AsFd, ioas_id: u32) -> Result<Vec<(u64, u64)>> {
    /// More holes than the devices of a machine reserve.
    const MOST_RANGES: usize = 1 << 16;
    let mut room = 16;
    loop {
        let mut ranges = vec![iommu_iova_range::default(); room];
        let mut request = iommu_ioas_iova_ranges {
            size: size_of::<iommu_ioas_iova_ranges>() as u32,
            ioas_id,
            num_iovas: room as u32,
            allowed_iovas: ranges.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes one iommu_ioas_iova_ranges, as its size says, and writes at most
        // `num_iovas` ranges, which is what `ranges` has room for.
        match unsafe { ioctl(&iommufd, Updater::<IOAS_IOVA_RANGES, _>::new(&mut request)) } {
            Ok(()) => {
                let found = ranges.iter().take(request.num_iovas as usize);
                return Ok(found.map(|range| (range.start, range.last)).collect());
            }
            // iommufd_ioas_iova_ranges tells the number where the room is short.
            Err(Errno::MSGSIZE) if (room + 1..=MOST_RANGES).contains(&(request.num_iovas as usize)) => {
                room = request.num_iovas as usize;
            }
            Err(errno) => return Err(errno),
        }
    }
}
