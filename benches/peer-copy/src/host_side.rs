//! Routes between lent memory and the host: by the owner's engine, and by the CPU through the window.

use std::sync::Arc;

use anyhow::Result;
use peervram::backends::{DmaRanges, HostSlice, Mapping, Owner};

use crate::bytes::Wrong;
use crate::pace::{Pace, Step};
use crate::record::Direction;
use crate::route::{Order, Route, Side, deadline, engine_of, landing};

/// The lender's own engine copies.
pub struct ByOwner {
    owner: Arc<dyn Owner>,
    ranges: DmaRanges,
    host: HostSlice,
    order: Order,
}

impl ByOwner {
    /// Between `ranges` of the owner's and host memory.
    ///
    /// # Errors
    /// There is not so much host memory.
    pub fn new(owner: Arc<dyn Owner>, ranges: DmaRanges, order: Order) -> Result<Self> {
        let host = landing(order.size_bytes)?;
        Ok(Self { owner, ranges, host, order })
    }

    fn side(&self) -> Side {
        Side::Engine { owner: Arc::clone(&self.owner), ranges: self.ranges.clone() }
    }
}

impl Route for ByOwner {
    fn engine(&self) -> String {
        self.owner.engine().map_or_else(|| "none".to_owned(), |engine| engine.name().to_owned())
    }

    fn observer(&self) -> &'static str {
        if self.order.direction == Direction::Read { "host" } else { "owner-engine" }
    }

    /// Its device writes what is read.
    fn is_posted(&self) -> bool {
        self.order.direction == Direction::Read
    }

    fn prepare(&mut self, round: u64) -> Result<()> {
        prepare(&self.order, round, &self.side(), &self.host)
    }

    fn copy(&mut self, pace: &mut Pace) -> Result<()> {
        while let Some(step) = pace.next_step() {
            match step {
                Step::Copy => {
                    let engine = engine_of(&self.owner)?;
                    pace.time(|| match self.order.direction {
                        Direction::Read => {
                            engine.read(&self.ranges, 0, &self.host, deadline()).map(|()| None)
                        }
                        _ => engine.write(&self.ranges, 0, &self.host, deadline()).map(|()| None),
                    })?;
                }
                Step::Renew(round) => self.prepare(round)?,
            }
        }
        Ok(())
    }

    fn check(&mut self, round: u64) -> Result<Option<Wrong>> {
        check(&self.order, round, &self.side(), &self.host)
    }
}

/// The CPU copies, between the window and memory that it caches.
pub struct ByCpu {
    window: Arc<Mapping>,
    /// Who looks at the lent memory.
    side: Side,
    memory: Vec<u8>,
    order: Order,
}

impl ByCpu {
    /// Through `window`, on memory whose lender's side is `side`.
    pub fn new(window: Arc<Mapping>, side: Side, order: Order) -> Self {
        let memory = vec![0; order.size_bytes as usize];
        Self { window, side, memory, order }
    }
}

impl Route for ByCpu {
    fn engine(&self) -> String {
        "CPU".to_owned()
    }

    fn observer(&self) -> &'static str {
        if self.order.direction == Direction::Read { "host" } else { self.side.observer() }
    }

    /// A CPU's packets are as long as it likes.
    fn is_posted(&self) -> bool {
        false
    }

    fn prepare(&mut self, round: u64) -> Result<()> {
        let host = landing(self.order.size_bytes)?;
        prepare(&self.order, round, &self.side, &host)?;
        Ok(host.mapping().read(0, &mut self.memory)?)
    }

    fn copy(&mut self, pace: &mut Pace) -> Result<()> {
        while let Some(step) = pace.next_step() {
            match step {
                Step::Copy => pace.time(|| match self.order.direction {
                    Direction::Read => self.window.read(0, &mut self.memory).map(|()| None),
                    _ => self.window.write(0, &self.memory).map(|()| None),
                })?,
                Step::Renew(round) => self.prepare(round)?,
            }
        }
        Ok(())
    }

    fn check(&mut self, round: u64) -> Result<Option<Wrong>> {
        let host = landing(self.order.size_bytes)?;
        host.mapping().write(0, &self.memory)?;
        check(&self.order, round, &self.side, &host)
    }
}

/// Each side gets what a round sends or poison.
fn prepare(order: &Order, round: u64, side: &Side, host: &HostSlice) -> Result<()> {
    let (sent, poison) =
        (order.bytes.sent(round, order.size_bytes)?, order.bytes.poison(round, order.size_bytes)?);
    let (lent, kept) = match order.direction {
        Direction::Read => (&sent, &poison),
        _ => (&poison, &sent),
    };
    side.write(lent)?;
    Ok(Side::Host(Arc::clone(host.mapping())).write(kept)?)
}

fn check(order: &Order, round: u64, side: &Side, host: &HostSlice) -> Result<Option<Wrong>> {
    if order.direction == Direction::Read {
        return Ok(order.bytes.check(round, host)?);
    }
    let seen = landing(order.size_bytes)?;
    side.read(&seen)?;
    Ok(order.bytes.check(round, &seen)?)
}
