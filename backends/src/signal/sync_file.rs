//! `SyncFile`: kernel fences as a file descriptor.
//!
//! A DRM driver gives one for submitted work, Vulkan one for a fence or semaphore of the handle type
//! `SYNC_FD`, and a dma-buf one for all that its importers have queued on it.
//!
//! Absent on purpose: merging two (hold both), and putting fences into a dma-buf (importers do).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::Signal;
use crate::uapi::{dma_buf, sync_file};
use crate::{DmaBuf, Error, Kind, Result};

const WAIT: &str = "wait for a sync file";

/// A `sync_file`: fires when all fences in it have.
#[derive(Debug)]
pub struct SyncFile(OwnedFd);

/// What is meant to be done with a dma-buf, and so which of its fences come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Reading: those of everyone who writes.
    Reading,
    /// Writing, or taking the memory away: those of everyone.
    Writing,
}

impl SyncFile {
    /// Takes ownership of `fd`. It is closed if it is refused.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for a descriptor of anything but a sync_file.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        const TRIED: &str = "take a file descriptor for a sync file";
        match sync_file::file_info(&fd) {
            Ok(_) => Ok(Self(fd)),
            // Each file answers an unknown ioctl in its own way; ENOTTY is the most frequent one.
            Err(errno) => Err(Error::new(
                Kind::InvalidInput,
                TRIED,
                format!("it is a descriptor of something else ({errno})"),
            )
            .errno(errno)
            .next("pass what vkGetFenceFdKHR gives for SYNC_FD, or a DRM driver as its out-fence")),
        }
    }

    /// The fences that importers have left in `buffer` so far, and that have to fire before it is
    /// read or written. Work that is queued later is not in it.
    ///
    /// Only work that takes part in implicit synchronisation leaves a fence: most Vulkan drivers do
    /// not, so that a buffer without fences is no proof of an idle importer.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for what is no dma-buf (a memfd), or before Linux 6.0.
    pub fn of_dma_buf(buffer: &DmaBuf, before: Before) -> Result<Self> {
        const TRIED: &str = "take the fences of a dma-buf";
        let flags = match before {
            Before::Reading => dma_buf::SYNC_READ,
            Before::Writing => dma_buf::SYNC_WRITE,
        };
        match dma_buf::export_sync_file(buffer, flags) {
            Ok(fd) => Ok(Self(fd)),
            Err(errno @ (Errno::NOTTY | Errno::INVAL)) => {
                let why = "it is no dma-buf, or the kernel is older than Linux 6.0";
                Err(Error::new(Kind::Unsupported, TRIED, why)
                    .errno(errno)
                    .next("hold the access until a fence of the device's own"))
            }
            Err(errno) => Err(Error::os(TRIED, errno)),
        }
    }

    /// Whether it has fired, by what the kernel says of its fences.
    fn fired(&self) -> Result<bool> {
        match sync_file::file_info(&self.0).map_err(|errno| Error::os(WAIT, errno))?.status {
            1.. => Ok(true),
            0 => Ok(false),
            status => Err(failed(status)),
        }
    }
}

/// The error of work that ended with `status`, a negative errno.
fn failed(status: i32) -> Error {
    let error = |why| {
        Error::new(Kind::Os, WAIT, why)
            .next("see dmesg of the importer's driver; the memory may still be worked on")
    };
    match status.unsigned_abs() {
        // The range of an errno, MAX_ERRNO.
        number @ 1..4096 => {
            let errno = Errno::from_raw_os_error(number as i32);
            error(format!("the work behind it failed: {errno}")).errno(errno)
        }
        _ => error(format!("the work behind it failed with status {status}")),
    }
}

impl Signal for SyncFile {
    fn wait(&self, timeout: Duration) -> Result<bool> {
        // Without a deadline if it is too far away to be told.
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], left.as_ref()) {
                Ok(0) => return Ok(false),
                // A fence that failed is readable, too: what it came to is in its status.
                Ok(_) => return self.fired(),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::os(WAIT, errno)),
            }
        }
    }
}

impl AsFd for SyncFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd() -> OwnedFd {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        fd
    }

    #[test]
    fn what_is_no_sync_file_is_refused() {
        let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
        for fd in [pipe, memfd()] {
            let error = SyncFile::from_fd(fd).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{error}");
            assert!(error.next_step().is_some() && error.raw_os_error().is_some(), "{error}");
        }
    }

    #[test]
    fn a_memfd_has_no_fences() {
        let buffer = DmaBuf::from_fd(memfd()).unwrap();
        let error = SyncFile::of_dma_buf(&buffer, Before::Writing).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    }

    #[test]
    fn any_status_below_zero_is_an_error() {
        assert_eq!(failed(-5).raw_os_error(), Some(5));
        for status in [-4095, -4096, i32::MIN] {
            assert!(failed(status).why().contains("failed"));
        }
    }
}
