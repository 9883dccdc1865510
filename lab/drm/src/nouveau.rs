//! nouveau, which attaches statically: the real node is one whose driver does so, too, and VFIO refuses both.

use core::ffi::{c_int, c_void};

use rustix::io::Errno;

use crate::Driver;

pub struct Nouveau;

#[expect(unsafe_code, reason = "a function of the trait")]
impl Driver for Nouveau {
    /// Memory that nouveau could import is not what this stand-in is for.
    fn stand_in(&self, _: c_int, _: u64) -> Result<u32, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    unsafe fn answer(&self, _: c_int, _: u8, _: *mut c_void) -> Option<Result<(), Errno>> {
        None
    }
}
