//! A descriptor, checked: the operation that it asks for, or the error that it is. Pure.

use crate::registers::{Descriptor, ErrorCode, FRAME_PIXELS_MAX, flags, operation};

/// The two engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// Copies and fills.
    Copy = 0,
    /// Draws.
    Draw = 1,
}

/// Where bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// At an offset in VRAM.
    Vram(u64),
    /// At a DMA address.
    Dma(u64),
}

impl Location {
    /// `bytes` further on. The range was checked, so it cannot wrap.
    pub fn after(self, bytes: u64) -> Location {
        match self {
            Location::Vram(offset) => Location::Vram(offset.wrapping_add(bytes)),
            Location::Dma(address) => Location::Dma(address.wrapping_add(bytes)),
        }
    }

    fn check(self, bytes: u64, vram_bytes: u64) -> Result<(), ErrorCode> {
        match self {
            Location::Vram(offset) => match offset.checked_add(bytes) {
                Some(end) if end <= vram_bytes => Ok(()),
                _ => Err(ErrorCode::VramRange),
            },
            Location::Dma(_) if bytes == 0 => Ok(()),
            Location::Dma(address) => address.checked_add(bytes - 1).map(|_| ()).ok_or(ErrorCode::DmaFault),
        }
    }

    fn is_dma(self) -> bool {
        matches!(self, Location::Dma(_))
    }
}

/// What is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Picture {
    /// Moving gradient with digits.
    Gradient,
    /// Turning triangle.
    Triangle,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Nothing.
    Nothing,
    /// Move bytes.
    Copy {
        /// From.
        source: Location,
        /// To.
        destination: Location,
        /// How many.
        bytes: u64,
    },
    /// Repeat a pattern.
    Fill {
        /// The pattern.
        pattern: u32,
        /// To.
        destination: Location,
        /// How many bytes.
        bytes: u64,
    },
    /// Draw a frame.
    Draw {
        /// Which.
        picture: Picture,
        /// To.
        destination: Location,
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// From row to row.
        stride_bytes: u32,
        /// Number of the frame.
        frame: u32,
    },
}

/// A checked descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// What to do.
    pub work: Work,
    /// Where the fence goes besides the register.
    pub fence: Option<Location>,
    /// Its value.
    pub fence_value: u64,
    /// Whether to raise the interrupt.
    pub interrupt: bool,
}

impl Operation {
    /// Checks a descriptor for `engine` against the size of VRAM.
    ///
    /// # Errors
    /// What will be in the error register.
    pub fn check(descriptor: &Descriptor, engine: EngineKind, vram_bytes: u64) -> Result<Self, ErrorCode> {
        let Descriptor {
            source,
            destination,
            length_bytes: bytes,
            fence_address,
            fence_value,
            parameters,
            ..
        } = *descriptor;
        if descriptor.flags & !flags::ALL != 0 {
            return Err(ErrorCode::Descriptor);
        }
        let place = |flag: u32, address: u64| {
            if descriptor.flags & flag != 0 { Location::Dma(address) } else { Location::Vram(address) }
        };
        let source = place(flags::SOURCE_DMA, source);
        let destination = place(flags::DESTINATION_DMA, destination);
        let work = match (descriptor.operation, engine, parameters) {
            (operation::NOTHING, _, [0, 0, 0, 0]) => Work::Nothing,
            (operation::COPY, EngineKind::Copy, [0, 0, 0, 0]) => {
                source.check(bytes, vram_bytes)?;
                destination.check(bytes, vram_bytes)?;
                Work::Copy { source, destination, bytes }
            }
            (operation::FILL, EngineKind::Copy, [pattern, 0, 0, 0]) => {
                destination.check(bytes, vram_bytes)?;
                Work::Fill { pattern, destination, bytes }
            }
            (operation::DRAW_GRADIENT, EngineKind::Draw, parameters) if bytes == 0 => {
                draw(Picture::Gradient, destination, parameters, vram_bytes)?
            }
            (operation::DRAW_TRIANGLE, EngineKind::Draw, parameters) if bytes == 0 => {
                draw(Picture::Triangle, destination, parameters, vram_bytes)?
            }
            _ => return Err(ErrorCode::Descriptor),
        };
        let fence =
            (descriptor.flags & flags::FENCE_IN_MEMORY != 0).then(|| place(flags::FENCE_DMA, fence_address));
        if let Some(fence) = fence {
            if fence_address % 8 != 0 {
                return Err(ErrorCode::Descriptor);
            }
            fence.check(8, vram_bytes)?;
        }
        Ok(Operation { work, fence, fence_value, interrupt: descriptor.flags & flags::INTERRUPT != 0 })
    }

    /// Whether it needs bus mastering.
    pub fn uses_dma(&self) -> bool {
        let by_work = match self.work {
            Work::Nothing => false,
            Work::Copy { source, destination, .. } => source.is_dma() || destination.is_dma(),
            Work::Fill { destination, .. } | Work::Draw { destination, .. } => destination.is_dma(),
        };
        by_work || self.fence.is_some_and(Location::is_dma)
    }
}

