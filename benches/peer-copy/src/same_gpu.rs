//! Routes within one GPU: memory of one `VkDevice` that a second one of the same GPU copies. No byte leaves the GPU, so
//! it is labelled [`LABEL`]: what it tells is what sharing memory costs, beside a plain copy.
//!
//! By [`OPAQUE_FD`] the second device imports the driver's own descriptor, by [`DMA_BUF`] a dma-buf, where the driver has
//! that; [`LOCAL`] is a copy in memory of the second device, with nothing shared.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use peervram::backends::vulkan::{Buffer, Device, OpaqueMemory};
use peervram::backends::{Engine, HostSlice, Importer};

use crate::attached::Imports;
use crate::bytes::Wrong;
use crate::pace::{Pace, Step};
use crate::place::Lent;
use crate::record::Direction;
use crate::route::{Order, Route, deadline, landing};

/// The words printed beside figures of one GPU with itself.
pub const LABEL: &str = "same GPU, not peer";

/// Imported by the driver's own descriptor.
pub const OPAQUE_FD: &str = "opaque-fd";
/// Imported as a dma-buf.
pub const DMA_BUF: &str = "dma-buf";
/// Nothing is imported.
pub const LOCAL: &str = "local";
/// All of them.
pub const PATHS: [&str; 3] = [OPAQUE_FD, DMA_BUF, LOCAL];

/// Two devices of one GPU.
pub struct SameGpu {
    /// Whose memory it is.
    pub first: Arc<Device>,
    /// Who copies.
    pub second: Arc<Device>,
}

impl SameGpu {
    /// The second device's engines.
    pub fn engine_names(&self) -> Vec<String> {
        Imports::engine_names(&self.second)
    }

    /// A route by [`OPAQUE_FD`] or [`LOCAL`].
    ///
    /// # Errors
    /// Why the driver does not share.
    pub fn route(&self, path: &'static str, engine: usize, order: Order) -> Result<Box<dyn Route>> {
        let (shared, far) = match path {
            OPAQUE_FD => {
                let memory = self.first.allocate_opaque(order.size_bytes)?;
                let far = self.second.import_opaque(memory.export()?)?;
                (Some(memory), far)
            }
            LOCAL => (None, self.second.stage(order.size_bytes)?),
            other => bail!("there is no path {other} within a GPU"),
        };
        let near = self.second.stage(order.size_bytes)?;
        let (first, second) = (Arc::clone(&self.first), Arc::clone(&self.second));
        Ok(Box::new(Within { near, far, shared, first, second, engine, order }))
    }

    /// A route by [`DMA_BUF`], to memory that the first device lends.
    ///
    /// # Errors
    /// Why the second one does not import it.
    pub fn route_to(&self, lent: &Lent, engine: usize, order: Order) -> Result<Box<dyn Route>> {
        self.second.route(&lent.export, lent.side.clone(), peervram::Path::Peer, engine, order)
    }
}

/// The second device copies between what it imported, or its own, and its own.
struct Within {
    near: Buffer,
    far: Buffer,
    /// The first device's side; none where all is the second's.
    shared: Option<OpaqueMemory>,
    first: Arc<Device>,
    second: Arc<Device>,
    engine: usize,
    order: Order,
}

impl Within {
    fn engine_itself(&self) -> Result<&dyn Engine<Buffer>> {
        self.second.engines().get(self.engine).copied().context("it has no such engine any more")
    }

    /// The far side as its owner works on it.
    fn far_side(&self) -> Result<(&dyn Engine<Buffer>, &Buffer)> {
        match &self.shared {
            Some(memory) => {
                let engine =
                    self.first.engines().first().copied().context("the first device has no engine")?;
                Ok((engine, memory.buffer()))
            }
            None => Ok((self.engine_itself()?, &self.far)),
        }
    }

    fn write_far(&self, bytes: &HostSlice) -> Result<()> {
        let (engine, buffer) = self.far_side()?;
        Ok(engine.write(buffer, 0, bytes, deadline())?)
    }
}

impl Route for Within {
    fn engine(&self) -> String {
        self.engine_itself().map_or_else(|_| "none".to_owned(), |engine| engine.name().to_owned())
    }

    fn observer(&self) -> &'static str {
        match (self.order.direction, &self.shared) {
            (Direction::Write, Some(_)) => "owner-engine",
            _ => "importer-engine",
        }
    }

    /// Nothing crosses a link.
    fn is_posted(&self) -> bool {
        false
    }

    fn prepare(&mut self, round: u64) -> Result<()> {
        let Order { direction, size_bytes, bytes } = &self.order;
        let (sent, poison) = (bytes.sent(round, *size_bytes)?, bytes.poison(round, *size_bytes)?);
        let (far, near) = match direction {
            Direction::Read => (&sent, &poison),
            _ => (&poison, &sent),
        };
        self.write_far(far)?;
        Ok(self.engine_itself()?.write(&self.near, 0, near, deadline())?)
    }

    fn copy(&mut self, pace: &mut Pace) -> Result<()> {
        while let Some(step) = pace.next_step() {
            if let Step::Renew(round) = step {
                self.prepare(round)?;
                continue;
            }
            let engine = self.engine_itself()?;
            let (far, near) = ((&self.far, 0), (&self.near, 0));
            let (from, to) = match self.order.direction {
                Direction::Read => (far, near),
                _ => (near, far),
            };
            pace.time(|| engine.copy(from, to, self.order.size_bytes, deadline()))?;
        }
        Ok(())
    }

    fn check(&mut self, round: u64) -> Result<Option<Wrong>> {
        let landing = landing(self.order.size_bytes)?;
        if self.order.direction == Direction::Read {
            self.engine_itself()?.read(&self.near, 0, &landing, deadline())?;
        } else {
            let (engine, buffer) = self.far_side()?;
            engine.read(buffer, 0, &landing, deadline())?;
        }
        Ok(self.order.bytes.check(round, &landing)?)
    }
}
