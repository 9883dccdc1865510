//! `Engine`: a device's own way to move bytes between memory that it reaches and this process.
//!
//! What verification observes with, and what staged copies are made by. `M` is memory as the device has
//! it: an importer's import, or the ranges of an owner. No CPU touches that memory on the way: what an
//! engine reads is what its *device* sees there. An engine may also copy within what its device reaches, without
//! the host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Error, Kind, Mapping, Result};

/// Part of host memory that is mapped into this process.
#[derive(Debug, Clone)]
pub struct HostSlice {
    mapping: Arc<Mapping>,
    offset_bytes: usize,
    length_bytes: usize,
}

impl HostSlice {
    /// `length_bytes` of `mapping` from `offset_bytes` on.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the slice is empty or leaves the mapping.
    pub fn new(mapping: Arc<Mapping>, offset_bytes: usize, length_bytes: usize) -> Result<Self> {
        let fits = offset_bytes.checked_add(length_bytes).is_some_and(|end| end <= mapping.len());
        if length_bytes == 0 || !fits {
            let why = format!(
                "{length_bytes:#x} bytes from {offset_bytes:#x} on are not in a mapping of {:#x}",
                mapping.len()
            );
            return Err(Error::new(Kind::InvalidInput, "take part of mapped memory", why));
        }
        Ok(Self { mapping, offset_bytes, length_bytes })
    }

    /// The mapping that it is part of. Engines remember by its identity what they have made reachable for
    /// their device.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Where it begins in the mapping, in bytes.
    pub fn offset_bytes(&self) -> usize {
        self.offset_bytes
    }

    /// Its length in bytes.
    pub fn length_bytes(&self) -> usize {
        self.length_bytes
    }
}

/// A device's own way to move bytes.
///
/// All calls block until the device is done, or until `deadline`. Calls of several threads are taken one
/// after the other.
pub trait Engine<M: ?Sized>: Send + Sync {
    /// What it is called on this device: "copy engine", "transfer queue", "compute queue".
    fn name(&self) -> &str;

    /// Copies from `memory`, beginning `offset_bytes` into it, until `host` is full.
    ///
    /// # Errors
    /// [`Kind::TimedOut`], with `host` filled in part; [`Kind::InvalidInput`] beyond the memory's end; what
    /// the device says.
    fn read(&self, memory: &M, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()>;

    /// Copies all of `host` into `memory`, beginning `offset_bytes` into it.
    ///
    /// # Errors
    /// As [`Engine::read`], with the memory written in part.
    fn write(&self, memory: &M, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()>;

    /// Copies `length_bytes` between two pieces of memory that the device reaches: `from` from an offset on, `to` an
    /// offset in the other. Says how long the device worked on it, without submission and waiting, where it can
    /// tell.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] unless the engine can; else as [`Engine::write`].
    fn copy(
        &self,
        from: (&M, u64),
        to: (&M, u64),
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        let _ = (from, to, length_bytes, deadline);
        let why = format!("its {} moves bytes from and to the host only", self.name());
        Err(Error::new(Kind::Unsupported, "copy within what a device reaches", why))
    }
}
