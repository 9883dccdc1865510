//! A device and an importer that only count, for tests of the shell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use peervram_backends::host::{Backing, HostMemory};
use peervram_backends::{
    Aperture, DmaBuf, DmaRanges, Error, Exporter, Importer, Kind, Mapping, OnRevoke, PciAddress, Region,
};

use super::keeper::Keeper;
use crate::{Export, Lender, Result};

/// Memory that can be away.
pub(crate) struct Card {
    memory: HostMemory,
    is_away: AtomicBool,
    pub is_shadowed: AtomicBool,
}

impl Card {
    /// A lender of its own keeper, and an export of all of it.
    pub fn lend() -> (Lender<Card>, Export) {
        let memory = HostMemory::with_backing(4096, Backing::Memfd).unwrap();
        let ranges = DmaRanges::whole(memory.region()).unwrap();
        let card = Card { memory, is_away: AtomicBool::new(false), is_shadowed: AtomicBool::new(false) };
        let lender = Lender::kept_by(Arc::new(Keeper::default()), card);
        let export = lender.export(Aperture::unowned(ranges)).unwrap();
        (lender, export)
    }
}

/// What scenes with a clock look at.
#[cfg(not(feature = "shuttle"))]
impl Card {
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
