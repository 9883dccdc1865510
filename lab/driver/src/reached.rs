//! `Reached`: host memory that the device reaches by DMA, made so at its first use.
//!
//! Mapping memory for DMA pins every page and tells the IOMMU, which takes longer than most copies: what was
//! mapped once stays so for as long as anybody but this list has the memory. It is let go of at the next call
//! after that.

use std::sync::{Arc, Mutex, PoisonError};

use peervram::backends::vfio::{IoAddressSpace, IovaMapping};
use peervram::backends::{HostSlice, Importer};
use peervram::{Error, Kind, Result};

/// The host memory that one device has been given so far.
pub struct Reached {
    /// The device's address space; none where another process opened the device.
    space: Option<IoAddressSpace>,
    mapped: Mutex<Vec<Arc<IovaMapping>>>,
}

impl Reached {
    /// A device in `space` that has been given no host memory yet.
    pub fn new(space: Option<IoAddressSpace>) -> Self {
        Self { space, mapped: Mutex::default() }
    }

    /// The DMA address of `host`, good for as long as what comes with it.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where there is no address space; what mapping the memory says.
    pub fn address_of(&self, host: &HostSlice) -> Result<(u64, Arc<IovaMapping>)> {
        let Some(space) = &self.space else {
            let why = "another process opened the device: its DMA addresses are not ours to give";
            return Err(Error::new(Kind::Unsupported, "reach host memory by DMA", why));
        };
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        // One owner of the memory is the mapping for DMA itself.
        mapped.retain(|one| one.memory().is_some_and(|memory| Arc::strong_count(memory) > 1));
        let is_it =
            |one: &&Arc<IovaMapping>| one.memory().is_some_and(|memory| Arc::ptr_eq(memory, host.mapping()));
        let found = match mapped.iter().find(is_it) {
            Some(found) => Arc::clone(found),
            None => {
                let made = Arc::new(space.import_host_pointer(Arc::clone(host.mapping()))?);
                mapped.push(Arc::clone(&made));
                made
            }
        };
        Ok((found.iova() + host.offset_bytes() as u64, found))
    }
}
