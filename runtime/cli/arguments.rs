//! Arguments that several commands share: sizes, ranges, picture sizes.

use std::str::FromStr;

use clap::Args;
use peervram::backends::{DmaRange, DmaRanges, Exporter, Region, vfio};
use peervram::{Error, Kind, Result};

use super::opened::Opened;

/// Which part of a device's memory.
#[derive(Args)]
pub struct MemoryArguments {
    /// The region, for PCI the BAR's number. VRAM is the largest one that can be mapped, or the
    /// usable memory of a Grace GPU (4), which is taken where this is not given.
    #[arg(long, value_name = "INDEX")]
    region: Option<u32>,

    /// A slice of the region, OFFSET+LENGTH, each like 4096, 0x1000, 64K or 16M. Several slices make
    /// one buffer, in the order given. Without it, the whole region.
    #[arg(long = "range", value_name = "RANGE")]
    ranges: Vec<RangeArgument>,
}

impl MemoryArguments {
    /// The option that was given, if one was: for commands that have no use for it.
    pub fn given(&self) -> Option<&'static str> {
        match (self.region, &self.ranges[..]) {
            (Some(_), _) => Some("--region"),
            (None, [_, ..]) => Some("--range"),
            (None, []) => None,
        }
    }

    /// The region and the ranges, as they were asked for.
    pub fn asked(&self) -> (Option<u32>, Vec<DmaRange>) {
        (self.region, self.ranges.iter().map(|argument| argument.0).collect())
    }

    /// The ranges asked for, checked against the device.
    pub fn ranges(&self, device: &Opened) -> Result<DmaRanges> {
        let (region, ranges) = self.asked();
        ranges_of(device, region, &ranges)
    }
}

/// `ranges` of a region of `device`: of its VRAM where none is named, and all of it where there are none.
pub fn ranges_of(device: &Opened, region: Option<u32>, ranges: &[DmaRange]) -> Result<DmaRanges> {
    let region = match region {
        Some(index) => device.region(index)?,
        None => device.memory()?,
    };
    match ranges {
        [] => DmaRanges::whole(region),
        ranges => DmaRanges::new(region, ranges),
    }
}

pub fn largest_memory(device: &vfio::Device) -> Result<&Region> {
    (device.regions().iter())
        .filter(|region| region.index < peervram::backends::pci::BAR_COUNT as u32 && region.flags.mmap)
        .max_by_key(|region| region.size_bytes)
        .ok_or_else(|| {
            Error::new(Kind::NotFound, "find a device's memory", "no BAR can be mapped").on(device.address())
        })
}

/// `OFFSET+LENGTH` in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeArgument(pub DmaRange);

impl FromStr for RangeArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (offset, length) =
            text.split_once('+').ok_or_else(|| format!("{text:?} is not OFFSET+LENGTH, like 0+16M"))?;
        Ok(Self(DmaRange::new(parse_bytes(offset)?, parse_bytes(length)?)))
    }
}

/// Reads `4096`, `0x1000`, `64K`, `16M` or `1G` (powers of 1024).
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no number of bytes; write 4096, 0x1000, 64K, 16M or 1G");
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let (digits, radix) = digits.strip_prefix("0x").map_or((digits, 10), |digits| (digits, 16));
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    let number = u64::from_str_radix(digits, radix).map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// `WIDTHxHEIGHT` in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureSize {
    pub width: u32,
    pub height: u32,
}

impl FromStr for PictureSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (width, height) = text.split_once('x')?;
            let size = Self { width: width.parse().ok()?, height: height.parse().ok()? };
            (1..=16384).contains(&size.width).then_some(())?;
            (1..=16384).contains(&size.height).then_some(size)
        };
        parse()
            .ok_or_else(|| format!("{text:?} is not WIDTHxHEIGHT in pixels, like 640x480, up to 16384 each"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("0x1000"), Ok(4096));
        assert_eq!(parse_bytes("64K"), Ok(65536));
        assert_eq!(parse_bytes("16M"), Ok(16 << 20));
        for wrong in ["", "K", "-1", "+5", "1T", "0x", "99999999999G", "1.5M"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ranges_and_pictures_are_read() {
        assert_eq!("0x1000+2M".parse(), Ok(RangeArgument(DmaRange::new(4096, 2 << 20))));
        assert!("4096".parse::<RangeArgument>().is_err());
        assert_eq!("640x480".parse(), Ok(PictureSize { width: 640, height: 480 }));
        assert!("640x0".parse::<PictureSize>().is_err());
        assert!("99999x1".parse::<PictureSize>().is_err());
    }
}
