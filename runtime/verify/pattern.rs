//! `Pattern`: bytes that say where they belong.
//!
//! Each aligned word of eight bytes is its own index, scrambled with a key: a word that turns up anywhere can
//! be unscrambled, and so tells which offset it was written to. What is shifted, swapped, wrapped, mirrored or
//! never arrived is therefore found and named, not only counted. Every direction, round and purpose has a key
//! of its own, so that bytes of an earlier test are never taken for those of this one.

use crate::Direction;

/// Bytes of a word.
pub(crate) const WORD_BYTES: u64 = 8;

/// What a pattern is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be found on the other side.
    Sent,
    /// In lent memory, to be replaced: what is left of it was not written.
    Poison,
    /// Where a copy is to land: what is left of it was not read.
    Landing,
}

/// Bytes of one direction, round and purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pattern {
    key: u64,
}

impl Pattern {
    /// The bytes for that purpose, out of `seed`.
    pub fn new(seed: u64, direction: Direction, round: u32, purpose: Purpose) -> Self {
        let direction = match direction {
            Direction::Read => 1,
            Direction::Write => 2,
            Direction::Both => 3,
        };
        let purpose = match purpose {
            Purpose::Sent => 1,
            Purpose::Poison => 2,
            Purpose::Landing => 3,
        };
        Self { key: scramble(scramble(seed) ^ (u64::from(round) << 8 | direction << 4 | purpose)) }
    }

    /// Fills `into` with what belongs from `offset_bytes` on.
    pub fn fill(&self, offset_bytes: u64, into: &mut [u8]) {
        let mut at = offset_bytes;
        let mut rest = into;
        while !rest.is_empty() {
            let within = (at % WORD_BYTES) as usize;
            let count = rest.len().min(WORD_BYTES as usize - within);
            let word = self.word(at / WORD_BYTES).to_le_bytes();
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&word[within..within + count]);
            at += count as u64;
            rest = later;
        }
    }

    /// The word of that index.
    pub fn word(&self, index: u64) -> u64 {
        scramble(index.wrapping_add(self.key))
    }

    /// The index of the word that is `word`. Every word has one; one that was never written has mostly a
    /// huge one.
    pub fn index_of(&self, word: u64) -> u64 {
        unscramble(word).wrapping_sub(self.key)
    }
}

// The finaliser of SplitMix64 and its inverse: a bijection in which every bit depends on every other.
const FIRST: u64 = 0xBF58_476D_1CE4_E5B9;
const SECOND: u64 = 0x94D0_49BB_1331_11EB;

fn scramble(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(FIRST);
    word = (word ^ word >> 27).wrapping_mul(SECOND);
    word ^ word >> 31
}

fn unscramble(mut word: u64) -> u64 {
    word = (word ^ word >> 31 ^ word >> 62).wrapping_mul(inverse(SECOND));
    word = (word ^ word >> 27 ^ word >> 54).wrapping_mul(inverse(FIRST));
    word ^ word >> 30 ^ word >> 60
}

/// The inverse of an odd number modulo 2^64, by Newton's method: each step doubles the right bits.
const fn inverse(odd: u64) -> u64 {
    let mut inverse = odd;
    let mut step = 0;
    while step < 5 {
        inverse = inverse.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(inverse)));
        step += 1;
    }
    inverse
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(seed: u64, round: u32) -> Pattern {
        Pattern::new(seed, Direction::Read, round, Purpose::Sent)
    }

    #[test]
    fn directions_rounds_and_purposes_differ_everywhere() {
        let of = |direction, round, purpose| Pattern::new(7, direction, round, purpose);
        let all = [
            of(Direction::Read, 0, Purpose::Sent),
            of(Direction::Read, 1, Purpose::Sent),
            of(Direction::Write, 0, Purpose::Sent),
            of(Direction::Read, 0, Purpose::Poison),
            Pattern::new(8, Direction::Read, 0, Purpose::Sent),
        ];
        for (i, a) in all.iter().enumerate() {
            for b in &all[i + 1..] {
                assert!((0..10_000).all(|index| a.word(index) != b.word(index)));
            }
        }
    }

    #[test]
    fn no_two_words_of_a_gibibyte_border_are_alike() {
        let pattern = pattern(1, 0);
        let words: std::collections::BTreeSet<u64> =
            (0..1 << 16).map(|index| pattern.word(index + (1 << 29) - (1 << 15))).collect();
        assert_eq!(words.len(), 1 << 16);
    }

    proptest! {
        #[test]
        fn a_word_tells_where_it_belongs(seed: u64, round: u32, index in 0_u64..1 << 61) {
            let pattern = pattern(seed, round);
            prop_assert_eq!(pattern.index_of(pattern.word(index)), index);
        }

        #[test]
        fn parts_are_parts_of_the_whole(seed: u64, start in 0_u64..1000, skip in 0_usize..100, length in 0_usize..100) {
            let pattern = pattern(seed, 0);
            let mut whole = vec![0; skip + length];
            pattern.fill(start, &mut whole);
            let mut part = vec![0; length];
            pattern.fill(start + skip as u64, &mut part);
            prop_assert_eq!(&whole[skip..], &part[..]);
        }
    }
}
