//! PNG files of pictures.

use anyhow::{Context, Result};
use peervram_lab::picture::Picture;
use png::{ColorType, Decoder, Encoder};
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;

/// Reads one of three bytes a pixel.
pub fn read(path: &Path) -> Result<Picture> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut reader = Decoder::new(BufReader::new(file)).read_info()?;
    let (width, height) = (reader.info().width, reader.info().height);
    let mut rgb = vec![0; reader.output_buffer_size().context("a picture beyond memory")?];
    reader.next_frame(&mut rgb)?;
    Ok(Picture { width, height, rgb })
}

/// Writes one.
pub fn write(path: &Path, picture: &Picture) -> Result<()> {
    let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    let mut encoder = Encoder::new(BufWriter::new(file), picture.width, picture.height);
    encoder.set_color(ColorType::Rgb);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgb)?;
    Ok(writer.finish()?)
}
