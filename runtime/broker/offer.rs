//! `Offer`: memory of a lender that a broker lends to other processes.

use std::fmt;
use std::sync::Arc;

use peervram_backends::{Aperture, DmaRange, DmaRanges, Error, Exporter, Kind, PciAddress, page_size_bytes};

use crate::revoke::{Event, RevokeCause, RevokeOptions, Subscription};
use crate::{Export, Lender, Result};

/// What the first byte of a lease is a multiple of, where nobody says otherwise: drivers of GPUs map pieces of 64 KiB
/// with fewer entries of their page tables.
const ALIGNMENT_BYTES: u64 = 64 << 10;
/// The longest name of a memory, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// How a memory's device is reset.
type Reset<E> = Box<dyn Fn(&Lender<E>, RevokeOptions) -> Result<()> + Send + Sync>;

/// Memory that a broker lends, by a name.
pub struct Offer {
    pub(super) name: String,
    pub(super) lender: Arc<dyn ServedLender>,
    pub(super) aperture: Aperture,
    pub(super) alignment_bytes: u64,
}

impl Offer {
    /// Lends what `aperture` describes. The lender is the caller's as before, to reset it or lend more of it; the broker
    /// lends nothing of it after the lender was closed.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for a name that is empty, longer than 64 bytes, or has other characters than letters,
    /// digits, `-`, `_`, `.` and `:`; for an aperture without an owner, because memory that nobody answers for cannot be
    /// scrubbed.
    pub fn new<E: Exporter + 'static>(
        name: &str,
        lender: &Arc<Lender<E>>,
        aperture: Aperture,
    ) -> Result<Self> {
        Self::of(name, Served { lender: Arc::clone(lender), reset: None }, aperture)
    }

    /// As [`Offer::new`]; and operators may reset the device, by `reset`: for a VFIO device
    /// `|lender, options| lender.reset(options)`.
    ///
    /// # Errors
    /// As [`Offer::new`].
    pub fn with_reset<E: Exporter + 'static>(
        name: &str,
        lender: &Arc<Lender<E>>,
        aperture: Aperture,
        reset: impl Fn(&Lender<E>, RevokeOptions) -> Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::of(name, Served { lender: Arc::clone(lender), reset: Some(Box::new(reset)) }, aperture)
    }

    fn of<E: Exporter + 'static>(name: &str, served: Served<E>, aperture: Aperture) -> Result<Self> {
        const TRIED: &str = "offer memory to other processes";
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_.:".contains(letter);
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(is_plain) {
            let why = format!("`{name}` is no name for it");
            let next = "take up to 64 letters, digits, `-`, `_`, `.` and `:`";
            return Err(Error::new(Kind::InvalidInput, TRIED, why).next(next));
        }
        if aperture.owner().is_none() {
            let why = "nobody answers for what is behind it, so that it cannot be scrubbed";
            let error = Error::new(Kind::InvalidInput, TRIED, why).on(served.device());
            return Err(error.next("give it an owner: Aperture::owned"));
        }
        let page = page_size_bytes();
        let alignment_bytes = if served.exports_new_memory() { page } else { page.max(ALIGNMENT_BYTES) };
        Ok(Self { name: name.into(), lender: Arc::new(served), aperture, alignment_bytes })
    }

    /// Has leases begin at multiples of `alignment_bytes`: a power of two, the page size at least. 64 KiB of a device
    /// without this, the page size of host memory.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for any other number.
    pub fn with_alignment(mut self, alignment_bytes: u64) -> Result<Self> {
        if !alignment_bytes.is_power_of_two() || alignment_bytes < page_size_bytes() {
            let why = format!("leases cannot begin at multiples of {alignment_bytes} bytes");
            let next = format!("take a power of two from {} on", page_size_bytes());
            return Err(Error::new(Kind::InvalidInput, "offer memory to other processes", why).next(next));
        }
        self.alignment_bytes = alignment_bytes;
        Ok(self)
    }

    /// Exports `ranges` of it.
    pub(super) fn export(&self, ranges: &[DmaRange]) -> Result<Export> {
        let region_index = self.aperture.ranges().region_index();
        let ranges = self.lender.ranges(region_index, ranges)?;
        self.lender.export(self.aperture.part(ranges))
    }
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer")
            .field("name", &self.name)
            .field("aperture", &self.aperture)
            .field("alignment_bytes", &self.alignment_bytes)
            .finish_non_exhaustive()
    }
}

/// A lender of whatever device, as a broker needs it.
pub(super) trait ServedLender: Send + Sync {
    fn device(&self) -> String;
    fn pci_address(&self) -> Option<PciAddress>;
    fn region_bytes(&self, region_index: u32) -> u64;
    fn ranges(&self, region_index: u32, ranges: &[DmaRange]) -> Result<DmaRanges>;
    fn exports_new_memory(&self) -> bool;
    fn generation(&self) -> u64;
    fn export(&self, aperture: Aperture) -> Result<Export>;
    fn on_event(&self, callback: Box<dyn Fn(&Event) + Send + Sync>) -> Subscription;
    /// Which lender it is: two offers may be of one.
    fn identity(&self) -> usize;
    /// Takes everything back around `call`.
    fn revoke(
        &self,
        cause: RevokeCause,
        tried: &'static str,
        options: RevokeOptions,
        call: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<()>;
    fn reset(&self, options: RevokeOptions) -> Result<()>;
}

struct Served<E: Exporter + 'static> {
    lender: Arc<Lender<E>>,
    reset: Option<Reset<E>>,
}

impl<E: Exporter + 'static> ServedLender for Served<E> {
    fn device(&self) -> String {
        self.lender.device().name()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.lender.device().pci_address()
    }

    fn region_bytes(&self, region_index: u32) -> u64 {
        self.lender.device().region(region_index).map_or(0, |region| region.size_bytes)
    }

    fn ranges(&self, region_index: u32, ranges: &[DmaRange]) -> Result<DmaRanges> {
        DmaRanges::new(self.lender.device().region(region_index)?, ranges)
    }

    fn exports_new_memory(&self) -> bool {
        self.lender.device().exports_new_memory()
    }

    fn generation(&self) -> u64 {
        self.lender.generation()
    }

    fn export(&self, aperture: Aperture) -> Result<Export> {
        self.lender.export(aperture)
    }

    fn on_event(&self, callback: Box<dyn Fn(&Event) + Send + Sync>) -> Subscription {
        self.lender.on_event(callback)
    }

    fn identity(&self) -> usize {
        Arc::as_ptr(&self.lender).addr()
    }

    fn revoke(
        &self,
        cause: RevokeCause,
        tried: &'static str,
        options: RevokeOptions,
        call: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<()> {
        self.lender.revoke(cause, tried, options, |_| call())
    }

    fn reset(&self, options: RevokeOptions) -> Result<()> {
        match &self.reset {
            Some(reset) => reset(&self.lender, options),
            None => Err(Error::new(Kind::Unsupported, "reset a device", "its owner did not say how")
                .on(self.device())
                .next("revoke takes its memory back from everybody without a reset")),
        }
    }
}
