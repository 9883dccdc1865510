//! `include/uapi/linux/dma-buf.h`.
#![expect(unsafe_code, reason = "ioctl")]

use std::ffi::{CStr, c_void};
use std::os::fd::AsFd;

use rustix::io::Result;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// The ioctl numbers used here, by their kernel names.
#[cfg(all(test, feature = "host"))]
pub const OPCODES: [(&str, Opcode); 1] = [("DMA_BUF_SET_NAME_B", SET_NAME)];

/// `DMA_BUF_SET_NAME_B`: the number says eight bytes, on every architecture, and means a pointer.
const SET_NAME: Opcode = opcode::write::<u64>(b'b', 1);

/// The longest name, its terminator included (`DMA_BUF_NAME_LEN`).
pub const NAME_BYTES_MAX: usize = 32;

/// Gives a dma-buf a name, which `/proc/PID/fdinfo` and debugfs show. A longer one than
/// [`NAME_BYTES_MAX`] is EINVAL.
pub fn set_name(dma_buf: impl AsFd, name: &CStr) -> Result<()> {
    // SAFETY: the kernel reads a string up to its terminator.
    unsafe { ioctl(dma_buf, SetName(name)) }
}

struct SetName<'name>(&'name CStr);

// SAFETY: DMA_BUF_SET_NAME_B reads a string and writes nothing (dma_buf_set_name).
unsafe impl Ioctl for SetName<'_> {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        SET_NAME
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_ptr().cast_mut().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> Result<()> {
        Ok(())
    }
}
