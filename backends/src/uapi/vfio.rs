//! `include/uapi/linux/vfio.h`.
#![expect(unsafe_code, reason = "ioctl")]

use std::ffi::{CStr, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, Result};
use rustix::ioctl::{IntegerSetter, Ioctl, IoctlOutput, NoArg, Opcode, Updater, ioctl, opcode};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd, vfio_device_feature, vfio_device_info, vfio_group_status,
    vfio_iommu_type1_info, vfio_irq_info, vfio_region_dma_range,
};

use crate::region::INFO_BYTES;

const fn vfio_io(number: u8) -> Opcode {
    opcode::none(b';', 100 + number)
}

/// The ioctl numbers used here, by their kernel names.
#[cfg(all(test, feature = "host"))]
pub const OPCODES: [(&str, Opcode); 15] = [
    ("VFIO_SET_IOMMU", SET_IOMMU),
    ("VFIO_GROUP_GET_STATUS", GROUP_GET_STATUS),
    ("VFIO_GROUP_SET_CONTAINER", GROUP_SET_CONTAINER),
    ("VFIO_GROUP_GET_DEVICE_FD", GROUP_GET_DEVICE_FD),
    ("VFIO_DEVICE_GET_INFO", DEVICE_GET_INFO),
    ("VFIO_DEVICE_GET_REGION_INFO", DEVICE_GET_REGION_INFO),
    ("VFIO_DEVICE_GET_IRQ_INFO", DEVICE_GET_IRQ_INFO),
    ("VFIO_DEVICE_SET_IRQS", DEVICE_SET_IRQS),
    ("VFIO_DEVICE_RESET", DEVICE_RESET),
    ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", DEVICE_GET_PCI_HOT_RESET_INFO),
    ("VFIO_DEVICE_PCI_HOT_RESET", DEVICE_PCI_HOT_RESET),
    ("VFIO_IOMMU_GET_INFO", IOMMU_GET_INFO),
    ("VFIO_DEVICE_FEATURE", DEVICE_FEATURE),
    ("VFIO_DEVICE_BIND_IOMMUFD", DEVICE_BIND_IOMMUFD),
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", DEVICE_ATTACH_IOMMUFD_PT),
];

const SET_IOMMU: Opcode = vfio_io(2);
const GROUP_GET_STATUS: Opcode = vfio_io(3);
const GROUP_SET_CONTAINER: Opcode = vfio_io(4);
const GROUP_GET_DEVICE_FD: Opcode = vfio_io(6);
const DEVICE_GET_INFO: Opcode = vfio_io(7);
const DEVICE_GET_REGION_INFO: Opcode = vfio_io(8);
const DEVICE_GET_IRQ_INFO: Opcode = vfio_io(9);
const DEVICE_SET_IRQS: Opcode = vfio_io(10);
const DEVICE_RESET: Opcode = vfio_io(11);
const DEVICE_GET_PCI_HOT_RESET_INFO: Opcode = vfio_io(12);
const DEVICE_PCI_HOT_RESET: Opcode = vfio_io(13);
const IOMMU_GET_INFO: Opcode = vfio_io(12);
const DEVICE_FEATURE: Opcode = vfio_io(17);
const DEVICE_BIND_IOMMUFD: Opcode = vfio_io(18);
const DEVICE_ATTACH_IOMMUFD_PT: Opcode = vfio_io(19);

/// Whether every device of the group is bound to VFIO or to nothing.
pub fn group_is_viable(group: impl AsFd) -> Result<bool> {
    let mut status = vfio_group_status { argsz: size_of::<vfio_group_status>() as u32, flags: 0 };
    // SAFETY: the kernel reads and writes one vfio_group_status.
    unsafe { ioctl(group, Updater::<GROUP_GET_STATUS, _>::new(&mut status)) }?;
    Ok(status.flags & VFIO_GROUP_FLAGS_VIABLE != 0)
}

/// Puts a group into a container. The group leaves it when its last descriptor is closed.
pub fn group_set_container(group: impl AsFd, container: impl AsFd) -> Result<()> {
    let mut container = container.as_fd().as_raw_fd();
    // SAFETY: the kernel reads one int.
    unsafe { ioctl(group, Updater::<GROUP_SET_CONTAINER, _>::new(&mut container)) }
}

/// Chooses the IOMMU model of a container that has a group.
pub fn set_iommu(container: impl AsFd, model: u32) -> Result<()> {
    // SAFETY: the argument is an integer.
    unsafe { ioctl(container, IntegerSetter::<SET_IOMMU>::new_usize(model as usize)) }
}

