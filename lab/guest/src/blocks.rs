//! Bytes that say where they belong, as an engine of a model GPU can make them by itself: a fill for each block of 4 KiB, with a
//! word of that block's own. Blocks that were swapped, shifted, left out or came from another round are other bytes.

use peervram::Result;
use peervram_model_driver::{Descriptor, ModelGpu};

use crate::crossing::PATIENCE;

/// What a word fills.
pub const BLOCK_BYTES: u64 = 4 << 10;

/// The word of a block in the bytes of `seed`.
fn word(seed: u32, block: u64) -> u32 {
    // The finaliser of SplitMix64: every bit hangs on every other.
    let mut word = u64::from(seed) << 32 | block;
    word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    (word ^ word >> 31) as u32
}

/// Those bytes, from `first_bytes` on; both are multiples of a block.
pub fn bytes(seed: u32, first_bytes: u64, length_bytes: u64) -> Vec<u8> {
    let blocks = first_bytes / BLOCK_BYTES..(first_bytes + length_bytes) / BLOCK_BYTES;
    blocks.flat_map(|block| word(seed, block).to_le_bytes().repeat(BLOCK_BYTES as usize / 4)).collect()
}

/// The engine of `gpu` puts them at `offset_bytes` of its VRAM. It loads nothing, so that whatever is wrong with its loads changes
/// nothing here.
///
/// # Errors
/// What the engine says.
pub fn fill(gpu: &ModelGpu, seed: u32, first_bytes: u64, length_bytes: u64, offset_bytes: u64) -> Result<()> {
    let fills: Vec<Descriptor> = (0..length_bytes / BLOCK_BYTES)
        .map(|block| {
            let place = offset_bytes + block * BLOCK_BYTES;
            Descriptor::fill(word(seed, first_bytes / BLOCK_BYTES + block), place, BLOCK_BYTES, 0)
        })
        .collect();
    gpu.copy_all(&fills, PATIENCE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    #[test]
    fn no_block_is_like_another() {
        let words: BTreeSet<u32> =
            (1..=8).flat_map(|seed| (0..1024).map(move |block| word(seed, block))).collect();
        assert_eq!(words.len(), 8 * 1024);
        let all = bytes(5, 0, 8 * BLOCK_BYTES);
        assert_eq!(
            bytes(5, 3 * BLOCK_BYTES, 2 * BLOCK_BYTES),
            all[3 * BLOCK_BYTES as usize..][..2 * BLOCK_BYTES as usize]
        );
    }

    /// A page filled with one constant looks like every other page filled with it, so a mix-up would pass.
    #[test]
    fn no_test_fills_memory_with_one_word() {
        let mut looked_at = 0;
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let file = entry.unwrap().path();
                if file.is_dir() {
                    folders.push(file);
                    continue;
                }
                looked_at += 1;
                if file.ends_with("blocks.rs") {
                    continue;
                }
                let text = fs::read_to_string(&file).unwrap();
                for sign in ["Descriptor::fill(", ".all(|&byte|", ".all(|byte|", ".all(|&one| one =="] {
                    assert!(!text.contains(sign), "{} has {sign}: use blocks, or a pattern", file.display());
                }
            }
        }
        assert!(looked_at > 30, "{looked_at}");
    }
}
