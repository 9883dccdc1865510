//! Copies by the device between an imported image and this process, pixel by pixel.
//!
//! As with buffers, through staging memory: what comes out is what the *device* sees, by its own idea of where pixels
//! lie. That is how it shows that both sides mean the same.
#![expect(unsafe_code, reason = "recording copies")]

use std::sync::Arc;
use std::time::Instant;

use ash::vk;

use super::copy::STAGING_BYTES;
use super::engine::Engine;
use crate::vulkan::copying::staging::Staging;
use crate::vulkan::images::image::Image;
use crate::vulkan::memory::handover::{self, Use};
use crate::vulkan::usage::ImageUsage;
use crate::{Error, ImageLayout, Kind, Result};

impl Engine {
    /// Copies all pixels of `image` to `into`, four bytes each, row after row without a gap.
    ///
    /// Blocks until it is done or `deadline` has passed; `into` may be filled in part then.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where `into` is not as large as the picture, or for an image of another device or
    /// without [`ImageUsage::TRANSFER_SRC`]; [`Kind::TimedOut`]; [`Kind::Vulkan`] where the driver refuses.
    pub fn read_image(&mut self, image: &Image, into: &mut [u8], deadline: Instant) -> Result<()> {
        const TRIED: &str = "copy out of an imported image";
        self.check_image(TRIED, image, ImageUsage::TRANSFER_SRC, into.len())?;
        let rows = self.band_rows(image);
        for (band, y) in into.chunks_mut(rows * row_bytes(image)).zip(bands(image, rows)) {
            let staging = self.copy_band(TRIED, image, deadline, None, y, band.len())?;
            // SAFETY: a band is at most as large as the staging memory, and nothing is in flight.
            unsafe { staging.read(band) };
        }
        Ok(())
    }

    /// Copies `pixels` to all of `image`. As [`Engine::read_image`], with [`ImageUsage::TRANSFER_DST`].
    ///
    /// # Errors
    /// As [`Engine::read_image`]; the image may be written in part then.
    pub fn write_image(&mut self, image: &Image, pixels: &[u8], deadline: Instant) -> Result<()> {
        const TRIED: &str = "copy into an imported image";
        self.check_image(TRIED, image, ImageUsage::TRANSFER_DST, pixels.len())?;
        let rows = self.band_rows(image);
        for (band, y) in pixels.chunks(rows * row_bytes(image)).zip(bands(image, rows)) {
            self.copy_band(TRIED, image, deadline, Some(band), y, band.len())?;
        }
        Ok(())
    }

    /// Copies whole rows, from row `y` on: `pixels` in, or out to the staging memory.
    fn copy_band(
        &mut self,
        tried: &'static str,
        image: &Image,
        deadline: Instant,
        pixels: Option<&[u8]>,
        y: u32,
        length_bytes: usize,
    ) -> Result<Arc<Staging>> {
        let staging = self.staging_of(length_bytes as u64)?;
        let used = vec![Arc::clone(image.resource()) as _, Arc::clone(&staging) as _];
        let width = image.layout().width;
        let rows = (length_bytes / (width as usize * 4)) as u32;
        let of =
            vk::ImageSubresourceLayers::default().aspect_mask(vk::ImageAspectFlags::COLOR).layer_count(1);
        let region = [vk::BufferImageCopy::default()
            .image_subresource(of)
            .image_offset(vk::Offset3D { x: 0, y: y as i32, z: 0 })
            .image_extent(vk::Extent3D { width, height: rows, depth: 1 })];
        // Copies can be made in this layout, too, and no pixel has to move for it.
        let general = vk::ImageLayout::GENERAL;
        self.commands.run(tried, deadline, used, |ash, commands| {
            // SAFETY: nothing is in flight when this is called, image and buffer are in the list above and have the
            // usage, and the rows are of the image (VUID-vkCmdCopyImageToBuffer-imageSubresource-07972,
            // VUID-vkCmdCopyBufferToImage-imageSubresource-07972) and as many as the buffer holds
            // (VUID-vkCmdCopyImageToBuffer-pRegions-00183).
            unsafe {
                if let Some(pixels) = pixels {
                    staging.write(pixels);
                }
                handover::acquire_image(commands, image.resource(), general, Use::COPY);
                match pixels {
                    Some(_) => ash.cmd_copy_buffer_to_image(
                        commands,
                        staging.buffer(),
                        image.resource().handle(),
                        general,
                        &region,
                    ),
                    None => ash.cmd_copy_image_to_buffer(
                        commands,
                        image.resource().handle(),
                        general,
                        staging.buffer(),
                        &region,
                    ),
                }
                handover::release_image(commands, image.resource(), general, Use::COPY);
                handover::show_host(ash, commands, Use::COPY);
            }
        })?;
        Ok(staging)
    }

