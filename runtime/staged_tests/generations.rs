//! No byte of one generation in the next: neither in the memory that comes back, nor in what its accesses see.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use peervram_backends::{Error, Flag, Kind, Mapping};
use proptest::prelude::*;

use super::fakes::{FakeImporter, Pair, SMALL, Setup, all, bytes};
use super::{BOTH, PATIENCE, attach};
use crate::{
    Access, AttachOptions, Attachment, Direction, EventKind, Events, InFlight, Outcome, Trust, verify,
};

const PAGE: usize = 4096;
const PAGES: usize = 4;

/// The device is late, the revoke goes on, the memory comes back and its owner writes it anew.
#[test]
fn what_a_torn_access_left_behind_is_not_what_the_next_one_finds() {
    for in_host_memory in [false, true] {
        let pair = Pair::new(Setup { in_host_memory, ..SMALL });
        let attachment = attach(&pair, Trust::Unverified);
        let [old, written, new] = [1, 2, 3].map(|seed| bytes(seed, pair.vram.len()));
        pair.vram.write(0, &old).unwrap();
        let access = attachment.enter(BOTH).unwrap();
        access.memory().put(0, &written);
        let late = attachment.current().unwrap();
        let flag = Flag::new();
        let in_flight = access.finish_when(flag.clone());
        pair.tear(&new);

        // The late device still writes where the copy is: another one is made.
        let refused = attachment.enter(BOTH).unwrap_err();
        assert_eq!(Error::from(refused).kind(), Kind::Revoked);
        assert!(!attachment.is_current());
        attachment.current().unwrap();
        let access = attachment.enter(BOTH).unwrap();
        assert!(access.memory().all() == new, "it finds other bytes than are lent");
        late.memory().put(0, &written);
        assert!(access.memory().all() == new, "the late device writes into its copy");
        assert_eq!(access.finish(), Outcome::Ok);
        assert!(all(&pair.vram) == new, "what was torn is copied back");

        flag.set();
        assert_eq!(in_flight.wait(PATIENCE), Some(Outcome::Torn { generation: 1 }));
        assert!(all(&pair.vram) == new, "what was torn is copied back at its end");
        drop((in_flight, late));
        assert_eq!(pair.importer.copies.load(std::sync::atomic::Ordering::SeqCst), 1);
    }
}

#[test]
fn a_copy_that_nobody_torn_uses_any_more_is_good_again() {
    let pair = Pair::new(SMALL);
    let attachment = attach(&pair, Trust::Unverified);
    let new = bytes(3, pair.vram.len());
    let (access, flag) = (attachment.enter(BOTH).unwrap(), Flag::new());
    access.memory().put(0, &bytes(2, pair.vram.len()));
    let in_flight = access.finish_when(flag.clone());
    pair.tear(&new);
    assert!(!attachment.is_current());
    flag.set();
    assert_eq!(in_flight.wait(PATIENCE), Some(Outcome::Torn { generation: 1 }));
    assert!(attachment.is_current());
    let access = attachment.enter(BOTH).unwrap();
    assert!(access.memory().all() == new);
    assert_eq!(access.finish(), Outcome::Ok);
    assert!(all(&pair.vram) == new);
}

/// What a test saved is not put back into memory that came back with other bytes in it, and proves nothing.
#[test]
fn a_test_in_the_middle_of_a_revoke_writes_nothing_and_says_so() {
    // With a way of its own that is tested, and with none, where the owner's engine is tried.
    for is_half_dead in [true, false] {
        for nth in 1..8 {
            let pair = Pair::new(Setup { size_bytes: (PAGES * PAGE) as u64, is_half_dead, ..SMALL });
            pair.vram.write(0, &bytes(1, pair.vram.len())).unwrap();
            let (begun, is_begun) = mpsc::channel();
            let (go_on, may_go_on) = mpsc::channel::<()>();
            let mut left = nth;
            pair.owner.engine.on_call(move |_| {
                left -= 1;
                if left == 0 {
                    begun.send(()).unwrap();
                    may_go_on.recv().unwrap();
                }
                Ok(())
            });
            let new = bytes(3, pair.vram.len());
            let result = thread::scope(|scope| {
                let options = AttachOptions::new(Trust::Verified(BOTH)).with_limits(limits());
                let attach = scope.spawn(|| pair.export.attach(Arc::clone(&pair.importer), options));
                is_begun.recv().unwrap();
                let events = pair.export.events().unwrap();
                let tear = scope.spawn(|| pair.tear(&new));
                // The attachment is late, and torn; the revoke waits for the engine.
                while !matches!(next(&events), EventKind::Late { .. }) {}
                go_on.send(()).unwrap();
                tear.join().unwrap();
                attach.join().unwrap()
            });
            assert!(all(&pair.vram) == new, "call {nth}: what was saved is put back");
            assert_eq!(result.unwrap_err().kind(), Kind::Revoked, "call {nth}");
            let (imports, copies) = (&pair.importer.imports, &pair.importer.copies);
            let left = [imports, copies].map(|left| left.load(std::sync::atomic::Ordering::SeqCst));
            assert_eq!(left, [0, 0], "call {nth}: something is left imported");
        }
    }
}

