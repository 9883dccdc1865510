//! A program in the guest talks to the lab: its screen, please, a word with a model GPU, or a hand on a
//! device.
//!
//! Whatever the agent runs finds the agent's socket in its environment, so a test, the demo and
//! a benchmark ask in the same way.

use anyhow::{Context, Result, anyhow, bail};
use peervram_model::request::{Answer, Findings, Request};
use std::cell::RefCell;
use std::io::BufReader;
use std::os::unix::net::UnixStream;

use crate::vm::change::Change;
use crate::vm::wire::{self, Event, Order};
use peervram_programs::picture::Picture;

/// A connection to the agent of the guest that this program runs in.
#[derive(Debug)]
pub struct Link {
    stream: RefCell<BufReader<UnixStream>>,
}

impl Link {
    /// Connects; fails where no agent is, which is anywhere but in a guest of the lab.
    pub fn connect() -> Result<Link> {
        let path = std::env::var_os(wire::SOCKET_VARIABLE)
            .with_context(|| format!("not in a guest of the lab: {} is not set", wire::SOCKET_VARIABLE))?;
        let stream = UnixStream::connect(&path)
            .with_context(|| format!("connecting to the agent at {}", path.display()))?;
        Ok(Link { stream: RefCell::new(BufReader::new(stream)) })
    }

    /// A picture of what the virtio GPU of this machine shows now.
    pub fn screendump(&self) -> Result<Picture> {
        self.send(&Event::Screendump)?;
        let answer = wire::receive(&mut *self.stream.borrow_mut())?;
        let Some(Order::Screendump { picture }) = answer else {
            bail!("the agent answers {answer:?} to a screendump");
        };
        let path = picture.map_err(|reason| anyhow::anyhow!("no screendump: {reason}"))?;
        let bytes = std::fs::read(&path).with_context(|| format!("reading {path}"))?;
        std::fs::remove_file(&path).ok();
        Picture::of_ppm(&bytes).with_context(|| format!("reading {path}"))
    }

    /// Asks the model GPU that is the row's device of that number, on its host's side.
    pub fn control(&self, device: usize, request: Request) -> Result<Findings> {
        self.send(&Event::Control { device, request })?;
        let order = wire::receive(&mut *self.stream.borrow_mut())?;
        let Some(Order::Control { answer }) = order else {
            bail!("the agent answers {order:?} to a request for a model GPU");
        };
        answer
            .and_then(Answer::into_result)
            .map_err(|reason| anyhow!("device {device} does not {request:?}: {reason}"))
    }

    /// Asks the host to do something to a device.
    pub fn change(&self, change: Change) -> Result<()> {
        self.send(&Event::Change(change))?;
        let order = wire::receive(&mut *self.stream.borrow_mut())?;
        let Some(Order::Changed { result }) = order else {
            bail!("the agent answers {order:?} to a change");
        };
        result.map_err(|reason| anyhow!("{change:?}: {reason}"))
    }

    /// Tells the agent something.
    pub fn send(&self, event: &Event) -> Result<()> {
        wire::send(self.stream.borrow().get_ref(), event).context("talking to the agent")
    }
}
