//! `BorrowedMemory`: the exporter of a lease: memory of another process's device, by the dma-buf that it sent.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use peervram_backends::{
    Aperture, CpuAccess, DmaBuf, DmaRange, DmaRanges, Error, Exporter, Kind, Mapping, PciAddress, Region,
    RegionFlags, SharedWordsView,
};

use super::super::message::{Borrowed, Done, Importing};
use super::brokers_word::BrokersWord;
use super::call::Calls;
use super::copying::CopyingBroker;
use crate::Result;
use crate::revoke::lending_device::Remote;
use crate::sync::Mutex;

/// Memory that a broker has lent.
pub(super) struct BorrowedMemory {
    lease: u64,
    calls: Arc<Calls>,
    device: String,
    address: Option<PciAddress>,
    region: [Region; 1],
    ranges: DmaRanges,
    origin: Arc<BrokersWord>,
    copying: Arc<CopyingBroker>,
    state: Mutex<State>,
}

struct State {
    /// None once the lease is over.
    dma_buf: Option<DmaBuf>,
    /// Whether the broker has said that the memory is there.
    is_here: bool,
}

impl BorrowedMemory {
    /// Of what the broker answered, and the descriptor that came with it. `words` are the broker's.
    ///
    /// # Errors
    /// The answer contradicts itself, the descriptor or the words.
    pub fn new(
        borrowed: &Borrowed,
        descriptor: Option<OwnedFd>,
        words: &Arc<SharedWordsView>,
        calls: &Arc<Calls>,
    ) -> Result<Self> {
        const TRIED: &str = "borrow memory";
        let wrong = |why: &str| {
            let why = format!("the broker's answer makes no sense: {why}");
            Error::new(Kind::Unsupported, TRIED, why).on(&borrowed.device)
        };
        let descriptor =
            descriptor.filter(|_| borrowed.dma_buf == 0).ok_or_else(|| wrong("no dma-buf came with it"))?;
        let dma_buf = DmaBuf::from_fd(descriptor)?;
        let address = borrowed.pci_address.as_deref().map(str::parse).transpose()?;
        let region = Region {
            index: borrowed.region,
            size_bytes: borrowed.region_size,
            file_offset_bytes: 0,
            // Nobody here has the device's own descriptor.
            flags: RegionFlags::default(),
            capabilities: Vec::new(),
        };
        let ranges: Vec<DmaRange> = borrowed.ranges.iter().map(|range| (*range).into()).collect();
        let ranges = DmaRanges::new(&region, &ranges)?;
        if ranges.size_bytes() != borrowed.size || dma_buf.size_bytes() != borrowed.size {
            return Err(wrong("its sizes differ"));
        }
        if borrowed.word >= words.count() {
            return Err(wrong("there is no such word"));
        }
        let origin = BrokersWord::new(words, borrowed.word, borrowed.lease, borrowed.generation);
        let origin = Arc::new(origin);
        let copying = CopyingBroker::new(borrowed.lease, calls, &origin, borrowed.engine.as_deref());
        Ok(Self {
            lease: borrowed.lease,
            calls: Arc::clone(calls),
            device: borrowed.device.clone(),
            address,
            region: [region],
            ranges,
            origin,
            copying: Arc::new(copying),
            state: Mutex::new(State { dma_buf: Some(dma_buf), is_here: true }),
        })
    }

    /// What is lent.
    pub fn aperture(&self) -> Aperture {
        Aperture::owned(self.ranges.clone(), Arc::clone(&self.copying) as _)
    }

    /// The broker has said that the memory is there, and of which generation.
    pub fn is_back(&self, generation: u64) {
        self.origin.set_known(generation);
        self.state.lock().is_here = true;
    }

    /// The broker has said that the memory is away.
    pub fn is_away(&self) {
        self.state.lock().is_here = false;
    }

    /// What the broker says of it without a message, and copies.
    pub fn remote(&self) -> Remote {
        Remote { origin: Arc::clone(&self.origin) as _, copier: Arc::clone(&self.copying) as _ }
    }

    fn descriptor(&self, tried: &'static str, ranges: &DmaRanges) -> Result<OwnedFd> {
        if *ranges != self.ranges {
            let why = "a lease is one dma-buf, of all its ranges";
            return Err(Error::new(Kind::InvalidInput, tried, why)
                .on(&self.device)
                .next("borrow these ranges by themselves"));
        }
        match &self.state.lock().dma_buf {
            Some(dma_buf) => dma_buf.duplicate(),
            None => Err(Error::new(Kind::Gone, tried, "the lease is over").on(&self.device)),
        }
    }
}

impl Exporter for BorrowedMemory {
    fn name(&self) -> String {
        self.device.clone()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.address
    }

    fn regions(&self) -> &[Region] {
        &self.region
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        DmaBuf::from_fd(self.descriptor("export a dma-buf", ranges)?)
    }

    fn begin_import(&self, _: &DmaRanges, importer: &str, must_be_freed: bool) -> Result<()> {
        let importing = Importing { lease: self.lease, importer: importer.to_owned(), must_be_freed };
        let Done {} = self.calls.call("Importing", &importing, "tell a broker who imports")?;
        Ok(())
    }

    /// The dma-buf itself is mapped: host memory can be. A VFIO dma-buf has no `mmap` in Linux 7.3
    /// (`drivers/vfio/pci/vfio_pci_dmabuf.c`, `vfio_pci_dmabuf_ops`).
    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        const TRIED: &str = "map borrowed memory";
        let descriptor = self.descriptor(TRIED, ranges)?;
        let mapping = Mapping::new(Arc::new(descriptor), &[(0, ranges.size_bytes())]);
        mapping.map(Arc::new).map_err(|error| {
            let why = format!("the kernel does not map a dma-buf of this device: {}", error.why());
            Error::new(Kind::Unsupported, TRIED, why).on(&self.device)
        })
    }

    fn check_reachable(&self) -> Result<()> {
        if self.state.lock().is_here {
            return Ok(());
        }
        Err(Error::new(Kind::MemoryDisabled, "use borrowed memory", "the broker has taken it back")
            .on(&self.device))
    }

    fn cpu_access(&self, _: u32) -> CpuAccess {
        if self.address.is_none() { CpuAccess::Cached } else { CpuAccess::Uncached }
    }

    fn close_device(&self) -> Result<()> {
        let dma_buf = {
            let mut state = self.state.lock();
            state.is_here = false;
            state.dma_buf.take()
        };
        // Without the lock: closing may wait for the kernel.
        drop(dma_buf);
        Ok(())
    }
}