fn draw(
    picture: Picture,
    destination: Location,
    parameters: [u32; 4],
    vram_bytes: u64,
) -> Result<Work, ErrorCode> {
    let [width, height, stride_bytes, frame] = parameters;
    let fits = (1..=FRAME_PIXELS_MAX).contains(&width)
        && (1..=FRAME_PIXELS_MAX).contains(&height)
        && stride_bytes >= width * 4
        && stride_bytes % 4 == 0;
    if !fits {
        return Err(ErrorCode::Descriptor);
    }
    let bytes = u64::from(stride_bytes) * u64::from(height - 1) + u64::from(width) * 4;
    destination.check(bytes, vram_bytes)?;
    Ok(Work::Draw { picture, destination, width, height, stride_bytes, frame })
}

/// Whether a copy must go from its end to its start: the ranges overlap, and going up would
/// overwrite what is still to be read.
pub fn must_go_down(source: Location, destination: Location, bytes: u64) -> bool {
    match (source, destination) {
        (Location::Vram(source), Location::Vram(destination))
        | (Location::Dma(source), Location::Dma(destination)) => {
            destination > source && destination - source < bytes
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VRAM: u64 = 1 << 20;

    fn check(descriptor: Descriptor) -> Result<Operation, ErrorCode> {
        Operation::check(&descriptor, EngineKind::Copy, VRAM)
    }

    #[test]
    fn ranges_end_where_vram_ends() {
        assert!(check(Descriptor::copy(0, VRAM - 4, 4, 1)).is_ok());
        assert_eq!(check(Descriptor::copy(0, VRAM - 4, 5, 1)), Err(ErrorCode::VramRange));
        assert_eq!(check(Descriptor::copy(u64::MAX, 0, 2, 1)), Err(ErrorCode::VramRange));
        assert_eq!(check(Descriptor::copy(0, 0, u64::MAX, 1)), Err(ErrorCode::VramRange));
    }

    #[test]
    fn engines_refuse_each_others_work_and_what_is_unknown() {
        let frame = Descriptor::draw(operation::DRAW_GRADIENT, 0, 16, 16, 1, 1);
        assert_eq!(check(frame), Err(ErrorCode::Descriptor));
        assert!(Operation::check(&frame, EngineKind::Draw, VRAM).is_ok());
        assert_eq!(check(Descriptor::nothing(1).with_flags(1 << 31)), Err(ErrorCode::Descriptor));
        assert_eq!(check(Descriptor { operation: 99, ..Descriptor::default() }), Err(ErrorCode::Descriptor));
    }

    #[test]
    fn a_fence_in_memory_is_aligned_and_inside() {
        assert!(check(Descriptor::nothing(1).with_fence_at(VRAM - 8)).is_ok());
        assert_eq!(check(Descriptor::nothing(1).with_fence_at(4)), Err(ErrorCode::Descriptor));
        assert_eq!(check(Descriptor::nothing(1).with_fence_at(VRAM)), Err(ErrorCode::VramRange));
    }

    proptest! {
        #[test]
        fn whatever_passes_stays_inside(bytes in proptest::array::uniform32(any::<u8>()), small in any::<bool>(), draw in any::<bool>()) {
            let mut whole = [0u8; 64];
            whole[..32].copy_from_slice(&bytes);
            whole[48..].copy_from_slice(&bytes[..16]);
            let mut descriptor: Descriptor = bytemuck::pod_read_unaligned(&whole);
            if small {
                descriptor.operation %= 5;
                descriptor.flags &= flags::ALL;
                descriptor.source %= 2 * VRAM;
                descriptor.destination %= 2 * VRAM;
                descriptor.length_bytes = if draw { 0 } else { descriptor.length_bytes % (2 * VRAM) };
                descriptor.parameters = descriptor.parameters.map(|parameter| parameter % 2048);
            }
            let engine = if draw { EngineKind::Draw } else { EngineKind::Copy };
            let inside = |place: Location, bytes: u64| match place {
                Location::Vram(offset) => offset + bytes <= VRAM,
                Location::Dma(address) => bytes == 0 || address.checked_add(bytes - 1).is_some(),
            };
            if let Ok(operation) = Operation::check(&descriptor, engine, VRAM) {
                let is_inside = match operation.work {
                    Work::Nothing => true,
                    Work::Copy { source, destination, bytes } => inside(source, bytes) && inside(destination, bytes),
                    Work::Fill { destination, bytes, .. } => inside(destination, bytes),
                    Work::Draw { destination, width, height, stride_bytes, .. } => {
                        inside(destination, u64::from(stride_bytes) * u64::from(height - 1) + u64::from(width) * 4)
                    }
                };
                prop_assert!(is_inside);
            }
        }
    }
}
