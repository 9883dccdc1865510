//! `Bytes`: what is copied, what destinations are poisoned with, and what was wrong with what arrived.
//!
//! Each word of eight bytes is its own place, scrambled, so none is like another. What a round sends, and what it
//! poisons with, are the same words from other pages on: everything is made once, and engines reach it by one
//! mapping.

use std::sync::Arc;

use peervram::Result;
use peervram::backends::{HostSlice, Mapping};
use serde::{Deserialize, Serialize};

/// What a round is shifted by.
const SHIFT_BYTES: u64 = 4096;
/// Rounds that differ; poisons come behind them.
const ROUNDS: u64 = 8;
/// Compared at a time.
const PIECE_BYTES: usize = 64 << 10;

/// Host memory full of words that say where they belong.
#[derive(Debug)]
pub struct Bytes {
    words: Arc<Mapping>,
}

/// What was wrong with bytes that were copied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wrong {
    /// Where the first wrong byte is.
    pub first_wrong_bytes: u64,
    /// How many are wrong.
    pub wrong_bytes: u64,
    /// How many bytes were compared.
    pub of_bytes: u64,
    /// What they look like.
    pub looks_like: String,
}

impl Bytes {
    /// For copies of at most `most_bytes`, a multiple of the page size.
    ///
    /// # Errors
    /// The host has not that much memory.
    pub fn new(most_bytes: u64) -> Result<Self> {
        let length_bytes = most_bytes + 2 * ROUNDS * SHIFT_BYTES;
        let words = Mapping::of_host_memory(length_bytes as usize)?;
        let mut piece = vec![0; PIECE_BYTES];
        for at in (0..length_bytes).step_by(PIECE_BYTES) {
            for (index, word) in (at / 8..).zip(piece.as_chunks_mut::<8>().0) {
                *word = scrambled(index).to_le_bytes();
            }
            let length = piece.len().min((length_bytes - at) as usize);
            words.write(at as usize, &piece[..length])?;
        }
        Ok(Self { words: Arc::new(words) })
    }

    /// What is sent in a round.
    ///
    /// # Errors
    /// `length_bytes` is larger than the largest copy.
    pub fn sent(&self, round: u64, length_bytes: u64) -> Result<HostSlice> {
        self.at_page(round % ROUNDS, length_bytes)
    }

    /// What destinations are filled with before it.
    ///
    /// # Errors
    /// As [`Bytes::sent`].
    pub fn poison(&self, round: u64, length_bytes: u64) -> Result<HostSlice> {
        self.at_page(ROUNDS + round % ROUNDS, length_bytes)
    }

    fn at_page(&self, page: u64, length_bytes: u64) -> Result<HostSlice> {
        HostSlice::new(Arc::clone(&self.words), (page * SHIFT_BYTES) as usize, length_bytes as usize)
    }

    /// What is wrong with what `seen` has after a round; nothing where all of it is right.
    ///
    /// # Errors
    /// A mapping that cannot be read.
    pub fn check(&self, round: u64, seen: &HostSlice) -> Result<Option<Wrong>> {
        let of_bytes = seen.length_bytes() as u64;
        let (sent, poison) = (self.sent(round, of_bytes)?, self.poison(round, of_bytes)?);
        let mut tally = Tally::default();
        let [mut right, mut here, mut poisoned] = [(); 3].map(|()| vec![0; PIECE_BYTES]);
        for at in (0..seen.length_bytes()).step_by(PIECE_BYTES) {
            let length = PIECE_BYTES.min(seen.length_bytes() - at);
            let read = |slice: &HostSlice, into: &mut [u8]| {
                slice.mapping().read(slice.offset_bytes() + at, &mut into[..length])
            };
            read(&sent, &mut right)?;
            read(seen, &mut here)?;
            if right[..length] != here[..length] {
                read(&poison, &mut poisoned)?;
                tally.add(at as u64, &right[..length], &here[..length], &poisoned[..length]);
            }
        }
        Ok(tally.into_wrong(of_bytes))
    }
}

/// Wrong bytes, counted by what they look like.
#[derive(Debug, Default)]
struct Tally {
    first: Option<u64>,
    wrong: u64,
    ones: u64,
    zeros: u64,
    poison: u64,
}

impl Tally {
    fn add(&mut self, offset_bytes: u64, right: &[u8], seen: &[u8], poison: &[u8]) {
        for (index, ((&right, &seen), &poison)) in right.iter().zip(seen).zip(poison).enumerate() {
            if right != seen {
                self.first.get_or_insert(offset_bytes + index as u64);
                self.wrong += 1;
                self.ones += u64::from(seen == 0xff);
                self.zeros += u64::from(seen == 0);
                self.poison += u64::from(seen == poison);
            }
        }
    }

    fn into_wrong(self, of_bytes: u64) -> Option<Wrong> {
        let first_wrong_bytes = self.first?;
        let looks_like = match self.wrong {
            all if all == self.poison => "what was in the destination before: nothing arrived",
            all if all == self.ones => "all ones, as where nobody answers",
            all if all == self.zeros => "zeros",
            _ => "other bytes",
        };
        Some(Wrong {
            first_wrong_bytes,
            wrong_bytes: self.wrong,
            of_bytes,
            looks_like: looks_like.to_owned(),
        })
    }
}

/// The finaliser of SplitMix64: every bit hangs on every other.
fn scrambled(index: u64) -> u64 {
    let mut word = index.wrapping_add(0x9E37_79B9_7F4A_7C15);
    word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ word >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE_BYTES: usize = 96 << 10;

    /// What is found wrong with round 1 after `change`.
    fn wrong(change: fn(&Bytes, &mut Vec<u8>)) -> Option<Wrong> {
        let bytes = Bytes::new(SIZE_BYTES as u64).unwrap();
        let sent = bytes.sent(1, SIZE_BYTES as u64).unwrap();
        let mut seen = vec![0; SIZE_BYTES];
        sent.mapping().read(sent.offset_bytes(), &mut seen).unwrap();
        change(&bytes, &mut seen);
        let landing = Arc::new(Mapping::of_host_memory(SIZE_BYTES).unwrap());
        landing.write(0, &seen).unwrap();
        bytes.check(1, &HostSlice::new(landing, 0, SIZE_BYTES).unwrap()).unwrap()
    }

    #[test]
    fn right_bytes_are_right() {
        assert_eq!(wrong(|_, _| ()), None);
    }

    #[test]
    fn wrong_bytes_are_counted_and_named() {
        let one = wrong(|_, seen| seen[70_000] ^= 1).unwrap();
        assert_eq!(
            (one.first_wrong_bytes, one.wrong_bytes, one.looks_like.as_str()),
            (70_000, 1, "other bytes")
        );
        assert!(wrong(|_, seen| seen.fill(0xff)).unwrap().looks_like.contains("all ones"));
        assert_eq!(wrong(|_, seen| seen.fill(0)).unwrap().looks_like, "zeros");
        let untouched = wrong(|bytes, seen| {
            let poison = bytes.poison(1, SIZE_BYTES as u64).unwrap();
            poison.mapping().read(poison.offset_bytes(), seen).unwrap();
        });
        assert!(untouched.unwrap().looks_like.contains("nothing arrived"));
    }

    #[test]
    fn the_bytes_of_another_round_are_wrong() {
        let stale = wrong(|bytes, seen| {
            let before = bytes.sent(0, SIZE_BYTES as u64).unwrap();
            before.mapping().read(before.offset_bytes(), seen).unwrap();
        });
        assert_eq!(stale.unwrap().of_bytes, SIZE_BYTES as u64);
    }
}
