//! Measuring: every ordered pair of places, by every path and engine, in every size.
//!
//! A figure is made in this order: source and destination are written by their owners, copies warm up, copies are timed; before
//! the last of them both are written anew, the source with other bytes and the destination with poison, which is not timed; the
//! destination is looked at. So what is looked at is what a timed copy brought: a way that drops timed copies cannot pass by what
//! earlier ones left behind, nor one that brings what the source had before.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use peervram::backends::topology::Topology;
use peervram::{Kind, Path};

use crate::bytes::{Bytes, Wrong};
use crate::host_side::{ByCpu, ByOwner};
use crate::link::Link;
use crate::pace::{Meeting, Pace, Plan, Span};
use crate::pin::{self, Pin};
use crate::place::{Lent, MemoryPlace};
use crate::record::{CopyKey, Direction, Failed, Figure, Overhead, Record, Refused, Verdict};
use crate::route::{Order, Route};
use crate::same_gpu;
use crate::spread::Spread;

/// Turns of each side, for what measuring costs. Single turns of a busy machine lie a tenth apart, and the median of hundreds
/// a hundredth.
const MOST_TURNS: usize = 301;
/// However long they take.
const LEAST_TURNS: usize = 11;
/// What is written before the first copy, and before the last one, which is looked at.
const FIRST_ROUND: u64 = 0;
const LAST_ROUND: u64 = 1;
/// When this is up, no more than the least are begun.
const TURNS_BUDGET: Duration = Duration::from_secs(90);

/// What is to be measured.
pub struct Wish {
    /// The sizes, in bytes, the smallest first.
    pub sizes_bytes: Vec<u64>,
    /// By which paths; see [`CopyKey::path`].
    pub paths: Vec<String>,
    /// Which ways.
    pub directions: Vec<Direction>,
    /// A part of the engine's name.
    pub engine: Option<String>,
    /// How often.
    pub plan: Plan,
    /// Whether bytes are looked at.
    pub verify: bool,
    /// Which CPUs everything stays on.
    pub pin: Option<Pin>,
    /// Whether what measuring costs is measured, too.
    pub overhead: bool,
}

/// Measures and records.
pub struct Measure<'a> {
    wish: &'a Wish,
    bytes: Arc<Bytes>,
    topology: Option<Topology>,
    record: &'a mut Record,
    say: &'a mut dyn FnMut(&str),
}

/// One way between two places.
#[derive(Clone)]
struct Combination<'a> {
    lender: &'a MemoryPlace,
    importer: &'a MemoryPlace,
    path: &'static str,
    engine: usize,
}

impl Combination<'_> {
    fn is_same_gpu(&self) -> bool {
        self.lender.is_same_gpu(self.importer)
    }
}

/// A route, and what is lent for it, which goes after it.
struct Opened {
    route: Box<dyn Route>,
    _lent: Option<Lent>,
}

impl<'a> Measure<'a> {
    /// Into `record`; `say` hears what is under way.
    pub fn new(
        wish: &'a Wish,
        bytes: Arc<Bytes>,
        topology: Option<Topology>,
        record: &'a mut Record,
        say: &'a mut dyn FnMut(&str),
    ) -> Self {
        Self { wish, bytes, topology, record, say }
    }

    /// Every pair of a lender and an importer.
    pub fn pairs(&mut self, lenders: &[&MemoryPlace], importers: &[&MemoryPlace]) {
        for &lender in lenders.iter().filter(|place| place.lends.is_some()) {
            for &importer in importers {
                if lender.record.name != importer.record.name || lender.same_gpu.is_some() {
                    self.pair(lender, importer);
                }
            }
        }
        if !self.wish.directions.contains(&Direction::Both) {
            return;
        }
        // Each pair of places once.
        for (index, &one) in lenders.iter().enumerate() {
            for &other in &lenders[index + 1..] {
                let is_meant = |place: &MemoryPlace| {
                    importers.iter().any(|importer| importer.record.name == place.record.name)
                };
                let can =
                    |place: &MemoryPlace| place.lends.is_some() && place.imports.is_some() && is_meant(place);
                if can(one) && can(other) {
                    self.both(one, other);
                }
            }
        }
    }

