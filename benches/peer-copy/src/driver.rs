//! `Driver`: who drives a device that is bound to VFIO, so that its own engines take part.
//!
//! A device without a driver lends plain bytes, and the CPU looks at them for it. To have another device take part with
//! its engines, write a driver on peervram's public interface, and add it to [`all`].

use std::sync::Arc;

use peervram::Result;
use peervram::backends::pci::Function;
use peervram::backends::{DmaRange, Owner, vfio};

use crate::attached::Imports;

/// A user-space driver.
pub trait Driver {
    /// Whether the function looks like one of its devices; the device is not touched.
    fn may_drive(&self, function: &Function) -> bool;

    /// Takes the device over.
    ///
    /// # Errors
    /// [`peervram::Kind::Unsupported`] if it is another device after all; else what the device says.
    fn open(&self, device: &vfio::Device) -> Result<Driven>;
}

/// A device that is driven.
pub struct Driven {
    /// Who answers for its memory.
    pub owner: Arc<dyn Owner>,
    /// The region that is its memory.
    pub region: u32,
    /// What of it may be lent.
    pub lent: DmaRange,
    /// The device as an importer.
    pub imports: Option<Box<dyn Imports>>,
}

/// The drivers that this program was built with.
pub fn all() -> Vec<Box<dyn Driver>> {
    vec![
        #[cfg(feature = "model")]
        Box::new(crate::model::ModelDriver),
    ]
}
