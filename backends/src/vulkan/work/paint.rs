//! A picture painted in place, by the CPU and by the device, to the same bytes.
//!
//! A duotone: brightness chooses between a dark and a bright colour, posterised a little; rings
//! light it, and the edges are darker. It reads and writes every pixel, so a picture that comes out
//! right has crossed to the device and back.
#![expect(unsafe_code, reason = "recording a dispatch")]

use std::sync::Arc;
use std::time::Instant;

use super::engine::Engine;
use crate::vulkan::buffers::buffer::Buffer;
use crate::vulkan::copying::pipeline::{Bound, Pipeline};
use crate::vulkan::memory::handover::{self, Use};
use crate::vulkan::usage::BufferUsage;
use crate::{Error, ImageLayout, Kind, Result};

const SPIRV: &[u8] = include_bytes!("../shaders/paint.spv");

/// Also in `shaders/paint.comp`, in both directions.
const PIXELS_PER_GROUP: u32 = 16;

/// Paints `picture` in `bytes` by the CPU, as [`Engine::paint`] does by the device.
///
/// Bits 0 to 7 of `parameter` move the rings; bits 8 and 9 choose the colours.
///
/// # Errors
/// As [`ImageLayout::check`]; nothing is painted then.
pub fn paint(bytes: &mut [u8], picture: &ImageLayout, parameter: u32) -> Result<()> {
    picture.check(bytes.len() as u64)?;
    let rows = bytes[picture.offset_bytes as usize..].chunks_mut(picture.stride_bytes as usize);
    for (y, row) in (0..picture.height).zip(rows) {
        let (pixels, _) = row.as_chunks_mut::<4>();
        for (x, pixel) in (0..picture.width).zip(pixels) {
            *pixel = painted(u32::from_le_bytes(*pixel), x, y, picture, parameter).to_le_bytes();
        }
    }
    Ok(())
}

const DARK: [u32; 4] = [0x1b1464, 0x0b3d2e, 0x3a0c3a, 0x10002b];
const BRIGHT: [u32; 4] = [0xffd8a8, 0xf6f3c5, 0xff9e80, 0x7df9ff];

fn channel(colour: u32, shift: u32) -> u32 {
    colour >> shift & 255
}

/// One pixel. Like `main` of `shaders/paint.comp`, line by line.
fn painted(pixel: u32, x: u32, y: u32, picture: &ImageLayout, parameter: u32) -> u32 {
    let (width, height) = (picture.width, picture.height);
    let luma = (77 * channel(pixel, 16) + 150 * channel(pixel, 8) + 29 * channel(pixel, 0)) >> 8;
    let contrast = (luma.saturating_sub(43) * 3 / 2).min(255);
    let tone = (contrast + ((contrast * 6) >> 8) * 51) / 2;

    let (dx, dy) = ((2 * x + 1).abs_diff(width), (2 * y + 1).abs_diff(height));
    let reach = (dx * dx + dy * dy).isqrt() * 1024 / (width * width + height * height).isqrt().max(1);

    let wave = (reach + (parameter & 255)) & 127;
    let ring = if wave < 64 { wave } else { 127 - wave };
    let shade = ((224 + ring / 2) * (256 - reach * reach / 8192)) >> 8;

    let dark = DARK[(parameter >> 8 & 3) as usize];
    let bright = BRIGHT[(parameter >> 8 & 3) as usize];
    let mut painted = pixel & 0xff00_0000;
    for shift in [0, 8, 16] {
        let mixed = (channel(dark, shift) * (255 - tone) + channel(bright, shift) * tone) / 255;
        painted |= (mixed * shade / 255) << shift;
    }
    painted
}

