//! The borrower's own process.

use std::fmt::Display;
use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use peervram::backends::vfio::Interface;
use peervram::broker::client::{self, Lease, Wish};
use peervram::{Attachment, Direction, Error, Event, EventKind, Events, Kind, Outcome, Trust};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::crossing::PATIENCE;
use crate::witness::{CopyEngine, Holder, Seen};

use super::hands::{Copied, Hands, Orders, Shown, whole_pages};

/// The child process: connects, and obeys until its input ends.
pub fn run(socket: &str, importer: &str, of: &str) -> Result<()> {
    let orders = Arc::new(Orders::default());
    let broker = client::Broker::connect(Path::new(socket))?;
    match importer {
        "engine" => Client::new(CopyEngine::new(of.parse()?, Interface::Cdev)?, broker).obey(&orders),
        "screen" => Client::new(Shown::new(of, &orders)?, broker).obey(&orders),
        "holder" => Client::new(Holder::new(of.into()), broker).obey(&orders),
        "holder-freed-before" => Client::new(Holder::freed_before(of.into()), broker).obey(&orders),
        "copied" => Client::new(Copied, broker).obey(&orders),
        other => bail!("a borrower imports with {other:?}"),
    }
}

/// Says a line to the test.
pub fn say(line: &str) -> Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "{line}")?;
    output.flush().context("talking to the test")
}

struct Client<W: Hands> {
    // Fields drop in this order: imports, leases, the importer.
    attachment: Option<Attachment<W::Importer>>,
    events: Option<Events>,
    lease: Option<Lease>,
    more: Vec<Lease>,
    witness: W,
    broker: client::Broker,
    seen: Seen,
}

impl<W: Hands> Client<W> {
    fn new(witness: W, broker: client::Broker) -> Self {
        let more = Vec::new();
        Self { attachment: None, events: None, lease: None, more, witness, broker, seen: Seen::default() }
    }

