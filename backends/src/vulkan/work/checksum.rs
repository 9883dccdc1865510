//! A position-dependent checksum of 32-bit words, by the CPU and by the device.
//!
//! The sum of `word[i] * (2 i + 1)`, modulo 2^32, over little-endian words; `i` counts from the
//! first word of the range. Addition commutes, so the device adds in parallel and in any order.
//! It tells lost, stale and misplaced data. It is no defence against somebody who forges it.
#![expect(unsafe_code, reason = "recording a dispatch, and reading its result")]

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::engine::Engine;
use crate::vulkan::buffers::buffer::Buffer;
use crate::vulkan::copying::pipeline::{Bound, Pipeline};
use crate::vulkan::copying::staging::Staging;
use crate::vulkan::memory::handover::{self, Use};
use crate::vulkan::usage::BufferUsage;
use crate::{Error, Kind, Result};

const SPIRV: &[u8] = include_bytes!("../shaders/checksum.spv");

/// Also in `shaders/checksum.comp`.
const BYTES_PER_GROUP: u64 = 256 * 64 * 4;

/// The checksum of `bytes`, as [`Engine::checksum`] computes it. A length that is no multiple of
/// four counts as if zeros followed.
pub fn checksum(bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    let mut factor = 1_u32;
    words.iter().chain([&last]).fold(0, |sum: u32, &word| {
        let term = u32::from_le_bytes(word).wrapping_mul(factor);
        factor = factor.wrapping_add(2);
        sum.wrapping_add(term)
    })
}

impl Engine {
    /// The checksum of `range`, in bytes from the start of `buffer`, as the device sees it. Both
    /// ends are multiples of four. The function [`checksum`] is the same by the CPU.
    ///
    /// Blocks until it is done or `deadline` has passed.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for a range off the words or beyond the buffer, or a buffer of
    /// another device or without [`BufferUsage::STORAGE_BUFFER`]; [`Kind::TimedOut`];
    /// [`Kind::Vulkan`] where the driver refuses.
    pub fn checksum(&mut self, buffer: &Buffer, range: Range<u64>, deadline: Instant) -> Result<u32> {
        const TRIED: &str = "compute a checksum";
        buffer.raw().check(TRIED, self.device.logical(), BufferUsage::STORAGE_BUFFER)?;
        if range.start > range.end
            || range.end > buffer.size_bytes()
            || !(range.start | range.end).is_multiple_of(4)
        {
            let why = format!(
                "{:#x}..{:#x} are no words of a buffer of {:#x} bytes",
                range.start,
                range.end,
                buffer.size_bytes()
            );
            return Err(Error::new(Kind::InvalidInput, TRIED, why));
        }
        let device = self.device.logical().clone();
        let pipeline = self.checksum.get(|| Pipeline::new(&device, SPIRV, 2, 3))?;
        let result = self.sum.get(|| Staging::new(&device, 4))?;
        let limits = device.limits();
        let parts = parts(
            range.clone(),
            limits.min_storage_buffer_offset_alignment,
            u64::from(limits.max_storage_buffer_range),
            u64::from(limits.max_compute_work_group_count[0]) * BYTES_PER_GROUP,
        );

        let mut sum = 0_u32;
        for part in parts {
            let constants = [
                ((part.start - part.bound_start) / 4) as u32,
                ((part.end - part.start) / 4) as u32,
                // The factors repeat after 2^31 words: wrapping is right.
                ((part.start - range.start) / 4) as u32,
            ];
            let bound = [
                Bound {
                    buffer: buffer.raw().handle(),
                    offset_bytes: part.bound_start,
                    length_bytes: part.end - part.bound_start,
                },
                Bound { buffer: result.buffer(), offset_bytes: 0, length_bytes: 4 },
            ];
            let groups = (part.end - part.start).div_ceil(BYTES_PER_GROUP) as u32;
            self.commands.run(
                TRIED,
                deadline,
                vec![Arc::clone(buffer.raw()) as _, Arc::clone(&pipeline) as _, Arc::clone(&result) as _],
                |ash, commands| {
                    // SAFETY: nothing is in flight when this is called, all that is recorded is in
                    // the list above, and `part` lies inside the buffer and the device's limits.
                    unsafe {
                        result.write(&0_u32.to_ne_bytes());
                        handover::acquire(commands, &buffer.raw().resource, Use::SHADER);
                        pipeline.record(commands, &bound, &constants, [groups, 1]);
                        handover::release(commands, &buffer.raw().resource, Use::SHADER);
                        handover::show_host(ash, commands, Use::SHADER);
                    }
                },
            )?;
            let mut bytes = [0; 4];
            // SAFETY: four bytes, and `run` succeeded, so nothing is in flight.
            unsafe { result.read(&mut bytes) };
            sum = sum.wrapping_add(u32::from_ne_bytes(bytes));
        }
        Ok(sum)
    }
}

/// A part of a range, and where the descriptor begins that covers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    bound_start: u64,
    start: u64,
    end: u64,
}

/// Cuts `range` into parts that one descriptor and one dispatch can cover.
///
/// `alignment` is a power of two of at most 256, `most_bound` at least 2^27 (both promised by the
/// specification's required limits), so every part is longer than zero.
fn parts(range: Range<u64>, alignment: u64, most_bound: u64, most_dispatched: u64) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let bound_start = start / alignment * alignment;
        let end = range.end.min(bound_start + most_bound / 4 * 4).min(start + most_dispatched);
        parts.push(Part { bound_start, start, end });
        start = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_sum_depends_on_values_and_positions() {
        assert_eq!(checksum(&[]), 0);
        assert_eq!(checksum(&[1, 0, 0, 0, 2, 0, 0, 0]), 1 + 2 * 3);
        assert_eq!(checksum(&[2, 0, 0, 0, 1, 0, 0, 0]), 2 + 3);
        assert_eq!(checksum(&[0xFF; 4]), u32::MAX);
        assert_eq!(checksum(&[7]), 7);
        assert_ne!(checksum(&[0xFF; 4096]), 0, "all ones is what a dead bus reads");
    }

    proptest! {
        #[test]
        fn any_word_that_changes_changes_the_sum(
            mut bytes in prop::collection::vec(any::<u8>(), 4..256),
            at: prop::sample::Index,
            change in 1_u8..,
        ) {
            let before = checksum(&bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            prop_assert_ne!(checksum(&bytes), before);
        }

        #[test]
        fn parts_cover_the_range_within_the_limits(
            start in 0_u64..2000,
            length in 0_u64..5000,
            alignment in (2_u32..9).prop_map(|power| 1_u64 << power),
            most_bound in 128_u64..1024,
            most_groups in 1_u64..8,
        ) {
            let (range, most_bound) = (start * 4..(start + length) * 4, 4 * most_bound);
            let parts = parts(range.clone(), alignment, most_bound, 4 * most_groups);
            let mut at = range.start;
            for part in parts {
                prop_assert_eq!(part.start, at);
                prop_assert!(part.end > part.start && part.end % 4 == 0);
                prop_assert!(part.bound_start % alignment == 0 && part.bound_start <= part.start);
                prop_assert!(part.end - part.bound_start <= most_bound);
                prop_assert!(part.end - part.start <= 4 * most_groups);
                at = part.end;
            }
            prop_assert_eq!(at, range.end);
        }
    }
}
