//! Which pictures a Vulkan device takes out of lent memory: row by row at the driver's own pitch and at the lender's, with rows
//! of several lengths.
//!
//! Each import is of a device of its own, opened for it: what one refusal may cost is not laid to the next.

use std::process::ExitCode;
use std::sync::Arc;

use peervram::backends::vulkan::{ImageOptions, Instance, Tiling};
use peervram::backends::{Aperture, DmaRange, DmaRanges, ImageLayout, PciAddress, RawBytes};
use peervram::{AttachOptions, Error, Export, Kind, Lender, Path, Result, Trust};
use serde::Serialize;

use crate::ending::{ErrorReport, print_json};
use crate::import::Target;
use crate::opened::Opened;

/// Widths in pixels of four bytes: rows of 2560 bytes (a multiple of 512), 2564 (of 4), 2624 (of 64) and 2816 (of 256).
const WIDTHS: [u32; 4] = [640, 641, 656, 704];
const HEIGHT: u32 = 64;

/// What came of one import.
#[derive(Serialize)]
struct ImageReport {
    tiling: &'static str,
    stride_bytes: u32,
    /// By which path it was taken; none where it was refused.
    path: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorReport>,
}

/// The process of a step.
pub fn run(lender: PciAddress, importer: &Target) -> anyhow::Result<ExitCode> {
    let Target::Vulkan(selector) = importer else {
        let error =
            Error::new(Kind::Unsupported, "import images", "only Vulkan devices make images of memory");
        return Err(error.into());
    };
    let device = Opened::open(lender)?;
    let largest = WIDTHS.map(|width| ImageLayout::packed(width, HEIGHT).end_bytes()).into_iter().max();
    // A driver may want its memory in larger pages than the kernel's.
    let lent = DmaRange::new(0, largest.unwrap_or_default().next_multiple_of(1 << 20));
    let ranges = DmaRanges::new(device.memory()?, &[lent])?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let mut images = Vec::new();
    for (name, tiling) in [("linear", Tiling::Linear), ("explicit-linear", Tiling::EXPLICIT_LINEAR)] {
        for width in WIDTHS {
            let layout = ImageLayout::packed(width, HEIGHT);
            let options = ImageOptions { tiling, ..ImageOptions::default() };
            let device = Instance::open()?.open_device(selector)?;
            let taken = attach(&export, Arc::new(device.for_images(layout, options)));
            images.push(ImageReport {
                tiling: name,
                stride_bytes: layout.stride_bytes,
                path: taken.as_ref().ok().map(|path| path.name()),
                error: taken.as_ref().err().map(ErrorReport::from),
            });
        }
    }
    print_json(&serde_json::json!({ "images": images }))?;
    Ok(ExitCode::SUCCESS)
}

/// The path by which it is taken. A copy would say nothing of images.
fn attach(export: &Export, importer: Arc<impl peervram::backends::Importer>) -> Result<Path> {
    let options = AttachOptions::new(Trust::Unverified).with_paths(&[Path::Peer, Path::HostPointer]);
    let attachment = export.attach(importer, options)?;
    let path = attachment.path();
    attachment.detach()?;
    Ok(path)
}
