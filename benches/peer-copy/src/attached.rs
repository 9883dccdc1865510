//! Routes by an attachment: an importer's engine copies between lent memory and its own, or the runtime stages.
//!
//! [`Imports`] forgets which importer it is, so that all places are alike to who measures.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use peervram::backends::{Engine, Importer};
use peervram::{AttachOptions, Attachment, Export, NotAttached, Outcome, Path, Trust};

use crate::bytes::Wrong;
use crate::pace::{Pace, Step};
use crate::record::Direction;
use crate::route::{Order, Route, Side, deadline, landing};

/// A place that imports.
pub trait Imports: Send + Sync {
    /// Its engines' names.
    fn engine_names(&self) -> Vec<String>;

    /// A route between what is lent, whose lender's side is `far`, and memory of its own, by `path` and the engine of
    /// that number.
    ///
    /// # Errors
    /// Why that path cannot be taken.
    fn route(
        &self,
        export: &Export,
        far: Side,
        path: Path,
        engine: usize,
        order: Order,
    ) -> Result<Box<dyn Route>>;
}

impl<I: Importer> Imports for Arc<I> {
    fn engine_names(&self) -> Vec<String> {
        Importer::engines(&**self).iter().map(|engine| engine.name().to_owned()).collect()
    }

    fn route(
        &self,
        export: &Export,
        far: Side,
        path: Path,
        engine: usize,
        order: Order,
    ) -> Result<Box<dyn Route>> {
        let options = AttachOptions::new(Trust::Unverified).with_paths(&[path]);
        let attachment = export.attach(Arc::clone(self), options).map_err(why_refused)?;
        ensure!(attachment.path() == path, "the path is {}", attachment.path());
        if path == Path::Staged {
            return Ok(Box::new(StagedRoute { attachment, far, order, round: 0 }));
        }
        let near = self.stage(order.size_bytes)?;
        Ok(Box::new(Direct { attachment, near: Some(near), far, engine, order }))
    }
}

/// Why the one path that was tried was refused, without the words for several.
fn why_refused(not_attached: NotAttached) -> anyhow::Error {
    match not_attached.refused() {
        [(_, error)] => error.clone().into(),
        _ => peervram::Error::from(not_attached).into(),
    }
}

/// An importer's engine copies.
struct Direct<I: Importer> {
    attachment: Attachment<I>,
    /// Memory of the importer's own; there until it is dropped.
    near: Option<I::Memory>,
    far: Side,
    engine: usize,
    order: Order,
}

impl<I: Importer> Direct<I> {
    fn engine_itself(&self) -> Result<&dyn Engine<I::Memory>> {
        let engines = self.attachment.importer().engines();
        engines.get(self.engine).copied().context("it has no such engine any more")
    }

    fn near(&self) -> &I::Memory {
        self.near.as_ref().expect("it is there until it is dropped")
    }

    /// What a round sends goes to the source, and poison to the destination.
    fn write_both(&self, round: u64) -> Result<()> {
        let Order { direction, size_bytes, bytes } = &self.order;
        let (sent, poison) = (bytes.sent(round, *size_bytes)?, bytes.poison(round, *size_bytes)?);
        let (far, near) = match direction {
            Direction::Read => (&sent, &poison),
            _ => (&poison, &sent),
        };
        self.far.write(far)?;
        Ok(self.engine_itself()?.write(self.near(), 0, near, deadline())?)
    }

    /// Hands a copy to `each`, inside of one access, for as long as that says so.
    fn copy_each(
        &self,
        mut each: impl FnMut(&dyn Fn() -> peervram::Result<Option<Duration>>) -> Result<bool>,
    ) -> Result<()> {
        let engine = self.engine_itself()?;
        let access = self.attachment.enter(access(self.order.direction)).map_err(peervram::Error::from)?;
        let (far, near) = ((access.memory(), 0), (self.near(), 0));
        let (from, to) = match self.order.direction {
            Direction::Read => (far, near),
            _ => (near, far),
        };
        let copy = || engine.copy(from, to, self.order.size_bytes, deadline());
        while each(&copy)? {}
        ended(access.finish())
    }
}

/// What an importer does with lent memory that copies in this direction.
fn access(direction: Direction) -> peervram::Direction {
    match direction {
        Direction::Read => peervram::Direction::Read,
        // Of two places that write to each other, each writes.
        Direction::Write | Direction::Both => peervram::Direction::Write,
    }
}

fn ended(outcome: Outcome) -> Result<()> {
    match outcome {
        Outcome::Ok => Ok(()),
        Outcome::Torn { .. } => bail!("the memory was taken back during a copy"),
        other => bail!("a copy ended as {other:?}"),
    }
}

