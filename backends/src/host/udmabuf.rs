//! `/dev/udmabuf`: the kernel's way to make a dma-buf of pages of memfds.
//!
//! One call, [`create`], after [`open`]. Written by hand after `include/uapi/linux/udmabuf.h`:
//!
//! | name | value |
//! |---|---|
//! | `UDMABUF_FLAGS_CLOEXEC` | `0x01` |
//! | `UDMABUF_CREATE_LIST` | `_IOW('u', 0x43, struct udmabuf_create_list)` = `0x40087543` |
//! | `struct udmabuf_create_item` | `memfd: u32 @0, __pad: u32 @4, offset: u64 @8, size: u64 @16`; 24 bytes |
//! | `struct udmabuf_create_list` | `flags: u32 @0, count: u32 @4, list: [item; count] @8`; 8 bytes |
//!
//! `UDMABUF_CREATE` (one item, `0x42`) is left out: a list of one does the same.
#![expect(unsafe_code, reason = "an ioctl of variable length, and the descriptor that it returns")]

use std::ffi::c_void;
use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use bytemuck::{Pod, Zeroable};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use crate::{DmaRange, Error, Kind, Result};

const PATH: &str = "/dev/udmabuf";

const UDMABUF_FLAGS_CLOEXEC: u32 = 0x01;
const UDMABUF_CREATE_LIST: Opcode = opcode::write::<CreateListHead>(b'u', 0x43);

/// `struct udmabuf_create_list` without its flexible array.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CreateListHead {
    flags: u32,
    count: u32,
}

/// `struct udmabuf_create_item`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CreateItem {
    memfd: u32,
    pad: u32,
    offset: u64,
    size: u64,
}

const _: () = assert!(size_of::<CreateListHead>() == 8);
const _: () = assert!(size_of::<CreateItem>() == 24);
const _: () = assert!(UDMABUF_CREATE_LIST as u64 == 0x4008_7543);