    fn pair(&mut self, lender: &MemoryPlace, importer: &MemoryPlace) {
        let ways: Vec<Combination> = if lender.record.name == importer.record.name {
            let engines = lender.same_gpu.as_ref().map_or(0, |same_gpu| same_gpu.engine_names().len());
            (same_gpu::PATHS.into_iter())
                .flat_map(|path| {
                    (0..engines).map(move |engine| Combination { lender, importer, path, engine })
                })
                .collect()
        } else if importer.is_host() {
            ["owner", "window"].map(|path| Combination { lender, importer, path, engine: 0 }).into()
        } else {
            let engines = importer.imports.as_ref().map_or(0, |imports| imports.engine_names().len());
            [Path::Peer, Path::HostPointer]
                .iter()
                .flat_map(|path| (0..engines).map(move |engine| (path.name(), engine)))
                .chain([(Path::Staged.name(), 0)])
                .map(|(path, engine)| Combination { lender, importer, path, engine })
                .collect()
        };
        let mut refused_path = None;
        for way in ways.into_iter().filter(|way| self.wish.paths.iter().any(|path| path == way.path)) {
            if refused_path == Some(way.path) {
                continue;
            }
            for direction in [Direction::Read, Direction::Write] {
                if !self.wish.directions.contains(&direction) {
                    continue;
                }
                if let Err(refusal) = self.sizes(&way, direction) {
                    refused_path = Some(way.path);
                    self.refuse(&way, &refusal);
                    break;
                }
            }
        }
    }

    fn refuse(&mut self, way: &Combination, why: &anyhow::Error) {
        self.record.refused.push(Refused {
            lender: way.lender.record.name.clone(),
            importer: way.importer.record.name.clone(),
            path: way.path.to_owned(),
            why: format!("{why:#}"),
        });
    }

