//! The holder: the lab's kernel module that imports dma-bufs and does as it is told.
//!
//! ```text
//! Hold::open -> set_mode -> attach -> map -> (invalidation) -> unmap -> release
//! ```
//! Errors are the kernel's own errnos. A dropped hold lets go of everything.

use anyhow::{Context, Result, bail, ensure};
use peervram_lab::machine::PciId;
use peervram_lab::{holder, wire};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Its node.
pub const DEVICE: &str = "/dev/peervram-holder";

/// What the holder does when the exporter takes the memory back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Unmaps before the exporter goes on: a good importer.
    Now,
    /// Unmaps that much later: a slow one.
    Late(Duration),
    /// Unmaps when told, or when closed: a broken one.
    UntilTold,
}

/// One attachment and its mapping, on behalf of any PCI function.
#[derive(Debug)]
pub struct Hold {
    file: File,
}

/// What a hold looks like now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Whether it is mapped.
    pub mapped: bool,
    /// How often the exporter has invalidated since the attachment.
    pub invalidations: u64,
    /// Where the function would find the memory; empty while it is not mapped.
    pub ranges: Vec<MappedRange>,
}

/// Memory as a function addresses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// A bus address or an IO virtual address, as the kernel decided.
    pub dma_address: u64,
    /// How long it is.
    pub length_bytes: u64,
}

impl Hold {
    /// A hold of nothing yet. Loads the module if that has not been done.
    pub fn open() -> Result<Hold> {
        if !Path::new(DEVICE).exists() {
            let module = format!("{}/{}", wire::SHARE, holder::FILE);
            let output = Command::new("insmod").arg(&module).output().context("starting insmod")?;
            if !output.status.success() {
                bail!("loading {module}: {}", String::from_utf8_lossy(&output.stderr).trim());
            }
        }
        let file = File::options().read(true).write(true).open(DEVICE).context(DEVICE)?;
        Ok(Hold { file })
    }

    /// What to do on an invalidation; at first it is [`Mode::Now`].
    pub fn set_mode(&self, mode: Mode) -> Result<(), Errno> {
        match mode {
            Mode::Now => self.tell("mode now"),
            Mode::Late(delay) => self.tell(&format!("mode late {}", delay.as_millis())),
            Mode::UntilTold => self.tell("mode until-told"),
        }
    }

    /// Attaches to a dma-buf as that PCI function, whatever drives it.
    pub fn attach(&self, function: &str, buffer: &impl AsFd) -> Result<(), Errno> {
        self.tell(&format!("attach {function} {}", buffer.as_fd().as_raw_fd()))
    }

    /// Maps it: the kernel says here whether the two functions can reach each other.
    pub fn map(&self) -> Result<(), Errno> {
        self.tell("map")
    }

    /// Unmaps it.
    pub fn unmap(&self) -> Result<(), Errno> {
        self.tell("unmap")
    }

    /// Unmaps and detaches.
    pub fn release(&self) -> Result<(), Errno> {
        self.tell("release")
    }

    /// What it looks like now.
    pub fn state(&self) -> Result<State> {
        let mut text = [0; 4096];
        let length = rustix::io::pread(&self.file, &mut text, 0).context("reading the holder's state")?;
        State::parse(std::str::from_utf8(&text[..length])?)
    }

    /// Has the kernel take a function for another one, as its own quirks do, until the function is removed.
    pub fn take_for(&self, function: &str, id: PciId) -> Result<(), Errno> {
        self.tell(&format!("take {function} {id}"))
    }

    /// Any command, as the module's own comment lists them.
    pub fn tell(&self, command: &str) -> Result<(), Errno> {
        rustix::io::write(&self.file, command.as_bytes()).map(|_| ())
    }
}

impl State {
    fn parse(text: &str) -> Result<State> {
        let mut state = State::default();
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["mapped", answer] => state.mapped = answer == "yes",
                ["invalidations", count] => state.invalidations = count.parse()?,
                ["range", address, length] => {
                    let digits = address.strip_prefix("0x").with_context(|| format!("{line:?}"))?;
                    let dma_address = u64::from_str_radix(digits, 16)?;
                    state.ranges.push(MappedRange { dma_address, length_bytes: length.parse()? });
                }
                ["mode" | "delay_ms" | "function" | "size_bytes", _] => {}
                _ => bail!("the holder says {line:?}"),
            }
        }
        ensure!(state.mapped != state.ranges.is_empty(), "mapped or not? {text:?}");
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read() {
        let text = "mode late\ndelay_ms 200\nfunction 0000:02:00.0\nsize_bytes 8192\ninvalidations 2\n\
                    mapped yes\nrange 0x00000000fffe0000 8192\n";
        let state = State::parse(text).unwrap();
        assert_eq!((state.mapped, state.invalidations), (true, 2));
        assert_eq!(state.ranges, [MappedRange { dma_address: 0xfffe_0000, length_bytes: 8192 }]);
        assert_eq!(State::parse("mode now\n").unwrap(), State::default());
        assert!(State::parse("mode now\nmapped yes\n").is_err());
        assert!(State::parse("moods swing\n").is_err());
    }
}
