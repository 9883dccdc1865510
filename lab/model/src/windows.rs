//! The DMA windows of a device: which ranges of DMA addresses lead where. Pure.
//!
//! Windows do not overlap. They are taken back whole: a range that cuts through one is refused, a
//! range that covers many or none is fine (QEMU takes back whole address spaces that way).
//!
//! Absent: what a window leads to. `T` is the caller's.

use std::collections::BTreeMap;

use rustix::io::Errno;

use crate::protocol::{Access, DmaMap, DmaUnmap};

/// The most windows; QEMU's own limit.
pub const WINDOWS_MAX: usize = 65535;

#[derive(Debug)]
struct Window<T> {
    last: u64,
    offset: u64,
    access: Access,
    target: T,
}

/// A piece of a transfer that lies in one window.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece<'a, T> {
    /// Where it leads.
    pub target: &'a T,
    /// Offset of the first byte in what `target` stands for.
    pub offset: u64,
    /// How many of the bytes asked for lie in this window; at least one.
    pub bytes: usize,
}

/// Which way bytes go, as the device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device reads memory.
    Read,
    /// The device writes memory.
    Write,
}

/// All windows of a device.
#[derive(Debug)]
pub struct Windows<T> {
    by_address: BTreeMap<u64, Window<T>>,
}

impl<T> Default for Windows<T> {
    fn default() -> Self {
        Windows { by_address: BTreeMap::new() }
    }
}

impl<T> Windows<T> {
    /// Adds a window.
    ///
    /// # Errors
    /// `EEXIST` if it overlaps another, `ENOSPC` beyond [`WINDOWS_MAX`], `EOVERFLOW` or `EINVAL`
    /// for a range that is none.
    pub fn insert(&mut self, map: &DmaMap, target: T) -> Result<(), Errno> {
        let last = match map.size_bytes {
            0 => return Err(Errno::INVAL),
            size => map.address.checked_add(size - 1).ok_or(Errno::OVERFLOW)?,
        };
        map.offset.checked_add(map.size_bytes).ok_or(Errno::OVERFLOW)?;
        if self.by_address.len() >= WINDOWS_MAX {
            return Err(Errno::NOSPC);
        }
        if self.below(last).is_some_and(|(_, window)| window.last >= map.address) {
            return Err(Errno::EXIST);
        }
        let window = Window { last, offset: map.offset, access: map.access, target };
        self.by_address.insert(map.address, window);
        Ok(())
    }

    /// Removes windows; says how many.
    ///
    /// # Errors
    /// `EINVAL` if the range cuts through a window; nothing is removed then.
    pub fn remove(&mut self, unmap: DmaUnmap) -> Result<usize, Errno> {
        let (first, last) = match unmap {
            DmaUnmap::All => (0, u64::MAX),
            DmaUnmap::Range { first, last } if first <= last => (first, last),
            DmaUnmap::Range { .. } => return Err(Errno::INVAL),
        };
        let cut_at_start = first.checked_sub(1).and_then(|before| self.below(before));
        let cut_at_end = self.below(last);
        if cut_at_start.is_some_and(|(_, window)| window.last >= first)
            || cut_at_end.is_some_and(|(_, window)| window.last > last)
        {
            return Err(Errno::INVAL);
        }
        let starts: Vec<u64> = self.by_address.range(first..=last).map(|(start, _)| *start).collect();
        for start in &starts {
            self.by_address.remove(start);
        }
        Ok(starts.len())
    }

