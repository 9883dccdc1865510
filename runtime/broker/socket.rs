//! Sending and receiving on a Unix stream socket, with descriptors beside the bytes.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Result;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Sends what there is room for, `descriptor` with the first byte. Says how much that was. A socket whose other end is
/// closed is EPIPE, without a signal.
pub(crate) fn send(socket: impl AsFd, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

/// What was received.
#[derive(Debug)]
pub(crate) struct Received {
    /// How many bytes; none where the other end is closed.
    pub bytes: usize,
    /// What came with the last of them.
    pub descriptor: Option<OwnedFd>,
    /// More descriptors came than were wanted. The kernel has closed them.
    pub has_more_descriptors: bool,
}

/// Receives what there is, with one descriptor where `wants_descriptor`, else with none: what comes all the same never
/// gets to this process.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8], wants_descriptor: bool) -> Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let space: &mut [MaybeUninit<u8>] = if wants_descriptor { &mut space } else { &mut [] };
    let mut ancillary = RecvAncillaryBuffer::new(space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let mut descriptors = descriptors.by_ref().flatten();
    let descriptor = descriptors.next();
    // The space of one may hold two, as it is aligned.
    let has_more_descriptors = descriptors.next().is_some() || message.flags.contains(ReturnFlags::CTRUNC);
    Ok(Received { bytes: message.bytes, descriptor, has_more_descriptors })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_descriptor_comes_with_its_bytes() {
        let (near, far) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/proc/self/comm").unwrap();
        assert_eq!(send(&near, b"one", None).unwrap(), 3);
        assert_eq!(send(&near, b"two", Some(file.as_fd())).unwrap(), 3);
        assert_eq!(send(&near, b"three", None).unwrap(), 5);
        let mut buffer = [0; 64];
        let mut seen = Vec::new();
        while seen.len() < 11 {
            let received = receive(&far, &mut buffer, true).unwrap();
            seen.extend_from_slice(&buffer[..received.bytes]);
            assert!(!received.has_more_descriptors);
            if let Some(descriptor) = received.descriptor {
                // Nothing after it is in the same piece.
                assert_eq!(seen.len(), 6);
                let same = |fd: &dyn std::os::fd::AsFd| rustix::fs::fstat(fd.as_fd()).unwrap().st_ino;
                assert_eq!(same(&descriptor), same(&file));
                let flags = rustix::io::fcntl_getfd(&descriptor).unwrap();
                assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            }
        }
        assert_eq!(seen, b"onetwothree");
        drop(near);
        assert_eq!(receive(&far, &mut buffer, true).unwrap().bytes, 0);
        assert_eq!(send(&far, b"x", None).unwrap_err(), rustix::io::Errno::PIPE);
    }

    #[test]
    fn a_descriptor_that_is_not_wanted_gets_nowhere() {
        let (near, far) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/proc/self/comm").unwrap();
        let inode = rustix::fs::fstat(&file).unwrap().st_ino;
        let open = || {
            let paths = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            paths
                .filter(|entry| {
                    std::fs::metadata(entry.path())
                        .is_ok_and(|file| std::os::unix::fs::MetadataExt::ino(&file) == inode)
                })
                .count()
        };
        let before = open();
        send(&near, b"x", Some(file.as_fd())).unwrap();
        let received = receive(&far, &mut [0; 8], false).unwrap();
        assert!(received.has_more_descriptors && received.descriptor.is_none());
        assert_eq!(open(), before);
    }
}
