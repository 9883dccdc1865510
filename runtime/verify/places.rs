//! `VerifiedPart`: a part of lent memory that is tested, and which those are.
//!
//! Where address arithmetic goes wrong it does so at borders: of a page, of a large page, of a huge page, of
//! 32 bits, and where one range ends and the next begins. So a quick test takes the start, the middle, the end, what
//! lies across each of those borders that the memory has, and a page in the middle of each range; the start is as long
//! as the limit of bytes allows. What was wrong before is looked at again. A full test takes everything in
//! pieces, after a quick one: only the quick one has all its places written before any is read, and so sees
//! an offset that stands for another far away.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Borders that bytes must not be lost or doubled at, and how much is tested on either side.
const BORDERS: [(u64, u64, &str); 4] = [
    (4 << 10, 2 << 10, "across 4 KiB"),
    (64 << 10, 4 << 10, "across 64 KiB"),
    (2 << 20, 16 << 10, "across 2 MiB"),
    (4 << 30, 16 << 10, "across 4 GiB"),
];

/// How much is tested at the end and in the middle.
const SPOT_BYTES: u64 = 64 << 10;

/// How much is tested on either side of a border between ranges, in the middle of a range, and where bytes were wrong.
const PAGE_BYTES: u64 = 4 << 10;

/// Bytes of a piece of a full test.
pub(crate) const PIECE_BYTES: u64 = 16 << 20;

/// The least that a quick test of one range takes, whatever the limit: all spots and borders.
pub(crate) const LEAST_BYTES: u64 = 512 << 10;

/// One part of lent memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct VerifiedPart {
    /// Where it begins, from the start of what was lent, in bytes.
    pub offset_bytes: u64,
    /// How long it is, in bytes.
    pub length_bytes: u64,
    /// Why it was chosen.
    pub name: String,
}

impl VerifiedPart {
    fn end_bytes(&self) -> u64 {
        self.offset_bytes + self.length_bytes
    }

    /// Whether the byte at `offset_bytes` is in it.
    pub(crate) fn contains(&self, offset_bytes: u64) -> bool {
        offset_bytes.checked_sub(self.offset_bytes).is_some_and(|at| at < self.length_bytes)
    }
}

impl fmt::Display for VerifiedPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:#x}+{:#x}", self.name, self.offset_bytes, self.length_bytes)
    }
}

/// The places of a quick test of ranges of these sizes, one after the other, in order and apart from each other.
/// Together they are at most `limit_bytes`, or [`least_bytes`]. `wrong` is where bytes were wrong before, from the
/// start of the first range.
pub(crate) fn quick(ranges_bytes: &[u64], limit_bytes: u64, wrong: &[u64]) -> Vec<VerifiedPart> {
    let size_bytes: u64 = ranges_bytes.iter().sum();
    let limit_bytes = limit_bytes.max(least_bytes(ranges_bytes.len(), wrong.len()));
    let clip = |from: u64, to: u64, name: &str| {
        let (from, to) = (from.min(size_bytes), to.min(size_bytes));
        (to > from).then(|| VerifiedPart { offset_bytes: from, length_bytes: to - from, name: name.into() })
    };
    let around = |at: u64, on_either_side: u64, name: &str| {
        clip(at.saturating_sub(on_either_side), at.saturating_add(on_either_side), name)
    };
    let page = |at: u64, name: &str| {
        let start = at / PAGE_BYTES * PAGE_BYTES;
        clip(start, start.saturating_add(PAGE_BYTES), name)
    };
    let spots = [
        around(size_bytes / 2 / PAGE_BYTES * PAGE_BYTES, SPOT_BYTES / 2, "middle"),
        clip(size_bytes.saturating_sub(SPOT_BYTES), size_bytes, "end"),
    ];
    let borders = BORDERS.iter().map(|&(border, on_either_side, name)| {
        (size_bytes > border).then(|| around(border, on_either_side, name)).flatten()
    });
    let starts = ranges_bytes.iter().scan(0, |next, length_bytes| {
        let start = *next;
        *next += length_bytes;
        Some((start, *length_bytes))
    });
    let ranges = starts.enumerate().skip(usize::from(ranges_bytes.len() == 1)).flat_map(
        |(number, (start, length))| {
            let border =
                (number > 0).then(|| around(start, PAGE_BYTES, &format!("into range {number}"))).flatten();
            [border, page(start + length / 2, &format!("middle of range {number}"))]
        },
    );
    let again = wrong.iter().map(|&at| page(at, "wrong before"));
    let mut rest: Vec<VerifiedPart> =
        spots.into_iter().chain(borders).chain(ranges).chain(again).flatten().collect();
    let taken: u64 = rest.iter().map(|place| place.length_bytes).sum();
    // The overlap of the start with other places counts twice, so coverage is underestimated.
    rest.extend(clip(0, (limit_bytes - taken) / PAGE_BYTES * PAGE_BYTES, "start"));
    merge(rest)
}