    /// Where the first bytes of a transfer go.
    ///
    /// # Errors
    /// `EFAULT` where nothing is mapped, `EACCES` where the direction is not allowed.
    pub fn find(&self, address: u64, bytes: usize, direction: Direction) -> Result<Piece<'_, T>, Errno> {
        let (start, window) = self
            .below(address)
            .filter(|(_, window)| window.last >= address && bytes > 0)
            .ok_or(Errno::FAULT)?;
        let allowed = match direction {
            Direction::Read => window.access.read,
            Direction::Write => window.access.write,
        };
        if !allowed {
            return Err(Errno::ACCESS);
        }
        // One less than what is left, so that a window of 2^64 bytes has no overflow.
        let left_minus_one = window.last - address;
        let bytes = usize::try_from(left_minus_one).map_or(bytes, |left| bytes.min(left.saturating_add(1)));
        Ok(Piece { target: &window.target, offset: window.offset.saturating_add(address - start), bytes })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_address.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    fn below(&self, address: u64) -> Option<(u64, &Window<T>)> {
        self.by_address.range(..=address).next_back().map(|(start, window)| (*start, window))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn window(address: u64, size_bytes: u64) -> DmaMap {
        DmaMap { access: Access { read: true, write: true }, offset: 0, address, size_bytes }
    }

    #[test]
    fn overlaps_are_refused_and_neighbours_are_not() {
        let mut windows = Windows::default();
        windows.insert(&window(0x2000, 0x1000), 'a').unwrap();
        for (address, size) in [(0x2000, 1), (0x1fff, 2), (0x2fff, 1), (0x1000, 0x4000)] {
            assert_eq!(
                windows.insert(&window(address, size), 'b'),
                Err(Errno::EXIST),
                "{address:#x}+{size:#x}"
            );
        }
        windows.insert(&window(0x1000, 0x1000), 'b').unwrap();
        windows.insert(&window(0x3000, 0x1000), 'c').unwrap();
        assert_eq!(windows.find(0x1ff0, 0x100, Direction::Read).unwrap().bytes, 0x10);
    }

    #[test]
    fn a_range_that_cuts_through_a_window_removes_nothing() {
        let mut windows = Windows::default();
        windows.insert(&window(0x1000, 0x1000), ()).unwrap();
        windows.insert(&window(0x4000, 0x1000), ()).unwrap();
        let cut = DmaUnmap::Range { first: 0, last: 0x4000 };
        assert_eq!(windows.remove(cut), Err(Errno::INVAL));
        assert_eq!(windows.remove(DmaUnmap::Range { first: 0x1800, last: 0x1fff }), Err(Errno::INVAL));
        assert_eq!(windows.remove(DmaUnmap::Range { first: 0x8000, last: u64::MAX }), Ok(0));
        assert_eq!(windows.remove(DmaUnmap::All), Ok(2));
    }

    #[test]
    fn rights_are_kept() {
        let mut windows = Windows::default();
        let map = DmaMap { access: Access { read: true, write: false }, ..window(0, 0x1000) };
        windows.insert(&map, ()).unwrap();
        assert_eq!(windows.find(0, 1, Direction::Write).unwrap_err(), Errno::ACCESS);
        assert_eq!(windows.find(0x1000, 1, Direction::Read).unwrap_err(), Errno::FAULT);
    }

    proptest! {
        /// Against a plain map from byte to window.
        #[test]
        fn any_sequence_agrees_with_a_map_of_bytes(
            steps in proptest::collection::vec((any::<bool>(), 0u64..48, 1u64..16), 1..40),
        ) {
            let mut windows = Windows::default();
            let mut bytes = std::collections::BTreeMap::new();
            for (number, (add, first, size)) in steps.into_iter().enumerate() {
                let last = first + size - 1;
                if add {
                    let free = (first..=last).all(|byte| !bytes.contains_key(&byte));
                    prop_assert_eq!(windows.insert(&window(first, size), number).is_ok(), free);
                    if free {
                        bytes.extend((first..=last).map(|byte| (byte, number)));
                    }
                } else {
                    let cut = |a: u64, b: u64| bytes.get(&a).is_some_and(|n| bytes.get(&b) == Some(n));
                    let is_cut = cut(last, last + 1) || first > 0 && cut(first - 1, first);
                    prop_assert_eq!(windows.remove(DmaUnmap::Range { first, last }).is_ok(), !is_cut);
                    if !is_cut {
                        bytes.retain(|byte, _| *byte < first || *byte > last);
                    }
                }
            }
            for byte in 0..70 {
                let found = windows.find(byte, 1, Direction::Read).ok().map(|piece| *piece.target);
                prop_assert_eq!(found, bytes.get(&byte).copied());
            }
        }
    }
}
