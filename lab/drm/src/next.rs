//! The functions of the C library as the next in line has them: drm-shim, and the C library behind that.
#![expect(unsafe_code, reason = "functions of C, found by name")]

use core::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::OnceLock;

use rustix::io::Errno;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("the lab's DRM stand-in knows the calling convention of x86-64 Linux only");

type Ioctl = unsafe extern "C" fn(c_int, c_ulong, ...) -> c_int;
type Fopen = unsafe extern "C" fn(*const c_char, *const c_char) -> *mut c_void;

unsafe extern "C" {
    fn __errno_location() -> *mut c_int;
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn fdopen(fd: c_int, mode: *const c_char) -> *mut c_void;
}

/// `RTLD_NEXT` of dlfcn.h.
const RTLD_NEXT: *mut c_void = -1_isize as *mut c_void;

fn find(name: &CStr) -> *mut c_void {
    // SAFETY: a name that ends with a zero.
    let found = unsafe { dlsym(RTLD_NEXT, name.as_ptr()) };
    assert!(!found.is_null(), "the C library has no {name:?}");
    found
}

/// # Safety
/// As for ioctl(2).
pub unsafe fn ioctl(file: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    static NEXT: OnceLock<Ioctl> = OnceLock::new();
    // SAFETY: the C library's ABI fixes the type of this symbol.
    let next = NEXT.get_or_init(|| unsafe { core::mem::transmute::<*mut c_void, Ioctl>(find(c"ioctl")) });
    // SAFETY: the caller's promise.
    unsafe { next(file, request, argument) }
}

/// # Safety
/// As for fopen(3).
pub unsafe fn fopen(path: *const c_char, mode: *const c_char) -> *mut c_void {
    static NEXT: OnceLock<Fopen> = OnceLock::new();
    // SAFETY: the C library's ABI fixes the type of this symbol.
    let next = NEXT.get_or_init(|| unsafe { core::mem::transmute::<*mut c_void, Fopen>(find(c"fopen")) });
    // SAFETY: the caller's promise.
    unsafe { next(path, mode) }
}

/// A `FILE *` to read from, which owns the descriptor.
pub fn to_read(fd: OwnedFd) -> *mut c_void {
    // SAFETY: the descriptor is open and handed over.
    unsafe { fdopen(fd.into_raw_fd(), c"r".as_ptr()) }
}

/// What a C function returns for a result: -1 and `errno` for an error.
pub fn or_errno(result: Result<(), Errno>) -> c_int {
    let Err(errno) = result else { return 0 };
    // SAFETY: the C library gives each thread a valid place for its errno.
    unsafe { *__errno_location() = errno.raw_os_error() };
    -1
}
