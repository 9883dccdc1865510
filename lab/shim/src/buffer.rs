//! The buffers that stand for udmabufs: which descriptor shows which extents.
#![expect(unsafe_code, reason = "reads what QEMU passes and maps memory")]

use core::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::syscall;

const MAP_SHARED_AND_FIXED: c_int = 0x01 | 0x10;
const MAP_FIXED: c_int = 0x10;
const MAP_PRIVATE_AND_ANONYMOUS: c_int = 0x02 | 0x20;

const EINVAL: isize = -22;
const ENFILE: isize = -23;

/// `struct udmabuf_create_list`, followed by `count` items.
#[repr(C)]
pub struct CreateList {
    flags: u32,
    count: u32,
}

/// `struct udmabuf_create`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Create {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

/// `struct udmabuf_create_item`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CreateItem {
    memfd: u32,
    padding: u32,
    offset: u64,
    size: u64,
}

/// An extent of a memfd, through a descriptor of our own.
struct Extent {
    fd: c_int,
    offset: i64,
    size: usize,
}

impl Drop for Extent {
    fn drop(&mut self) {
        // SAFETY: duplicated for this extent alone.
        unsafe { syscall::close(self.fd) };
    }
}

struct Buffer {
    fd: c_int,
    identity: (u64, u64),
    extents: Vec<Extent>,
}

impl Buffer {
    fn is_open(&self) -> bool {
        syscall::identity(self.fd) == Some(self.identity)
    }
}

/// A fixed table: nothing is allocated or freed while it is locked, as the allocator may call
/// `mmap`, which locks it.
static BUFFERS: Mutex<[Option<Buffer>; 256]> = Mutex::new([const { None }; 256]);

/// How many slots of the table were ever used, readable without its lock.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Whether there has been any buffer yet.
pub fn any() -> bool {
    USED.load(Ordering::Acquire) > 0
}

/// Makes a buffer of a whole memfd, which is that memfd: whoever gets the descriptor maps the same memory, in another
/// process, too. A part of one is refused, for a descriptor cannot say where it begins.
///
/// # Safety
/// `create` points to what `UDMABUF_CREATE` wants.
pub unsafe fn create_whole(create: *const Create) -> isize {
    // SAFETY: the caller's promise.
    let Create { memfd, offset, size, .. } = unsafe { *create };
    let memfd = memfd.cast_signed();
    if offset != 0 || syscall::length(memfd) != Some(size) {
        return EINVAL;
    }
    syscall::duplicate(memfd)
}

/// Makes a buffer of a list of extents: its descriptor, or a negative errno.
///
/// # Safety
/// `list` points to what `UDMABUF_CREATE_LIST` wants.
pub unsafe fn create(list: *const CreateList) -> isize {
    // SAFETY: the caller's promise.
    let count = unsafe { (*list).count } as usize;
    // SAFETY: the items follow the head, which has no padding.
    let items = unsafe { core::slice::from_raw_parts(list.add(1).cast::<CreateItem>(), count) };
    let mut extents = Vec::with_capacity(count);
    for item in items {
        let (Ok(offset), Ok(size)) = (i64::try_from(item.offset), usize::try_from(item.size)) else {
            return EINVAL;
        };
        let fd = syscall::duplicate(item.memfd.cast_signed());
        if fd < 0 {
            return fd;
        }
        extents.push(Extent { fd: fd as c_int, offset, size });
    }
    let fd = syscall::memfd();
    let Some(identity) = syscall::identity(fd as c_int) else { return fd.min(EINVAL) };
    let mut rest = Some(Buffer { fd: fd as c_int, identity, extents });
    let mut old = None;
    {
        let mut buffers = BUFFERS.lock().unwrap_or_else(PoisonError::into_inner);
        let free = buffers.iter().position(|slot| !slot.as_ref().is_some_and(Buffer::is_open));
        if let Some(index) = free {
            old = core::mem::replace(&mut buffers[index], rest.take());
            USED.fetch_max(index + 1, Ordering::Release);
        }
    }
    drop(old);
    if rest.is_some() {
        // SAFETY: made above and known to nobody.
        unsafe { syscall::close(fd as c_int) };
        return ENFILE;
    }
    fd
}

