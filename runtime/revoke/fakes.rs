//! A device and an importer that only count, for tests of the shell.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use peervram_backends::host::{Backing, HostMemory};
use peervram_backends::{
    Aperture, CpuAccess, DmaBuf, DmaRanges, Error, Exporter, Importer, Interrupts, Kind, Mapping, NotReady,
    OnRevoke, PciAddress, Region,
};

#[cfg(not(feature = "shuttle"))]
use rustix::event::{EventfdFlags, eventfd};

use super::revoker::Revoker;
use crate::{Export, Lender, Result};

/// Memory that can be away.
pub(crate) struct Card {
    memory: HostMemory,
    is_away: AtomicBool,
    pub is_shadowed: AtomicBool,
    /// How long it takes to get ready; more than [`LIMIT_MS`] is never.
    pub gets_ready_ms: AtomicU64,
    cpu_access: CpuAccess,
    /// What it tells of its errors by, where it does.
    errors: Option<OwnedFd>,
}

/// When a card is given up that does not get ready.
const LIMIT_MS: u64 = 1000;

impl Card {
    /// A lender of a revoker of its own, and an export of all of it.
    pub fn lend() -> (Lender<Card>, Export) {
        Self::lend_with(None)
    }

    /// A device whose memory that is.
    pub fn of(memory: HostMemory, cpu_access: CpuAccess) -> Card {
        let (is_away, is_shadowed) = (AtomicBool::new(false), AtomicBool::new(false));
        Card { memory, is_away, is_shadowed, gets_ready_ms: AtomicU64::new(0), cpu_access, errors: None }
    }

    fn lend_with(errors: Option<OwnedFd>) -> (Lender<Card>, Export) {
        let memory = HostMemory::with_backing(4096, Backing::Memfd).unwrap();
        let ranges = DmaRanges::whole(memory.region()).unwrap();
        let card = Card { errors, ..Card::of(memory, CpuAccess::Uncached) };
        let lender = Lender::with_revoker(Arc::new(Revoker::default()), card);
        let export = lender.export(Aperture::unowned(ranges)).unwrap();
        (lender, export)
    }
}

/// What scenes with a clock look at.
#[cfg(not(feature = "shuttle"))]
impl Card {
    /// As [`Card::lend`], and an eventfd: writing to it is an error of the card's.
    pub fn lend_watched() -> (Lender<Card>, Export, OwnedFd) {
        let errors = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let (lender, export) = Self::lend_with(Some(errors.try_clone().unwrap()));
        (lender, export, errors)
    }

    pub fn ranges(&self) -> DmaRanges {
        DmaRanges::whole(self.memory.region()).unwrap()
    }

    pub fn set_away(&self, is_away: bool) {
        self.is_away.store(is_away, Ordering::SeqCst);
    }
}

impl Exporter for Card {
    fn name(&self) -> String {
        "card".into()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        None
    }

    fn regions(&self) -> &[Region] {
        self.memory.regions()
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        self.memory.export(ranges)
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        self.memory.map(ranges)
    }

    fn check_reachable(&self) -> Result<()> {
        match self.is_away.load(Ordering::SeqCst) {
            true => Err(Error::new(Kind::MemoryDisabled, "reach a card", "it is away").on("card")),
            false => Ok(()),
        }
    }

    fn wait_until_ready(&self, tell: &mut dyn FnMut(&NotReady)) -> Result<()> {
        let takes_ms = self.gets_ready_ms.load(Ordering::SeqCst);
        if takes_ms == 0 {
            return Ok(());
        }
        let limit = Duration::from_millis(LIMIT_MS);
        tell(&NotReady { reason: "it warms up".into(), waited: Duration::ZERO, limit });
        if takes_ms > LIMIT_MS {
            return Err(Error::new(Kind::TimedOut, "wait for a card", "it warms up").on("card"));
        }
        std::thread::sleep(Duration::from_millis(takes_ms));
        Ok(())
    }

    fn cpu_access(&self, _: u32) -> CpuAccess {
        self.cpu_access
    }

    fn interrupts(&self) -> Result<Interrupts> {
        let error = self.errors.as_ref().map(|fd| fd.try_clone().unwrap());
        Ok(Interrupts { error, request: None })
    }

    fn shadow(&self) -> Result<()> {
        self.is_shadowed.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn unshadow(&self) -> Result<()> {
        self.is_shadowed.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// Imports anything, and counts how many imports are alive.
pub(crate) struct Reader {
    pub on_revoke: OnRevoke,
    pub alive: Arc<AtomicUsize>,
}

impl Reader {
    pub fn new(on_revoke: OnRevoke) -> Arc<Self> {
        Arc::new(Self { on_revoke, alive: Arc::default() })
    }

    #[cfg(not(feature = "shuttle"))]
    pub fn alive(&self) -> usize {
        self.alive.load(Ordering::SeqCst)
    }
}

impl Importer for Reader {
    type Memory = ();

    fn name(&self) -> String {
        "reader".into()
    }

    fn on_revoke(&self) -> OnRevoke {
        self.on_revoke
    }

    fn governed_by_p2pdma(&self) -> bool {
        false
    }

    fn import(&self, _: &DmaBuf) -> Result<()> {
        self.alive.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn release(&self, (): ()) -> Result<()> {
        self.alive.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}
