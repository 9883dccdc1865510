//! `ImageLayout`: where a linear picture lies in a buffer.

use crate::{Error, Kind, Result};

/// A linear XRGB8888 picture in a buffer: four bytes a pixel, blue first, the fourth unused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLayout {
    /// Its width in pixels.
    pub width: u32,
    /// Its height in pixels.
    pub height: u32,
    /// From one row to the next, in bytes.
    pub stride_bytes: u32,
    /// From the start of the buffer to the first pixel, in bytes.
    pub offset_bytes: u32,
}

impl ImageLayout {
    /// A picture whose rows follow each other without a gap, from the start of the buffer.
    pub fn packed(width: u32, height: u32) -> Self {
        Self { width, height, stride_bytes: width.saturating_mul(4), offset_bytes: 0 }
    }

    /// From the start of the buffer to the end of the last row, in bytes.
    pub fn end_bytes(&self) -> u64 {
        u64::from(self.offset_bytes) + u64::from(self.stride_bytes) * u64::from(self.height)
    }

    /// Checks that the picture lies inside a buffer of `buffer_bytes`.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] names the rule that it breaks.
    pub fn check(&self, buffer_bytes: u64) -> Result<()> {
        let refuse = |why: String| {
            Err(Error::new(Kind::InvalidInput, "lay a picture into a buffer", why).next(format!(
                "a {}x{} picture needs {} bytes",
                self.width,
                self.height,
                self.end_bytes()
            )))
        };
        if self.width == 0 || self.height == 0 {
            return refuse("it has no pixels".into());
        }
        if !self.offset_bytes.is_multiple_of(4) || !self.stride_bytes.is_multiple_of(4) {
            return refuse("offset and stride must be multiples of the four bytes of a pixel".into());
        }
        if u64::from(self.width) * 4 > u64::from(self.stride_bytes) {
            return refuse(format!("its stride of {} bytes is shorter than a row", self.stride_bytes));
        }
        if self.end_bytes() > buffer_bytes {
            return refuse(format!("it is larger than the buffer, which has {buffer_bytes} bytes"));
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
                .contains("shorter")
        );
        assert!(ImageLayout { offset_bytes: 2, ..layout }.check(u64::MAX).is_err());
        assert!(ImageLayout::packed(0, 480).check(u64::MAX).is_err());
        assert!(ImageLayout::packed(u32::MAX, u32::MAX).check(u64::MAX).is_err());
    }
}
