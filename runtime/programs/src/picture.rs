//! Pictures worth looking at, and PNG files of them.
//!
//! [`Picture::test_card`] is what the demo writes into VRAM: every pixel differs from its neighbours'
//! pattern, so a wrong stride, offset or byte order shows at once.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind};
use std::path::Path;

/// A picture in memory: XRGB8888, rows without gaps, four bytes a pixel, blue first.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({}x{})", self.width, self.height)
    }
}

impl Picture {
    /// Takes `bytes` for a picture.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] unless there are exactly four bytes a pixel.
    pub fn new(width: u32, height: u32, bytes: Vec<u8>) -> io::Result<Self> {
        if bytes.len() as u64 != u64::from(width) * u64::from(height) * 4 {
            let why = format!("{} bytes are no {width}x{height} pixels", bytes.len());
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
        Ok(Self { width, height, bytes })
    }

    /// Takes three bytes a pixel, red first, for a picture.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] unless there are exactly as many.
    pub fn of_rgb(width: u32, height: u32, rgb: &[u8]) -> io::Result<Self> {
        let (pixels, rest) = rgb.as_chunks::<3>();
        if !rest.is_empty() {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                format!("{} bytes are no pixels", rgb.len()),
            ));
        }
        let bytes = pixels.iter().flat_map(|&[red, green, blue]| [blue, green, red, 0]).collect();
        Self::new(width, height, bytes)
    }

    /// Reads a binary PPM ("P6"), which is what QEMU writes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidData`] where it is another file.
    pub fn of_ppm(bytes: &[u8]) -> io::Result<Self> {
        let wrong = |why: String| io::Error::new(ErrorKind::InvalidData, why);
        let mut position = 0;
        let mut word = || -> Option<&str> {
            let rest = &bytes[position..];
            let start = rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
            let length = rest[start..].iter().position(|byte| byte.is_ascii_whitespace())?;
            // One white-space character ends a word; pixels may begin right after it.
            position += start + length + 1;
            std::str::from_utf8(&rest[start..start + length]).ok()
        };
        let (Some(magic), Some(width), Some(height), Some(most)) = (word(), word(), word(), word()) else {
            return Err(wrong("the picture's header is cut off".into()));
        };
        if (magic, most) != ("P6", "255") {
            return Err(wrong(format!("{magic:?} with the maximum {most} is no binary PPM of 255")));
        }
        let number =
            |text: &str| text.parse().map_err(|_| wrong(format!("{text:?} is no size of a picture")));
        Self::of_rgb(number(width)?, number(height)?, &bytes[position..])
    }

    /// Reads a PNG file of three bytes a pixel.
    ///
    /// # Errors
    /// What the file system says, or that it is another file.
    pub fn load(path: &Path) -> io::Result<Self> {
        let mut reader = png::Decoder::new(BufReader::new(File::open(path)?)).read_info()?;
        let (width, height) = (reader.info().width, reader.info().height);
        let length = reader.output_buffer_size();
        let mut rgb = vec![0; length.ok_or_else(|| io::Error::from(ErrorKind::OutOfMemory))?];
        reader.next_frame(&mut rgb)?;
        Self::of_rgb(width, height, &rgb)
    }

    /// The test card: a shaded sphere over a grid, colour bars below, a frame one pixel wide.
    pub fn test_card(width: u32, height: u32) -> Self {
        let bytes = (0..height)
            .flat_map(|y| (0..width).flat_map(move |x| test_card_pixel(x, y, width, height)))
            .collect();
        Self { width, height, bytes }
    }

    /// Pixels in a row.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Its pixels, row by row, four bytes each: blue, green, red, unused.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The pixel at a place, red, green and blue; panics outside the picture.
    pub fn pixel(&self, x: u32, y: u32) -> [u8; 3] {
        assert!(x < self.width && y < self.height, "pixel {x},{y} of {self:?}");
        let start = (y as usize * self.width as usize + x as usize) * 4;
        [self.bytes[start + 2], self.bytes[start + 1], self.bytes[start]]
    }

    /// How many of its pixels another one of the same size shows otherwise, the unused byte left out; all of them where
    /// the sizes differ.
    pub fn count_differing(&self, other: &Self) -> usize {
        if (self.width, self.height) != (other.width, other.height) {
            return self.bytes.len() / 4;
        }
        let (ours, theirs) = (self.bytes.as_chunks::<4>().0, other.bytes.as_chunks::<4>().0);
        ours.iter().zip(theirs).filter(|(a, b)| a[..3] != b[..3]).count()
    }

    /// Its pixels as red, green and blue, without the unused byte.
    pub fn to_rgb(&self) -> Vec<u8> {
        let (pixels, _) = self.bytes.as_chunks::<4>();
        pixels.iter().flat_map(|&[blue, green, red, _]| [red, green, blue]).collect()
    }

    /// Writes it to a PNG file.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut encoder = png::Encoder::new(BufWriter::new(File::create(path)?), self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.to_rgb())?;
        Ok(writer.finish()?)
    }
}

