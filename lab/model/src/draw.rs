//! Pictures worth looking at, one row of XRGB8888 at a time. Pure.
//!
//! Every frame differs from the one before, and says its number: a picture that is late, torn or
//! repeated can be seen and read.

use crate::operation::Picture;

/// Digits, five rows of three bits.
const DIGITS: [[u8; 5]; 10] = [
    [7, 5, 5, 5, 7],
    [2, 6, 2, 2, 7],
    [7, 1, 7, 4, 7],
    [7, 1, 7, 1, 7],
    [5, 5, 7, 1, 1],
    [7, 4, 7, 1, 7],
    [7, 4, 7, 5, 7],
    [7, 1, 1, 1, 1],
    [7, 5, 7, 5, 7],
    [7, 5, 7, 1, 7],
];
const DIGIT_COLUMNS: u32 = 4;
const DIGIT_ROWS: u32 = 5;
const WHITE: u32 = 0x00ff_ffff;

/// Draws row `y` of a frame of `width * height` pixels into `row`, four bytes for each pixel.
pub fn draw_row(picture: Picture, frame: u32, width: u32, height: u32, y: u32, row: &mut [u8]) {
    let triangle = (picture == Picture::Triangle).then(|| Triangle::new(frame, width, height));
    for (x, pixel) in (0..width).zip(row.chunks_exact_mut(4)) {
        let colour = match &triangle {
            Some(triangle) => triangle.colour(x, y),
            None => gradient(frame, width, height, x, y),
        };
        let colour = if is_digit(frame, width, height, x, y) { WHITE } else { colour };
        pixel.copy_from_slice(&colour.to_le_bytes());
    }
}

fn gradient(frame: u32, width: u32, height: u32, x: u32, y: u32) -> u32 {
    let shift = u64::from(frame) * 4;
    let across = (u64::from(x) * 256 / u64::from(width.max(1)) + shift) & 0xff;
    let down = (u64::from(y) * 256 / u64::from(height.max(1)) + shift / 2) & 0xff;
    let blue = 255 - (across + down) / 2;
    (across << 16 | down << 8 | blue) as u32
}

/// Whether a pixel belongs to the number of the frame, at the upper left.
fn is_digit(frame: u32, width: u32, height: u32, x: u32, y: u32) -> bool {
    let scale = (width.min(height) / 48).max(1);
    let Some((x, y)) = x.checked_sub(2 * scale).zip(y.checked_sub(2 * scale)) else { return false };
    let (column, line) = (x / scale, y / scale);
    let count = frame.checked_ilog10().unwrap_or(0) + 1;
    let (place, column) = (column / DIGIT_COLUMNS, column % DIGIT_COLUMNS);
    if line >= DIGIT_ROWS || place >= count || column >= 3 {
        return false;
    }
    let digit = frame / 10u32.pow(count - 1 - place) % 10;
    DIGITS[digit as usize][line as usize] >> (2 - column) & 1 == 1
}

struct Triangle {
    corners: [(f32, f32); 3],
    area: f32,
}

impl Triangle {
    fn new(frame: u32, width: u32, height: u32) -> Self {
        // A full turn in 120 frames.
        let turn = (frame % 120) as f32 / 120.0;
        let radius = width.min(height) as f32 * 0.45;
        let corners = [0.0, 1.0, 2.0].map(|third: f32| {
            let angle = (turn + third / 3.0) * std::f32::consts::TAU;
            (width as f32 / 2.0 + radius * angle.sin(), height as f32 / 2.0 - radius * angle.cos())
        });
        let area = edge(corners[0], corners[1], corners[2]);
        Triangle { corners, area }
    }

    /// Each corner has a colour of its own; in between they mix.
    fn colour(&self, x: u32, y: u32) -> u32 {
        const BACKGROUND: u32 = 0x0010_1418;
        let point = (x as f32 + 0.5, y as f32 + 0.5);
        let [a, b, c] = self.corners;
        let weights =
            [edge(b, c, point), edge(c, a, point), edge(a, b, point)].map(|weight| weight / self.area);
        if weights.iter().any(|weight| !(0.0..=1.0).contains(weight)) {
            return BACKGROUND;
        }
        let [red, green, blue] = weights.map(|weight| (weight * 255.0) as u32);
        red << 16 | green << 8 | blue
    }
}

/// Twice the signed area of a triangle.
fn edge(a: (f32, f32), b: (f32, f32), c: (f32, f32)) -> f32 {
    (b.0 - a.0) * (c.1 - a.1) - (b.1 - a.1) * (c.0 - a.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(picture: Picture, number: u32, width: u32, height: u32) -> Vec<u32> {
        let mut pixels = Vec::new();
        for y in 0..height {
            let mut row = vec![0; width as usize * 4];
            draw_row(picture, number, width, height, y, &mut row);
            pixels.extend(row.chunks_exact(4).map(|pixel| u32::from_le_bytes(pixel.try_into().unwrap())));
        }
        pixels
    }

    #[test]
    fn frames_differ_from_one_another() {
        for picture in [Picture::Gradient, Picture::Triangle] {
            assert_ne!(frame(picture, 1, 64, 48), frame(picture, 2, 64, 48));
        }
    }

    #[test]
    fn the_number_can_be_read() {
        let pixels = frame(Picture::Triangle, 17, 48, 48);
        let line = |y: usize| {
            (2..10).map(|x| if pixels[y * 48 + x] == WHITE { '#' } else { '.' }).collect::<String>()
        };
        assert_eq!(
            (2..7).map(line).collect::<Vec<_>>(),
            [".#..###.", "##....#.", ".#....#.", ".#....#.", "###...#."]
        );
    }

    #[test]
    fn the_triangle_is_shaded_and_has_a_background() {
        let pixels = frame(Picture::Triangle, 0, 60, 60);
        let centre = pixels[30 * 60 + 30];
        assert!([16, 8, 0].iter().all(|shift| (70..100).contains(&(centre >> shift & 0xff))), "{centre:06x}");
        assert_eq!(pixels[59 * 60 + 59], 0x0010_1418);
    }

    #[test]
    fn extreme_sizes_and_numbers_do_not_overflow() {
        let mut row = [0; 4];
        for picture in [Picture::Gradient, Picture::Triangle] {
            draw_row(picture, u32::MAX, 1, 1, 0, &mut row);
            draw_row(picture, u32::MAX, 16384, 16384, 16383, &mut row);
        }
    }
}
