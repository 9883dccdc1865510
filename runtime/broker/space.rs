//! `Space`: which parts of one memory are free, lent, or not to be lent yet. Pure.
//!
//! ```text
//!   unscrubbed --scrubbed--> free --lend--> lent --end--> quarantined --freed by the kernel--> unscrubbed
//!       ^                     |
//!       +---- taken back -----+
//! ```
//! A byte is in one of these states. Memory of which every lease is new has no states but free and lent.

use std::collections::VecDeque;
use std::ops::Range;

use peervram_backends::{DmaRange, DmaRanges};
use rangemap::RangeSet;

/// What is scrubbed at a time.
const SCRUB_BYTES: u64 = 16 << 20;

/// The parts of one memory.
#[derive(Debug)]
pub(super) struct Space {
    alignment: u64,
    /// All that is lent of.
    all: RangeSet<u64>,
    /// Of that, what can be lent now.
    free: RangeSet<u64>,
    /// What nobody has scrubbed.
    unscrubbed: VecDeque<DmaRange>,
    /// What somebody is scrubbing now.
    being_scrubbed: u64,
    /// How often the content was forgotten: what was scrubbed before that is not.
    forgotten: u64,
    /// Every lease is new memory: nothing is ever scrubbed.
    is_new: bool,
}

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// There will be when what is unscrubbed is scrubbed.
    Yet,
    /// It is lent, or in quarantine.
    Now,
    /// It is no part of the memory.
    Ever,
}

impl Space {
    /// Of `ranges`. Leases begin at multiples of `alignment`, a power of two. With `is_new` nothing is ever scrubbed,
    /// because every lease is new memory; else everything is to be scrubbed first.
    pub fn new(ranges: &DmaRanges, alignment: u64, is_new: bool) -> Self {
        let all: RangeSet<u64> = ranges.as_slice().iter().map(|range| bounds(*range)).collect();
        let (free, unscrubbed) = (all.clone(), VecDeque::new());
        let mut space = Self { alignment, all, free, unscrubbed, being_scrubbed: 0, forgotten: 0, is_new };
        space.forget_content();
        space
    }

    /// How much there is, in bytes.
    pub fn size_bytes(&self) -> u64 {
        bytes(&self.all)
    }

    /// What leases begin at multiples of, in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// How much is neither lent nor in quarantine, in bytes.
    pub fn free_bytes(&self) -> u64 {
        bytes(&self.free) + self.unscrubbed_bytes()
    }

    /// How much is to be scrubbed, in bytes.
    pub fn unscrubbed_bytes(&self) -> u64 {
        self.unscrubbed.iter().map(|range| range.length_bytes).sum::<u64>() + self.being_scrubbed
    }

    /// The longest range that could be lent now, in bytes.
    pub fn largest_free_bytes(&self) -> u64 {
        let usable = |gap: &Range<u64>| gap.end.saturating_sub(gap.start.next_multiple_of(self.alignment));
        self.free.iter().map(usable).max().unwrap_or(0)
    }

    /// Takes `size_bytes` in one range that begins at a multiple of `alignment`: the first that there is.
    ///
    /// # Errors
    /// There is no room.
    pub fn take(&mut self, size_bytes: u64, alignment: u64) -> Result<DmaRange, NoRoom> {
        let alignment = alignment.max(self.alignment);
        let begin = |gap: &Range<u64>| {
            let begin = gap.start.checked_next_multiple_of(alignment)?;
            (begin.checked_add(size_bytes)? <= gap.end).then_some(begin)
        };
        if let Some(begin) = self.free.iter().find_map(begin) {
            let range = DmaRange::new(begin, size_bytes);
            self.free.remove(bounds(range));
            return Ok(range);
        }
        Err(if size_bytes > self.size_bytes() { NoRoom::Ever } else { self.no_room() })
    }

    /// Takes exactly `ranges`, all or none. They do not overlap, and none ends beyond 2^64.
    ///
    /// # Errors
    /// One of them is not free.
    pub fn take_exactly(&mut self, ranges: &[DmaRange]) -> Result<(), NoRoom> {
        if !ranges.iter().all(|range| is_in(&self.all, *range)) {
            return Err(NoRoom::Ever);
        }
        if !ranges.iter().all(|range| is_in(&self.free, *range)) {
            return Err(self.no_room());
        }
        ranges.iter().for_each(|range| self.free.remove(bounds(*range)));
        Ok(())
    }

    fn no_room(&self) -> NoRoom {
        if self.unscrubbed_bytes() > 0 { NoRoom::Yet } else { NoRoom::Now }
    }