    fn obey(mut self, orders: &Orders) -> Result<()> {
        say("ok")?;
        while let Some(order) = orders.next()? {
            match self.answer(&order, orders) {
                Ok(answer) if answer.is_empty() => say("ok")?,
                Ok(answer) => say(&format!("ok {answer}"))?,
                Err(error) => {
                    let code = error.downcast_ref::<Error>().map_or("-", |error| error.kind().code());
                    say(&format!("failed {code} {error:#}").replace('\n', " "))?;
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self, order: &str, orders: &Orders) -> Result<String> {
        let words: Vec<&str> = order.split(' ').collect();
        match words[..] {
            ["borrow", size] => self.borrow(whole_pages(size)?),
            ["many", count, size] => {
                for _ in 0..count.parse()? {
                    self.more.push(self.broker.borrow(Wish::of_size(whole_pages(size)?))?);
                }
                Ok(String::new())
            }
            ["attach"] => {
                let lease = self.lease.as_ref().context("nothing is borrowed")?;
                self.attachment = Some(lease.attach(self.witness.importer(), Trust::Unverified)?);
                Ok(String::new())
            }
            ["look", generation] => {
                let generation: u64 = generation.parse()?;
                let before = self.seen.right;
                self.look(|seen| seen.right >= before + 2 && seen.generation == generation)
            }
            ["until-gone"] => self.look(|seen| seen.gone),
            ["look-for", generation] => {
                self.seen.of_lender = Some(generation.parse()?);
                self.seen.unannounced_below = u64::MAX;
                let before = self.seen.right;
                self.look(|seen| seen.right >= before + 2)
            }
            ["store", seed] => self.access(Direction::Write, |witness, memory, size_bytes| {
                witness.store(memory, seed.parse()?, size_bytes)
            }),
            ["has", seed] => {
                let seed = if seed == "zeros" { None } else { Some(seed.parse()?) };
                let mut is_so = false;
                self.access(Direction::Read, |witness, memory, size_bytes| {
                    is_so = witness.has(memory, seed, size_bytes)?;
                    Ok(())
                })?;
                Ok(if is_so { "yes" } else { "no" }.into())
            }
            ["inside"] => {
                let attachment = self.attachment.as_ref().context("nothing is attached")?;
                let access = attachment.enter(Direction::Both)?;
                say("ok")?;
                let next = orders.next()?;
                ensure!(next.as_deref() == Some("finish"), "inside, it is told to {next:?}");
                Ok(match access.finish() {
                    Outcome::Torn { .. } => "torn".into(),
                    other => format!("{other:?}").to_lowercase(),
                })
            }
            ["hear"] => Ok(self.heard().join(" ")),
            ["hear-until", kind] => self.hear_until(kind),
            ["hide"] => self.hide(),
            ["return"] => {
                self.end_attachment();
                let lease = self.lease.take().context("nothing is borrowed")?;
                lease.give_back(PATIENCE)?;
                Ok(String::new())
            }
            ["churn", seed] => self.churn(seed.parse()?),
            _ => bail!("a borrower does not {order:?}"),
        }
    }

    fn end_attachment(&mut self) {
        (self.attachment, self.events) = (None, None);
    }

    fn borrow(&mut self, size_bytes: u64) -> Result<String> {
        let lease = self.broker.borrow(Wish::of_size(size_bytes).with_label("the lab's client"))?;
        self.events = Some(lease.events()?);
        self.seen = Seen::default();
        Ok(self.lease.insert(lease).number().to_string())
    }

    fn look(&mut self, is_enough: impl Fn(&Seen) -> bool) -> Result<String> {
        let attachment = self.attachment.as_ref().context("nothing is attached")?;
        self.seen.look_until(&mut self.witness, attachment, is_enough)?;
        let Seen { right, torn, wrong, .. } = self.seen;
        Ok(format!("{right} {torn} {wrong}"))
    }

    /// One access of the whole lease, with the current import. Says its generation.
    fn access(
        &mut self,
        direction: Direction,
        work: impl FnOnce(&mut W, &super::hands::MemoryOf<W>, u64) -> Result<()>,
    ) -> Result<String> {
        let attachment = self.attachment.as_ref().context("nothing is attached")?;
        let size_bytes = self.lease.as_ref().context("nothing is borrowed")?.size_bytes();
        attachment.current()?;
        let access = attachment.enter(direction)?;
        let generation = access.generation();
        let worked = work(&mut self.witness, access.memory(), size_bytes);
        access.finish().check()?;
        worked.map(|()| generation.to_string())
    }

    /// The events since the last time.
    fn heard(&self) -> Vec<String> {
        let events = self.events.iter();
        events
            .flat_map(|events| std::iter::from_fn(|| events.try_next()))
            .map(|event| in_words(&event))
            .collect()
    }

    fn hear_until(&self, kind: &str) -> Result<String> {
        let events = self.events.as_ref().context("nothing is borrowed")?;
        let mut heard = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(event) = events.next_within(left)? else { bail!("heard only of {heard:?}") };
            heard.push(in_words(&event));
            if event.kind.code() == kind {
                return Ok(heard.join(" "));
            }
        }
    }

    /// The dma-buf goes into a message that nobody has asked for. Says its inode.
    fn hide(&self) -> Result<String> {
        let lease = self.lease.as_ref().context("nothing is borrowed")?;
        let dma_buf = lease.dma_buf().map_err(Error::clone)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [std::os::fd::AsFd::as_fd(dma_buf)];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(io::stdin(), &[IoSlice::new(b"!")], &mut ancillary, SendFlags::empty())
            .context("hiding it")?;
        Ok(dma_buf.inode()?.to_string())
    }

    /// Borrows, fills, compares and returns, again and again, until it is killed or the broker is gone.
    fn churn(&mut self, seed: u32) -> Result<String> {
        say("ok")?;
        for round in 0_u32.. {
            match self.churn_once(seed.wrapping_add(round)) {
                Ok(true) => {}
                // What the end of the broker took away reads as ones, and is torn.
                Ok(false) => bail!("wrong bytes"),
                Err(error) if is_the_end(&error) => break,
                // An engine that works on memory which goes away may fail in its own words.
                Err(error) => {
                    self.hear_until("gone").map_err(|_| error)?;
                    break;
                }
            }
        }
        self.end_attachment();
        self.lease = None;
        Ok("the broker is gone".into())
    }

    fn churn_once(&mut self, seed: u32) -> Result<bool> {
        self.borrow(CHURNED_BYTES)?;
        self.answer("attach", &Orders::default())?;
        let has = |client: &mut Self, of: &str| client.answer(&format!("has {of}"), &Orders::default());
        if has(self, "zeros")? != "yes" {
            return Ok(false);
        }
        for turn in 0..3 {
            let seed = seed.wrapping_mul(3).wrapping_add(turn);
            self.answer(&format!("store {seed}"), &Orders::default())?;
            if has(self, &seed.to_string())? != "yes" {
                return Ok(false);
            }
        }
        self.answer("return", &Orders::default())?;
        Ok(true)
    }
}

/// What is borrowed again and again.
const CHURNED_BYTES: u64 = 512 << 10;

/// What is said, or comes of an engine that works on memory which is being taken away, once a broker is gone.
fn is_the_end(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<Error>().map(Error::kind);
    matches!(kind, Some(Kind::Gone | Kind::Revoked))
}

fn in_words(event: &Event) -> String {
    let of = |cause: &dyn Display| format!("{}({cause})", event.kind.code());
    match event.kind {
        EventKind::Draining { cause, .. } | EventKind::Revoked { cause } => of(&cause.code()),
        _ => event.kind.code().into(),
    }
}