fn next(events: &Events) -> EventKind {
    events.next_within(PATIENCE).unwrap().expect("the memory is taken back").kind
}

fn limits() -> verify::Limits {
    verify::Limits { copy_timeout: PATIENCE, ..verify::Limits::default() }
}

/// What a page was last written with: who wrote it in which generation, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    generation: u64,
    number: u32,
    page: usize,
}

fn stamped(stamp: Stamp) -> Vec<u8> {
    let words = [stamp.generation, stamp.number.into(), stamp.page as u64];
    words.iter().flat_map(|word| word.to_le_bytes()).cycle().take(PAGE).collect()
}

/// The stamps of all pages; a page that is of several is a panic.
fn stamps(memory: &[u8]) -> Vec<Stamp> {
    let stamp_of = |(page, bytes): (usize, &[u8])| {
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..][..8].try_into().unwrap());
        let stamp = Stamp { generation: word(0), number: word(1) as u32, page };
        assert!(bytes == stamped(stamp), "page {page} is of several, or of another place");
        stamp
    };
    memory.chunks_exact(PAGE).enumerate().map(stamp_of).collect()
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The owner's device writes a page.
    OwnerWrites(usize),
    Enter(Direction),
    /// The device of an access that has begun, torn or not, writes a page.
    DeviceWrites(prop::sample::Index, usize),
    Finish(prop::sample::Index),
    LeaveToDevice(prop::sample::Index),
    /// A device is done with what was left to it.
    Done(prop::sample::Index),
    /// Somebody looks whether it is, or says so.
    Wait(prop::sample::Index),
    Abandon(prop::sample::Index),
    Tear,
    Current,
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..PAGES;
    let direction = prop_oneof![Just(Direction::Read), Just(Direction::Write), Just(BOTH)];
    let one = any::<prop::sample::Index>;
    prop_oneof![
        2 => page.clone().prop_map(Step::OwnerWrites),
        4 => direction.prop_map(Step::Enter),
        4 => (one(), page).prop_map(|(one, page)| Step::DeviceWrites(one, page)),
        2 => one().prop_map(Step::Finish),
        3 => one().prop_map(Step::LeaveToDevice),
        2 => one().prop_map(Step::Done),
        2 => one().prop_map(Step::Wait),
        1 => one().prop_map(Step::Abandon),
        2 => Just(Step::Tear),
        3 => Just(Step::Current),
    ]
}

/// What a device works on. It knows of no generations, and writes there until it is done.
struct Work {
    mapping: Arc<Mapping>,
    generation: u64,
    may_write: bool,
    is_done: bool,
}

/// One world, and what is true of it at any time.
struct World<'a> {
    pair: &'a Pair,
    attachment: &'a Attachment<FakeImporter>,
    work: Vec<Work>,
    /// Accesses of this thread, and those left to a device, each with the number of its work.
    inside: Vec<(usize, Access<'a, FakeImporter>)>,
    in_flight: Vec<(usize, Flag, InFlight<FakeImporter>)>,
    stamps: u32,
}

impl<'a> World<'a> {
    fn new(pair: &'a Pair, attachment: &'a Attachment<FakeImporter>) -> Self {
        let (work, inside, in_flight) = (Vec::new(), Vec::new(), Vec::new());
        let mut world = Self { pair, attachment, work, inside, in_flight, stamps: 0 };
        let first = world.fill(0);
        pair.vram.write(0, &first).unwrap();
        world
    }

    fn stamp(&mut self, generation: u64, page: usize) -> Vec<u8> {
        self.stamps += 1;
        stamped(Stamp { generation, number: self.stamps, page })
    }

    fn fill(&mut self, generation: u64) -> Vec<u8> {
        (0..PAGES).flat_map(|page| self.stamp(generation, page)).collect()
    }

    /// The work of accesses that have not ended, as far as is known here.
    fn unended(&self) -> impl Iterator<Item = &Work> {
        let inside = self.inside.iter().map(|(work, _)| *work);
        inside.chain(self.in_flight.iter().map(|(work, ..)| *work)).map(|work| &self.work[work])
    }

