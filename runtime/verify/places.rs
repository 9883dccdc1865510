//! `Places`: which parts of lent memory are tested.
//!
//! Where address arithmetic goes wrong it does so at borders: of a page, of a large page, of a huge page, of
//! 32 bits. So a quick test takes the start, the middle, the end, and what lies across each of those borders
//! that the memory has; the start is as long as the limit of bytes allows. A full test takes everything in
//! pieces, after a quick one: only the quick one has all its places written before any is read, and so sees
//! an offset that stands for another far away.

use std::fmt;

/// Borders that bytes must not be lost or doubled at, and how much is tested on either side.
const BORDERS: [(u64, u64, &str); 4] = [
    (4 << 10, 2 << 10, "across 4 KiB"),
    (64 << 10, 4 << 10, "across 64 KiB"),
    (2 << 20, 16 << 10, "across 2 MiB"),
    (4 << 30, 16 << 10, "across 4 GiB"),
];

/// How much is tested at the end and in the middle.
const SPOT_BYTES: u64 = 64 << 10;

/// Bytes of a piece of a full test.
pub(crate) const PIECE_BYTES: u64 = 16 << 20;

/// The least that a quick test takes, whatever the limit: all spots and borders.
pub(crate) const LEAST_BYTES: u64 = 512 << 10;

/// One part of lent memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub offset_bytes: u64,
    pub length_bytes: u64,
    /// Why it was chosen.
    pub name: String,
}

impl Place {
    fn end_bytes(&self) -> u64 {
        self.offset_bytes + self.length_bytes
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:#x}+{:#x}", self.name, self.offset_bytes, self.length_bytes)
    }
}

/// The places of a quick test of memory of `size_bytes`, in order and apart from each other, and together at
/// most `limit_bytes`, or [`LEAST_BYTES`].
pub(crate) fn quick(size_bytes: u64, limit_bytes: u64) -> Vec<Place> {
    let limit_bytes = limit_bytes.max(LEAST_BYTES);
    let clip = |from: u64, to: u64, name: &str| {
        let (from, to) = (from.min(size_bytes), to.min(size_bytes));
        (to > from).then(|| Place { offset_bytes: from, length_bytes: to - from, name: name.into() })
    };
    let middle = size_bytes / 2 / 4096 * 4096;
    let spots = [
        clip(middle.saturating_sub(SPOT_BYTES / 2), middle + SPOT_BYTES / 2, "middle"),
        clip(size_bytes.saturating_sub(SPOT_BYTES), size_bytes, "end"),
    ];
    let borders = BORDERS.iter().map(|&(border, around_bytes, name)| {
        (size_bytes > border).then(|| clip(border - around_bytes, border + around_bytes, name)).flatten()
    });
    let mut rest: Vec<Place> = spots.into_iter().chain(borders).flatten().collect();
    let taken: u64 = rest.iter().map(|place| place.length_bytes).sum();
    // What lies in the start anyway counts twice, which errs to the smaller side.
    rest.extend(clip(0, (limit_bytes - taken) / 4096 * 4096, "start"));
    merge(rest)
}

/// Sorts places and makes one of those that touch.
fn merge(mut places: Vec<Place>) -> Vec<Place> {
    places.sort_by_key(|place| (place.offset_bytes, place.length_bytes));
    let mut merged: Vec<Place> = Vec::with_capacity(places.len());
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
pub(crate) fn full(size_bytes: u64) -> impl Iterator<Item = Place> {
    (0..size_bytes.div_ceil(PIECE_BYTES)).map(move |index| {
        let offset_bytes = index * PIECE_BYTES;
        let length_bytes = PIECE_BYTES.min(size_bytes - offset_bytes);
        Place { offset_bytes, length_bytes, name: "everything".into() }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    fn covers(places: &[Place], offset: u64) -> bool {
        places.iter().any(|place| (place.offset_bytes..place.end_bytes()).contains(&offset))
    }

    #[test]
    fn a_page_is_tested_whole() {
        let places = quick(PAGE, 1 << 20);
        assert_eq!(places.len(), 1);
        assert_eq!((places[0].offset_bytes, places[0].length_bytes), (0, PAGE));
    }

    #[test]
    fn a_large_aperture_is_tested_at_every_border() {
        let places = quick(24 << 30, 1 << 20);
        let names: String = places.iter().map(|place| place.name.clone() + "; ").collect();
        for name in ["start", "middle", "end", "4 KiB", "64 KiB", "2 MiB", "4 GiB"] {
            assert!(names.contains(name), "{name} is not in {names}");
        }
        assert!(covers(&places, (24 << 30) - 1));
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
        fn places_are_inside_apart_bounded_and_at_every_border(pages in 1_u64..1 << 25, limit in 0_u64..64 << 20) {
            let size = pages * PAGE;
            let places = quick(size, limit);
            for pair in places.windows(2) {
                prop_assert!(pair[0].end_bytes() < pair[1].offset_bytes);
            }
            prop_assert!(places.iter().all(|place| place.length_bytes > 0 && place.end_bytes() <= size));
            // Copies of engines want aligned places.
            prop_assert!(places.iter().all(|place| place.offset_bytes % 2048 == 0 && place.length_bytes % 2048 == 0));
            let sum: u64 = places.iter().map(|place| place.length_bytes).sum();
            prop_assert!(sum <= limit.max(LEAST_BYTES).min(size));
            prop_assert!(covers(&places, 0) && covers(&places, size - 1) && covers(&places, size / 2));
            for (border, _, name) in BORDERS {
                if size > border {
                    prop_assert!(covers(&places, border - 1) && covers(&places, border), "{}", name);
                }
            }
        }
    }
}
