//! What a borrower can do with memory beside looking at it.

use std::io::{self, BufRead};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use peervram::backends::drm::{BufferObject, Node, ScanOut};
use peervram::backends::{Importer, page_size_bytes};

use crate::blocks;
use crate::painted::LAYOUT;
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