/// What the above says of the kernel's header, for the test that compiles it.
#[cfg(all(test, feature = "vfio"))]
pub(crate) fn claims() -> [(&'static str, usize); 10] {
    use std::mem::offset_of;
    [
        ("UDMABUF_FLAGS_CLOEXEC", UDMABUF_FLAGS_CLOEXEC as usize),
        ("UDMABUF_CREATE_LIST", UDMABUF_CREATE_LIST as usize),
        ("sizeof(struct udmabuf_create_list)", size_of::<CreateListHead>()),
        ("offsetof(struct udmabuf_create_list, flags)", offset_of!(CreateListHead, flags)),
        ("offsetof(struct udmabuf_create_list, count)", offset_of!(CreateListHead, count)),
        ("offsetof(struct udmabuf_create_list, list)", size_of::<CreateListHead>()),
        ("sizeof(struct udmabuf_create_item)", size_of::<CreateItem>()),
        ("offsetof(struct udmabuf_create_item, memfd)", offset_of!(CreateItem, memfd)),
        ("offsetof(struct udmabuf_create_item, offset)", offset_of!(CreateItem, offset)),
        ("offsetof(struct udmabuf_create_item, size)", offset_of!(CreateItem, size)),
    ]
}

/// The head and its items, contiguous and aligned to eight bytes as the kernel reads them.
struct CreateList(Vec<u64>);

impl CreateList {
    fn new(memfd: BorrowedFd<'_>, ranges: &[DmaRange]) -> Self {
        let head = CreateListHead { flags: UDMABUF_FLAGS_CLOEXEC, count: ranges.len() as u32 };
        let mut words: Vec<u64> = vec![bytemuck::cast(head)];
        for range in ranges {
            let item = CreateItem {
                memfd: memfd.as_raw_fd() as u32,
                pad: 0,
                offset: range.offset_bytes,
                size: range.length_bytes,
            };
            words.extend(bytemuck::cast::<CreateItem, [u64; 3]>(item));
        }
        Self(words)
    }
}

// SAFETY: the opcode belongs to exactly this layout; the buffer holds the head and as many items
// as the head says, all initialised, and the kernel only reads it. On success the return value is
// a new descriptor that nobody else owns (drivers/dma-buf/udmabuf.c, udmabuf_create).
unsafe impl Ioctl for CreateList {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        UDMABUF_CREATE_LIST
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the caller vouches that the ioctl succeeded, and then this is the new descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

/// Opens `/dev/udmabuf`.
///
/// # Errors
/// [`Kind::NotFound`] without the module, [`Kind::PermissionDenied`] without the right.
pub(super) fn open() -> Result<OwnedFd> {
    rustix::fs::open(PATH, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        let error = Error::os("open udmabuf", errno).on(PATH);
        match error.kind() {
            Kind::NotFound => error.next("load the udmabuf module: modprobe udmabuf"),
            Kind::PermissionDenied => {
                error.next("run as root, or as a member of the file's group (often kvm)")
            }
            _ => error,
        }
    })
}

/// Makes a dma-buf of `ranges` of `memfd`, in that order. Both descriptors are borrowed.
///
/// # Errors
/// What the driver says; for its size limit, in words.
pub(super) fn create(udmabuf: BorrowedFd<'_>, memfd: BorrowedFd<'_>, ranges: &[DmaRange]) -> Result<OwnedFd> {
    const TRIED: &str = "make a udmabuf";
    // SAFETY: `udmabuf` is `/dev/udmabuf`, for which this opcode is defined; the list is of the
    // layout that the opcode promises (see `Ioctl for CreateList`) and lives through the call.
    unsafe { ioctl(udmabuf, CreateList::new(memfd, ranges)) }.map_err(|errno| {
        let size_bytes: u64 = ranges.iter().map(|range| range.length_bytes).sum();
        match (errno, limit("size_limit_mb"), limit("list_limit")) {
            (Errno::INVAL, Some(limit_mb), _) if size_bytes > limit_mb << 20 => {
                let why = format!("{} MiB are more than its limit of {limit_mb} MiB", size_bytes >> 20);
                Error::new(Kind::Unsupported, TRIED, why)
                    .next("raise /sys/module/udmabuf/parameters/size_limit_mb, lend less, or use the memfd itself (Backing::Memfd)")
            }
            (Errno::INVAL, _, Some(limit)) if ranges.len() as u64 > limit => {
                let why = format!("{} ranges are more than its limit of {limit}", ranges.len());
                Error::new(Kind::Unsupported, TRIED, why)
                    .next("raise /sys/module/udmabuf/parameters/list_limit, or lend fewer")
            }
            _ => Error::os(TRIED, errno),
        }
        .errno(errno)
        .on(PATH)
    })
}

/// A limit that the driver makes public.
fn limit(parameter: &str) -> Option<u64> {
    fs::read_to_string(format!("/sys/module/udmabuf/parameters/{parameter}")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_list_is_laid_out_as_the_kernel_reads_it() {
        let (read, _write) = rustix::pipe::pipe().unwrap();
        let ranges = [DmaRange::new(0x1000, 0x2000), DmaRange::new(0, 0x1000)];
        let list = CreateList::new(read.as_fd(), &ranges);
        let bytes: &[u8] = bytemuck::cast_slice(&list.0);
        assert_eq!(bytes.len(), 8 + 2 * 24);
        assert_eq!(bytes[0..4], 1_u32.to_ne_bytes());
        assert_eq!(bytes[4..8], 2_u32.to_ne_bytes());
        assert_eq!(bytes[8..12], (read.as_raw_fd() as u32).to_ne_bytes());
        assert_eq!(bytes[16..24], 0x1000_u64.to_ne_bytes());
        assert_eq!(bytes[48..56], 0x1000_u64.to_ne_bytes());
    }
}
