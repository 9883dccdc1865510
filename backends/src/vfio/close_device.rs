//! Closing a device whose value lives on.
//!
//! Whoever borrows the device's descriptor may go on doing so: its number leads to `/dev/null` afterwards,
//! where every ioctl is ENOTTY and every read is empty.
#![expect(unsafe_code, reason = "changing what a descriptor leads to, in place")]

use std::fs::OpenOptions;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::io::DupFlags;

use super::Device;
use crate::{Error, Exporter, Result};

const TRIED: &str = "let go of a VFIO device";

impl Device {
    pub(super) fn close_in_place(&self) -> Result<()> {
        // A mapping that cannot be replaced for good keeps the device open; everything else is closed all the same.
        let retired = self.retire_mappings();
        let failed = |error: std::io::Error| Error::os(TRIED, error).on(self.address());
        let nothing = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(failed)?;
        // SAFETY: the descriptor is open and `self.open` owns it; this second owner is forgotten before it
        // could close it.
        let mut fd = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(self.open.fd.as_raw_fd()) });
        rustix::io::dup3(&nothing, &mut fd, DupFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        retired
    }
}
