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

use crate::protocol::{FDS_MAX, HEADER_BYTES, Header};

/// File descriptors that came with a message.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// The descriptors that arrived, closed on exec.
    pub fds: Vec<OwnedFd>,
    /// Some were lost: more than [`FDS_MAX`], or this process may have no more.
    pub truncated: bool,
}

/// Bytes that one read asks for at the beginning of a message: all of most messages.
const HEAD_BYTES: usize = 2 * HEADER_BYTES;

/// Takes messages off a stream, most of them with one read.
///
/// Order of calls: [`Reader::header`], then [`Reader::payload`] or [`Reader::skip`], and again. A
/// read at the beginning of a message shorter than 32 bytes may reach into the next one, which is
/// kept. The kernel ends a read behind the piece that had descriptors, so those of such a read belong
/// to the message begun last.
#[derive(Debug)]
pub struct Reader<'a> {
    socket: BorrowedFd<'a>,
    head: [u8; HEAD_BYTES],
    present: usize,
    descriptors: Descriptors,
}

impl<'a> Reader<'a> {
    /// From the beginning of a message on.
    pub fn new(socket: BorrowedFd<'a>) -> Self {
        Reader { socket, head: [0; HEAD_BYTES], present: 0, descriptors: Descriptors::default() }
    }

    /// The header of the next message; `None` if the stream ended before it.
    ///
    /// # Errors
    /// `ECONNRESET` if the stream ends in the middle, or what the kernel says.
    pub fn header(&mut self) -> Result<Option<Header>, Errno> {
        while self.present < HEADER_BYTES {
            match receive_some(self.socket, &mut self.head[self.present..], &mut self.descriptors)? {
                0 if self.present == 0 => return Ok(None),
                0 => return Err(Errno::CONNRESET),
                bytes => self.present += bytes,
            }
        }
        Ok(self.head.first_chunk().map(Header::read))
    }

    /// Fills `payload`, which is all of the message after its header.
    ///
    /// # Errors
    /// `ECONNRESET` if the stream ends first, or what the kernel says.
    pub fn payload(&mut self, payload: &mut [u8]) -> Result<Descriptors, Errno> {
        let here = payload.len().min(self.present - HEADER_BYTES);
        let (first, rest) = payload.split_at_mut(here);
        first.copy_from_slice(&self.head[HEADER_BYTES..HEADER_BYTES + here]);
        let end = HEADER_BYTES + here;
        if end < self.present {
            self.head.copy_within(end..self.present, 0);
            self.present -= end;
            return Ok(Descriptors::default());
        }
        self.present = 0;
        let mut descriptors = std::mem::take(&mut self.descriptors);
        receive(self.socket, rest, &mut descriptors)?;
        Ok(descriptors)
    }

    /// Takes `bytes` of payload off the stream, however many, by way of `scratch`. Descriptors are
    /// closed.
    ///
    /// # Errors
    /// Those of [`Reader::payload`].
    pub fn skip(&mut self, bytes: usize, scratch: &mut [u8]) -> Result<(), Errno> {
        let mut left = bytes - bytes.min(scratch.len());
        let mut descriptors = self.payload(&mut scratch[..bytes - left])?;
        while left > 0 {
            let piece = left.min(scratch.len());
            receive(self.socket, &mut scratch[..piece], &mut descriptors)?;
            left -= piece;
        }
        Ok(())
    }
}

/// Fills `buffer`; the end of the stream is an error.
fn receive(socket: BorrowedFd<'_>, mut buffer: &mut [u8], into: &mut Descriptors) -> Result<(), Errno> {
    while !buffer.is_empty() {
        match receive_some(socket, buffer, into)? {
            0 => return Err(Errno::CONNRESET),
            bytes => buffer = &mut buffer[bytes..],
        }
    }
    Ok(())
}

/// One read; zero at the end of the stream.
fn receive_some(socket: BorrowedFd<'_>, buffer: &mut [u8], into: &mut Descriptors) -> Result<usize, Errno> {
    loop {
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
        return Ok(message.bytes);
    }
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
