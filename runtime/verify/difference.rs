//! `Difference`: where bytes are wrong, and what they look like.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::pattern::{Pattern, WORD_BYTES};

/// How many bytes are shown of what was expected and what was seen.
const SHOWN_BYTES: usize = 8;
/// Up to this many wrong bits are taken for a flipping data line; more are taken for other bytes.
const FEW_BITS: u32 = 4;

/// What was wrong with bytes that came from the other side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Difference {
    /// Where the first wrong byte is, in bytes from the start of what was lent.
    pub first_wrong_bytes: u64,
    /// The bytes expected from there on, in hexadecimal.
    pub expected: String,
    /// The bytes found there, in hexadecimal.
    pub seen: String,
    /// How many bytes were wrong.
    pub wrong_bytes: u64,
    /// How many bytes were compared.
    pub of_bytes: u64,
    /// What the wrong bytes look like.
    pub looks_like: String,
}

/// Bytes that may turn up in the wrong place, and what to call them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    pub pattern: Pattern,
    pub name: &'static str,
}

impl Difference {
    /// What is wrong with `seen`, which should be what belongs in memory of `size_bytes` from
    /// `offset_bytes` on. `known` is what else was written anywhere, `before` what was in this place before
    /// everything.
    pub(crate) fn find(
        expected: &Pattern,
        offset_bytes: u64,
        seen: &[u8],
        size_bytes: u64,
        known: &[Known],
        before: Option<&[u8]>,
    ) -> Option<Self> {
        let mut right = vec![0; seen.len()];
        expected.fill(offset_bytes, &mut right);
        if right == seen {
            return None;
        }
        let wrong: Vec<usize> = (0..seen.len()).filter(|&i| right[i] != seen[i]).collect();
        let first = wrong[0];
        let shown = |bytes: &[u8]| -> String {
            bytes[first..].iter().take(SHOWN_BYTES).map(|byte| format!("{byte:02x}")).collect()
        };
        let all = |value: u8| wrong.iter().all(|&i| seen[i] == value);
        let bits: u32 = wrong.iter().take(64).map(|&i| (right[i] ^ seen[i]).count_ones()).sum();
        let looks_like = if all(0xff) && wrong.len() > 1 {
            "all ones, as where nobody answers".into()
        } else if all(0) && wrong.len() > 1 {
            "zeros".into()
        } else if let Some(text) = origin(expected, offset_bytes, seen, first, size_bytes, known) {
            text
        } else if before.is_some_and(|before| wrong.iter().all(|&i| before.get(i) == Some(&seen[i]))) {
            "what was there before the test: nothing arrived".into()
        } else if bits <= FEW_BITS && wrong.len() <= 64 {
            format!("the right bytes with {bits} flipped {}", if bits == 1 { "bit" } else { "bits" })
        } else {
            "bytes that this test wrote nowhere: other memory, perhaps a private copy of one side".into()
        };
        Some(Self {
            first_wrong_bytes: offset_bytes + first as u64,
            expected: shown(&right),
            seen: shown(seen),
            wrong_bytes: wrong.len() as u64,
            of_bytes: seen.len() as u64,
            looks_like,
        })
    }
}

