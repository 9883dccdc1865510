//! `Books`: what is lent, to whom, and what nobody is given. Kept by the broker's thread alone.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use peervram_backends::{DmaRange, Error, Kind, Peer, SharedWords, deadline_after, page_size_bytes};

use super::inbox::{Inbox, MemoryNotice};
use super::lease_words::LeaseWords;
use super::message::{self, LeaseStatus, Memory, MemoryState, Quarantined};
use super::offer::Offer;
use super::policy::{Policy, Wish};
use super::quarantine::Prover;
use super::remote::{LeaseHolder, RemoteAttachment};
use super::scrub::Scrubber;
use super::served_memory::{NotBorrowed, ServedMemory};
use super::space::Piece;
use crate::{Direction, Export, Result};

const TRIED: &str = "borrow memory";
/// After this long, what could not be scrubbed is tried again.
const SCRUB_AGAIN: Duration = Duration::from_secs(1);
/// After this long, what was taken back while it was scrubbed.
const SCRUB_AGAIN_SOON: Duration = Duration::from_millis(10);
/// For this long, who wants memory waits for what has just gone into quarantine: the kernel frees it when the last
/// descriptor is closed, which those who return memory do before.
const GRACE: Duration = Duration::from_secs(1);
/// The longest label, and the longest name of an importer, in bytes.
pub(super) const WORDS_BYTES_MAX: usize = 128;
/// How many importers of one lease are remembered by name.
const IMPORTERS_MAX: usize = 16;

/// Memory that somebody has.
pub(super) struct Lease {
    memory: usize,
    ranges: Box<[DmaRange]>,
    size_bytes: u64,
    direction: Direction,
    /// The connection that it ends with.
    pub connection: u64,
    pub peer: Arc<Peer>,
    label: Option<String>,
    importers: Vec<String>,
    since: SystemTime,
    pub export: Export,
    pub attachment: Arc<RemoteAttachment>,
}

impl Lease {
    /// Whether it was borrowed on that connection, or by the process of `peer`.
    pub fn is_of(&self, connection: u64, peer: &Peer) -> bool {
        self.connection == connection || self.peer.is_same_process(peer)
    }
}

/// Memory that nobody is given.
struct InQuarantine {
    memory: usize,
    ranges: Box<[DmaRange]>,
    size_bytes: u64,
    user: u32,
    inode: Option<u64>,
    since: SystemTime,
    /// Until when others wait for it who want memory; none where it may never be free.
    grace: Option<Instant>,
    why: String,
}

/// What a user has.
#[derive(Default, Clone, Copy)]
struct Usage {
    bytes: u64,
    leases: usize,
}

/// Who has what.
pub(super) struct Books {
    policy: Policy,
    inbox: Arc<Inbox>,
    words: Arc<LeaseWords>,
    scrubber: Scrubber,
    prover: Prover,
    memories: Vec<ServedMemory>,
    leases: BTreeMap<u64, Lease>,
    quarantine: BTreeMap<u64, InQuarantine>,
    users: HashMap<u32, Usage>,
    next_lease: u64,
}

impl Books {
    /// Of what is offered. Begins to scrub it.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for two memories of one name; what exporting says; no thread could be started.
    pub fn new(offers: Vec<Offer>, policy: Policy, inbox: &Arc<Inbox>) -> Result<Self> {
        let mut books = Self {
            policy,
            inbox: Arc::clone(inbox),
            words: LeaseWords::new()?,
            scrubber: Scrubber::start(inbox)?,
            prover: Prover::start(inbox)?,
            memories: Vec::new(),
            leases: BTreeMap::new(),
            quarantine: BTreeMap::new(),
            users: HashMap::new(),
            next_lease: 1,
        };
        for offer in offers {
            if books.memories.iter().any(|memory| memory.offer.name == offer.name) {
                let why = format!("two memories are called `{}`", offer.name);
                return Err(
                    Error::new(Kind::InvalidInput, "serve a broker", why).next("name each differently")
                );
            }
            books.memories.push(ServedMemory::new(offer, books.memories.len(), inbox)?);
        }
        (0..books.memories.len()).for_each(|memory| books.scrub_more(memory));
        Ok(books)
    }

    /// Whether `peer` may do what operators do.
    pub fn is_operator(&self, peer: &Peer) -> bool {
        self.policy.is_operator(peer)
    }

    /// What clients see of their leases without a message.
    pub fn words(&self) -> &Arc<SharedWords> {
        self.words.shared()
    }

    /// The lease of that number.
    pub fn lease(&self, lease: u64) -> Option<&Lease> {
        self.leases.get(&lease)
    }