/// Opens the group's device called `name`, its PCI address.
pub fn group_get_device_fd(group: impl AsFd, name: &CStr) -> Result<OwnedFd> {
    // SAFETY: the kernel reads a string up to its terminator; the answer is a new descriptor.
    unsafe {
        ioctl(group, ReturnsFd { opcode: GROUP_GET_DEVICE_FD, argument: name.as_ptr().cast_mut().cast() })
    }
}

/// Flags and numbers of regions and interrupts of a device.
pub fn device_get_info(device: impl AsFd) -> Result<vfio_device_info> {
    let mut info = vfio_device_info { argsz: size_of::<vfio_device_info>() as u32, ..Default::default() };
    // SAFETY: the kernel reads and writes one vfio_device_info, as argsz says.
    unsafe { ioctl(device, Updater::<DEVICE_GET_INFO, _>::new(&mut info)) }?;
    Ok(info)
}

/// The description of region `index` with its capability chain, as bytes for `Region::parse`.
pub fn device_get_region_info(device: impl AsFd, index: u32) -> Result<Vec<u8>> {
    read_info(device, DEVICE_GET_REGION_INFO, INFO_BYTES, |bytes| {
        bytes[8..12].copy_from_slice(&index.to_ne_bytes());
    })
}

/// The description of a container's IOMMU, `struct vfio_iommu_type1_info` with its capability chain, as bytes.
pub fn iommu_get_info(container: impl AsFd) -> Result<Vec<u8>> {
    read_info(container, IOMMU_GET_INFO, size_of::<vfio_iommu_type1_info>(), |_| {})
}

/// Asks for a description that begins with `argsz` and may be longer than `least_bytes`: the kernel then says by how
/// much. `fill` writes what the kernel is to read.
fn read_info(fd: impl AsFd, opcode: Opcode, least_bytes: usize, fill: impl Fn(&mut [u8])) -> Result<Vec<u8>> {
    /// More than any driver describes; an answer beyond it is refused, not allocated.
    const MOST_BYTES: usize = 1 << 20;
    let mut size_bytes = least_bytes;
    loop {
        // u64 for the structs' alignment.
        let mut request = vec![0_u64; size_bytes.div_ceil(8)];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut request);
        bytes[0..4].copy_from_slice(&(size_bytes as u32).to_ne_bytes());
        fill(bytes);
        // SAFETY: the kernel writes at most argsz bytes, which is what `request` has.
        unsafe { ioctl(&fd, Raw { opcode, argument: request.as_mut_ptr().cast() }) }?;
        let bytes: &[u8] = bytemuck::cast_slice(&request);
        let needed = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if needed <= size_bytes {
            return Ok(bytes[..size_bytes].to_vec());
        }
        if needed > MOST_BYTES {
            return Err(Errno::MSGSIZE);
        }
        size_bytes = needed;
    }
}

/// Resets the device. Blocks until every importer of its dma-bufs has unmapped.
pub fn device_reset(device: impl AsFd) -> Result<()> {
    // SAFETY: no argument.
    unsafe { ioctl(device, NoArg::<DEVICE_RESET>::new()) }
}

/// How many interrupts the device has of the kind `index`.
pub fn device_get_irq_count(device: impl AsFd, index: u32) -> Result<u32> {
    let mut info = vfio_irq_info { argsz: size_of::<vfio_irq_info>() as u32, index, ..Default::default() };
    // SAFETY: the kernel reads and writes one vfio_irq_info, as argsz says.
    unsafe { ioctl(device, Updater::<DEVICE_GET_IRQ_INFO, _>::new(&mut info)) }?;
    Ok(info.count)
}

/// `struct vfio_irq_set` with one eventfd as its data.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct IrqSetEventfd {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub eventfd: i32,
}

/// Has the first interrupt of the kind `index` signal an eventfd, in the place of the one before.
pub fn device_set_irq_eventfd(device: impl AsFd, index: u32, eventfd: BorrowedFd<'_>) -> Result<()> {
    let mut set = IrqSetEventfd {
        argsz: size_of::<IrqSetEventfd>() as u32,
        flags: VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        start: 0,
        count: 1,
        eventfd: eventfd.as_raw_fd(),
    };
    // SAFETY: the kernel reads argsz bytes, which is the whole of `set`, and writes none.
    unsafe { ioctl(device, Raw { opcode: DEVICE_SET_IRQS, argument: (&raw mut set).cast() }) }
}

/// Bytes of `struct vfio_pci_hot_reset_info` and `struct vfio_pci_hot_reset` before their arrays.
pub const HOT_RESET_HEADER_BYTES: usize = 12;
/// Bytes of `struct vfio_pci_dependent_device`.
pub const DEPENDENT_DEVICE_BYTES: usize = 8;

