//! A device that lends, its owner and an importer, all of host memory, whose engines a test can look into, hold up
//! and have fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use peervram_backends::host::{Backing, HostMemory};
use peervram_backends::{
    Aperture, CpuAccess, DmaBuf, DmaRanges, Engine, Error, Exporter, HostSlice, Importer, Kind, Mapping,
    OnRevoke, Owner, page_size_bytes,
};

use crate::revoke::fakes::Card;
use crate::revoke::revoker::Revoker;
use crate::{Export, Lender, Result, RevokeCause, RevokeOptions};

/// What an engine was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Read,
    Write,
}

/// One call of an engine.
pub struct Call<'a> {
    pub asked: Asked,
    pub offset_bytes: usize,
    pub host: &'a HostSlice,
    pub deadline: Instant,
}

/// Runs before the bytes of each call are moved; an error of it is the engine's, and nothing is moved.
type Hook = Box<dyn FnMut(&Call<'_>) -> Result<()> + Send>;

/// An engine that copies by the CPU.
pub struct FakeEngine {
    name: &'static str,
    hook: Mutex<Option<Hook>>,
    calls: Mutex<Vec<(Asked, usize, usize)>>,
}

impl FakeEngine {
    pub fn new(name: &'static str) -> Self {
        Self { name, hook: Mutex::default(), calls: Mutex::default() }
    }

    pub fn on_call(&self, hook: impl FnMut(&Call<'_>) -> Result<()> + Send + 'static) {
        *self.hook.lock() = Some(Box::new(hook));
    }

    pub fn behave(&self) {
        *self.hook.lock() = None;
    }

    /// What it was asked for since the last time: what, where and how much.
    pub fn take_calls(&self) -> Vec<(Asked, usize, usize)> {
        std::mem::take(&mut self.calls.lock())
    }

    fn carry(
        &self,
        memory: &Mapping,
        asked: Asked,
        offset: u64,
        host: &HostSlice,
        deadline: Instant,
    ) -> Result<()> {
        let offset_bytes = offset as usize;
        if let Some(hook) = &mut *self.hook.lock() {
            hook(&Call { asked, offset_bytes, host, deadline })?;
        }
        self.calls.lock().push((asked, offset_bytes, host.length_bytes()));
        let mut bytes = vec![0; host.length_bytes()];
        match asked {
            Asked::Read => {
                memory.read(offset_bytes, &mut bytes)?;
                host.mapping().write(host.offset_bytes(), &bytes)
            }
            Asked::Write => {
                host.mapping().read(host.offset_bytes(), &mut bytes)?;
                memory.write(offset_bytes, &bytes)
            }
        }
    }
}

/// An engine that did not end in time.
pub fn timed_out() -> Result<()> {
    Err(Error::new(Kind::TimedOut, "wait for an engine", "fence 1 was not reached"))
}

/// Whoever drives the lending device.
pub struct FakeOwner {
    pub engine: FakeEngine,
    has_engine: bool,
    vram: Arc<Mapping>,
}

impl Owner for FakeOwner {
    fn name(&self) -> &str {
        "fake owner"
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

    fn engine(&self) -> Option<&dyn Engine<DmaRanges>> {
        self.has_engine.then_some(self as _)
    }
}

/// As an owner's: its memory is its own affair.
impl Engine<DmaRanges> for FakeOwner {
    fn name(&self) -> &str {
        self.engine.name
    }

    fn read(&self, _: &DmaRanges, offset: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.engine.carry(&self.vram, Asked::Read, offset, host, deadline)
    }

    fn write(&self, _: &DmaRanges, offset: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.engine.carry(&self.vram, Asked::Write, offset, host, deadline)
    }
}

/// Memory as the importer has it.
pub struct FakeMemory {
    pub mapping: Arc<Mapping>,
    /// Lent memory itself, and no copy.
    is_direct: bool,
}

impl FakeMemory {
    pub fn all(&self) -> Vec<u8> {
        all(&self.mapping)
    }

    /// What the importer's device does: at any time, by itself.
    pub fn put(&self, offset_bytes: usize, bytes: &[u8]) {
        self.mapping.write(offset_bytes, bytes).unwrap();
    }
}

pub fn all(mapping: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; mapping.len()];
    mapping.read(0, &mut bytes).unwrap();
    bytes
}

/// A device that reaches no lent memory, or wrongly, and has memory of its own.
pub struct FakeImporter {
    pub engines: Vec<FakeEngine>,
    /// Its staging memory is host memory.
    in_host_memory: bool,
    /// It imports mapped memory, reads it and cannot write it.
    is_half_dead: bool,
    on_revoke: OnRevoke,
    /// Imports of lent memory that are not released.
    pub imports: AtomicUsize,
    /// Copies that are not released.
    pub copies: AtomicUsize,
}

impl FakeImporter {
    fn count(&self, memory: &FakeMemory) -> &AtomicUsize {
        if memory.is_direct { &self.imports } else { &self.copies }
    }
}

/// As an importer's.
impl Engine<FakeMemory> for FakeEngine {
    fn name(&self) -> &str {
        self.name
    }

    fn read(&self, memory: &FakeMemory, offset: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.carry(&memory.mapping, Asked::Read, offset, host, deadline)
    }

    fn write(&self, memory: &FakeMemory, offset: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        // Posted writes to a peer that arrive nowhere.
        if memory.is_direct {
            Ok(())
        } else {
            self.carry(&memory.mapping, Asked::Write, offset, host, deadline)
        }
    }
}

impl Importer for FakeImporter {
    type Memory = FakeMemory;

    fn name(&self) -> String {
        "fake importer".into()
    }

    fn on_revoke(&self) -> OnRevoke {
        self.on_revoke
    }

    fn governed_by_p2pdma(&self) -> bool {
        false
    }

    fn import(&self, _: &DmaBuf) -> Result<FakeMemory> {
        Err(Error::new(Kind::ImporterCannot, "import a dma-buf", "it reaches no peer").on("fake importer"))
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<FakeMemory> {
        if !self.is_half_dead {
            return Err(
                Error::new(Kind::Unsupported, "import a host pointer", "it does not").on("fake importer")
            );
        }
        let memory = FakeMemory { mapping, is_direct: true };
        self.count(&memory).fetch_add(1, Ordering::SeqCst);
        Ok(memory)
    }

    fn stage(&self, size_bytes: u64) -> Result<FakeMemory> {
        let mapping = Arc::new(Mapping::of_host_memory(size_bytes as usize)?);
        // Nothing is there by chance.
        mapping.write(0, &vec![0xA7; size_bytes as usize])?;
        let memory = FakeMemory { mapping, is_direct: false };
        self.count(&memory).fetch_add(1, Ordering::SeqCst);
        Ok(memory)
    }

    fn host_memory(&self, memory: &FakeMemory) -> Option<Arc<Mapping>> {
        (self.in_host_memory && !memory.is_direct).then(|| Arc::clone(&memory.mapping))
    }

    fn engines(&self) -> Vec<&dyn Engine<FakeMemory>> {
        self.engines.iter().map(|engine| engine as _).collect()
    }

    fn release(&self, memory: FakeMemory) -> Result<()> {
        self.count(&memory).fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

/// What is there, and what it can do.
#[derive(Clone, Copy)]
pub struct Setup {
    pub size_bytes: u64,
    pub owner_has_engine: bool,
    pub cpu_access: CpuAccess,
    pub importer_engines: usize,
    pub in_host_memory: bool,
    pub is_half_dead: bool,
    pub on_revoke: OnRevoke,
}

/// Two engines, one piece.
pub const SMALL: Setup = Setup {
    size_bytes: 4 * 4096,
    owner_has_engine: true,
    cpu_access: CpuAccess::WriteCombined,
    importer_engines: 1,
    in_host_memory: false,
    is_half_dead: false,
    on_revoke: OnRevoke::Reimport,
};

/// All of them.
pub struct Pair {
    // In the order in which they go.
    pub export: Export,
    pub importer: Arc<FakeImporter>,
    pub owner: Arc<FakeOwner>,
    /// The lent memory, as its device has it.
    pub vram: Arc<Mapping>,
    pub lender: Lender<Card>,
}

impl Pair {
    pub fn new(setup: Setup) -> Self {
        assert!(setup.size_bytes.is_multiple_of(page_size_bytes()));
        let memory = HostMemory::with_backing(setup.size_bytes, Backing::Memfd).unwrap();
        let ranges = DmaRanges::whole(memory.region()).unwrap();
        let vram = memory.map(&ranges).unwrap();
        let owner = Arc::new(FakeOwner {
            engine: FakeEngine::new("owner's engine"),
            has_engine: setup.owner_has_engine,
            vram: Arc::clone(&vram),
        });
        let card = Card::of(memory, setup.cpu_access);
        let lender = Lender::with_revoker(Arc::new(Revoker::default()), card);
        let export = lender.export(Aperture::owned(ranges, Arc::clone(&owner) as _)).unwrap();
        let engines = ["bulk engine", "other engine"].into_iter().take(setup.importer_engines);
        let importer = Arc::new(FakeImporter {
            engines: engines.map(FakeEngine::new).collect(),
            in_host_memory: setup.in_host_memory,
            is_half_dead: setup.is_half_dead,
            on_revoke: setup.on_revoke,
            imports: AtomicUsize::new(0),
            copies: AtomicUsize::new(0),
        });
        Self { export, importer, owner, vram, lender }
    }

    /// Takes the memory back under whoever is inside, and gives it back with other bytes in it.
    pub fn tear(&self, restored: &[u8]) {
        let (vram, bytes) = (Arc::clone(&self.vram), restored.to_vec());
        // From another thread: one that is inside would be refused.
        let revoke = || {
            self.lender.revoke(RevokeCause::Reset, "reset a fake device", impatient(), move |_| {
                vram.write(0, &bytes)
            })
        };
        std::thread::scope(|scope| scope.spawn(revoke).join()).unwrap().unwrap();
    }
}

/// Goes on at a deadline that nobody keeps.
pub fn impatient() -> RevokeOptions {
    RevokeOptions::within(Duration::ZERO).or_go_on()
}

/// Bytes that say where they belong and who wrote them: every word of eight has its own place and `seed` in it.
pub fn bytes(seed: u32, size_bytes: usize) -> Vec<u8> {
    let word = |at: usize| ((at as u64) << 32 | u64::from(seed)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..size_bytes / 8).flat_map(|at| word(at).to_le_bytes()).collect()
}