impl Engine {
    /// Paints `picture` in `buffer`, in place. The function [`paint`] gives the same bytes by the
    /// CPU, and says what `parameter` does.
    ///
    /// Blocks until it is done or `deadline` has passed; the picture may be painted in part then.
    ///
    /// # Errors
    /// As [`ImageLayout::check`]; [`Kind::InvalidInput`] for a buffer of another device or without
    /// [`BufferUsage::STORAGE_BUFFER`]; [`Kind::Unsupported`] for rows longer than a shader of this
    /// device can see; [`Kind::TimedOut`]; [`Kind::Vulkan`] where the driver refuses.
    pub fn paint(
        &mut self,
        buffer: &Buffer,
        picture: &ImageLayout,
        parameter: u32,
        deadline: Instant,
    ) -> Result<()> {
        const TRIED: &str = "paint a picture";
        buffer.raw().check(TRIED, self.device.logical(), BufferUsage::STORAGE_BUFFER)?;
        picture.check(buffer.size_bytes())?;
        let device = self.device.logical().clone();
        let limits = device.limits();
        let alignment = limits.min_storage_buffer_offset_alignment;
        let stride_bytes = u64::from(picture.stride_bytes);
        // A descriptor begins up to `alignment` before its first row.
        let rows_bound = u64::from(limits.max_storage_buffer_range).saturating_sub(alignment) / stride_bytes;
        let rows_dispatched = u64::from(limits.max_compute_work_group_count[1]) * u64::from(PIXELS_PER_GROUP);
        let band_rows = u64::from(picture.height).min(rows_bound).min(rows_dispatched) as u32;
        if band_rows == 0 {
            let why = format!("rows of {stride_bytes} bytes are longer than a shader can see");
            return Err(Error::new(Kind::Unsupported, TRIED, why));
        }
        let pipeline = self.paint.get(|| Pipeline::new(&device, SPIRV, 1, 7))?;

        for first_row in (0..picture.height).step_by(band_rows as usize) {
            let row_count = band_rows.min(picture.height - first_row);
            let start = picture.offset_bytes + u64::from(first_row) * stride_bytes;
            let end = start + u64::from(row_count - 1) * stride_bytes + u64::from(picture.width) * 4;
            let bound_start = start / alignment * alignment;
            let constants = [
                ((start - bound_start) / 4) as u32,
                picture.width,
                picture.height,
                picture.stride_bytes / 4,
                first_row,
                row_count,
                parameter,
            ];
            let bound = [Bound {
                buffer: buffer.raw().handle(),
                offset_bytes: bound_start,
                length_bytes: end - bound_start,
            }];
            // MAX_SIDE pixels are 2048 groups; every device has 65535.
            let groups = [picture.width.div_ceil(PIXELS_PER_GROUP), row_count.div_ceil(PIXELS_PER_GROUP)];
            let used = vec![Arc::clone(buffer.raw()) as _, Arc::clone(&pipeline) as _];
            self.commands.run(TRIED, deadline, used, |_, commands| {
                // SAFETY: nothing is in flight when this is called, all that is recorded is in the
                // list above, and the band lies inside the buffer and the device's limits.
                unsafe {
                    handover::acquire(commands, &buffer.raw().resource, Use::SHADER);
                    pipeline.record(commands, &bound, &constants, groups);
                    handover::release(commands, &buffer.raw().resource, Use::SHADER);
                }
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_pictures_own_pixels_are_painted() {
        let picture = ImageLayout { offset_bytes: 8, width: 3, height: 2, stride_bytes: 20 };
        // Each byte has its own place in it.
        let before: [u8; 64] = std::array::from_fn(|at| 0x80 + at as u8);
        let mut bytes = before;
        paint(&mut bytes, &picture, 0).unwrap();
        let mut painted = 0;
        for (at, (&byte, before)) in bytes.iter().zip(before).enumerate() {
            let inside = (8..20).contains(&at) || (28..40).contains(&at);
            let unused = at % 4 == 3;
            assert!(byte == before || inside && !unused, "byte {at}");
            painted += usize::from(byte != before);
        }
        assert_eq!(painted, 18);
    }

    proptest! {
        /// Debug builds panic on overflow, so this also shows that the shader never wraps, up to the
        /// longest sides that `ImageLayout::check` lets through.
        #[test]
        fn nothing_overflows(
            pixel: u32, parameter: u32, width in 1_u32..=32768, height in 1_u32..=32768, x: u32, y: u32,
        ) {
            let picture = ImageLayout::packed(width, height);
            let result = painted(pixel, x % width, y % height, &picture, parameter);
            prop_assert_eq!(result >> 24, pixel >> 24);
        }
    }
}
