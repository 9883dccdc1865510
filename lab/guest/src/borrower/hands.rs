//! What a borrower can do with memory beside looking at it.

use std::io::{self, BufRead};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use peervram::backends::drm::{BufferObject, Node, ScanOut};
use peervram::backends::{DmaBuf, Importer, Mapping, OnRevoke, page_size_bytes};
use peervram::{Error, Kind};

use crate::blocks;
use crate::painted::{LAYOUT, bytes_of};
use crate::witness::{COPIED_BYTES, CopyEngine, Holder, Witness};

use super::program::say;

/// Memory as a witness has it.
pub type MemoryOf<W> = <<W as Witness>::Importer as Importer>::Memory;

/// A witness who may have an engine for bytes of any kind.
pub trait Hands: Witness {
    /// Fills the lease with the blocks of `seed`.
    fn store(&mut self, _: &MemoryOf<Self>, _seed: u32, _size_bytes: u64) -> Result<()> {
        bail!("{} cannot write", self.name())
    }

    /// Whether the lease holds the blocks of `seed`, or zeros.
    fn has(&mut self, _: &MemoryOf<Self>, _seed: Option<u32>, _size_bytes: u64) -> Result<bool> {
        bail!("{} cannot read", self.name())
    }
}

impl Hands for Holder {}

impl Hands for CopyEngine {
    fn store(&mut self, memory: &MemoryOf<Self>, seed: u32, size_bytes: u64) -> Result<()> {
        pieces(size_bytes)?.try_for_each(|at| CopyEngine::store(self, seed, memory, at))
    }

    fn has(&mut self, memory: &MemoryOf<Self>, seed: Option<u32>, size_bytes: u64) -> Result<bool> {
        for at in pieces(size_bytes)? {
            let expected = match seed {
                Some(seed) => blocks::bytes(seed, at, COPIED_BYTES),
                None => vec![0; COPIED_BYTES as usize],
            };
            if self.load(memory, at)? != expected {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn pieces(size_bytes: u64) -> Result<impl Iterator<Item = u64>> {
    anyhow::ensure!(size_bytes.is_multiple_of(COPIED_BYTES), "{size_bytes} bytes are not whole pieces");
    Ok((0..size_bytes).step_by(COPIED_BYTES as usize))
}

/// The virtio GPU, whose screen the test looks at: it has the way to the host.
pub struct Shown {
    node: Arc<Node>,
    orders: Arc<Orders>,
}

impl Shown {
    pub fn new(node: &str, orders: &Arc<Orders>) -> Result<Self> {
        Ok(Self { node: Arc::new(Node::open(Path::new(node))?), orders: Arc::clone(orders) })
    }
}

impl Witness for Shown {
    type Importer = Node;

    fn name(&self) -> &'static str {
        "virtio-gpu"
    }

    fn importer(&self) -> Arc<Node> {
        Arc::clone(&self.node)
    }

    fn is_right(&mut self, memory: &BufferObject, generation: u64) -> Result<bool> {
        let _scan_out = ScanOut::start(memory, LAYOUT)?;
        say(&format!("showing {generation}"))?;
        match self.orders.next()?.as_deref() {
            Some("right") => Ok(true),
            Some("wrong") => Ok(false),
            other => bail!("asked what the screen shows, the test says {other:?}"),
        }
    }
}

impl Hands for Shown {}

/// A CPU driver: it imports no dma-buf, and this process cannot map one of VFIO, so that its broker copies.
pub struct OwnMemory;

impl Importer for OwnMemory {
    type Memory = Arc<Mapping>;

    fn name(&self) -> String {
        "a CPU driver".into()
    }

    fn on_revoke(&self) -> OnRevoke {
        OnRevoke::Reimport
    }

    fn governed_by_p2pdma(&self) -> bool {
        false
    }

    fn import(&self, _: &DmaBuf) -> peervram::Result<Arc<Mapping>> {
        Err(Error::new(Kind::Unsupported, "import a dma-buf", "it imports nothing").on(self.name()))
    }

    fn stage(&self, size_bytes: u64) -> peervram::Result<Arc<Mapping>> {
        Mapping::of_host_memory(size_bytes as usize).map(Arc::new)
    }

    fn host_memory(&self, memory: &Arc<Mapping>) -> Option<Arc<Mapping>> {
        Some(Arc::clone(memory))
    }

    fn release(&self, _: Arc<Mapping>) -> peervram::Result<()> {
        Ok(())
    }
}

/// A CPU that looks at what its broker copied.
pub struct Copied;

impl Witness for Copied {
    type Importer = OwnMemory;

    fn name(&self) -> &'static str {
        "copied by the broker"
    }

    fn importer(&self) -> Arc<OwnMemory> {
        Arc::new(OwnMemory)
    }

    fn is_right(&mut self, memory: &Arc<Mapping>, generation: u64) -> Result<bool> {
        let expected = bytes_of(generation);
        let mut seen = vec![0; expected.len()];
        memory.read(0, &mut seen)?;
        Ok(seen == expected)
    }
}

impl Hands for Copied {
    fn store(&mut self, memory: &Arc<Mapping>, seed: u32, size_bytes: u64) -> Result<()> {
        Ok(memory.write(0, &blocks::bytes(seed, 0, size_bytes))?)
    }

    fn has(&mut self, memory: &Arc<Mapping>, seed: Option<u32>, size_bytes: u64) -> Result<bool> {
        let mut seen = vec![0; size_bytes as usize];
        memory.read(0, &mut seen)?;
        Ok(seen == seed.map_or_else(|| vec![0; seen.len()], |seed| blocks::bytes(seed, 0, size_bytes)))
    }
}

/// What the test tells, line by line.
#[derive(Default)]
pub struct Orders(Mutex<()>);

impl Orders {
    /// The next line, none at the end. Waits for it.
    pub fn next(&self) -> Result<Option<String>> {
        let _one_at_a_time = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        io::stdin().lock().lines().next().transpose().context("listening to the test")
    }
}

/// The size that an order asks for, in whole pages.
pub fn whole_pages(words: &str) -> Result<u64> {
    let bytes: u64 = words.parse().with_context(|| format!("{words:?} is no size"))?;
    Ok(bytes.next_multiple_of(page_size_bytes()))
}
