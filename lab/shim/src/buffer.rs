//! The buffers that stand for udmabufs: which descriptor shows which extents.
#![expect(unsafe_code, reason = "reads what QEMU passes and maps memory")]

use core::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::syscall;

const MAP_SHARED: c_int = 0x01;
const MAP_FIXED: c_int = 0x10;
const MAP_PRIVATE_AND_ANONYMOUS: c_int = 0x02 | 0x20;
const MAP_FIXED_NOREPLACE: c_int = 0x10_0000;

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
    if syscall::is_error(base) {
        return Some(base);
    }
    let mut done = 0;
    for extent in &buffer.extents {
        let size = extent.size.min(length - done);
        if size == 0 {
            break;
        }
        let at = (base as usize + done) as *mut c_void;
        // SAFETY: inside the reservation made above.
        if let Err(refused) = unsafe { place(extent, at, size, protection) } {
            // Addresses that the caller chose are the caller's still, and stay reserved.
            if refused.is_held && flags & MAP_FIXED == 0 {
                // SAFETY: the reservation is ours, with all that lies in it, and known to nobody yet.
                unsafe { syscall::munmap(base, length) };
            }
            return Some(refused.errno);
        }
        done += size;
    }
    Some(base)
}

/// Why an extent was not placed.
#[derive(Debug)]
struct Refused {
    /// Negative.
    errno: isize,
    /// Whether its place is still reserved. If not, another thread's memory may lie there.
    is_held: bool,
}

/// Maps the beginning of an extent at `at`. The kernel takes away what is at a fixed address before it asks the file
/// (`__mmap_region` in `mm/vma.c`), and another thread's memory could come to lie in the hole that a refusal leaves: so
/// the file is asked elsewhere, and its mapping moved.
///
/// # Safety
/// `size` bytes from `at` on are reserved, and nobody uses them yet.
unsafe fn place(extent: &Extent, at: *mut c_void, size: usize, protection: c_int) -> Result<(), Refused> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let elsewhere = unsafe {
        syscall::mmap(core::ptr::null_mut(), size, protection, MAP_SHARED, extent.fd, extent.offset)
    };
    if syscall::is_error(elsewhere) {
        return Err(Refused { errno: elsewhere, is_held: true });
    }
    // SAFETY: a whole mapping that nobody else knows of; the caller's promise for where it goes.
    let errno = unsafe { syscall::move_mapping(elsewhere, size, at) };
    if !syscall::is_error(errno) {
        return Ok(());
    }
    // SAFETY: made above.
    unsafe { syscall::munmap(elsewhere, size) };
    // What a failed move has unmapped already is reserved again, if nobody was faster.
    let flags = MAP_PRIVATE_AND_ANONYMOUS | MAP_FIXED_NOREPLACE;
    // SAFETY: nothing is replaced.
    let held = unsafe { syscall::mmap(at, size, 0, flags, -1, 0) };
    Err(Refused { errno, is_held: !syscall::is_error(held) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    /// What is in page `page` of a file: each word has its own place and the file's `name` in it.
    fn page(name: u8, page: u64) -> Vec<u8> {
        (0..512).flat_map(|word| (((page * 512 + word) << 8) | u64::from(name)).to_le_bytes()).collect()
    }

    fn pages(name: u8, count: u64) -> File {
        // SAFETY: a new descriptor that nobody else owns.
        let mut file = unsafe { File::from_raw_fd(syscall::memfd() as c_int) };
        (0..count).for_each(|number| file.write_all(&page(name, number)).unwrap());
        file
    }

    /// Whether something lies at a page.
    fn is_mapped(at: *mut c_void) -> bool {
        let flags = MAP_PRIVATE_AND_ANONYMOUS | MAP_FIXED_NOREPLACE;
        // SAFETY: nothing is replaced.
        let taken = unsafe { syscall::mmap(at, 4096, 0, flags, -1, 0) };
        if !syscall::is_error(taken) {
            // SAFETY: mapped just now.
            unsafe { syscall::munmap(taken, 4096) };
        }
        taken == EEXIST
    }

    const EEXIST: isize = -17;
    const ENODEV: isize = -19;

    fn reserve(length: usize) -> *mut c_void {
        // SAFETY: a new mapping.
        let base =
            unsafe { syscall::mmap(core::ptr::null_mut(), length, 0, MAP_PRIVATE_AND_ANONYMOUS, -1, 0) };
        assert!(!syscall::is_error(base));
        base as *mut c_void
    }

    /// A socket's driver refuses to be mapped, after the kernel has emptied a fixed address.
    #[test]
    fn an_extent_that_cannot_be_mapped_leaves_no_hole() {
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let extent = Extent { fd: syscall::duplicate(socket.as_raw_fd()) as c_int, offset: 0, size: 4096 };
        let at = reserve(4096);
        // SAFETY: reserved above.
        let refused = unsafe { place(&extent, at, 4096, 1) }.unwrap_err();
        assert_eq!(refused.errno, ENODEV);
        assert!(refused.is_held && is_mapped(at));
        // SAFETY: reserved above.
        unsafe { syscall::munmap(at as isize, 4096) };

        // A buffer of a page and that: the caller's addresses stay reserved.
        let first = pages(b'f', 1);
        let item = |fd: c_int| CreateItem { memfd: fd.cast_unsigned(), padding: 0, offset: 0, size: 4096 };
        let items = [item(first.as_raw_fd()), item(socket.as_raw_fd())];
        let list = List { head: CreateList { flags: 0, count: 2 }, items };
        // SAFETY: a list of two items.
        let fd = unsafe { create((&raw const list).cast()) };
        // SAFETY: a new descriptor that nobody else owns.
        let _buffer = unsafe { OwnedFd::from_raw_fd(fd as c_int) };
        let base = reserve(8192);
        // SAFETY: in the place of what was reserved.
        assert_eq!(unsafe { map(base, 8192, 1, MAP_FIXED | 1, fd as c_int, 0) }, Some(ENODEV));
        assert!(is_mapped(base) && is_mapped(base.wrapping_byte_add(4096)));
        // SAFETY: nobody uses it.
        unsafe { syscall::munmap(base as isize, 8192) };
        // SAFETY: a new mapping.
        assert_eq!(unsafe { map(core::ptr::null_mut(), 8192, 1, 1, fd as c_int, 0) }, Some(ENODEV));
    }

    #[test]
    fn a_whole_memfd_is_its_own_buffer() {
        use std::io::{Read, Seek};
        let file = pages(b'a', 2);
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
        assert!(seen == [page(b'a', 0), page(b'a', 1)].concat());
    }

    #[repr(C)]
    struct List {
        head: CreateList,
        items: [CreateItem; 2],
    }

    #[test]
    fn extents_lie_side_by_side() {
        let (first, second) = (pages(b'f', 3), pages(b's', 3));
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
        assert!(seen == [page(b's', 1), page(b'f', 2)].concat());
        // SAFETY: mapped above; `seen` is not used again.
        unsafe { syscall::munmap(base, 8192) };

        assert_eq!(map(12288), Some(EINVAL));
        drop(buffer);
        let other = pages(b'o', 1);
        // SAFETY: a new mapping.
        let result = unsafe { super::map(core::ptr::null_mut(), 4096, 1, 1, other.as_raw_fd(), 0) };
        assert_eq!(result, None);
    }
}