    /// Nobody has `ranges` any more, which were taken.
    pub fn end(&mut self, ranges: &[DmaRange]) {
        if self.is_new {
            self.free.extend(ranges.iter().map(|range| bounds(*range)));
        } else {
            self.unscrubbed.extend(ranges.iter().copied());
        }
    }

    /// The content of what is free is not known any more: the device was reset.
    pub fn forget_content(&mut self) {
        if self.is_new {
            return;
        }
        self.forgotten += 1;
        for gap in std::mem::take(&mut self.free) {
            // As pieces, each of which is free as soon as it is scrubbed.
            let begins = gap.clone().step_by(SCRUB_BYTES as usize);
            let piece = |begin: u64| DmaRange::new(begin, SCRUB_BYTES.min(gap.end - begin));
            self.unscrubbed.extend(begins.map(piece));
        }
    }

    /// What is to be scrubbed next. Whoever gets it says [`scrubbed`](Space::scrubbed) or
    /// [`not_scrubbed`](Space::not_scrubbed) of it.
    pub fn next_to_scrub(&mut self) -> Option<Piece> {
        let range = self.unscrubbed.pop_front()?;
        self.being_scrubbed += range.length_bytes;
        Some(Piece { range, forgotten: self.forgotten })
    }

    /// `piece` holds zeros: it is free, unless the content was forgotten since.
    pub fn scrubbed(&mut self, piece: Piece) {
        if piece.forgotten != self.forgotten {
            self.not_scrubbed(piece);
            return;
        }
        self.being_scrubbed -= piece.range.length_bytes;
        self.free.insert(bounds(piece.range));
    }

    /// `piece` could not be scrubbed: it is not lent before it was.
    pub fn not_scrubbed(&mut self, piece: Piece) {
        self.being_scrubbed -= piece.range.length_bytes;
        self.unscrubbed.push_back(piece.range);
    }
}

/// What is to be scrubbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub range: DmaRange,
    /// How often the content had been forgotten when it was given out.
    forgotten: u64,
}

fn bounds(range: DmaRange) -> Range<u64> {
    range.offset_bytes..range.offset_bytes + range.length_bytes
}

fn is_in(set: &RangeSet<u64>, range: DmaRange) -> bool {
    set.get(&range.offset_bytes).is_some_and(|gap| bounds(range).end <= gap.end)
}