    /// All leases, with their numbers.
    pub fn leases(&self) -> impl Iterator<Item = (u64, &Lease)> {
        self.leases.iter().map(|(lease, of)| (*lease, of))
    }

    /// The offer of that name.
    ///
    /// # Errors
    /// [`Kind::NotFound`].
    pub fn offer(&self, name: &str) -> Result<Arc<Offer>> {
        Ok(Arc::clone(&self.memories[self.find(name)?].offer))
    }

    fn find(&self, name: &str) -> Result<usize> {
        self.memories.iter().position(|memory| memory.offer.name == name).ok_or_else(|| no_memory(name))
    }

    /// Lends to `peer`, until the lease is ended. Returns the number of the lease.
    ///
    /// # Errors
    /// Why not, or that it is to be asked again when more is scrubbed.
    pub fn borrow(
        &mut self,
        peer: &Arc<Peer>,
        connection: u64,
        request: &message::Borrow,
    ) -> Result<u64, NotBorrowed> {
        let explicit = explicit(request)?;
        let size_bytes = match &explicit {
            Some(ranges) => ranges.iter().map(|range| range.length_bytes).fold(0, u64::saturating_add),
            None => size(request)?,
        };
        let direction = enforceable(request.direction.unwrap_or(Direction::Both))?;
        let candidates = match &request.memory {
            // Whoever may not borrow of a memory is not told whether there is one.
            Some(name) => {
                if !self.policy.may_see(peer, name) {
                    self.policy.check(peer, wish(name, size_bytes, request, self.usage(peer)))?;
                }
                vec![self.find(name)?]
            }
            None => (0..self.memories.len()).collect(),
        };
        let mut reason = None;
        for memory in candidates {
            let name = &self.memories[memory].offer.name;
            let allowed = self.policy.check(peer, wish(name, size_bytes, request, self.usage(peer)));
            let taken = allowed.map_err(NotBorrowed::Failed).and_then(|()| {
                let is_freeing = self.is_freeing(memory);
                self.memories[memory].take(size_bytes, request.alignment, explicit.as_deref(), is_freeing)
            });
            match taken {
                Ok(ranges) => {
                    return self.lend(memory, ranges, size_bytes, direction, peer, connection, request);
                }
                // Of several reasons the one that time mends, else the first.
                Err(NotBorrowed::Later) => reason = Some(NotBorrowed::Later),
                Err(failed) => reason = Some(reason.unwrap_or(failed)),
            }
        }
        Err(reason.unwrap_or_else(|| Error::new(Kind::NotFound, TRIED, "nothing is lent here").into()))
    }

    fn usage(&self, peer: &Peer) -> Usage {
        self.users.get(&peer.user).copied().unwrap_or_default()
    }

    #[expect(clippy::too_many_arguments, reason = "what a lease is")]
    fn lend(
        &mut self,
        memory: usize,
        ranges: Box<[DmaRange]>,
        size_bytes: u64,
        direction: Direction,
        peer: &Arc<Peer>,
        connection: u64,
        request: &message::Borrow,
    ) -> Result<u64, NotBorrowed> {
        let lease = self.next_lease;
        let who = LeaseHolder { lease, peer: Arc::clone(peer), label: request.label.clone() };
        let served = &mut self.memories[memory];
        let exported = served.offer.export(&ranges).and_then(|export| {
            // Before anybody is told of it: who attaches by other means is waited for by the kernel.
            export.dma_buf().map_err(Error::clone)?;
            let word = self.words.take(lease)?;
            let attachment = RemoteAttachment::new(export.inner(), who, word, &self.inbox)?;
            Ok((export, attachment))
        });
        let (export, attachment) = match exported {
            Ok(exported) => exported,
            Err(error) => {
                served.space.end(&ranges);
                self.scrub_more(memory);
                return Err(error.into());
            }
        };
        if attachment.state().0 != served.generation {
            // It was taken back and is there again, which is still to be told here: what it holds was not scrubbed since.
            served.space.end(&ranges);
            return Err(NotBorrowed::Later);
        }
        served.leases += 1;
        let usage = self.users.entry(peer.user).or_default();
        (usage.bytes, usage.leases) = (usage.bytes + size_bytes, usage.leases + 1);
        self.next_lease += 1;
        let record = Lease {
            memory,
            ranges,
            size_bytes,
            direction,
            connection,
            peer: Arc::clone(peer),
            label: request.label.clone(),
            importers: Vec::new(),
            since: SystemTime::now(),
            export,
            attachment,
        };
        self.leases.insert(lease, record);
        Ok(lease)
    }

