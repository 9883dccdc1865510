//! `VramRoom`: a part of VRAM from which pieces are taken and to which they are given back. First fit.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// A part of VRAM, with what of it is taken: starts and lengths, in bytes.
#[derive(Debug)]
pub(crate) struct VramRoom {
    all: Range<u64>,
    taken: Mutex<BTreeMap<u64, u64>>,
}

/// A piece of VRAM, given back when dropped.
#[derive(Debug)]
pub struct VramPiece {
    room: Arc<VramRoom>,
    start: u64,
    length_bytes: u64,
}

impl VramRoom {
    /// All of `all`, in bytes from the start of VRAM.
    pub fn new(all: Range<u64>) -> Arc<Self> {
        Arc::new(Self { all, taken: Mutex::default() })
    }

    /// Whether it never had a byte.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Takes the first gap that is long enough.
    pub fn take(self: &Arc<Self>, length_bytes: u64) -> Option<VramPiece> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut start = self.all.start;
        for (&begin, &length) in taken.iter() {
            if begin - start >= length_bytes {
                break;
            }
            start = begin + length;
        }
        if start.checked_add(length_bytes)? > self.all.end {
            return None;
        }
        taken.insert(start, length_bytes);
        Some(VramPiece { room: Arc::clone(self), start, length_bytes })
    }
}

impl VramPiece {
    /// Where it begins, in bytes from the start of VRAM.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Its length in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }
}

impl Drop for VramPiece {
    fn drop(&mut self) {
        self.room.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_are_taken_again() {
        let room = VramRoom::new(4096..16384);
        let first = room.take(4096).unwrap();
        let second = room.take(4096).unwrap();
        let third = room.take(4096).unwrap();
        assert_eq!([first.start(), second.start(), third.start()], [4096, 8192, 12288]);
        assert!(room.take(4096).is_none() && room.take(u64::MAX).is_none());
        drop(second);
        assert!(room.take(8192).is_none());
        assert_eq!(room.take(4096).unwrap().start(), 8192);
        assert!(VramRoom::new(0..0).is_empty() && !room.is_empty());
    }
}
