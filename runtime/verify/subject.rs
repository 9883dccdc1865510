//! `Subject`: the pair that a certificate is about; and `Request`: what an importer wants of one.

use std::fmt;

use peervram_backends::{DmaRange, DmaRanges, PciAddress};
use serde::{Deserialize, Serialize};

use super::text::clean;
use crate::{Direction, Path};

/// One of the two devices.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Party {
    /// Its name, as messages have it.
    pub name: String,
    /// Its PCI address, where it has one.
    pub address: Option<String>,
}

impl Party {
    pub(crate) fn new(name: &str, address: Option<PciAddress>) -> Self {
        Self { name: clean(name), address: address.map(|address| address.to_string()) }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Some(address) if !self.name.contains(address.as_str()) => write!(f, "{} at {address}", self.name),
            _ => f.write_str(&self.name),
        }
    }
}

/// The pair that a certificate is about: a lender's region and an importer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Subject {
    /// Whose memory.
    pub lender: Party,
    /// Which region of it, for PCI the BAR's number.
    pub region: u32,
    /// Who reaches it.
    pub importer: Party,
}

/// A slice of the region, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// Where it begins.
    pub offset_bytes: u64,
    /// How long it is.
    pub length_bytes: u64,
}

impl From<&DmaRange> for Extent {
    fn from(range: &DmaRange) -> Self {
        Self { offset_bytes: range.offset_bytes, length_bytes: range.length_bytes }
    }
}

impl Extent {
    /// Where it ends; none of what is in no memory.
    pub(crate) fn end_bytes(self) -> Option<u64> {
        self.offset_bytes.checked_add(self.length_bytes)
    }
}

/// What somebody wants to trust a path for: an importer's engines, a direction, a path, and what is lent by it.
/// [`Attachment::request`](crate::Attachment::request) makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub(crate) engines: Vec<String>,
    pub(crate) direction: Direction,
    pub(crate) path: Path,
    /// In the order of the buffer.
    pub(crate) ranges: Vec<Extent>,
    /// Whether it is enough that the CPU looked, through the same window as the importer.
    pub(crate) window_only: bool,
}

impl Request {
    pub(crate) fn new(engines: Vec<String>, direction: Direction, path: Path, ranges: &DmaRanges) -> Self {
        let engines = engines.iter().map(|engine| clean(engine)).collect();
        let ranges = ranges.as_slice().iter().map(Extent::from).collect();
        Self { engines, direction, path, ranges, window_only: false }
    }

    /// The same, where a look through the importer's own window is enough, or is not.
    #[must_use]
    pub fn window_only(mut self, is_enough: bool) -> Self {
        self.window_only = is_enough;
        self
    }
}