    /// What a new lease is answered with.
    pub fn borrowed(&self, lease: u64) -> Option<message::Borrowed> {
        let record = self.leases.get(&lease)?;
        let memory = &self.memories[record.memory];
        let region = memory.offer.aperture.ranges().region_index();
        Some(message::Borrowed {
            lease,
            memory: memory.offer.name.clone(),
            device: memory.device.to_string(),
            pci_address: memory.offer.lender.pci_address().map(|address| address.to_string()),
            region,
            region_size: memory.offer.lender.region_bytes(region),
            ranges: sent(&record.ranges),
            size: record.size_bytes,
            direction: record.direction,
            generation: record.attachment.state().0,
            word: record.attachment.word(),
            engine: record.attachment.engine().map(str::to_owned),
            dma_buf: 0,
        })
    }

    /// An importer of a lease's client imports it.
    pub fn note_importer(&mut self, lease: u64, importer: &str, must_be_freed: bool) {
        let Some(record) = self.leases.get_mut(&lease) else { return };
        if must_be_freed {
            record.attachment.must_be_freed();
        }
        if record.importers.len() < IMPORTERS_MAX && record.importers.iter().all(|known| known != importer) {
            record.importers.push(importer.to_owned());
        }
    }

    /// Ends a lease. Its memory is free, or in quarantine until the kernel has freed the dma-buf.
    pub fn end(&mut self, lease: u64, why: &str) {
        let Some(record) = self.leases.remove(&lease) else { return };
        let Lease { memory, ranges, size_bytes, peer, export, attachment, .. } = record;
        attachment.end();
        let served = &mut self.memories[memory];
        served.leases -= 1;
        let is_new = served.offer.lender.exports_new_memory();
        let inode = export.dma_buf().ok().and_then(|dma_buf| dma_buf.inode().ok());
        // The broker's own descriptor is closed by this, on another thread.
        drop((attachment, export));
        tracing::info!(lease, memory = served.offer.name, %peer, why, "a lease ended");
        if is_new {
            served.space.end(&ranges);
            self.give_back_usage(peer.user, size_bytes);
            return;
        }
        let why = "the kernel has not freed its dma-buf yet".to_owned();
        let (user, since, grace) = (peer.user, SystemTime::now(), Some(deadline_after(GRACE)));
        let out = InQuarantine { memory, ranges, size_bytes, user, inode, since, grace, why };
        self.quarantine.insert(lease, out);
        match inode {
            Some(inode) => self.prover.watch(lease, inode),
            None => self.unproven(lease, "its dma-buf has no inode".into()),
        }
    }

    /// The kernel has freed the dma-buf of a lease that ended, or an operator says so.
    ///
    /// # Errors
    /// [`Kind::NotFound`]: that lease is not in quarantine.
    pub fn release(&mut self, lease: u64) -> Result<()> {
        let Some(out) = self.quarantine.remove(&lease) else {
            let why = format!("lease {lease} is not in quarantine");
            return Err(
                Error::new(Kind::NotFound, "end a quarantine", why).next("`peervram status` shows what is")
            );
        };
        self.prover.forget(lease);
        self.memories[out.memory].space.end(&out.ranges);
        self.give_back_usage(out.user, out.size_bytes);
        self.scrub_more(out.memory);
        Ok(())
    }

    /// Whether the dma-buf of a lease that ended is freed cannot be known.
    pub fn unproven(&mut self, lease: u64, why: String) {
        if let Some(in_quarantine) = self.quarantine.get_mut(&lease) {
            tracing::warn!(lease, why, "memory stays in quarantine");
            (in_quarantine.why, in_quarantine.grace) = (why, None);
        }
    }

    /// Whether some of a memory was just returned, so that the kernel is about to free it.
    fn is_freeing(&self, memory: usize) -> bool {
        let now = Instant::now();
        let mut of_it = self.quarantine.values().filter(|out| out.memory == memory);
        of_it.any(|out| out.grace.is_some_and(|grace| grace > now))
    }

    fn give_back_usage(&mut self, user: u32, size_bytes: u64) {
        if let Some(usage) = self.users.get_mut(&user) {
            usage.bytes = usage.bytes.saturating_sub(size_bytes);
            usage.leases = usage.leases.saturating_sub(1);
            if usage.leases == 0 {
                self.users.remove(&user);
            }
        }
    }

