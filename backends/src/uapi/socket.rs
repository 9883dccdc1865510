//! `include/uapi/asm-generic/socket.h`: what a Unix socket knows of its other end.
#![expect(unsafe_code, reason = "getsockopt")]

use std::ffi::{c_int, c_void};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, Result};

/// `SO_PEERCRED`: a `struct ucred` of when the other end connected.
const PEERCRED: c_int = 17;
/// `SO_PEERGROUPS` (Linux 4.13): supplementary groups, of when the other end connected.
const PEERGROUPS: c_int = 59;
/// `SO_PEERPIDFD` (Linux 6.5).
const PEERPIDFD: c_int = 77;

/// The most groups that a process can have (`NGROUPS_MAX` in `include/uapi/linux/limits.h`).
const GROUPS_MAX: usize = 65536;

/// `struct ucred`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Credentials {
    /// Zero where the other process is in no PID namespace that this one sees.
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

/// Process, user and group of the other end.
pub fn peer_credentials(socket: impl AsFd) -> Result<Credentials> {
    let mut credentials = Credentials::default();
    get(socket.as_fd(), PEERCRED, bytemuck::bytes_of_mut(&mut credentials))?;
    Ok(credentials)
}

/// Supplementary groups of the other end.
pub fn peer_groups(socket: impl AsFd) -> Result<Vec<u32>> {
    let mut groups = vec![0_u32; 32];
    loop {
        match get(socket.as_fd(), PEERGROUPS, bytemuck::cast_slice_mut(&mut groups)) {
            Ok(bytes) => {
                groups.truncate(bytes / size_of::<u32>());
                return Ok(groups);
            }
            Err(Errno::RANGE) if groups.len() < GROUPS_MAX => groups.resize(groups.len() * 8, 0),
            Err(errno) => return Err(errno),
        }
    }
}

/// A pidfd of the process that connected. ENOPROTOOPT before Linux 6.5; EINVAL, ENODATA or ESRCH where the process has
/// ended already.
pub fn peer_pidfd(socket: impl AsFd) -> Result<OwnedFd> {
    let mut number: c_int = -1;
    get(socket.as_fd(), PEERPIDFD, bytemuck::bytes_of_mut(&mut number))?;
    // SAFETY: the kernel has just made this descriptor for the caller (sk_getsockopt, pidfd_prepare).
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Reads an option of the socket layer into `value`; returns how many bytes of it the kernel wrote.
fn get(socket: BorrowedFd<'_>, option: c_int, value: &mut [u8]) -> Result<usize> {
    let mut length = libc::socklen_t::try_from(value.len()).map_err(|_| Errno::INVAL)?;
    // SAFETY: the kernel writes at most `length` bytes to `value`, which has that many, and the new length to `length`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            value.as_mut_ptr().cast::<c_void>(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(length as usize)
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    /// The constants are those of the C library, where it has them.
    #[test]
    fn the_numbers_are_the_kernels() {
        assert_eq!((PEERCRED, PEERGROUPS), (libc::SO_PEERCRED, libc::SO_PEERGROUPS));
        let (near, _far) = UnixStream::pair().unwrap();
        let credentials = peer_credentials(&near).unwrap();
        let own = (rustix::process::getpid().as_raw_nonzero().get(), rustix::process::getuid().as_raw());
        assert_eq!((credentials.pid, credentials.uid), own);
        assert_eq!(credentials.gid, rustix::process::getgid().as_raw());
        assert!(peer_credentials(std::fs::File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn groups_are_those_of_this_process() {
        let (near, _far) = UnixStream::pair().unwrap();
        let own: Vec<u32> =
            rustix::process::getgroups().unwrap().iter().map(|group| group.as_raw()).collect();
        assert_eq!(peer_groups(&near).unwrap(), own);
    }
}
