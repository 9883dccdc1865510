//! The few system calls of the shim, made without the C library, which would call the shim again.
#![expect(unsafe_code, reason = "system calls")]

use core::arch::asm;
use core::ffi::{c_char, c_int, c_uint, c_ulong, c_void};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("the lab's shim knows the system calls of x86-64 Linux only");

const CLOSE: isize = 3;
const FSTAT: isize = 5;
const MMAP: isize = 9;
const MUNMAP: isize = 11;
const MREMAP: isize = 25;
const IOCTL: isize = 16;
const FCNTL: isize = 72;
const MEMFD_CREATE: isize = 319;

const F_DUPFD_CLOEXEC: isize = 1030;
const MFD_CLOEXEC: c_uint = 1;
const MREMAP_MAYMOVE_AND_FIXED: isize = 1 | 2;

unsafe extern "C" {
    fn __errno_location() -> *mut c_int;
}

/// What a C function returns for a system call's result: -1 and `errno` for an error.
pub fn or_errno(result: isize) -> isize {
    if !is_error(result) {
        return result;
    }
    // SAFETY: the C library gives each thread a valid place for its errno.
    unsafe { *__errno_location() = -result as c_int };
    -1
}

/// # Safety
/// As for the system call of that number.
unsafe fn call(number: isize, arguments: [isize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the kernel's calling convention: these registers in, rax out, rcx and r11 lost.
    // What the call does to memory is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// # Safety
/// As for ioctl(2).
pub unsafe fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> isize {
    // SAFETY: the caller's promise.
    unsafe { call(IOCTL, [fd as isize, request as isize, argument as isize, 0, 0, 0]) }
}

/// # Safety
/// As for mmap(2).
pub unsafe fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> isize {
    let (protection, flags, fd) = (protection as isize, flags as isize, fd as isize);
    // SAFETY: the caller's promise.
    unsafe { call(MMAP, [address as isize, length as isize, protection, flags, fd, offset as isize]) }
}

/// # Safety
/// Nothing uses the mapping any more.
pub unsafe fn munmap(address: isize, length: usize) -> isize {
    // SAFETY: the caller's promise.
    unsafe { call(MUNMAP, [address, length as isize, 0, 0, 0, 0]) }
}

/// Moves a whole mapping to `to`, in the place of what is there.
///
/// # Safety
/// As for mremap(2).
pub unsafe fn move_mapping(from: isize, length: usize, to: *mut c_void) -> isize {
    let length = length as isize;
    // SAFETY: the caller's promise.
    unsafe { call(MREMAP, [from, length, length, MREMAP_MAYMOVE_AND_FIXED, to as isize, 0]) }
}

/// Whether a result is an errno.
pub fn is_error(result: isize) -> bool {
    (-4095..0).contains(&result)
}

/// A second descriptor of the same file.
pub fn duplicate(fd: c_int) -> isize {
    // SAFETY: touches no memory.
    unsafe { call(FCNTL, [fd as isize, F_DUPFD_CLOEXEC, 0, 0, 0, 0]) }
}

/// # Safety
/// Nobody else owns the descriptor.
pub unsafe fn close(fd: c_int) {
    // SAFETY: the caller's promise.
    unsafe { call(CLOSE, [fd as isize, 0, 0, 0, 0, 0]) };
}

/// An empty memfd.
pub fn memfd() -> isize {
    let name: *const c_char = c"udmabuf".as_ptr();
    // SAFETY: reads a string that lives for ever.
    unsafe { call(MEMFD_CREATE, [name as isize, MFD_CLOEXEC as isize, 0, 0, 0, 0]) }
}

/// Device and inode of an open file: what it is, whatever its number.
pub fn identity(fd: c_int) -> Option<(u64, u64)> {
    // struct stat begins with st_dev and st_ino.
    stat(fd).map(|stat| (stat[0], stat[1]))
}

/// The length of an open file.
pub fn length(fd: c_int) -> Option<u64> {
    // st_size is at byte 48.
    stat(fd).map(|stat| stat[6])
}

/// struct stat, which has 144 bytes.
fn stat(fd: c_int) -> Option<[u64; 18]> {
    let mut stat = [0; 18];
    // SAFETY: the kernel writes 144 bytes.
    let result = unsafe { call(FSTAT, [fd as isize, stat.as_mut_ptr() as isize, 0, 0, 0, 0]) };
    (result == 0).then_some(stat)
}