fn bytes(set: &RangeSet<u64>) -> u64 {
    set.iter().map(|gap| gap.end - gap.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use peervram_backends::{Region, RegionFlags};
    use proptest::prelude::*;

    const PAGE: u64 = 65536;

    fn space(pages: &[(u64, u64)], is_new: bool) -> Space {
        let region = Region {
            index: 2,
            size_bytes: 1 << 40,
            file_offset_bytes: 0,
            flags: RegionFlags::default(),
            capabilities: Vec::new(),
        };
        let ranges: Vec<_> =
            pages.iter().map(|&(offset, length)| DmaRange::new(offset * PAGE, length * PAGE)).collect();
        Space::new(&DmaRanges::new(&region, &ranges).unwrap(), PAGE, is_new)
    }

    fn scrub_all(space: &mut Space) {
        while let Some(range) = space.next_to_scrub() {
            space.scrubbed(range);
        }
    }

    #[test]
    fn nothing_is_lent_that_is_not_scrubbed() {
        let mut space = space(&[(0, 1024)], false);
        assert_eq!((space.free_bytes(), space.unscrubbed_bytes()), (1024 * PAGE, 1024 * PAGE));
        assert_eq!((space.take(PAGE, PAGE), space.largest_free_bytes()), (Err(NoRoom::Yet), 0));
        let first = space.next_to_scrub().unwrap();
        space.not_scrubbed(first);
        assert_eq!(space.take(PAGE, PAGE), Err(NoRoom::Yet));
        scrub_all(&mut space);
        let lent = space.take(3 * PAGE, PAGE).unwrap();
        assert_eq!(space.largest_free_bytes(), 1021 * PAGE);
        space.end(&[lent]);
        assert_eq!(space.take_exactly(&[lent]), Err(NoRoom::Yet));
        scrub_all(&mut space);
        space.take_exactly(&[lent]).unwrap();
        assert_eq!(space.take_exactly(&[lent]), Err(NoRoom::Now));
    }

    #[test]
    fn a_reset_leaves_nothing_scrubbed_and_nothing_out() {
        let mut space = space(&[(0, 1000), (2000, 24)], false);
        scrub_all(&mut space);
        let lent: Vec<_> = [5, 1, 700].map(|pages| space.take(pages * PAGE, PAGE).unwrap()).into();
        space.forget_content();
        assert_eq!(space.unscrubbed_bytes(), (1024 - 706) * PAGE);
        scrub_all(&mut space);
        space.end(&lent);
        scrub_all(&mut space);
        assert_eq!((space.free_bytes(), space.largest_free_bytes()), (1024 * PAGE, 1000 * PAGE));
    }

    /// A reset in the middle: what was written before it counts for nothing.
    #[test]
    fn what_was_scrubbed_before_a_reset_is_scrubbed_again() {
        let mut space = space(&[(0, 16)], false);
        let piece = space.next_to_scrub().unwrap();
        space.forget_content();
        space.scrubbed(piece);
        assert_eq!((space.take(PAGE, PAGE), space.unscrubbed_bytes()), (Err(NoRoom::Yet), 16 * PAGE));
        scrub_all(&mut space);
        space.take(16 * PAGE, PAGE).unwrap();
    }

    #[test]
    fn what_is_new_memory_is_never_scrubbed() {
        let mut space = space(&[(0, 4)], true);
        let lent = space.take(4 * PAGE, PAGE).unwrap();
        assert_eq!(space.take(PAGE, PAGE), Err(NoRoom::Now));
        assert_eq!(space.take(5 * PAGE, PAGE), Err(NoRoom::Ever));
        space.end(&[lent]);
        assert_eq!(space.take(4 * PAGE, PAGE), Ok(lent));
    }

    #[test]
    fn explicit_ranges_are_taken_all_or_none() {
        let mut space = space(&[(8, 8)], true);
        let range = |page: u64, pages: u64| DmaRange::new(page * PAGE, pages * PAGE);
        assert_eq!(space.take_exactly(&[range(8, 2), range(15, 2)]), Err(NoRoom::Ever));
        assert_eq!(space.take_exactly(&[range(4, 5)]), Err(NoRoom::Ever));
        assert_eq!(space.free_bytes(), 8 * PAGE);
        space.take_exactly(&[range(12, 1), range(8, 2)]).unwrap();
        assert_eq!(space.take(4 * PAGE, 1), Err(NoRoom::Now));
        assert_eq!(space.take(2 * PAGE, 4 * PAGE), Err(NoRoom::Now));
        assert_eq!(space.take(2 * PAGE, 1), Ok(range(10, 2)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take(u64, u32),
        TakeExactly(u64, u64),
        End(usize),
        Scrub(bool),
        Reset,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1_u64..40, 0_u32..4).prop_map(|(pages, shift)| Step::Take(pages, shift)),
            (0_u64..300, 1_u64..20).prop_map(|(page, pages)| Step::TakeExactly(page, pages)),
            (0_usize..100).prop_map(Step::End),
            any::<bool>().prop_map(Step::Scrub),
            Just(Step::Reset),
        ]
    }

    proptest! {
        /// No byte is lent twice, none gets lost, and alignment is kept.
        #[test]
        fn the_books_balance(steps in prop::collection::vec(step(), 1..120), is_new: bool) {
            let mut space = space(&[(0, 200), (256, 40)], is_new);
            let mut lent: Vec<DmaRange> = Vec::new();
            for step in steps {
                let taken = match step {
                    Step::Take(pages, shift) => {
                        let taken = space.take(pages * PAGE, PAGE << shift).ok();
                        prop_assert!(taken.is_none_or(|range| range.offset_bytes % (PAGE << shift) == 0));
                        taken
                    }
                    Step::TakeExactly(page, pages) => {
                        let range = DmaRange::new(page * PAGE, pages * PAGE);
                        space.take_exactly(&[range]).ok().map(|()| range)
                    }
                    Step::End(at) => {
                        if !lent.is_empty() {
                            let range = lent.swap_remove(at % lent.len());
                            space.end(&[range]);
                        }
                        None
                    }
                    Step::Scrub(works) => {
                        if let Some(range) = space.next_to_scrub() {
                            if works { space.scrubbed(range) } else { space.not_scrubbed(range) }
                        }
                        None
                    }
                    Step::Reset => {
                        space.forget_content();
                        None
                    }
                };
                if let Some(new) = taken {
                    let end = |range: &DmaRange| range.offset_bytes + range.length_bytes;
                    let apart = |old: &DmaRange| end(old) <= new.offset_bytes || end(&new) <= old.offset_bytes;
                    prop_assert!(lent.iter().all(apart), "{new:?} of {lent:?}");
                    lent.push(new);
                }
                let lent_bytes: u64 = lent.iter().map(|range| range.length_bytes).sum();
                prop_assert_eq!(space.free_bytes() + lent_bytes, 240 * PAGE);
                prop_assert!(space.largest_free_bytes() <= space.free_bytes());
            }
        }
    }
}
