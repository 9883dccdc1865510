//! `Aperture`: the owner's statement of what lies behind ranges of a region.
//!
//! A BAR is not VRAM. It can go through the GPU's own page tables, wrap, or show nothing until a
//! driver has set it up. Only the owner of the device (a user-space driver, a VMM) knows, so it
//! says so by an [`Owner`]. Without a statement an aperture is *unowned*: it can be lent, but it is
//! never scrubbed and never certified.

use std::fmt;
use std::sync::Arc;

use crate::{DmaRanges, Engine, Result};

/// Whoever drives the device and answers for its memory.
///
/// The hooks are called by the lender at the right moments; they may block for as long as the
/// device needs and no longer.
pub trait Owner: Send + Sync {
    /// Who answers for the memory, for messages: "nova user-space driver", "raw bytes".
    fn name(&self) -> &str;

    /// Makes everything that the device has written to the ranges visible through the BAR.
    /// Called before an importer begins to use the memory.
    ///
    /// # Errors
    /// The device cannot: the importer does not get access then.
    fn flush(&self, ranges: &DmaRanges) -> Result<()>;

    /// Makes the device forget cached copies of the ranges. Called after an importer has finished.
    ///
    /// # Errors
    /// The device cannot; the importer's bytes may then be invisible to it.
    fn invalidate(&self, ranges: &DmaRanges) -> Result<()>;

    /// Stops the device's own work on the ranges. Called before the memory is taken back, and once for each export of it: an
    /// owner of several hears of one revoke as often, and [`resume`](Owner::resume) likewise.
    ///
    /// # Errors
    /// The device cannot; the revoke goes on all the same.
    fn quiesce(&self, ranges: &DmaRanges) -> Result<()>;

    /// Starts the device's own work again: the memory is there after it was taken back, and its content is
    /// unknown. Called after a revoke, before any importer is let in.
    ///
    /// Between `quiesce` and `resume` the owner must not touch mapped BARs: what it would see is shadow
    /// memory.
    ///
    /// # Errors
    /// The device cannot go on; nobody is let in then.
    fn resume(&self, ranges: &DmaRanges) -> Result<()> {
        let _ = ranges;
        Ok(())
    }

    /// The device's own engine, for memory that is ranges of its region; offsets are into all of them, one
    /// after the other. Without one, only the CPU can look at the memory for the owner, through the same
    /// BAR as importers, and no copy can be made but by the CPU.
    fn engine(&self) -> Option<&dyn Engine<DmaRanges>> {
        None
    }
}

/// The owner of memory that is nothing but bytes: no page tables, no caches, no engine behind it.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawBytes;

impl Owner for RawBytes {
    fn name(&self) -> &str {
        "raw bytes"
    }

    fn flush(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn invalidate(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn quiesce(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }
}

/// Ranges of a region, and who says that they are backed, linear and free to lend.
#[derive(Clone)]
pub struct Aperture {
    ranges: DmaRanges,
    owner: Option<Arc<dyn Owner>>,
}

impl Aperture {
    /// `owner` states that memory lies behind `ranges`, in that order, and is nobody else's.
    pub fn owned(ranges: DmaRanges, owner: Arc<dyn Owner>) -> Self {
        Self { ranges, owner: Some(owner) }
    }

    /// An aperture without an owner: nobody states what lies behind `ranges`.
    pub fn unowned(ranges: DmaRanges) -> Self {
        Self { ranges, owner: None }
    }

    /// The same owner's statement of `ranges` alone, which are part of the aperture's.
    pub fn part(&self, ranges: DmaRanges) -> Self {
        Self { ranges, owner: self.owner.clone() }
    }

    /// The ranges.
    pub fn ranges(&self) -> &DmaRanges {
        &self.ranges
    }

    /// Who answers for them.
    pub fn owner(&self) -> Option<&dyn Owner> {
        self.owner.as_deref()
    }
}

impl fmt::Debug for Aperture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aperture")
            .field("ranges", &self.ranges)
            .field("owner", &self.owner().map(Owner::name))
            .finish()
    }
}
