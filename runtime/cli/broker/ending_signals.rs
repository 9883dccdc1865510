//! `EndingSignals`: SIGINT and SIGTERM, as something to wait for.

use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use peervram::{Error, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// From when it is made, the two do not end this process any more: whoever has it is told.
pub struct EndingSignals {
    interrupted: UnixStream,
    terminated: UnixStream,
}

impl EndingSignals {
    /// # Errors
    /// No descriptor is free.
    pub fn register() -> Result<Self> {
        let register = |signal| {
            let (ours, of_handler) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            pipe::register(signal, of_handler)?;
            Ok(ours)
        };
        let failed = |error: std::io::Error| Error::os("wait for signals", error);
        Ok(Self {
            interrupted: register(SIGINT).map_err(failed)?,
            terminated: register(SIGTERM).map_err(failed)?,
        })
    }

    /// Readable after SIGINT, and after SIGTERM.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.interrupted.as_fd(), self.terminated.as_fd()]
    }

    /// Whether SIGTERM came since this was asked last. SIGINT is forgotten.
    pub fn take_terminated(&mut self) -> bool {
        let mut seen = [0; 64];
        while matches!(self.interrupted.read(&mut seen), Ok(1..)) {}
        let mut is_terminated = false;
        while matches!(self.terminated.read(&mut seen), Ok(1..)) {
            is_terminated = true;
        }
        is_terminated
    }
}