    /// How many rows are copied at once.
    fn band_rows(&self, image: &Image) -> usize {
        let granularity = self.device.logical().queue(false).family.min_image_transfer_granularity;
        band_rows(image.layout(), granularity.height)
    }

    /// Staging memory of at least so many bytes: more than usual where a queue copies no less at once.
    fn staging_of(&mut self, length_bytes: u64) -> Result<Arc<Staging>> {
        let size_bytes = length_bytes.max(STAGING_BYTES);
        self.staging.drop_if(|staging| staging.size_bytes() < size_bytes);
        let device = self.device.logical().clone();
        self.staging.get(|| Staging::new(&device, size_bytes))
    }

    /// Whether `image` is of this device, made for `usage`, and has `length_bytes` of pixels.
    fn check_image(
        &self,
        tried: &'static str,
        image: &Image,
        usage: ImageUsage,
        length_bytes: usize,
    ) -> Result<()> {
        let layout = image.layout();
        let pixels_bytes = u64::from(layout.width) * u64::from(layout.height) * 4;
        let why = if !self.device.logical().is_same(image.device().logical()) {
            "the image is of another Vulkan device".to_owned()
        } else if !image.options().usage.contains(usage) {
            "the image was imported without the usage for it".to_owned()
        } else if length_bytes as u64 != pixels_bytes {
            format!(
                "a picture of {}x{} has {pixels_bytes:#x} bytes, not {length_bytes:#x}",
                layout.width, layout.height
            )
        } else {
            return Ok(());
        };
        Err(Error::new(Kind::InvalidInput, tried, why))
    }
}

fn row_bytes(image: &Image) -> usize {
    image.layout().width as usize * 4
}

/// As many whole rows as fit the usual staging memory (one does: no picture is wider than 32768 pixels), in steps of
/// `granularity` (`minImageTransferGranularity`: VUID-vkCmdCopyImageToBuffer-imageOffset-07747,
/// VUID-vkCmdCopyBufferToImage-imageOffset-07738), and one step at least. A queue with a granularity of zero copies whole
/// images only.
fn band_rows(picture: ImageLayout, granularity: u32) -> usize {
    let (rows, granularity) = (picture.height as usize, granularity as usize);
    if granularity == 0 {
        return rows;
    }
    let fit = STAGING_BYTES as usize / (picture.width as usize * 4);
    (fit / granularity).max(1) * granularity
}

/// The first row of each band of so many rows.
fn bands(image: &Image, rows: usize) -> impl Iterator<Item = u32> + use<> {
    (0..image.layout().height).step_by(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_are_steps_of_what_the_queue_copies_at_once() {
        let picture = |width, height| ImageLayout { offset_bytes: 0, width, height, stride_bytes: width * 4 };
        let rows_of_4_mib = 4 << 20 >> 12;
        assert_eq!(band_rows(picture(1024, 5000), 1), rows_of_4_mib);
        assert_eq!(band_rows(picture(1024, 5000), 48), rows_of_4_mib / 48 * 48);
        assert_eq!(band_rows(picture(32768, 5000), 1), 32);
        assert_eq!(band_rows(picture(32768, 5000), 64), 64, "one step, however large");
        assert_eq!(band_rows(picture(1024, 5000), 0), 5000, "the whole image");
    }
}