/// The least that a quick test takes of so many ranges, with so many places that were wrong before.
fn least_bytes(ranges: usize, wrong: usize) -> u64 {
    LEAST_BYTES + (3 * ranges + wrong) as u64 * PAGE_BYTES
}

/// Sorts places and makes one of those that touch.
fn merge(mut places: Vec<VerifiedPart>) -> Vec<VerifiedPart> {
    places.sort_by_key(|place| (place.offset_bytes, place.length_bytes));
    let mut merged: Vec<VerifiedPart> = Vec::with_capacity(places.len());
    for place in places {
        match merged.last_mut() {
            Some(last) if last.end_bytes() >= place.offset_bytes => {
                last.length_bytes = last.end_bytes().max(place.end_bytes()) - last.offset_bytes;
                last.name = format!("{}, {}", last.name, place.name);
            }
            _ => merged.push(place),
        }
    }
    merged
}

/// Everything, in pieces.
pub(crate) fn full(size_bytes: u64) -> impl Iterator<Item = VerifiedPart> {
    (0..size_bytes.div_ceil(PIECE_BYTES)).map(move |index| {
        let offset_bytes = index * PIECE_BYTES;
        let length_bytes = PIECE_BYTES.min(size_bytes - offset_bytes);
        VerifiedPart { offset_bytes, length_bytes, name: "everything".into() }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    fn covers(places: &[VerifiedPart], offset: u64) -> bool {
        places.iter().any(|place| place.contains(offset))
    }

    /// Whether a place was chosen for this reason, and not for one that reads alike.
    fn has(places: &[VerifiedPart], reason: &str) -> bool {
        places.iter().flat_map(|place| place.name.split(", ")).any(|name| name == reason)
    }

    #[test]
    fn a_page_is_tested_whole() {
        let places = quick(&[PAGE], 1 << 20, &[]);
        assert_eq!(places.len(), 1);
        assert_eq!((places[0].offset_bytes, places[0].length_bytes), (0, PAGE));
    }

    #[test]
    fn a_large_aperture_is_tested_at_every_border() {
        let places = quick(&[24 << 30], 1 << 20, &[]);
        for name in
            ["start", "middle", "end", "across 4 KiB", "across 64 KiB", "across 2 MiB", "across 4 GiB"]
        {
            assert!(has(&places, name), "{name} is not in {places:?}");
        }
        for (border, on_either_side, name) in BORDERS {
            assert!(covers(&places, border - on_either_side), "{name}");
            assert!(covers(&places, border + on_either_side - 1), "{name}");
        }
        let (middle, end) = (12 << 30, 24 << 30);
        for at in [0, middle - SPOT_BYTES / 2, middle + SPOT_BYTES / 2 - 1, end - SPOT_BYTES, end - 1] {
            assert!(covers(&places, at), "{at:#x} is not in {places:?}");
        }
        assert!(!covers(&places, middle - SPOT_BYTES / 2 - 1) && !covers(&places, end - SPOT_BYTES - 1));
        // A border that the memory ends at is none.
        assert!(!has(&quick(&[2 << 20], 1 << 20, &[]), "across 2 MiB"));
        assert!(has(&quick(&[(2 << 20) + PAGE], 1 << 20, &[]), "across 2 MiB"));
    }

    /// Ten ranges of 1 GiB: once five had no tested place, and seven of the nine borders between them none.
    #[test]
    fn every_range_and_every_border_between_two_is_tested() {
        let places = quick(&[1 << 30; 10], 2 << 20, &[]);
        for number in 0..10 {
            let start = number << 30;
            assert!(covers(&places, start + (1 << 29)), "the middle of range {number}");
            assert!(has(&places, &format!("middle of range {number}")));
            assert_eq!(has(&places, &format!("into range {number}")), number > 0);
            if number > 0 {
                for at in [start - PAGE, start - 1, start, start + PAGE - 1] {
                    assert!(covers(&places, at), "{at:#x}, at the border of range {number}");
                }
            }
        }
        assert!(!quick(&[1 << 30], 2 << 20, &[]).iter().any(|place| place.name.contains("range")));
    }

    /// The least is twelve kilobytes for a range and four for a place, beside what one range takes.
    #[test]
    fn without_a_limit_every_place_still_fits() {
        assert_eq!(least_bytes(1, 0), (512 + 12) << 10);
        assert_eq!(least_bytes(2, 5), (512 + 24 + 20) << 10);
        let places = quick(&[1 << 30; 40], 0, &[7 << 30; 4]);
        assert!(has(&places, "start") && has(&places, "middle of range 39"), "{places:?}");
        assert_eq!(quick(&[], 1 << 20, &[]), [], "nothing that was lent has no places");
    }

    #[test]
    fn what_was_wrong_is_looked_at_again() {
        let wrong = [5 << 30, (5 << 30) + PAGE + 17];
        let places = quick(&[8 << 30], 0, &wrong);
        assert!(wrong.iter().all(|&at| covers(&places, at)));
        assert!(has(&places, "wrong before"));
        assert!(!covers(&quick(&[8 << 30], 0, &[]), wrong[0]));
    }

    #[test]
    fn a_byte_is_in_a_place_or_not() {
        let place = VerifiedPart { offset_bytes: 8, length_bytes: 4, name: String::new() };
        let inside: Vec<u64> = (0..20).filter(|&at| place.contains(at)).collect();
        assert_eq!(inside, [8, 9, 10, 11]);
        // A file may say anything.
        let last = VerifiedPart { offset_bytes: u64::MAX, length_bytes: u64::MAX, name: String::new() };
        assert!(last.contains(u64::MAX) && !last.contains(0));
    }

    #[test]
    fn a_place_is_shown_with_its_reason() {
        let place = VerifiedPart { offset_bytes: 8192, length_bytes: 4096, name: "start".into() };
        assert_eq!(place.to_string(), "start: 0x2000+0x1000");
    }

    #[test]
    fn full_is_everything_once() {
        let mut next = 0;
        for place in full(PIECE_BYTES * 2 + PAGE) {
            assert_eq!(place.offset_bytes, next);
            next = place.end_bytes();
        }
        assert_eq!(next, PIECE_BYTES * 2 + PAGE);
    }

    proptest! {
        #[test]
        fn places_are_inside_apart_bounded_and_at_every_border(
            pages in prop::collection::vec(prop_oneof![1_u64..20, 1_u64..1 << 22], 1..40),
            limit in 0_u64..64 << 20,
            wrong in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let ranges: Vec<u64> = pages.iter().map(|pages| pages * PAGE).collect();
            let size: u64 = ranges.iter().sum();
            let wrong: Vec<u64> = wrong.iter().map(|at| at.index(size as usize) as u64).collect();
            let places = quick(&ranges, limit, &wrong);
            for pair in places.windows(2) {
                prop_assert!(pair[0].end_bytes() < pair[1].offset_bytes);
            }
            prop_assert!(places.iter().all(|place| place.length_bytes > 0 && place.end_bytes() <= size));
            // Copies of engines want aligned places.
            prop_assert!(places.iter().all(|place| place.offset_bytes % 2048 == 0 && place.length_bytes % 2048 == 0));
            let sum: u64 = places.iter().map(|place| place.length_bytes).sum();
            prop_assert!(sum <= limit.max(least_bytes(ranges.len(), wrong.len())).min(size));
            prop_assert!(covers(&places, 0) && covers(&places, size - 1) && covers(&places, size / 2));
            for (border, _, name) in BORDERS {
                if size > border {
                    prop_assert!(covers(&places, border - 1) && covers(&places, border), "{}", name);
                }
            }
            let mut start = 0;
            for length in &ranges {
                prop_assert!(covers(&places, start) && covers(&places, start + length - 1));
                prop_assert!(covers(&places, start + length / 2));
                start += length;
            }
            prop_assert!(wrong.iter().all(|&at| covers(&places, at)));
        }
    }
}