/// Maps a buffer: its address or a negative errno, `None` if the descriptor is no buffer's.
///
/// # Safety
/// As for mmap(2).
pub unsafe fn map(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> Option<isize> {
    let identity = syscall::identity(fd)?;
    let buffers = BUFFERS.lock().unwrap_or_else(PoisonError::into_inner);
    let buffer = buffers.iter().flatten().find(|buffer| buffer.identity == identity)?;
    let total: usize = buffer.extents.iter().map(|extent| extent.size).sum();
    if offset != 0 || length > total {
        return Some(EINVAL);
    }
    // First the addresses, then the extents over them.
    let reserve = MAP_PRIVATE_AND_ANONYMOUS | (flags & MAP_FIXED);
    // SAFETY: reserves what the caller asked for.
    let base = unsafe { syscall::mmap(address, length, 0, reserve, -1, 0) };
    if (-4095..0).contains(&base) {
        return Some(base);
    }
    let mut done = 0;
    for extent in &buffer.extents {
        let size = extent.size.min(length - done);
        if size == 0 {
            break;
        }
        let place = (base as usize + done) as *mut c_void;
        // SAFETY: inside the reservation made above.
        let result =
            unsafe { syscall::mmap(place, size, protection, MAP_SHARED_AND_FIXED, extent.fd, extent.offset) };
        if result < 0 {
            // SAFETY: the reservation is ours and known to nobody yet.
            unsafe { syscall::munmap(base, length) };
            return Some(result);
        }
        done += size;
    }
    Some(base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    fn pages(bytes: &[u8]) -> File {
        // SAFETY: a new descriptor that nobody else owns.
        let mut file = unsafe { File::from_raw_fd(syscall::memfd() as c_int) };
        for byte in bytes {
            file.write_all(&[*byte; 4096]).unwrap();
        }
        file
    }

    #[test]
    fn a_whole_memfd_is_its_own_buffer() {
        use std::io::{Read, Seek};
        let file = pages(b"ab");
        let create =
            |offset, size| Create { memfd: file.as_raw_fd().cast_unsigned(), flags: 0, offset, size };
        // SAFETY: the structure that it wants.
        let made = |asked: Create| unsafe { create_whole(&raw const asked) };
        assert_eq!((made(create(4096, 4096)), made(create(0, 4096))), (EINVAL, EINVAL));
        let fd = made(create(0, 8192));
        assert!(fd >= 0, "{fd}");
        // SAFETY: a new descriptor that nobody else owns.
        let mut buffer = unsafe { File::from_raw_fd(fd as c_int) };
        let mut seen = Vec::new();
        buffer.rewind().unwrap();
        buffer.read_to_end(&mut seen).unwrap();
        assert_eq!((seen.len(), seen[0], seen[4096]), (8192, b'a', b'b'));
    }

    #[repr(C)]
    struct List {
        head: CreateList,
        items: [CreateItem; 2],
    }

    #[test]
    fn extents_lie_side_by_side() {
        let (first, second) = (pages(b"abc"), pages(b"xyz"));
        let item = |file: &File, page: u64| CreateItem {
            memfd: file.as_raw_fd().cast_unsigned(),
            padding: 0,
            offset: page * 4096,
            size: 4096,
        };
        let list =
            List { head: CreateList { flags: 0, count: 2 }, items: [item(&second, 1), item(&first, 2)] };
        // SAFETY: a list of two items.
        let fd = unsafe { create((&raw const list).cast()) };
        assert!(fd >= 0, "{fd}");
        // SAFETY: a new descriptor that nobody else owns.
        let buffer = unsafe { OwnedFd::from_raw_fd(fd as c_int) };
        drop((first, second));

        // SAFETY: a new mapping.
        let map = |length| unsafe { map(core::ptr::null_mut(), length, 1, 1, fd as c_int, 0) };
        let base = map(8192).unwrap();
        assert!(base > 0, "{base}");
        // SAFETY: two pages were mapped for reading.
        let seen = unsafe { core::slice::from_raw_parts(base as *const u8, 8192) };
        assert!(seen[..4096].iter().all(|byte| *byte == b'y'));
        assert!(seen[4096..].iter().all(|byte| *byte == b'c'));
        // SAFETY: mapped above; `seen` is not used again.
        unsafe { syscall::munmap(base, 8192) };

        assert_eq!(map(12288), Some(EINVAL));
        drop(buffer);
        let other = pages(b"o");
        // SAFETY: a new mapping.
        let result = unsafe { super::map(core::ptr::null_mut(), 4096, 1, 1, other.as_raw_fd(), 0) };
        assert_eq!(result, None);
    }
}
