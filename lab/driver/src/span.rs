//! `Span`: bytes that an engine copies from or to, and the descriptors of a copy between two of them.

use peervram_model::registers::{Descriptor, flags};

/// Bytes one after the other, in VRAM or at a DMA address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// An offset in VRAM, or a DMA address.
    pub start: u64,
    /// How many.
    pub length_bytes: u64,
    /// Whether `start` is a DMA address.
    pub is_dma: bool,
}

impl Span {
    /// A span of VRAM.
    pub fn vram(start: u64, length_bytes: u64) -> Self {
        Self { start, length_bytes, is_dma: false }
    }

    /// At a DMA address.
    pub fn dma(start: u64, length_bytes: u64) -> Self {
        Self { start, length_bytes, is_dma: true }
    }

    /// Copies it to `destination`, of the same length.
    pub fn copied_to(self, destination: Span) -> Descriptor {
        debug_assert_eq!(self.length_bytes, destination.length_bytes);
        let mut words = 0;
        if self.is_dma {
            words |= flags::SOURCE_DMA;
        }
        if destination.is_dma {
            words |= flags::DESTINATION_DMA;
        }
        Descriptor::copy(self.start, destination.start, self.length_bytes, 0).with_flags(words)
    }
}