    /// A piece was scrubbed, or could not be.
    pub fn scrubbed(&mut self, memory: usize, piece: Piece, result: &Result<()>) {
        let served = &mut self.memories[memory];
        served.is_scrubbing = false;
        match result {
            Ok(()) => served.space.scrubbed(piece),
            Err(error) => {
                served.space.not_scrubbed(piece);
                let again = if was_taken_back(error) { SCRUB_AGAIN_SOON } else { SCRUB_AGAIN };
                served.scrub_at = Some(deadline_after(again));
            }
        }
        self.scrub_more(memory);
    }

    /// Has the next range scrubbed, where one is to be and none is being.
    fn scrub_more(&mut self, memory: usize) {
        let served = &mut self.memories[memory];
        let is_time = served.scrub_at.is_none_or(|at| at <= Instant::now());
        if served.is_scrubbing || !is_time || served.state != MemoryState::Live {
            return;
        }
        if let Some(piece) = served.space.next_to_scrub() {
            (served.is_scrubbing, served.scrub_at) = (true, None);
            self.scrubber.scrub(memory, &served.offer, piece);
        }
    }

    /// Begins what was put off until now. Says when there is more of that.
    pub fn pass_time(&mut self) -> Option<Instant> {
        (0..self.memories.len()).for_each(|memory| self.scrub_more(memory));
        let now = Instant::now();
        let graces = self.quarantine.values().filter_map(|out| out.grace).filter(|grace| *grace > now);
        let live = self.memories.iter().filter(|memory| memory.state == MemoryState::Live);
        live.filter_map(|memory| memory.scrub_at).chain(graces).min()
    }

    /// A memory was taken back, given back, or is about to be.
    pub fn note_memory(&mut self, memory: usize, notice: MemoryNotice, generation: u64) {
        let served = &mut self.memories[memory];
        served.generation = generation;
        served.state = match notice {
            MemoryNotice::Draining => MemoryState::Draining,
            MemoryNotice::CalledOff => MemoryState::Live,
            MemoryNotice::Away => MemoryState::Away,
            MemoryNotice::Gone => MemoryState::Gone,
            MemoryNotice::Restored => {
                // What a reset leaves in memory may be what somebody else had there.
                served.space.forget_content();
                MemoryState::Live
            }
        };
        self.scrub_more(memory);
    }

    /// What `peer` may borrow of.
    pub fn list(&self, peer: &Peer) -> Vec<Memory> {
        let seen = self.memories.iter().enumerate();
        seen.filter(|(_, memory)| self.policy.may_see(peer, &memory.offer.name))
            .map(|(index, memory)| memory.status(self.quarantined_bytes(index)))
            .collect()
    }

    fn quarantined_bytes(&self, memory: usize) -> u64 {
        let of_it = self.quarantine.values().filter(|quarantined| quarantined.memory == memory);
        of_it.map(|quarantined| quarantined.size_bytes).sum()
    }

    /// Everything.
    pub fn status(&self) -> message::Status {
        let memories = self.memories.iter().enumerate();
        message::Status {
            memories: memories.map(|(index, memory)| memory.status(self.quarantined_bytes(index))).collect(),
            leases: self.leases.iter().map(|(lease, record)| self.lease_status(*lease, record)).collect(),
            quarantine: self
                .quarantine
                .iter()
                .map(|(lease, record)| self.quarantined(*lease, record))
                .collect(),
        }
    }

    fn lease_status(&self, lease: u64, record: &Lease) -> LeaseStatus {
        let (generation, state) = record.attachment.state();
        LeaseStatus {
            lease,
            memory: self.memories[record.memory].offer.name.clone(),
            ranges: sent(&record.ranges),
            size: record.size_bytes,
            direction: record.direction,
            user: record.peer.user,
            process: record.peer.process,
            program: record.peer.program(),
            label: record.label.clone(),
            importers: record.importers.clone(),
            since: seconds(record.since),
            generation,
            state,
        }
    }

    fn quarantined(&self, lease: u64, record: &InQuarantine) -> Quarantined {
        Quarantined {
            lease,
            memory: self.memories[record.memory].offer.name.clone(),
            ranges: sent(&record.ranges),
            size: record.size_bytes,
            user: record.user,
            inode: record.inode,
            since: seconds(record.since),
            why: record.why.clone(),
        }
    }
}

/// Whether something failed because memory was taken back meanwhile, or is being.
pub(super) fn was_taken_back(error: &Error) -> bool {
    matches!(error.kind(), Kind::Revoked | Kind::Busy)
}

fn no_memory(name: &str) -> Error {
    let why = format!("no memory is called `{name}`");
    Error::new(Kind::NotFound, "find a memory", why).next("`peervram status` shows what is lent")
}

