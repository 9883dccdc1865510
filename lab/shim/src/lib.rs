//! A library that QEMU is started with: it answers for `/dev/udmabuf` where there is none.
//!
//! virtio-gpu's blob resources need one thing of udmabuf: a descriptor whose `mmap` shows a list
//! of extents of memfds, here the guest's memory, as one run of addresses. `ioctl` answers
//! `UDMABUF_CREATE_LIST` with a descriptor that stands for such a list, and `mmap` of that
//! descriptor maps the extents side by side. Everything else goes straight to the kernel, without
//! allocating or locking: the allocator itself may be what calls.
//!
//! Where the GPU has 3D, the server of virglrenderer inherits this library, and in it Mesa's driver for
//! CPUs makes its memory a dma-buf for QEMU to map. That is a memfd of its own, and `UDMABUF_CREATE` is
//! answered with another descriptor of it, for only what the kernel knows goes from process to process.
//!
//! The descriptor is an empty memfd rather than an eventfd because memfds have inode numbers of
//! their own: one that was closed, its number reused, is never taken for what it was.

mod buffer;
mod syscall;

use core::ffi::{c_int, c_ulong, c_void};

use buffer::{Create, CreateList};

/// `_IOW('u', 0x42, struct udmabuf_create)`, include/uapi/linux/udmabuf.h.
const UDMABUF_CREATE: c_ulong = 0x4018_7542;

/// `_IOW('u', 0x43, struct udmabuf_create_list)`, include/uapi/linux/udmabuf.h.
const UDMABUF_CREATE_LIST: c_ulong = 0x4008_7543;

const MAP_ANONYMOUS: c_int = 0x20;

/// The C library's `ioctl`. It is variadic there; on x86-64 the one argument that every request
/// has at most comes in the same register.
///
/// # Safety
/// As for ioctl(2): `argument` is what `request` wants.
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "stands in for a C function")]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // Callers may pass requests as sign-extended ints.
    let result = match request & 0xffff_ffff {
        // SAFETY: the request says what the argument points to.
        UDMABUF_CREATE => unsafe { buffer::create_whole(argument.cast::<Create>()) },
        // SAFETY: as above.
        UDMABUF_CREATE_LIST => unsafe { buffer::create(argument.cast::<CreateList>()) },
        // SAFETY: passed on as it came.
        _ => unsafe { syscall::ioctl(fd, request, argument) },
    };
    // An ioctl's result fits an int; errors were told apart already.
    syscall::or_errno(result) as c_int
}

/// The C library's `mmap`.
///
/// # Safety
/// As for mmap(2).
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "stands in for a C function")]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    if fd >= 0 && flags & MAP_ANONYMOUS == 0 && buffer::any() {
        // SAFETY: the caller's promises about the mapping are handed on.
        if let Some(result) = unsafe { buffer::map(address, length, protection, flags, fd, offset) } {
            return syscall::or_errno(result) as *mut c_void;
        }
    }
    // SAFETY: passed on as it came.
    let result = unsafe { syscall::mmap(address, length, protection, flags, fd, offset) };
    syscall::or_errno(result) as *mut c_void
}

/// The C library's `mmap64`, the same on a 64-bit machine.
///
/// # Safety
/// As for mmap(2).
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "stands in for a C function")]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the same function.
    unsafe { mmap(address, length, protection, flags, fd, offset) }
}
