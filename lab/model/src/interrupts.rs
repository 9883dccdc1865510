//! MSI-X vectors as the client connects them: an event file descriptor each.
//!
//! Absent: masks and the pending bits. QEMU keeps the table and raises a masked vector itself.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::registers::VECTORS;

/// The connected vectors.
#[derive(Debug, Default)]
pub struct Interrupts {
    events: [Option<OwnedFd>; VECTORS as usize],
}

impl Interrupts {
    /// Connects `events` to the vectors from `start` on, or nothing to `count` of them.
    ///
    /// # Errors
    /// `EINVAL` outside the vectors; nothing has changed then.
    pub fn connect(&mut self, start: u32, count: u32, events: Vec<OwnedFd>) -> Result<(), Errno> {
        let slots = self.range(start, count)?;
        if events.is_empty() {
            slots.fill_with(|| None);
        } else if events.len() == slots.len() {
            for (slot, event) in slots.iter_mut().zip(events) {
                *slot = Some(event);
            }
        } else {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// Disconnects all.
    pub fn disconnect(&mut self) {
        self.events = Default::default();
    }

    /// Raises those in the range for which `wanted` says so.
    ///
    /// # Errors
    /// `EINVAL` outside the vectors.
    pub fn raise_some(
        &mut self,
        start: u32,
        count: u32,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<(), Errno> {
        for (number, slot) in self.range(start, count)?.iter().enumerate() {
            if wanted(number) {
                raise(slot.as_ref());
            }
        }
        Ok(())
    }

    /// Raises one vector, if it is connected.
    pub fn raise(&self, vector: u16) {
        raise(self.events.get(usize::from(vector)).and_then(Option::as_ref));
    }

    fn range(&mut self, start: u32, count: u32) -> Result<&mut [Option<OwnedFd>], Errno> {
        let end = start.checked_add(count).ok_or(Errno::INVAL)?;
        self.events.get_mut(start as usize..end as usize).ok_or(Errno::INVAL)
    }
}

/// Adds one to the counter, unless that would block: the descriptor is the client's, and may be
/// anything.
fn raise(event: Option<&OwnedFd>) {
    let Some(event) = event else { return };
    let mut ready = [PollFd::from_borrowed_fd(event.as_fd(), PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let writable = rustix::event::poll(&mut ready, Some(&now))
        .is_ok_and(|_| ready[0].revents().contains(PollFlags::OUT));
    if !writable {
        return;
    }
    if let Err(errno) = rustix::io::write(event, &1u64.to_ne_bytes())
        && errno.kind() != ErrorKind::WouldBlock
    {
        tracing::warn!(%errno, "an interrupt could not be raised: the client's event descriptor refuses");
    }
}