/// Which devices a hot reset touches: a `struct vfio_pci_hot_reset_info` with its array, as bytes.
pub fn device_get_pci_hot_reset_info(device: impl AsFd) -> Result<Vec<u8>> {
    /// More than hang below one bus.
    const MOST_DEVICES: usize = 4096;
    /// The topology may change between counting and telling, not forever.
    const MOST_TRIES: usize = 8;
    let mut room = 8;
    for _ in 0..MOST_TRIES {
        let size_bytes = HOT_RESET_HEADER_BYTES + room * DEPENDENT_DEVICE_BYTES;
        // u32 for the struct's alignment.
        let mut request = vec![0_u32; size_bytes / 4];
        request[0] = size_bytes as u32;
        let raw = Raw { opcode: DEVICE_GET_PCI_HOT_RESET_INFO, argument: request.as_mut_ptr().cast() };
        // SAFETY: the kernel writes at most argsz bytes, which is what `request` has.
        match unsafe { ioctl(&device, raw) } {
            Ok(()) => return Ok(bytemuck::cast_slice(&request).to_vec()),
            // vfio_pci_ioctl_get_pci_hot_reset_info tells the number where the room is short.
            Err(Errno::NOSPC) => room = request[2] as usize,
            // vfio_pci_fill_devs: the topology changed since it counted.
            Err(Errno::AGAIN) => {}
            Err(errno) => return Err(errno),
        }
        if room > MOST_DEVICES {
            return Err(Errno::MSGSIZE);
        }
    }
    Err(Errno::AGAIN)
}

/// Resets the slot or bus of a device. `groups` vouches for who else is on it, and is empty for a device
/// of the character-device interface. Blocks as [`device_reset`].
pub fn device_pci_hot_reset(device: impl AsFd, groups: &[BorrowedFd<'_>]) -> Result<()> {
    let size_bytes = HOT_RESET_HEADER_BYTES + groups.len() * size_of::<i32>();
    let mut request = vec![size_bytes as i32, 0, groups.len() as i32];
    request.extend(groups.iter().map(AsRawFd::as_raw_fd));
    // SAFETY: the kernel reads argsz bytes, all of them inside `request`, and writes none.
    unsafe { ioctl(device, Raw { opcode: DEVICE_PCI_HOT_RESET, argument: request.as_mut_ptr().cast() }) }
}

/// Binds a device of the character-device interface to an iommufd. Lasts until it is closed.
pub fn device_bind_iommufd(device: impl AsFd, iommufd: BorrowedFd<'_>) -> Result<u32> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_of::<vfio_device_bind_iommufd>() as u32,
        flags: 0,
        iommufd: iommufd.as_raw_fd(),
        out_devid: 0,
        token_uuid_ptr: 0,
    };
    // SAFETY: the kernel reads and writes one vfio_device_bind_iommufd, as argsz says.
    unsafe { ioctl(device, Updater::<DEVICE_BIND_IOMMUFD, _>::new(&mut bind)) }?;
    Ok(bind.out_devid)
}

/// Attaches a bound device to an IO address space. Lasts until it is closed.
pub fn device_attach_iommufd_pt(device: impl AsFd, pt_id: u32) -> Result<()> {
    let mut attach = vfio_device_attach_iommufd_pt {
        argsz: size_of::<vfio_device_attach_iommufd_pt>() as u32,
        flags: 0,
        pt_id,
        pasid: 0,
    };
    // SAFETY: the kernel reads and writes one vfio_device_attach_iommufd_pt, as argsz says.
    unsafe { ioctl(device, Updater::<DEVICE_ATTACH_IOMMUFD_PT, _>::new(&mut attach)) }
}

/// Asks whether GET of `feature` exists: ENOTTY where the kernel does not know it, EOPNOTSUPP
/// where this driver does not have it.
pub fn device_feature_probe_get(device: impl AsFd, feature: u32) -> Result<()> {
    let mut request = vfio_device_feature {
        argsz: size_of::<vfio_device_feature>() as u32,
        flags: feature | VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_PROBE,
        ..Default::default()
    };
    // SAFETY: a probe transfers nothing beyond the header.
    unsafe { ioctl(device, Updater::<DEVICE_FEATURE, _>::new(&mut request)) }
}

/// Sets a `feature` that takes no data: ENOTTY where the kernel does not know it.
pub fn device_feature_set(device: impl AsFd, feature: u32) -> Result<()> {
    let mut request = vfio_device_feature {
        argsz: size_of::<vfio_device_feature>() as u32,
        flags: feature | VFIO_DEVICE_FEATURE_SET,
        ..Default::default()
    };
    // SAFETY: the kernel reads the header, and nothing behind it, as argsz says.
    unsafe { ioctl(device, Updater::<DEVICE_FEATURE, _>::new(&mut request)) }
}

