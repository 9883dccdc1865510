//! A picture in memory: what a screendump is.

use anyhow::{Context, Result, bail};

/// Pixels, row by row from the top, three bytes each: red, green, blue.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `width * height * 3` bytes.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// Reads a binary PPM ("P6"), which is what QEMU writes.
    pub fn from_ppm(bytes: &[u8]) -> Result<Picture> {
        let mut position = 0;
        let mut word = || -> Result<&str> {
            let rest = &bytes[position..];
            let start = rest.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(0);
            let length = rest[start..]
                .iter()
                .position(|byte| byte.is_ascii_whitespace())
                .context("the picture's header is cut off")?;
            // One white-space character ends a word; pixels may begin right after it.
            position += start + length + 1;
            Ok(std::str::from_utf8(&rest[start..start + length])?)
        };
        let magic = word()?;
        if magic != "P6" {
            bail!("not a binary PPM: it begins with {magic:?}");
        }
        let width: u32 = word()?.parse().context("the picture's width")?;
        let height: u32 = word()?.parse().context("the picture's height")?;
        let maximum = word()?;
        if maximum != "255" {
            bail!("a PPM with the maximum {maximum}; only 255 is read");
        }
        let rgb = bytes[position..].to_vec();
        if rgb.len() as u64 != u64::from(width) * u64::from(height) * 3 {
            bail!("{width} x {height} pixels do not fit {} bytes", rgb.len());
        }
        Ok(Picture { width, height, rgb })
    }

    /// The pixel at a place; panics outside the picture.
    pub fn pixel(&self, x: u32, y: u32) -> [u8; 3] {
        assert!(x < self.width && y < self.height, "pixel {x},{y} of {self:?}");
        let start = (y as usize * self.width as usize + x as usize) * 3;
        [self.rgb[start], self.rgb[start + 1], self.rgb[start + 2]]
    }
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "Picture({} x {})", self.width, self.height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ppm_is_read() {
        let picture = Picture::from_ppm(b"P6\n2 1\n255\n\x01\x02\x03\n\x05\x06").unwrap();
        assert_eq!((picture.width, picture.height), (2, 1));
        assert_eq!(picture.pixel(1, 0), [10, 5, 6]);
    }

    #[test]
    fn what_is_no_ppm_is_refused() {
        for bytes in [&b""[..], b"P6", b"P6 2 1 255 \x01", b"P5 1 1 255 \x01", b"P6 1 1 65535 "] {
            assert!(Picture::from_ppm(bytes).is_err(), "{bytes:?}");
        }
    }
}