fn test_card_pixel(x: u32, y: u32, width: u32, height: u32) -> [u8; 4] {
    let (px, py) = (x as f32 / width as f32, y as f32 / height as f32);
    let [red, green, blue] = if x == 0 || y == 0 || x + 1 == width || y + 1 == height {
        [1.0, 1.0, 1.0]
    } else if py > 0.86 {
        colour_bar(px, py)
    } else {
        scene(px, py, width as f32 / height as f32)
    };
    let byte = |value: f32| (value.clamp(0.0, 1.0) * 255.0) as u8;
    // The lowest bits carry the position, so that no two neighbours are equal.
    [byte(blue) ^ (x & 1) as u8, byte(green) ^ (y & 1) as u8, byte(red), 0]
}

/// Eight bars of the corner colours of the RGB cube, a grey ramp below them.
fn colour_bar(px: f32, py: f32) -> [f32; 3] {
    if py > 0.95 {
        return [px; 3];
    }
    let bar = 7 - (px * 8.0) as u32;
    [(bar >> 1 & 1) as f32, (bar >> 2 & 1) as f32, (bar & 1) as f32].map(|on| 0.08 + on * 0.84)
}

/// A lit sphere and its shadow on a floor of squares, under an evening sky.
fn scene(px: f32, py: f32, aspect: f32) -> [f32; 3] {
    const CENTRE: (f32, f32) = (0.5, 0.42);
    const RADIUS: f32 = 0.27;
    let (dx, dy) = ((px - CENTRE.0) * aspect, py - CENTRE.1);
    let inside = RADIUS * RADIUS - dx * dx - dy * dy;
    if inside > 0.0 {
        let normal = [dx / RADIUS, dy / RADIUS, inside.sqrt() / RADIUS];
        let light = [-0.48, -0.62, 0.62];
        let lit = (0..3).map(|i| normal[i] * light[i]).sum::<f32>().max(0.0);
        let gloss = lit.powi(24) * 0.75;
        let rim = (1.0 - normal[2]).powi(3) * 0.35;
        return [
            0.10 + 0.22 * lit + gloss + rim,
            0.16 + 0.52 * lit + gloss + rim,
            0.26 + 0.62 * lit + gloss + rim,
        ];
    }
    if py > 0.56 {
        let depth = 0.1 / (py - 0.5);
        let column = ((px - 0.5) * depth * aspect * 14.0).floor() as i32;
        let row = (depth * 9.0).floor() as i32;
        let square = if (column + row) % 2 == 0 { 0.62 } else { 0.30 };
        let shadow_x = (px - 0.53) * aspect / 0.34;
        let shadow_y = (py - 0.705) / 0.055;
        let shade = if shadow_x * shadow_x + shadow_y * shadow_y < 1.0 { 0.35 } else { 1.0 };
        let haze = ((py - 0.56) / 0.2).min(1.0);
        return [0.9, 0.8, 0.72].map(|tint| (square * shade * haze + 0.75 * (1.0 - haze)) * tint);
    }
    let dusk = py / 0.56;
    [0.16 + 0.62 * dusk * dusk, 0.20 + 0.42 * dusk, 0.42 + 0.16 * dusk]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_comes_back_from_its_file() {
        let picture = Picture::test_card(64, 48);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("card.png");
        picture.save(&path).unwrap();
        let decoder = png::Decoder::new(BufReader::new(File::open(&path).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut rgb).unwrap();
        assert_eq!(rgb, picture.to_rgb());
        assert_eq!(Picture::load(&path).unwrap(), picture);
    }

    #[test]
    fn a_ppm_is_read() {
        let picture = Picture::of_ppm(b"P6\n2 1\n255\n\x01\x02\x03\n\x05\x06").unwrap();
        assert_eq!((picture.width(), picture.height()), (2, 1));
        assert_eq!((picture.pixel(0, 0), picture.pixel(1, 0)), ([1, 2, 3], [10, 5, 6]));
    }

    #[test]
    fn what_is_no_ppm_is_refused() {
        for bytes in [&b""[..], b"P6", b"P6 2 1 255 \x01", b"P5 1 1 255 \x01", b"P6 1 1 65535 "] {
            assert!(Picture::of_ppm(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn pixels_that_differ_are_counted() {
        let [card, mut other] = [(); 2].map(|()| Picture::test_card(8, 8));
        assert_eq!(card.count_differing(&other), 0);
        other.bytes[4 * 9] ^= 1;
        // Nobody sees the unused byte.
        other.bytes[4 * 20 + 3] ^= 1;
        assert_eq!(card.count_differing(&other), 1);
        assert_eq!(card.count_differing(&Picture::test_card(8, 4)), 64);
    }

    #[test]
    fn neighbours_differ_so_that_a_shift_shows() {
        let picture = Picture::test_card(320, 200);
        let shifted = |pixels: usize| {
            let bytes = picture.bytes();
            bytes.iter().zip(&bytes[pixels * 4..]).filter(|(a, b)| a != b).count() * 8 / bytes.len()
        };
        assert!(shifted(1) > 0 && shifted(320) > 0 && shifted(7) > 0);
    }

    #[test]
    fn bytes_must_be_as_many_as_pixels() {
        assert_eq!(Picture::new(2, 2, vec![0; 15]).unwrap_err().kind(), ErrorKind::InvalidInput);
        let picture = Picture::new(2, 2, vec![0; 16]).unwrap();
        assert_eq!((picture.width(), picture.height(), picture.bytes().len()), (2, 2, 16));
    }
}
