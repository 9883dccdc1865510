//! `DmaBuf`: a dma-buf file descriptor and its size.
//!
//! Closing the last descriptor of a VFIO dma-buf takes the device's memory lock
//! (`vfio_pci_dma_buf_release`), which a revoke holds until every importer has unmapped: it can
//! block without a limit. So a dropped `DmaBuf` goes to the *reaper*, whose threads do nothing but
//! close, and [`DmaBuf::close`] is there for callers that want to wait.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use crate::reaper::{Lane, Reaper};
use crate::uapi::dma_buf as uapi;
use crate::{Error, Kind, PciAddress, Result};

/// A dma-buf, or what an importer takes for one (a memfd, for Vulkan drivers that map it by CPU).
#[derive(Debug)]
pub struct DmaBuf {
    fd: OnceLock<OwnedFd>,
    size_bytes: u64,
    /// Whose memory it is, where this process exports it.
    exporter: Option<PciAddress>,
}

impl DmaBuf {
    /// Takes ownership of `fd`, whose size is found by seeking, as the kernel's dma-buf files allow.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the file has no size: it is then no dma-buf. The descriptor is
    /// closed in that case.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        const TRIED: &str = "take a file descriptor for a dma-buf";
        let size_bytes =
            rustix::fs::seek(&fd, rustix::fs::SeekFrom::End(0)).map_err(|errno| Error::os(TRIED, errno))?;
        // dma_buf_llseek accepts only the two ends, with offset zero.
        let _ = rustix::fs::seek(&fd, rustix::fs::SeekFrom::Start(0));
        if size_bytes == 0 {
            return Err(Error::new(Kind::InvalidInput, TRIED, "it has no size")
                .next("pass the descriptor of a dma-buf, udmabuf or memfd"));
        }
        Ok(Self { fd: OnceLock::from(fd), size_bytes, exporter: None })
    }

    /// Takes ownership of `fd`, a dma-buf that the kernel just made of that many bytes of `exporter`: there is
    /// nothing to find out, and no system call is spent on it.
    #[cfg(feature = "vfio")]
    pub(crate) fn of_device(fd: OwnedFd, size_bytes: u64, exporter: PciAddress) -> Self {
        Self { fd: OnceLock::from(fd), size_bytes, exporter: Some(exporter) }
    }

    /// Takes a copy of descriptor `number` of this process, as a parent process or a service
    /// manager left it. The inherited descriptor itself stays open.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where there is no such descriptor, or it has no size.
    pub fn inherited(number: i32) -> Result<Self> {
        let own =
            rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
        let copy = own.and_then(|own| {
            rustix::process::pidfd_getfd(own, number, rustix::process::PidfdGetfdFlags::empty())
        });
        let copy = copy.map_err(|errno| {
            Error::new(
                Kind::InvalidInput,
                "take an inherited dma-buf",
                format!("descriptor {number}: {errno}"),
            )
            .errno(errno)
            .next("peervram export DEVICE -- COMMAND passes one on as {fd}")
        })?;
        Self::from_fd(copy)
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The inode number that `/sys/kernel/debug/dma_buf/bufinfo` and `/proc/PID/fdinfo` show.
    ///
    /// # Errors
    /// What `fstat` says.
    pub fn inode(&self) -> Result<u64> {
        Ok(rustix::fs::fstat(self).map_err(|errno| Error::os("identify a dma-buf", errno))?.st_ino)
    }

    /// Gives it a name, of up to 31 bytes, that `/proc/PID/fdinfo` and bufinfo show.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the name is too long; else what the kernel says of a file that is no
    /// dma-buf.
    pub fn set_name(&self, name: &CStr) -> Result<()> {
        if name.to_bytes_with_nul().len() > uapi::NAME_BYTES_MAX {
            let why = format!("{name:?} is longer than {} bytes", uapi::NAME_BYTES_MAX - 1);
            return Err(Error::new(Kind::InvalidInput, "name a dma-buf", why));
        }
        uapi::set_name(self, name).map_err(|errno| Error::os("name a dma-buf", errno))
    }

    /// Another descriptor of the same buffer, close-on-exec, owned by the caller.
    ///
    /// # Errors
    /// What `fcntl` says: mostly that the process has too many files open.
    pub fn duplicate(&self) -> Result<OwnedFd> {
        rustix::io::fcntl_dupfd_cloexec(self, 3)
            .map_err(|errno| Error::os("duplicate a dma-buf's descriptor", errno))
    }

    /// Closes it on this thread. Blocks while a revoke of its device is in flight.
    pub fn close(mut self) {
        drop(self.fd.take());
    }
}

impl AsFd for DmaBuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // Empty only after `close`, which consumes the value, and inside `drop`.
        self.fd.get().expect("a live DmaBuf has its descriptor").as_fd()
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            let inode = || rustix::fs::fstat(&fd).map_or(0, |stat| stat.st_ino);
            let lane = self.exporter.map_or_else(|| Lane::of_inode(inode()), Lane::Device);
            Reaper::of_process().add(lane, fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deadline_after;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    use std::time::{Duration, Instant};

    fn memfd(size_bytes: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, size_bytes).unwrap();
        fd
    }

    #[test]
    fn the_size_is_the_files() {
        let buffer = DmaBuf::from_fd(memfd(8192)).unwrap();
        assert_eq!(buffer.size_bytes(), 8192);
        assert_ne!(buffer.inode().unwrap(), 0);
    }

    #[test]
    fn a_file_without_size_is_no_dma_buf() {
        assert_eq!(DmaBuf::from_fd(memfd(0)).unwrap_err().kind(), Kind::InvalidInput);
        let (read, _write) = rustix::pipe::pipe().unwrap();
        assert!(DmaBuf::from_fd(read).unwrap_err().raw_os_error().is_some());
    }

    #[test]
    fn the_reaper_closes_what_is_dropped() {
        let fd = memfd(4096);
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let other = std::fs::File::open(path).unwrap();
        drop(DmaBuf::from_fd(fd).unwrap());
        let deadline = deadline_after(Duration::from_secs(10));
        let inode = rustix::fs::fstat(&other).unwrap().st_ino;
        while open_descriptors(inode) > 1 {
            assert!(Instant::now() < deadline, "it stays open");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How many descriptors of this process are of the file `inode`.
    fn open_descriptors(inode: u64) -> usize {
        let entries = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.ok());
        entries.filter(|entry| std::fs::metadata(entry.path()).is_ok_and(|file| file.ino() == inode)).count()
    }
}