    /// All sizes of one way. An error is a refusal of the path; copies that break are recorded.
    fn sizes(&mut self, way: &Combination, direction: Direction) -> Result<()> {
        let most_bytes = way.lender.lends.as_ref().map_or(0, |lends| lends.most_bytes());
        let mut has_any = false;
        for &size_bytes in self.wish.sizes_bytes.iter().filter(|&&size| size <= most_bytes) {
            let route = self.route(way, direction, size_bytes);
            let mut opened = match route {
                Ok(Some(route)) => route,
                Ok(None) => return Ok(()),
                // The importer has no room for more.
                Err(error) if has_any => {
                    self.refuse(way, &error.context(format!("{}", crate::size::Size(size_bytes))));
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            let what = self.what(way, &*opened.route, direction, size_bytes);
            if self.wish.engine.as_ref().is_some_and(|wanted| !what.engine.contains(wanted.as_str())) {
                return Ok(());
            }
            (self.say)(&what.to_string());
            match self.figure(&mut *opened.route, what.clone(), self.link(way)) {
                Ok(figure) => self.record.figures.push(Figure { same_gpu: way.is_same_gpu(), ..figure }),
                Err(error) if !has_any && is_refusal(&error) => return Err(error),
                Err(error) => {
                    self.record.failed.push(Failed { what, why: format!("{error:#}") });
                    return Ok(());
                }
            }
            has_any = true;
            let is_largest =
                self.wish.sizes_bytes.iter().rfind(|&&size| size <= most_bytes) == Some(&size_bytes);
            if self.wish.overhead && is_largest && direction == Direction::Write {
                match overhead(&mut *opened.route, &what) {
                    Ok(overhead) => self.record.overheads.extend(overhead),
                    Err(error) => self.record.failed.push(Failed { what, why: format!("{error:#}") }),
                }
            }
        }
        Ok(())
    }

    fn what(&self, way: &Combination, route: &dyn Route, direction: Direction, size_bytes: u64) -> CopyKey {
        CopyKey {
            lender: way.lender.record.name.clone(),
            importer: way.importer.record.name.clone(),
            path: way.path.to_owned(),
            engine: route.engine(),
            direction,
            size_bytes,
        }
    }

    fn link(&self, way: &Combination) -> Option<Link> {
        let (lender, importer) = (way.lender.address, way.importer.address);
        Link::between(self.topology.as_ref()?, lender, importer)
    }

    /// None where there is no such way, and nothing to refuse.
    fn route(&self, way: &Combination, direction: Direction, size_bytes: u64) -> Result<Option<Opened>> {
        let Some(lends) = &way.lender.lends else { return Ok(None) };
        let order = Order { direction, size_bytes, bytes: Arc::clone(&self.bytes) };
        if let (same_gpu::OPAQUE_FD | same_gpu::LOCAL, Some(same_gpu)) = (way.path, &way.lender.same_gpu) {
            let route = same_gpu.route(way.path, way.engine, order)?;
            return Ok(Some(Opened { route, _lent: None }));
        }
        let lent = lends.lend(size_bytes)?;
        let side = lent.side.clone();
        let path = match way.path {
            "owner" => {
                let Some(owner) = lent.owner.clone() else { return Ok(None) };
                let route = Box::new(ByOwner::new(owner, lent.ranges.clone(), order)?);
                return Ok(Some(Opened { route, _lent: Some(lent) }));
            }
            "window" => {
                let Some(window) = lent.window.clone() else { return Ok(None) };
                let route = Box::new(ByCpu::new(window, side, order));
                return Ok(Some(Opened { route, _lent: Some(lent) }));
            }
            same_gpu::DMA_BUF => {
                let Some(same_gpu) = &way.lender.same_gpu else { return Ok(None) };
                let route = same_gpu.route_to(&lent, way.engine, order)?;
                return Ok(Some(Opened { route, _lent: Some(lent) }));
            }
            name => {
                [Path::Peer, Path::HostPointer, Path::Staged].into_iter().find(|path| path.name() == name)
            }
        };
        let (Some(path), Some(imports)) = (path, &way.importer.imports) else { return Ok(None) };
        let route = imports.route(&lent.export, side, path, way.engine, order)?;
        Ok(Some(Opened { route, _lent: Some(lent) }))
    }

    fn figure(&mut self, route: &mut dyn Route, what: CopyKey, link: Option<Link>) -> Result<Figure> {
        let mut pace = Pace::new(self.wish.plan);
        if self.wish.verify {
            route.prepare(FIRST_ROUND)?;
            pace = pace.renewed_at_last(LAST_ROUND);
        }
        route.copy(&mut pace)?;
        let wrong = if self.wish.verify { route.check(LAST_ROUND)? } else { None };
        let (time, device_time) = (Spread::of(&pace.times_ns()), Spread::of(&pace.device_times_ns));
        let time = time.ok_or_else(|| anyhow::anyhow!("nothing was copied"))?;
        // The device's time is dropped unless every copy reported it.
        let device_time = device_time.filter(|of_device| of_device.count == time.count);
        let mut figure = Figure::new(what, time, device_time, link, route.is_posted());
        self.judge(&mut figure, wrong, route.observer());
        Ok(figure)
    }

    fn judge(&self, figure: &mut Figure, wrong: Option<Wrong>, observer: &str) {
        if self.wish.verify {
            figure.verdict = if wrong.is_some() { Verdict::Wrong } else { Verdict::Right };
            figure.observer = Some(observer.to_owned());
            figure.wrong = wrong;
        }
    }

    /// Two places write to each other at once, by the first path that both have.
    fn both(&mut self, one: &MemoryPlace, other: &MemoryPlace) {
        for path in [Path::Peer, Path::HostPointer] {
            if !self.wish.paths.iter().any(|wanted| wanted == path.name()) {
                continue;
            }
            let there = Combination { lender: one, importer: other, path: path.name(), engine: 0 };
            if let Some(Pin { first, other: None }) = self.wish.pin {
                let why = format!("both at once: on one CPU the sides take turns; --pin {first},OTHER");
                self.refuse(&there, &anyhow::anyhow!(why));
                return;
            }
            let back = Combination { lender: other, importer: one, ..there.clone() };
            match self.both_sizes(&there, &back) {
                Ok(()) => return,
                Err(error) => self.refuse(&there, &error.context("both at once")),
            }
        }
    }

    fn both_sizes(&mut self, there: &Combination, back: &Combination) -> Result<()> {
        let most = |way: &Combination| way.lender.lends.as_ref().map_or(0, |lends| lends.most_bytes());
        let most_bytes = most(there).min(most(back));
        let mut has_any = false;
        for &size_bytes in self.wish.sizes_bytes.iter().filter(|&&size| size <= most_bytes) {
            let route = |way| match self.route(way, Direction::Write, size_bytes) {
                Ok(Some(route)) => Ok(route),
                Ok(None) => anyhow::bail!("there is no such way"),
                Err(error) => Err(error),
            };
            let (first, second) = match route(there).and_then(|first| Ok((first, route(back)?))) {
                Ok(both) => both,
                // The importer has no room for more.
                Err(_) if has_any => return Ok(()),
                Err(error) => return Err(error),
            };
            let (mut first, mut second) = (first, second);
            let mut what = self.what(there, &*first.route, Direction::Both, size_bytes);
            if second.route.engine() != what.engine {
                what.engine = format!("{} and {}", what.engine, second.route.engine());
            }
            (self.say)(&what.to_string());
            match self.both_figure(&mut *first.route, &mut *second.route, what.clone(), self.link(there)) {
                Ok(figure) => self.record.figures.push(Figure { same_gpu: there.is_same_gpu(), ..figure }),
                Err(error) => {
                    self.record.failed.push(Failed { what, why: format!("{error:#}") });
                    return Ok(());
                }
            }
            has_any = true;
        }
        Ok(())
    }

    fn both_figure(
        &mut self,
        first: &mut dyn Route,
        second: &mut dyn Route,
        what: CopyKey,
        link: Option<Link>,
    ) -> Result<Figure> {
        if self.wish.verify {
            first.prepare(FIRST_ROUND)?;
            second.prepare(FIRST_ROUND)?;
        }
        let meeting = Meeting::default();
        let pace = || {
            let pace = Pace::together(self.wish.plan, &meeting);
            if self.wish.verify { pace.renewed_at_last(LAST_ROUND) } else { pace }
        };
        // Create both sides before either begins: dropping one releases the other.
        let (mut pace, other_pace) = (pace(), pace());
        let other_cpu = self.wish.pin.and_then(|pin| pin.other);
        let (spans, other_spans) = thread::scope(|scope| {
            let run_other = || -> Result<Vec<Span>> {
                let mut pace = other_pace;
                other_cpu.map_or(Ok(()), pin::stay_on)?;
                second.copy(&mut pace)?;
                Ok(std::mem::take(&mut pace.spans))
            };
            let other = thread::Builder::new().spawn_scoped(scope, run_other)?;
            let copied = first.copy(&mut pace);
            let spans = std::mem::take(&mut pace.spans);
            drop(pace);
            let other = other.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the other direction panicked")));
            copied?;
            Ok::<_, anyhow::Error>((spans, other?))
        })?;
        // Only copies that overlap are fast: if one begins when the other is done, both count in full.
        let times: Vec<f64> =
            spans.into_iter().zip(other_spans).map(|(one, other)| one.around(other).ns()).collect();
        let wrong = match self.wish.verify {
            true => first.check(LAST_ROUND)?.or(second.check(LAST_ROUND)?),
            false => None,
        };
        let time = Spread::of(&times).ok_or_else(|| anyhow::anyhow!("nothing was copied"))?;
        let mut figure = Figure::new(what, time, None, link, first.is_posted());
        self.judge(&mut figure, wrong, first.observer());
        Ok(figure)
    }
}

/// Whether an engine said that it cannot, rather than that it broke.
fn is_refusal(error: &anyhow::Error) -> bool {
    error.downcast_ref::<peervram::Error>().is_some_and(|error| error.kind() == Kind::Unsupported)
}

/// The same copies in turns, one by one, through this program and by hand. Whoever else wants the machine meets both alike, and
/// each goes first as often as the other.
fn overhead(route: &mut dyn Route, what: &CopyKey) -> Result<Option<Overhead>> {
    let plan = Plan { warm_up: 0, least: 1, most: 1, budget: Duration::ZERO };
    if !route.copy_by_hand(1)? {
        return Ok(None);
    }
    let mut ratios = Vec::new();
    let begin = Instant::now();
    for turn in 0..MOST_TURNS {
        if turn >= LEAST_TURNS && begin.elapsed() > TURNS_BUDGET {
            break;
        }
        let (mut ours, mut by_hand) = (0.0, 0.0);
        for is_ours in [turn % 2 == 0, turn % 2 != 0] {
            let start = Instant::now();
            if is_ours {
                route.copy(&mut Pace::new(plan))?;
                ours = start.elapsed().as_secs_f64();
            } else {
                route.copy_by_hand(1)?;
                by_hand = start.elapsed().as_secs_f64();
            }
        }
        ratios.push(by_hand / ours);
    }
    Ok(Spread::of(&ratios).map(|spread| Overhead {
        what: what.clone(),
        turns: ratios.len(),
        ratio: spread.median_ns,
        p10: spread.p10_ns,
        p90: spread.p90_ns,
    }))
}

#[cfg(test)]
mod tests;
