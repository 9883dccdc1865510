//! A picture that is lent or was read: where it lies, and errors about it in the words of this program.

use std::path::Path;

use peervram::backends::ImageLayout;
use peervram::{Error, Result};
pub use peervram_programs::picture::Picture;

/// Where it lies in memory that begins with it.
pub fn layout_of(picture: &Picture) -> ImageLayout {
    ImageLayout::packed(picture.width(), picture.height())
}

/// Takes bytes that were read for a picture.
///
/// # Errors
/// They are not as many as its pixels want.
pub fn of_bytes(layout: ImageLayout, bytes: Vec<u8>) -> Result<Picture> {
    Picture::new(layout.width, layout.height, bytes).map_err(|error| Error::os("make a picture", error))
}

/// Writes a PNG file.
///
/// # Errors
/// What the file system says.
pub fn save(picture: &Picture, path: &Path) -> Result<()> {
    picture.save(path).map_err(|error| Error::os("write a picture", error).on(path.display()))
}
