//! `ServedMemory`: one memory that a broker lends, with what is free of it and where its device is.

use std::sync::Arc;
use std::time::Instant;

use peervram_backends::{DmaRange, Error, Kind};

use super::inbox::{Inbox, MemoryNotice, Notice};
use super::message::{Memory, MemoryState};
use super::offer::Offer;
use super::space::{NoRoom, Space};
use crate::revoke::{EventKind, Subscription};
use crate::{Export, Result};

const TRIED: &str = "borrow memory";

/// Memory that is lent.
pub(super) struct ServedMemory {
    pub offer: Arc<Offer>,
    pub device: Arc<str>,
    pub space: Space,
    pub state: MemoryState,
    /// Of which the content of what is free is known.
    pub generation: u64,
    pub leases: u64,
    pub is_scrubbing: bool,
    /// Not before this.
    pub scrub_at: Option<Instant>,
    /// All of it, lent to nobody: its owner, whose engine scrubs, rests around a revoke although nobody has a lease. None
    /// where every export is new memory.
    _standing: Option<Export>,
    _subscription: Subscription,
}

/// Why there is no lease.
#[derive(Debug)]
pub(super) enum NotBorrowed {
    /// There is none to be had: why.
    Failed(Error),
    /// There is when more is scrubbed, or the kernel has freed what was just returned.
    Later,
}

impl From<Error> for NotBorrowed {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl ServedMemory {
    /// Of an offer, the one of that number. What becomes of it is told to `inbox`.
    ///
    /// # Errors
    /// What exporting says.
    pub fn new(offer: Offer, index: usize, inbox: &Arc<Inbox>) -> Result<Self> {
        let is_new = offer.lender.exports_new_memory();
        let space = Space::new(offer.aperture.ranges(), offer.alignment_bytes, is_new);
        let all = offer.aperture.ranges().as_slice();
        let standing = (!is_new).then(|| offer.export(all)).transpose()?;
        let inbox = Arc::clone(inbox);
        let subscription = offer.lender.on_event(Box::new(move |event| {
            let notice = match event.kind {
                EventKind::Draining { .. } => MemoryNotice::Draining,
                EventKind::CalledOff => MemoryNotice::CalledOff,
                EventKind::Revoked { .. } => MemoryNotice::Away,
                EventKind::Restored => MemoryNotice::Restored,
                EventKind::Gone => MemoryNotice::Gone,
                _ => return,
            };
            inbox.tell(Notice::Memory(index, notice, event.generation));
        }));
        // Nothing is scrubbed yet, so that a revoke that comes before this is told of is no harm.
        let generation = offer.lender.generation();
        Ok(Self {
            device: offer.lender.device().into(),
            offer: Arc::new(offer),
            space,
            state: MemoryState::Live,
            generation,
            leases: 0,
            is_scrubbing: false,
            scrub_at: None,
            _standing: standing,
            _subscription: subscription,
        })
    }

    /// Takes what is asked for out of what is free. `is_freeing` says whether more will be in a moment.
    ///
    /// # Errors
    /// Why it cannot be had, or that it can be later.
    pub fn take(
        &mut self,
        size_bytes: u64,
        alignment: Option<u64>,
        explicit: Option<&[DmaRange]>,
        is_freeing: bool,
    ) -> Result<Box<[DmaRange]>, NotBorrowed> {
        let (kind, why) = match self.state {
            MemoryState::Live => (None, ""),
            MemoryState::Draining => (Some(Kind::Busy), "its memory is being taken back or given back now"),
            MemoryState::Away => (Some(Kind::Revoked), "its memory is away"),
            MemoryState::Gone => (Some(Kind::Gone), "the lender closed it"),
        };
        if let Some(kind) = kind {
            return Err(Error::new(kind, TRIED, why)
                .on(&self.device)
                .next("try again when it is there")
                .into());
        }
        let taken = match explicit {
            Some(ranges) => {
                let region = self.offer.aperture.ranges().region_index();
                // What is wrong with them is said in words, before the allocator is asked.
                self.offer.lender.ranges(region, ranges)?;
                self.space.take_exactly(ranges).map(|()| ranges.into())
            }
            None => self.space.take(size_bytes, alignment.unwrap_or(1)).map(|range| [range].into()),
        };
        taken.map_err(|no_room| match no_room {
            NoRoom::Yet => NotBorrowed::Later,
            NoRoom::Now if is_freeing => NotBorrowed::Later,
            NoRoom::Ever | NoRoom::Now => self.no_room(size_bytes, no_room, explicit.is_some()).into(),
        })
    }

    fn no_room(&self, size_bytes: u64, no_room: NoRoom, is_explicit: bool) -> Error {
        let (name, size, free, largest) = (
            &self.offer.name,
            self.space.size_bytes(),
            self.space.free_bytes(),
            self.space.largest_free_bytes(),
        );
        let why = match (no_room, is_explicit) {
            (NoRoom::Ever, true) => format!("these ranges are no part of what is lent as {name}"),
            (NoRoom::Ever, false) => {
                format!("{size_bytes} bytes are more than the {size} that are lent as {name}")
            }
            (_, true) => format!("these ranges of {name} are not free"),
            (_, false) => {
                format!(
                    "{size_bytes} bytes are not free in one range of {name}: {free} are free, {largest} in one range"
                )
            }
        };
        let kind = if no_room == NoRoom::Ever { Kind::InvalidInput } else { Kind::Exhausted };
        Error::new(kind, TRIED, why).on(&self.device).next("`peervram status` shows who has what")
    }

    /// What there is to say of it; `quarantined` is how many bytes nobody is given.
    pub fn status(&self, quarantined: u64) -> Memory {
        Memory {
            name: self.offer.name.clone(),
            device: self.device.to_string(),
            region: self.offer.aperture.ranges().region_index(),
            size: self.space.size_bytes(),
            free: self.space.free_bytes(),
            largest_free: self.space.largest_free_bytes(),
            unscrubbed: self.space.unscrubbed_bytes(),
            quarantined,
            alignment: self.space.alignment(),
            generation: self.offer.lender.generation(),
            state: self.state,
            leases: self.leases,
        }
    }
}