impl<I: Importer> Route for Direct<I> {
    fn engine(&self) -> String {
        self.engine_itself().map_or_else(|_| "none".to_owned(), |engine| engine.name().to_owned())
    }

    fn observer(&self) -> &'static str {
        match self.order.direction {
            Direction::Read => "importer-engine",
            _ => self.far.observer(),
        }
    }

    fn is_posted(&self) -> bool {
        self.order.direction == Direction::Write && self.attachment.path() == Path::Peer
    }

    fn prepare(&mut self, round: u64) -> Result<()> {
        self.write_both(round)
    }

    fn copy(&mut self, pace: &mut Pace) -> Result<()> {
        self.copy_each(|copy| {
            let step = pace.next_step();
            match step {
                Some(Step::Copy) => pace.time(copy)?,
                Some(Step::Renew(round)) => self.write_both(round)?,
                None => {}
            }
            Ok(step.is_some())
        })
    }

    fn check(&mut self, round: u64) -> Result<Option<Wrong>> {
        let landing = landing(self.order.size_bytes)?;
        match self.order.direction {
            Direction::Read => self.engine_itself()?.read(self.near(), 0, &landing, deadline())?,
            _ => self.far.read(&landing)?,
        }
        Ok(self.order.bytes.check(round, &landing)?)
    }

    fn copy_by_hand(&mut self, count: usize) -> Result<bool> {
        let mut left = count;
        self.copy_each(|copy| {
            if left > 0 {
                copy()?;
                left -= 1;
            }
            Ok(left > 0)
        })?;
        Ok(true)
    }
}

impl<I: Importer> Drop for Direct<I> {
    fn drop(&mut self) {
        if let Some(near) = self.near.take()
            && let Err(error) = self.attachment.importer().release(near)
        {
            peervram_programs::note!("peer-copy: could not free memory: {error}");
        }
    }
}

/// The runtime copies, through the host.
struct StagedRoute<I: Importer> {
    attachment: Attachment<I>,
    far: Side,
    order: Order,
    round: u64,
}

impl<I: Importer> StagedRoute<I> {
    fn near_engine(&self) -> Result<&dyn Engine<I::Memory>> {
        self.attachment.importer().engines().first().copied().context("the importer has no engine")
    }
}

impl<I: Importer> Route for StagedRoute<I> {
    fn engine(&self) -> String {
        let how = self.attachment.staging();
        let mover = how.and_then(|how| match self.order.direction {
            Direction::Read => Some(how.pull),
            _ => how.push,
        });
        mover.map_or_else(|| "none".to_owned(), |mover| mover.to_string())
    }

    fn observer(&self) -> &'static str {
        match self.order.direction {
            Direction::Read => "importer-engine",
            _ => self.far.observer(),
        }
    }

    fn is_posted(&self) -> bool {
        false
    }

    fn prepare(&mut self, round: u64) -> Result<()> {
        let Order { direction, size_bytes, bytes } = &self.order;
        let (sent, poison) = (bytes.sent(round, *size_bytes)?, bytes.poison(round, *size_bytes)?);
        self.round = round;
        match direction {
            Direction::Read => {
                self.far.write(&sent)?;
                let import = self.attachment.current()?;
                self.near_engine()?.write(import.memory(), 0, &poison, deadline())?;
            }
            // What is sent is written inside of the access: its beginning copies.
            _ => self.far.write(&poison)?,
        }
        Ok(())
    }

    fn copy(&mut self, pace: &mut Pace) -> Result<()> {
        while let Some(step) = pace.next_step() {
            if let Step::Renew(round) = step {
                self.prepare(round)?;
                continue;
            }
            let enter = || self.attachment.enter(access(self.order.direction)).map_err(peervram::Error::from);
            if self.order.direction == Direction::Read {
                let mut access = None;
                pace.time(|| {
                    access = Some(enter()?);
                    Ok(None)
                })?;
                access.map_or(Ok(()), |access| ended(access.finish()))?;
            } else {
                let access = enter()?;
                let sent = self.order.bytes.sent(self.round, self.order.size_bytes)?;
                self.near_engine()?.write(access.memory(), 0, &sent, deadline())?;
                let mut outcome = None;
                pace.time(|| {
                    outcome = Some(access.finish());
                    Ok(None)
                })?;
                outcome.map_or(Ok(()), ended)?;
            }
        }
        Ok(())
    }

    fn check(&mut self, round: u64) -> Result<Option<Wrong>> {
        let landing = landing(self.order.size_bytes)?;
        match self.order.direction {
            Direction::Read => {
                let import = self.attachment.current()?;
                self.near_engine()?.read(import.memory(), 0, &landing, deadline())?;
            }
            _ => self.far.read(&landing)?,
        }
        Ok(self.order.bytes.check(round, &landing)?)
    }
}