fn wish<'a>(memory: &'a str, size_bytes: u64, request: &message::Borrow, usage: Usage) -> Wish<'a> {
    Wish {
        memory,
        size_bytes,
        direction: request.direction.unwrap_or(Direction::Both),
        network_card: request.network_card.unwrap_or(false),
        has_bytes: usage.bytes,
        has_leases: usage.leases,
    }
}

/// The ranges that a request names, if it does.
fn explicit(request: &message::Borrow) -> Result<Option<Vec<DmaRange>>> {
    let wrong =
        |why: &str, next: &str| Error::new(Kind::InvalidInput, TRIED, why.to_owned()).next(next.to_owned());
    if let Some(words) =
        [&request.label, &request.memory].into_iter().flatten().find(|words| words.len() > WORDS_BYTES_MAX)
    {
        let why = format!("a name of {} bytes is longer than {WORDS_BYTES_MAX}", words.len());
        return Err(Error::new(Kind::InvalidInput, TRIED, why).next("take a shorter one"));
    }
    if request.alignment.is_some_and(|alignment| !alignment.is_power_of_two()) {
        return Err(wrong("the alignment is no power of two", "leave it out, or take a power of two"));
    }
    let Some(ranges) = &request.ranges else { return Ok(None) };
    if request.size.is_some() {
        return Err(wrong("both a size and ranges are given", "give one of them"));
    }
    if request.memory.is_none() {
        return Err(wrong("ranges are given, and no memory", "name the memory that the ranges are of"));
    }
    Ok(Some(ranges.iter().map(|range| (*range).into()).collect()))
}

/// The size that a request asks for, in whole pages.
fn size(request: &message::Borrow) -> Result<u64> {
    let size = request.size.and_then(|size| size.checked_next_multiple_of(page_size_bytes()));
    size.filter(|size| *size > 0).ok_or_else(|| {
        let why = match request.size {
            None => "neither a size nor ranges are given".to_owned(),
            Some(size) => format!("{size} bytes cannot be lent"),
        };
        Error::new(Kind::InvalidInput, TRIED, why).next("give a size in bytes")
    })
}

/// A direction that is promised.
fn enforceable(direction: Direction) -> Result<Direction> {
    if direction == Direction::Both {
        return Ok(direction);
    }
    let why = format!("the kernel cannot keep who has a dma-buf to `{direction}` alone");
    Err(Error::new(Kind::Unsupported, TRIED, why)
        .next("borrow with the direction both, and keep to the other by yourself"))
}

/// Ranges as they are sent.
fn sent(ranges: &[DmaRange]) -> Vec<message::Range> {
    ranges.iter().map(|range| (*range).into()).collect()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Ranges are checked against their region when they are borrowed.
#[cfg(test)]
mod tests {
    use super::*;
    use message::{Borrow, Range};

    #[test]
    fn a_request_is_a_size_or_ranges() {
        let range = Range { offset: 0, length: 4096 };
        let sized = Borrow { size: Some(5000), ..Borrow::default() };
        assert_eq!((size(&sized).unwrap(), explicit(&sized).unwrap()), (8192, None));
        let ranged = Borrow { memory: Some("vram".into()), ranges: Some(vec![range]), ..Borrow::default() };
        assert_eq!(explicit(&ranged).unwrap().unwrap(), [DmaRange::new(0, 4096)]);
        let wrong = [
            Borrow { size: Some(1), ..ranged.clone() },
            Borrow { memory: None, ..ranged.clone() },
            Borrow { alignment: Some(3), ..sized.clone() },
            Borrow { alignment: Some(0), ..sized.clone() },
            Borrow { label: Some("x".repeat(WORDS_BYTES_MAX + 1)), ..sized.clone() },
        ];
        for request in wrong {
            assert_eq!(explicit(&request).unwrap_err().kind(), Kind::InvalidInput, "{request:?}");
        }
        for size_bytes in [None, Some(0), Some(u64::MAX)] {
            let request = Borrow { size: size_bytes, ..Borrow::default() };
            assert_eq!(size(&request).unwrap_err().kind(), Kind::InvalidInput, "{size_bytes:?}");
        }
    }

    #[test]
    fn what_the_kernel_cannot_keep_is_not_promised() {
        assert_eq!(enforceable(Direction::Both).unwrap(), Direction::Both);
        for direction in [Direction::Read, Direction::Write] {
            assert_eq!(enforceable(direction).unwrap_err().kind(), Kind::Unsupported);
        }
    }
}
