//! A library that a program in a guest is started with, in front of one of Mesa's drm-shims: together they are the kernel
//! driver of a GPU that is not there, and a real Vulkan driver works on them.
//!
//! ```text
//! RADV, ...    the driver, as users have it
//! this         imports of dma-bufs, what is mapped when, errnos on request
//! drm-shim     Debian's `mesa-drm-shim`: the node, its files in sysfs, memory, and nothing else
//! the kernel   a real DRM node: it says whether a dma-buf can be attached and mapped
//! ```
//!
//! The shims have no PRIME. `PRIME_FD_TO_HANDLE` is answered here, as the kernel driver that is meant would (`imports.rs`): a
//! real node is asked, the memory behind the handle is the shim's. **No byte moves**: a submission does nothing but say which
//! imports it lists, and have the kernel look at each, as the real driver does when it maps what a submission lists.
//!
//! The variables that say what is meant, set by the lab (`lab/src/vm/driver.rs`):
//! - `PEERVRAM_DRM_AS`: the kernel driver, `amdgpu`, `xe` or `nouveau`. Nothing is done without it.
//! - `PEERVRAM_DRM_NODE`: the real node. drm-shim hides it from the C library, so it is opened by the system call.
//! - `PEERVRAM_DRM_ADDRESS`: where the GPU is said to be, which is where the real node's device is.
//! - `PEERVRAM_DRM_TALK`: a folder. In `errnos` a test writes what is to fail, and how, in `address` where the GPU is instead
//!   (`talk.rs`); in `submissions` it reads how many imports each submission has listed.

mod amdgpu;
mod files;
mod imports;
mod kernel;
mod next;
mod nouveau;
mod talk;
mod xe;

use core::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::sync::OnceLock;

use rustix::io::Errno;

/// What is particular to a kernel driver.
#[expect(unsafe_code, reason = "a method that reads what a driver passes")]
trait Driver: Sync {
    /// Memory of the shim's, which stands for imported memory: a handle of the file.
    fn stand_in(&self, file: c_int, size_bytes: u64) -> Result<u32, Errno>;

    /// What the GPU is on the bus; none where the shim is right.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// Answers a request; none where the shim is to.
    ///
    /// # Safety
    /// `argument` is what the request wants.
    unsafe fn answer(&self, file: c_int, number: u8, argument: *mut c_void) -> Option<Result<(), Errno>>;
}

/// What a GPU calls itself on the bus.
#[derive(Clone, Copy)]
struct Identity {
    vendor: u16,
    device: u16,
}

/// The one that is meant.
fn driver() -> Option<&'static dyn Driver> {
    static MEANT: OnceLock<Option<&dyn Driver>> = OnceLock::new();
    *MEANT.get_or_init(|| match std::env::var("PEERVRAM_DRM_AS").ok()?.as_str() {
        "amdgpu" => Some(&amdgpu::Amdgpu),
        "xe" => Some(&xe::Xe),
        "nouveau" => Some(&nouveau::Nouveau),
        _ => None,
    })
}

/// Requests of DRM's own, include/uapi/drm/drm.h.
const GEM_CLOSE: u8 = 0x09;
const PRIME_FD_TO_HANDLE: u8 = 0x2e;

/// The C library's `ioctl`. It is variadic there; on x86-64 the one argument that every request has at most comes in the
/// same register.
///
/// # Safety
/// As for ioctl(2): `argument` is what `request` wants.
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "stands in for a C function")]
pub unsafe extern "C" fn ioctl(file: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // The type of DRM's requests, in the second byte; what is asked for is in the first.
    let answered = match driver() {
        Some(driver) if (request >> 8) as u8 == b'd' && kernel::is_shims(file) => {
            // SAFETY: the caller's promise.
            unsafe { answer(driver, file, request as u8, argument) }
        }
        _ => None,
    };
    match answered {
        Some(result) => next::or_errno(result),
        // SAFETY: passed on as it came.
        None => unsafe { next::ioctl(file, request, argument) },
    }
}

/// # Safety
/// `argument` is what the request wants.
#[expect(unsafe_code, reason = "reads what a driver passes")]
unsafe fn answer(
    driver: &dyn Driver,
    file: c_int,
    number: u8,
    argument: *mut c_void,
) -> Option<Result<(), Errno>> {
    match number {
        PRIME_FD_TO_HANDLE => {
            // SAFETY: the request wants this structure.
            let asked = unsafe { &mut *argument.cast::<kernel::PrimeHandle>() };
            let imported = imports::import(driver, file, asked.fd);
            Some(imported.map(|handle| asked.handle = handle))
        }
        GEM_CLOSE => {
            // SAFETY: the request wants a structure that begins with the handle.
            imports::close(file, unsafe { *argument.cast::<u32>() });
            None
        }
        // SAFETY: the caller's promise.
        _ => unsafe { driver.answer(file, number, argument) },
    }
}

/// The C library's `fopen`.
///
/// # Safety
/// As for fopen(3).
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "stands in for a C function")]
pub unsafe extern "C" fn fopen(path: *const c_char, mode: *const c_char) -> *mut c_void {
    // SAFETY: the caller gives a path that ends with a zero.
    match files::open(unsafe { CStr::from_ptr(path) }) {
        Some(file) => file,
        // SAFETY: passed on as it came.
        None => unsafe { next::fopen(path, mode) },
    }
}

/// The C library's `fopen64`, the same on a 64-bit machine.
///
/// # Safety
/// As for fopen(3).
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "stands in for a C function")]
pub unsafe extern "C" fn fopen64(path: *const c_char, mode: *const c_char) -> *mut c_void {
    // SAFETY: the same function.
    unsafe { fopen(path, mode) }
}
