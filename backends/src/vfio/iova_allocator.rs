//! Which IO virtual addresses of an address space are taken.
//!
//! First fit, from 4 GiB on: the addresses below are where firmware and interrupt controllers reserve
//! theirs (the MSI window at 0xfee00000), and every IOMMU that can host a GPU reaches beyond. Which addresses may be
//! used at all, [`iova_ranges`](super::iova_ranges) says.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::iova_ranges::{Addresses, without};

/// The lowest address that is given out.
pub(super) const FIRST: u64 = 1 << 32;
/// Large pages of the IOMMU need aligned addresses.
const ALIGNMENT: u64 = 2 << 20;

/// The ranges that are taken, by start: their length in bytes.
#[derive(Debug, Default)]
pub(super) struct IovaAllocator(Mutex<BTreeMap<u64, u64>>);

impl IovaAllocator {
    /// Takes the first free range of that length, which is not zero, out of `usable`; none where no gap is long enough.
    pub(super) fn take(&self, length_bytes: u64, usable: &[Addresses]) -> Option<u64> {
        let mut taken = self.0.lock();
        let ranges: Vec<Addresses> =
            taken.iter().map(|(&start, &length_bytes)| start..=start + (length_bytes - 1)).collect();
        let start = without(usable, &ranges).into_iter().find_map(|gap| {
            let start = (*gap.start()).max(FIRST).checked_next_multiple_of(ALIGNMENT)?;
            let last = start.checked_add(length_bytes.checked_sub(1)?)?;
            (last <= *gap.end()).then_some(start)
        })?;
        taken.insert(start, length_bytes);
        Some(start)
    }

    /// Gives a range back.
    pub(super) fn free(&self, start: u64, length_bytes: u64) {
        let removed = self.0.lock().remove(&start);
        debug_assert_eq!(removed, Some(length_bytes), "a range is given back as it was taken");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What an IOMMU of 39 bits reaches.
    const ALL: [Addresses; 1] = [0..=(1 << 39) - 1];

    #[test]
    fn a_gap_is_taken_again() {
        let iovas = IovaAllocator::default();
        assert_eq!(iovas.take(4096, &ALL), Some(4 << 30));
        let second = iovas.take(64 << 20, &ALL).unwrap();
        assert_eq!(second, (4 << 30) + (2 << 20));
        assert_eq!(iovas.take(4096, &ALL), Some(second + (64 << 20)));
        iovas.free(second, 64 << 20);
        assert_eq!(iovas.take(32 << 20, &ALL), Some(second));
        // What is left of the gap is exactly this long.
        assert_eq!(iovas.take((32 << 20) + 1, &ALL), Some(second + (66 << 20)));
        assert_eq!(iovas.take(32 << 20, &ALL), Some(second + (32 << 20)));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let iovas = IovaAllocator::default();
        let last = (4_u64 << 30) + (8 << 20) - 1;
        for length_bytes in [0, (8 << 20) + 1, 1 << 39, u64::MAX] {
            assert_eq!(iovas.take(length_bytes, &[0..=last]), None, "{length_bytes:#x}");
        }
        assert_eq!(iovas.take(8 << 20, &[0..=last]), Some(4 << 30));
        assert_eq!(iovas.take(1, &[0..=last]), None);
        assert_eq!(iovas.take(4096, &[]), None);
        assert_eq!(iovas.take(4096, &[u64::MAX - 4096..=u64::MAX]), None);
    }

    #[test]
    fn what_a_neighbour_answers_is_never_an_address_for_dma() {
        // A 16 GiB BAR at 4 GiB, behind a switch whose window ends in the middle of a large page.
        let bus = [(4 << 30)..=(20 << 30) - 1, (4 << 30)..=(20 << 30) + 0xf_ffff];
        let usable = without(&ALL, &bus);
        let iovas = IovaAllocator::default();
        assert_eq!(iovas.take(1 << 30, &usable), Some((20 << 30) + (2 << 20)));
        // A BAR that appears later is avoided from then on.
        let plugged = [(21 << 30)..=(30 << 30) - 1];
        assert_eq!(iovas.take(1 << 30, &without(&usable, &plugged)), Some(30 << 30));
    }

    proptest! {
        #[test]
        fn ranges_never_overlap(
            steps in prop::collection::vec((any::<bool>(), 1_u64..600), 1..60),
            bus in prop::collection::vec((0_u64..0x4000, 1_u64..0x200), 0..5),
        ) {
            let bus: Vec<Addresses> = (bus.iter())
                .map(|&(page, pages)| FIRST + page * 4096..=FIRST + (page + pages) * 4096 - 1)
                .collect();
            let usable = without(&ALL, &bus);
            let iovas = IovaAllocator::default();
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (take, pages) in steps {
                if take || held.is_empty() {
                    let length = pages * 4096;
                    let start = iovas.take(length, &usable).unwrap();
                    prop_assert!(start >= FIRST && start.is_multiple_of(ALIGNMENT));
                    prop_assert!(held.iter().all(|&(other, size)| start + length <= other || other + size <= start));
                    prop_assert!(bus.iter().all(|range| start > *range.end() || start + length <= *range.start()));
                    held.push((start, length));
                } else {
                    let (start, length) = held.swap_remove(pages as usize % held.len());
                    iovas.free(start, length);
                }
            }
        }
    }
}