    fn enter(&mut self, direction: Direction) {
        let now = self.attachment.generation();
        match self.attachment.enter(direction) {
            Ok(access) => {
                let shares = self.unended().any(|work| work.generation == now && work.may_write);
                assert!(shares || access.memory().all() == all(&self.pair.vram), "other bytes than are lent");
                assert_eq!(access.generation(), now);
                self.work.push(Work {
                    mapping: Arc::clone(&access.memory().mapping),
                    generation: now,
                    may_write: direction.includes(Direction::Write),
                    is_done: false,
                });
                self.inside.push((self.work.len() - 1, access));
            }
            Err(refused) => {
                assert_eq!(Error::from(refused).kind(), Kind::Revoked);
                assert!(self.unended().any(|work| work.generation < now), "refused for nothing");
            }
        }
    }

    fn finish(&mut self, (work, access): (usize, Access<'a, FakeImporter>)) {
        self.work[work].is_done = true;
        let now = self.attachment.generation();
        let is_torn = access.generation() != now;
        let expected = if is_torn { Outcome::Torn { generation: now } } else { Outcome::Ok };
        assert_eq!(access.finish(), expected);
    }

    fn take(&mut self, step: &Step) {
        let now = self.attachment.generation();
        match step {
            Step::OwnerWrites(page) => {
                let bytes = self.stamp(now, *page);
                self.pair.vram.write(page * PAGE, &bytes).unwrap();
            }
            Step::Enter(direction) => self.enter(*direction),
            Step::DeviceWrites(one, page) if !self.work.is_empty() => {
                let at = one.index(self.work.len());
                if self.work[at].may_write && !self.work[at].is_done {
                    let bytes = self.stamp(self.work[at].generation, *page);
                    self.work[at].mapping.write(page * PAGE, &bytes).unwrap();
                }
            }
            Step::Finish(one) if !self.inside.is_empty() => {
                let access = self.inside.swap_remove(one.index(self.inside.len()));
                self.finish(access);
            }
            Step::LeaveToDevice(one) if !self.inside.is_empty() => {
                let (work, access) = self.inside.swap_remove(one.index(self.inside.len()));
                let flag = Flag::new();
                self.in_flight.push((work, flag.clone(), access.finish_when(flag)));
            }
            Step::Done(one) if !self.in_flight.is_empty() => {
                let (work, flag, _) = &self.in_flight[one.index(self.in_flight.len())];
                self.work[*work].is_done = true;
                flag.set();
            }
            Step::Wait(one) if !self.in_flight.is_empty() => {
                let at = one.index(self.in_flight.len());
                let (work, _, in_flight) = &self.in_flight[at];
                let outcome = in_flight.wait(Duration::ZERO);
                assert_eq!(outcome.is_some(), self.work[*work].is_done);
                assert_ne!(outcome, Some(Outcome::NotCopiedBack));
                if outcome.is_some() {
                    let _ = self.in_flight.swap_remove(at);
                }
            }
            Step::Abandon(one) if !self.in_flight.is_empty() => {
                let (work, _, in_flight) = self.in_flight.swap_remove(one.index(self.in_flight.len()));
                self.work[work].is_done = true;
                let _ = in_flight.abandon();
            }
            Step::Tear => {
                let restored = self.fill(now + 1);
                self.pair.tear(&restored);
                assert_eq!(self.attachment.generation(), now + 1);
            }
            Step::Current => {
                self.attachment.current().unwrap();
                assert!(self.attachment.is_current());
            }
            // Nothing is there to be taken a step with.
            _ => {}
        }
        self.check();
    }

    fn check(&self) {
        let now = self.attachment.generation();
        for stamp in stamps(&all(&self.pair.vram)) {
            assert_eq!(stamp.generation, now, "another generation's bytes are lent: {stamp:?}");
        }
        for (_, access) in self.inside.iter().filter(|(_, access)| access.generation() == now) {
            for stamp in stamps(&access.memory().all()) {
                assert_eq!(stamp.generation, now, "an access sees another generation's bytes: {stamp:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// In any order of accesses, late devices and revokes that go on.
    #[test]
    fn no_byte_of_one_generation_is_in_the_next(
        steps in prop::collection::vec(step(), 1..40),
        in_host_memory: bool,
        owner_has_engine: bool,
    ) {
        let size_bytes = (PAGES * PAGE) as u64;
        let pair = Pair::new(Setup { size_bytes, in_host_memory, owner_has_engine, ..SMALL });
        let attachment = attach(&pair, Trust::Unverified);
        let mut world = World::new(&pair, &attachment);
        steps.iter().for_each(|step| world.take(step));
    }
}