/// What the words around the first wrong byte say of themselves. They may lie at any byte, in either order.
fn origin(
    expected: &Pattern,
    offset_bytes: u64,
    seen: &[u8],
    first: usize,
    size_bytes: u64,
    known: &[Known],
) -> Option<String> {
    let this = Known { pattern: *expected, name: "the bytes" };
    // The word that the first wrong byte is in may begin before it.
    let begin = first.saturating_sub(WORD_BYTES as usize - 1);
    let end = seen.len().min(first + 3 * WORD_BYTES as usize);
    for at in begin..end.saturating_sub(WORD_BYTES as usize - 1) {
        let bytes: [u8; 8] = seen[at..at + 8].try_into().ok()?;
        let here = offset_bytes + at as u64;
        for (word, order) in
            [(u64::from_le_bytes(bytes), ""), (u64::from_be_bytes(bytes), ", each word back to front")]
        {
            for known in std::iter::once(&this).chain(known) {
                let index = known.pattern.index_of(word);
                let Some(from) = index.checked_mul(WORD_BYTES).filter(|&from| from < size_bytes) else {
                    continue;
                };
                let same = known.pattern == this.pattern;
                if same && from == here && order.is_empty() {
                    // A right word beside the wrong ones.
                    continue;
                }
                return Some(match (same, from == here) {
                    (true, true) => format!("the right bytes{order}"),
                    (true, false) => format!("the bytes of offset {from:#x}, found at {here:#x}{order}"),
                    (false, true) => format!("{}{order}", known.name),
                    (false, false) => {
                        format!("{}, of offset {from:#x}, found at {here:#x}{order}", known.name)
                    }
                });
            }
        }
    }
    None
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} bytes are wrong, the first at {:#x}: expected {}, seen {}; they look like {}",
            self.wrong_bytes,
            self.of_bytes,
            self.first_wrong_bytes,
            self.expected,
            self.seen,
            self.looks_like
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::pattern::Purpose;
    use super::*;
    use crate::Direction;

    const SIZE_BYTES: u64 = 1 << 32;
    const OFFSET_BYTES: u64 = 4 << 20;

    fn sent() -> Pattern {
        Pattern::new(3, Direction::Read, 1, Purpose::Sent)
    }

    fn known() -> [Known; 2] {
        let of = |round, purpose| Pattern::new(3, Direction::Read, round, purpose);
        [
            Known { pattern: of(1, Purpose::Poison), name: "what was to be replaced" },
            Known { pattern: of(0, Purpose::Sent), name: "the bytes of the round before" },
        ]
    }

    fn right() -> Vec<u8> {
        bytes_of(&sent(), OFFSET_BYTES)
    }

    fn bytes_of(pattern: &Pattern, offset_bytes: u64) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        pattern.fill(offset_bytes, &mut bytes);
        bytes
    }

    fn find(seen: &[u8], before: Option<&[u8]>) -> Option<Difference> {
        Difference::find(&sent(), OFFSET_BYTES, seen, SIZE_BYTES, &known(), before)
    }

    fn looks_like(seen: &[u8]) -> String {
        find(seen, None).expect("it is wrong").looks_like
    }

    #[test]
    fn right_bytes_are_no_difference() {
        assert_eq!(find(&right(), None), None);
    }

    #[test]
    fn what_it_looks_like_is_said() {
        assert!(looks_like(&[0xff; 4096]).contains("all ones"));
        assert_eq!(looks_like(&[0; 4096]), "zeros");
        assert_eq!(looks_like(&bytes_of(&known()[0].pattern, OFFSET_BYTES)), "what was to be replaced");
        assert_eq!(looks_like(&bytes_of(&known()[1].pattern, OFFSET_BYTES)), "the bytes of the round before");
        assert!(looks_like(&[0x5a; 4096]).contains("wrote nowhere"));
        let wrapped = looks_like(&bytes_of(&sent(), OFFSET_BYTES - (2 << 20)));
        assert!(wrapped.contains("of offset 0x200000, found at 0x400000"), "{wrapped}");
    }

    #[test]
    fn shifts_by_any_number_of_bytes_are_found() {
        for shift in 1..20_u64 {
            let text = looks_like(&bytes_of(&sent(), OFFSET_BYTES + shift));
            let (from, at) =
                text.strip_prefix("the bytes of offset 0x").unwrap().split_once(", found at 0x").unwrap();
            let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
            assert_eq!(hex(from) - hex(at), shift, "{text}");
        }
    }

    /// The one word that is wrong may be the first or the last that was looked at.
    #[test]
    fn a_word_of_another_place_is_read_at_either_end() {
        for at in [0, 8, 4080, 4088] {
            let mut seen = right();
            let other = bytes_of(&sent(), OFFSET_BYTES - (2 << 20));
            seen[at..at + 8].copy_from_slice(&other[at..at + 8]);
            let (from, here) = (0x20_0000 + at, 0x40_0000 + at);
            assert_eq!(looks_like(&seen), format!("the bytes of offset {from:#x}, found at {here:#x}"));
        }
        let alone = bytes_of(&sent(), OFFSET_BYTES - (2 << 20));
        assert_eq!(looks_like(&alone[..8]), "the bytes of offset 0x200000, found at 0x400000");
        // Fewer than eight bytes cannot be read backwards.
        assert!(looks_like(&alone[..7]).contains("wrote nowhere"));
    }

    /// Of what turns up at once, the first word may be of something else.
    #[test]
    fn the_words_behind_the_first_wrong_one_are_read_too() {
        let moved = bytes_of(&sent(), OFFSET_BYTES - (2 << 20));
        let mut seen = right();
        seen[8..16].fill(0x5a);
        seen[16..64].copy_from_slice(&moved[16..64]);
        assert_eq!(looks_like(&seen), "the bytes of offset 0x200010, found at 0x400010");
    }

    #[test]
    fn what_lies_beyond_the_end_was_never_written() {
        let word = |offset_bytes: u64| {
            let mut seen = right();
            let bytes = bytes_of(&sent(), offset_bytes);
            seen[64..72].copy_from_slice(&bytes[..8]);
            looks_like(&seen)
        };
        assert_eq!(word(SIZE_BYTES - 8), "the bytes of offset 0xfffffff8, found at 0x400040");
        assert!(word(SIZE_BYTES).contains("wrote nowhere"), "{}", word(SIZE_BYTES));
    }

    #[test]
    fn one_wrong_byte_is_neither_ones_nor_zeros() {
        let right = right();
        for (value, looks) in [(0xff, "all ones, as where nobody answers"), (0, "zeros")] {
            // One bit away from what belongs there.
            let at = (0..right.len()).find(|&at| (right[at] ^ value).count_ones() == 1).unwrap();
            let mut one = right.clone();
            one[at] = value;
            assert_eq!(looks_like(&one), "the right bytes with 1 flipped bit");
            let mut two = right.clone();
            two[8..10].fill(value);
            assert_eq!(looks_like(&two), looks);
        }
    }

    #[test]
    fn swapped_words_are_named() {
        let mut seen = right();
        seen.chunks_exact_mut(8).for_each(<[u8]>::reverse);
        assert_eq!(looks_like(&seen), "the right bytes, each word back to front");
    }

    #[test]
    fn memory_that_did_not_change_is_named() {
        let before: Vec<u8> = (0..4096).map(|at: u32| (at / 3) as u8).collect();
        let difference = find(&before, Some(&before)).unwrap();
        assert!(difference.looks_like.contains("before the test"), "{difference}");
    }

    #[test]
    fn the_last_byte_counts() {
        let mut seen = right();
        *seen.last_mut().unwrap() ^= 0x10;
        let difference = find(&seen, None).unwrap();
        assert_eq!((difference.wrong_bytes, difference.of_bytes), (1, 4096));
        assert_eq!(difference.first_wrong_bytes, OFFSET_BYTES + 4095);
        assert_eq!(difference.looks_like, "the right bytes with 1 flipped bit");
    }

    proptest! {
        #[test]
        fn any_change_is_found_where_it_is(at in 0_usize..4096, flip in 1_u8..) {
            let mut seen = right();
            seen[at] ^= flip;
            let difference = find(&seen, None).unwrap();
            prop_assert_eq!(difference.first_wrong_bytes, OFFSET_BYTES + at as u64);
            prop_assert_eq!(difference.wrong_bytes, 1);
        }

        #[test]
        fn any_bytes_are_survived(seen in proptest::collection::vec(any::<u8>(), 1..64)) {
            // Short ones may be right by chance.
            let is_right = right().starts_with(&seen);
            prop_assert_eq!(find(&seen, Some(&[1, 2, 3])).is_none(), is_right);
        }
    }
}
