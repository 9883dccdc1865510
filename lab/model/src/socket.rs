//! Whole messages over a stream socket, with the file descriptors that travel beside them.
//!
//! Absent: any knowledge of commands.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::protocol::FDS_MAX;

/// File descriptors that came with a message.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// Those that arrived, closed on exec.
    pub fds: Vec<OwnedFd>,
    /// Some were lost: more than [`FDS_MAX`], or this process may have no more.
    pub truncated: bool,
}

/// Fills `buffer` and collects descriptors. `Ok(false)`: the stream ended before the first byte.
///
/// # Errors
/// `ECONNRESET` if the stream ends in the middle, or what the kernel says.
pub fn receive(socket: BorrowedFd<'_>, mut buffer: &mut [u8], into: &mut Descriptors) -> Result<bool, Errno> {
    let mut is_first = true;
    while !buffer.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(buffer)];
        let message = match rustix::net::recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => message,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
        };
        into.truncated |= message.flags.contains(ReturnFlags::CTRUNC);
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = ancillary {
                into.fds.extend(fds);
            }
        }
        if into.fds.len() > FDS_MAX {
            into.fds.truncate(FDS_MAX);
            into.truncated = true;
        }
        match message.bytes {
            0 if is_first => return Ok(false),
            0 => return Err(Errno::CONNRESET),
            bytes => buffer = &mut buffer[bytes..],
        }
        is_first = false;
    }
    Ok(true)
}

/// Sends all of `message`; the descriptor goes with its first byte.
///
/// # Errors
/// What the kernel says.
pub fn send(socket: BorrowedFd<'_>, mut message: &[u8], mut fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    while !message.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        match rustix::net::sendmsg(socket, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL) {
            Ok(bytes) => {
                message = &message[bytes..];
                fd = None;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