/// The request of `VFIO_DEVICE_FEATURE_DMA_BUF`, up to its flexible array of ranges:
/// `struct vfio_device_feature` followed by `struct vfio_device_feature_dma_buf`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct DmaBufRequest {
    pub argsz: u32,
    pub feature_flags: u32,
    pub region_index: u32,
    pub open_flags: u32,
    pub flags: u32,
    pub nr_ranges: u32,
}

const RANGE_BYTES: usize = size_of::<vfio_region_dma_range>();
const HEADER_WORDS: usize = size_of::<DmaBufRequest>() / size_of::<u64>();
/// How many ranges a request has without memory of the heap.
const RANGES_ON_STACK: usize = 8;
const _: () = assert!(size_of::<DmaBufRequest>().is_multiple_of(align_of::<vfio_region_dma_range>()));
const _: () = assert!(RANGE_BYTES == 16);

/// A [`DmaBufRequest`] with its ranges, in words for their alignment. Those of almost every buffer fit the stack.
enum Request {
    Few([u64; HEADER_WORDS + 2 * RANGES_ON_STACK]),
    Many(Vec<u64>),
}

impl Request {
    fn of(header: DmaBufRequest, ranges: impl ExactSizeIterator<Item = (u64, u64)>) -> Self {
        let mut request = if ranges.len() <= RANGES_ON_STACK {
            Self::Few([0; HEADER_WORDS + 2 * RANGES_ON_STACK])
        } else {
            Self::Many(vec![0; HEADER_WORDS + 2 * ranges.len()])
        };
        let (of_header, of_ranges) = request.words().split_at_mut(HEADER_WORDS);
        of_header.copy_from_slice(&bytemuck::cast::<DmaBufRequest, [u64; HEADER_WORDS]>(header));
        for (words, (offset, length)) in of_ranges.chunks_exact_mut(2).zip(ranges) {
            words.copy_from_slice(&[offset, length]);
        }
        request
    }

    fn words(&mut self) -> &mut [u64] {
        match self {
            Self::Few(words) => words,
            Self::Many(words) => words,
        }
    }
}

/// Makes a dma-buf of `ranges` (offset and length in bytes) of a region.
pub fn device_feature_dma_buf(
    device: impl AsFd,
    feature: u32,
    region_index: u32,
    open_flags: u32,
    ranges: impl ExactSizeIterator<Item = (u64, u64)>,
) -> Result<OwnedFd> {
    let header = DmaBufRequest {
        argsz: (size_of::<DmaBufRequest>() + ranges.len() * RANGE_BYTES) as u32,
        feature_flags: feature | VFIO_DEVICE_FEATURE_GET,
        region_index,
        open_flags,
        flags: 0,
        nr_ranges: ranges.len() as u32,
    };
    let mut request = Request::of(header, ranges);
    let argument = request.words().as_mut_ptr().cast();
    // SAFETY: the kernel reads argsz bytes, all of them inside `request`, and writes none; the
    // answer is a new descriptor.
    unsafe { ioctl(device, ReturnsFd { opcode: DEVICE_FEATURE, argument }) }
}

/// An ioctl with a pointer to a request of variable length.
struct Raw {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: whoever calls `ioctl` with it vouches for the opcode and for what the pointer leads to.
unsafe impl Ioctl for Raw {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> Result<()> {
        Ok(())
    }
}

/// An ioctl that answers with a new file descriptor.
struct ReturnsFd {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: as `Raw`; and the caller vouches that the answer is a descriptor nobody else owns.
unsafe impl Ioctl for ReturnsFd {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> Result<OwnedFd> {
        // SAFETY: the kernel just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_every_range_behind_its_header() {
        for count in [0, 1, RANGES_ON_STACK, RANGES_ON_STACK + 1, 100] {
            let ranges = (0..count).map(|range| ((range as u64) << 12, range as u64 + 1));
            let header = DmaBufRequest {
                argsz: (size_of::<DmaBufRequest>() + count * RANGE_BYTES) as u32,
                feature_flags: 1,
                region_index: 2,
                open_flags: 3,
                flags: 4,
                nr_ranges: count as u32,
            };
            let mut request = Request::of(header, ranges.clone());
            assert_eq!(matches!(request, Request::Few(_)), count <= RANGES_ON_STACK);
            let words = request.words();
            assert!(size_of_val(words) >= header.argsz as usize);
            let of_header: DmaBufRequest = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words[..3]));
            assert_eq!((of_header.argsz, of_header.flags), (header.argsz, 4));
            assert_eq!((of_header.open_flags, of_header.nr_ranges), (3, count as u32));
            let found = words[3..].chunks_exact(2).take(count).map(|range| (range[0], range[1]));
            assert!(found.eq(ranges), "{count} ranges");
        }
    }
}
