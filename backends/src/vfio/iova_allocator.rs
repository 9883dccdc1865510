//! Which IO virtual addresses of an address space are taken.
//!
//! First fit, from 4 GiB on: the addresses below are where firmware and interrupt controllers reserve
//! theirs (the MSI window at 0xfee00000), and every IOMMU that can host a GPU reaches beyond.

use std::collections::BTreeMap;

use parking_lot::Mutex;

const FIRST: u64 = 1 << 32;
/// What the weakest IOMMUs of today translate: 39 bits.
const END: u64 = 1 << 39;
/// Large pages of the IOMMU need aligned addresses.
const ALIGNMENT: u64 = 2 << 20;

/// The ranges that are taken, by start: their length in bytes.
#[derive(Debug, Default)]
pub(super) struct IovaAllocator(Mutex<BTreeMap<u64, u64>>);

impl IovaAllocator {
    /// Takes the first free range of that length; none where no gap is long enough.
    pub(super) fn take(&self, length_bytes: u64) -> Option<u64> {
        let mut taken = self.0.lock();
        let mut start = FIRST;
        for (&begin, &length) in taken.iter() {
            if begin - start >= length_bytes {
                break;
            }
            start = (begin + length).next_multiple_of(ALIGNMENT);
        }
        if start.checked_add(length_bytes)? > END {
            return None;
        }
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

    #[test]
    fn a_gap_is_taken_again() {
        let iovas = IovaAllocator::default();
        let first = iovas.take(4096).unwrap();
        let second = iovas.take(64 << 20).unwrap();
        let third = iovas.take(4096).unwrap();
        assert!(first < second && second < third && second.is_multiple_of(ALIGNMENT));
        iovas.free(second, 64 << 20);
        assert_eq!(iovas.take(32 << 20), Some(second));
        assert_eq!(iovas.take(END), None);
        assert_eq!(iovas.take(u64::MAX), None);
    }

    proptest! {
        #[test]
        fn ranges_never_overlap(steps in prop::collection::vec((any::<bool>(), 1_u64..600), 1..60)) {
            let iovas = IovaAllocator::default();
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (take, pages) in steps {
                if take || held.is_empty() {
                    let length = pages * 4096;
                    let start = iovas.take(length).unwrap();
                    prop_assert!(held.iter().all(|&(other, size)| start + length <= other || other + size <= start));
                    held.push((start, length));
                } else {
                    let (start, length) = held.swap_remove(pages as usize % held.len());
                    iovas.free(start, length);
                }
            }
        }
    }
}
