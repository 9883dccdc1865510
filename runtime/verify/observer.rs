//! `Observer`: who looks at lent memory for its owner.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use peervram_backends::{DmaRanges, Engine, HostSlice, Mapping};
use serde::{Deserialize, Serialize};

use crate::Result;

/// Who wrote and read for the owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Observer {
    /// The CPU, through the same BAR as the importer. That both see the same says nothing of what the
    /// device itself has there: "window only".
    OwnerCpuThroughBar,
    /// The owner's own engine: what its device sees.
    OwnerEngine,
}

impl Observer {
    /// A stable name for scripts and `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::OwnerCpuThroughBar => "owner-cpu-through-bar",
            Self::OwnerEngine => "owner-engine",
        }
    }
}

impl fmt::Display for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::OwnerCpuThroughBar => "window only (the CPU, through the same BAR)",
            Self::OwnerEngine => "the owner's engine",
        })
    }
}

/// Lent memory as its observer reaches it.
pub(crate) enum View<'a> {
    Engine { engine: &'a dyn Engine<DmaRanges>, ranges: &'a DmaRanges },
    Bar(Arc<Mapping>),
}

impl View<'_> {
    pub fn observer(&self) -> Observer {
        match self {
            Self::Engine { .. } => Observer::OwnerEngine,
            Self::Bar(_) => Observer::OwnerCpuThroughBar,
        }
    }

    /// Copies from lent memory until `host` is full.
    pub fn read(&self, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        match self {
            Self::Engine { engine, ranges } => engine.read(ranges, offset_bytes, host, deadline),
            Self::Bar(mapping) => {
                let mut bytes = vec![0; host.length_bytes()];
                mapping.read(offset_bytes as usize, &mut bytes)?;
                host.mapping().write(host.offset_bytes(), &bytes)
            }
        }
    }

    /// Copies all of `host` into lent memory.
    pub fn write(&self, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        match self {
            Self::Engine { engine, ranges } => engine.write(ranges, offset_bytes, host, deadline),
            Self::Bar(mapping) => {
                let mut bytes = vec![0; host.length_bytes()];
                host.mapping().read(host.offset_bytes(), &mut bytes)?;
                mapping.write(offset_bytes as usize, &bytes)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Observer::{OwnerCpuThroughBar, OwnerEngine};
    use super::*;
    use std::time::Duration;

    #[test]
    fn observers_have_names_for_scripts_and_for_people() {
        assert_eq!(
            [OwnerCpuThroughBar, OwnerEngine].map(Observer::name),
            ["owner-cpu-through-bar", "owner-engine"]
        );
        assert_eq!(format!("{OwnerEngine:>20}|"), "  the owner's engine|");
        assert!(OwnerCpuThroughBar.to_string().starts_with("window only"));
        assert!(OwnerEngine > OwnerCpuThroughBar, "who sees more is more");
    }

    #[test]
    fn through_the_bar_bytes_are_copied_from_and_to_their_place() {
        let memory = Arc::new(Mapping::of_host_memory(8192).unwrap());
        let host = Arc::new(Mapping::of_host_memory(4096).unwrap());
        let view = View::Bar(Arc::clone(&memory));
        assert_eq!(view.observer(), OwnerCpuThroughBar);
        let half = HostSlice::new(Arc::clone(&host), 2048, 16).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let sent: Vec<u8> = (1..17).collect();
        host.write(2048, &sent).unwrap();
        view.write(4096, &half, deadline).unwrap();
        let mut there = vec![0; 18];
        memory.read(4095, &mut there).unwrap();
        assert_eq!((there[0], &there[1..17], there[17]), (0, &sent[..], 0));
        host.write(2048, &[0; 16]).unwrap();
        view.read(4100, &half, deadline).unwrap();
        let mut back = vec![0; 16];
        host.read(2048, &mut back).unwrap();
        assert_eq!((&back[..12], &back[12..]), (&sent[4..], &[0; 4][..]));
    }
}
