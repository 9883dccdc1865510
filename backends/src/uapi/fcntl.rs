//! `include/uapi/linux/fcntl.h`: what rustix does not have.
#![expect(unsafe_code, reason = "fcntl")]

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::{Errno, Result};

/// `F_DUPFD_QUERY`, from Linux 6.10 on.
const F_DUPFD_QUERY: libc::c_int = 1024 + 3;

/// Whether two descriptors are of one open file, as duplicates are. EINVAL where the kernel cannot tell.
pub fn is_same_open_file(a: impl AsFd, b: impl AsFd) -> Result<bool> {
    // SAFETY: it takes two descriptors and changes nothing; both are open as long as they are borrowed here.
    let answer = unsafe { libc::fcntl(a.as_fd().as_raw_fd(), F_DUPFD_QUERY, b.as_fd().as_raw_fd()) };
    match answer {
        0 => Ok(false),
        1.. => Ok(true),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
    }
}

/// What the above says of the kernel's header, for the test that compiles it.
#[cfg(all(test, feature = "vfio", feature = "host"))]
pub fn claims() -> [(&'static str, usize); 1] {
    [("F_DUPFD_QUERY", F_DUPFD_QUERY as usize)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn duplicates_are_one_open_file_and_two_opens_are_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let again = File::open(file.path()).unwrap();
        let duplicate = again.try_clone().unwrap();
        match is_same_open_file(&again, &duplicate) {
            // Linux before 6.10.
            Err(Errno::INVAL) => return,
            answer => assert!(answer.unwrap()),
        }
        assert!(is_same_open_file(&again, &again).unwrap());
        assert!(!is_same_open_file(file.as_file(), &again).unwrap());
    }
}
