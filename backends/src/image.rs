//! `ImageLayout`: where a linear picture lies in a buffer.

use crate::{Error, Kind, Result};

/// The longest side of a picture, in pixels: what today's displays and GPUs take at most.
const MAX_SIDE: u32 = 32768;

/// A linear picture in a buffer. Its pixels are `DRM_FORMAT_XRGB8888`: little-endian words, blue in
/// the lowest byte, the highest unused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLayout {
    /// From the start of the buffer to the first pixel, in bytes, a multiple of four.
    pub offset_bytes: u64,
    /// Its width in pixels.
    pub width: u32,
    /// Its height in pixels.
    pub height: u32,
    /// From one row to the next, in bytes, a multiple of four.
    pub stride_bytes: u32,
}

impl ImageLayout {
    /// A picture whose rows follow each other without a gap, from the start of the buffer.
    pub const fn packed(width: u32, height: u32) -> Self {
        Self { offset_bytes: 0, width, height, stride_bytes: width.saturating_mul(4) }
    }

    /// From the start of the buffer to the end of the last pixel, in bytes.
    pub fn end_bytes(&self) -> u64 {
        let rows = u64::from(self.stride_bytes) * u64::from(self.height.saturating_sub(1));
        self.offset_bytes.saturating_add(rows).saturating_add(u64::from(self.width) * 4)
    }

    /// Checks that the picture lies inside a buffer of `buffer_bytes`.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] names the rule that it breaks: sides between 1 and 32768 pixels, offset
    /// and stride whole pixels, rows that do not overlap, the end inside the buffer.
    pub fn check(&self, buffer_bytes: u64) -> Result<()> {
        let Self { offset_bytes, width, height, stride_bytes } = *self;
        let refuse = |why: String| {
            let next = format!("a picture of {width}x{height} needs {:#x} bytes", self.end_bytes());
            Err(Error::new(Kind::InvalidInput, "lay a picture into a buffer", why).next(next))
        };
        if !(1..=MAX_SIDE).contains(&width) || !(1..=MAX_SIDE).contains(&height) {
            return refuse(format!("{width}x{height} pixels are not between 1 and {MAX_SIDE} a side"));
        }
        if !offset_bytes.is_multiple_of(4) || !stride_bytes.is_multiple_of(4) {
            return refuse(format!("offset {offset_bytes:#x} or stride {stride_bytes:#x} splits a pixel"));
        }
        if stride_bytes < width * 4 {
            return refuse(format!(
                "a row of {width} pixels is longer than the stride, {stride_bytes} bytes"
            ));
        }
        if self.end_bytes() > buffer_bytes {
            return refuse(format!("it is larger than the buffer, which has {buffer_bytes:#x} bytes"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_must_fit() {
        let layout = ImageLayout::packed(640, 480);
        layout.check(640 * 480 * 4).unwrap();
        assert!(layout.check(640 * 480 * 4 - 1).unwrap_err().why().contains("larger than the buffer"));
        assert!(
            ImageLayout { stride_bytes: 2556, ..layout }
                .check(u64::MAX)
                .unwrap_err()
                .why()
                .contains("longer than the stride")
        );
        assert!(ImageLayout { offset_bytes: u64::MAX - 3, ..layout }.check(1 << 40).is_err());
        assert!(ImageLayout { offset_bytes: 2, ..layout }.check(u64::MAX).is_err());
        assert!(ImageLayout::packed(0, 480).check(u64::MAX).is_err());
        assert!(ImageLayout::packed(u32::MAX, u32::MAX).check(u64::MAX).is_err());
    }
}
