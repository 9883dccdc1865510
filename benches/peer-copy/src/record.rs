//! `Record`: all that a run found, as `--json` writes it and `--save` keeps it. `schema/peer-copy-3.json` is its
//! schema, and `VERSION` that schema's version.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::bytes::Wrong;
use crate::clocks::Clock;
use crate::link::Link;
use crate::machine::MachineRecord;
use crate::spread::Spread;

/// What a record calls itself.
pub const SCHEMA: &str = "peervram-peer-copy";
/// Goes up when a field changes its meaning, comes or goes.
pub const VERSION: u32 = 3;

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: String,
    /// [`VERSION`].
    pub version: u32,
    /// When it began, in seconds since 1970.
    pub began_unix_s: u64,
    /// On what.
    pub machine: MachineRecord,
    /// Whether bytes were looked at.
    pub verified: bool,
    /// What took part.
    pub places: Vec<PlaceRecord>,
    /// What could not be measured.
    pub refused: Vec<Refused>,
    /// What went wrong while it was measured.
    pub failed: Vec<Failed>,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// What measuring itself costs, where that was asked for.
    pub overheads: Vec<Overhead>,
}

/// A place that memory is in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaceRecord {
    /// "0000:01:00.0", "vulkan0", "host".
    pub name: String,
    /// What it is.
    pub about: String,
    /// Where it is, if on the PCI bus.
    pub pci_address: Option<String>,
    /// The NUMA node that it hangs from.
    pub numa_node: Option<u32>,
    /// How much it lends; zero where it lends nothing.
    pub lends_bytes: u64,
    /// Its engines: an owner's, or an importer's.
    pub engines: Vec<String>,
    /// Its clocks when measuring ended, as its driver tells them; none where it does not.
    pub clocks: Vec<Clock>,
}

/// A way that was not to be had.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// Whose memory.
    pub lender: String,
    /// The importer; empty if the lender itself could not be opened.
    pub importer: String,
    /// By which path; empty where by none.
    pub path: String,
    /// Why not.
    pub why: String,
}

/// A way that broke.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failed {
    /// Which copies.
    pub what: CopyKey,
    /// The reason.
    pub why: String,
}

/// Which copies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopyKey {
    /// Whose memory.
    pub lender: String,
    /// Who copies from or to it.
    pub importer: String,
    /// "peer", "host-pointer", "staged", "owner" (the lender's own engine), "window" (the CPU, through the BAR); within one
    /// GPU "opaque-fd", "dma-buf", "local".
    pub path: String,
    /// What moves the bytes.
    pub engine: String,
    /// Which way.
    pub direction: Direction,
    /// How much each copy moves, in each direction.
    pub size_bytes: u64,
}

impl fmt::Display for CopyKey {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let Self { lender, importer, path, engine, direction, size_bytes } = self;
        let size = crate::size::Size(*size_bytes);
        write!(formatter, "{lender} and {importer}, {path}, {engine}, {direction}, {size}")
    }
}

/// Which way bytes go, as the importer sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Out of lent memory.
    Read,
    /// Into it.
    Write,
    /// Two places write to each other at once.
    Both,
}

impl Direction {
    /// A stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Both => "both",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Direction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Read, Self::Write, Self::Both];
        let found = all.into_iter().find(|direction| direction.name() == text);
        found.ok_or_else(|| format!("{text:?} is no direction; there are read, write and both"))
    }
}

/// Whether bytes arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Right in the last timed copy, whose destination had been poisoned before.
    Right,
    /// Wrong, whatever the speed.
    Wrong,
    /// Nobody compared the bytes.
    Unverified,
}

/// What copies of one size took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// Which.
    pub what: CopyKey,
    /// Whether both ends are one GPU: no peer then.
    pub same_gpu: bool,
    /// Whether the bytes arrived.
    pub verdict: Verdict,
    /// Who looked.
    pub observer: Option<String>,
    /// What was wrong.
    pub wrong: Option<Wrong>,
    /// From the call until it returned: submitting and waiting are in it.
    pub time: Spread,
    /// The work alone, by the device's own clock, where it has one.
    pub device_time: Option<Spread>,
    /// Out of the device's time where there is one, all directions together.
    pub bytes_per_s: f64,
    /// Whether submitting and waiting are left out of that.
    pub excludes_submission: bool,
    /// What the way can carry.
    pub link: Option<Link>,
    /// The bandwidth as a share of the raw link.
    pub link_share: Option<f64>,
    /// And of what posted writes can reach with the payloads that are set.
    pub ceiling_share: Option<f64>,
}

impl Figure {
    /// Out of what was timed.
    pub fn new(
        what: CopyKey,
        time: Spread,
        device_time: Option<Spread>,
        link: Option<Link>,
        is_posted: bool,
    ) -> Figure {
        let directions = if what.direction == Direction::Both { 2.0 } else { 1.0 };
        let best = device_time.as_ref().unwrap_or(&time);
        let bytes_per_s = what.size_bytes as f64 * directions / (best.median_ns / 1e9).max(1e-9);
        // A link carries both directions at once.
        let each = bytes_per_s / directions;
        let link_share = link.as_ref().map(|link| each / link.raw_bytes_per_s);
        let ceiling = link.as_ref().and_then(|link| link.write_ceiling_bytes_per_s).filter(|_| is_posted);
        Figure {
            what,
            same_gpu: false,
            verdict: Verdict::Unverified,
            observer: None,
            wrong: None,
            excludes_submission: device_time.is_some(),
            time,
            device_time,
            bytes_per_s,
            link,
            link_share,
            ceiling_share: ceiling.map(|ceiling| each / ceiling),
        }
    }

    /// The spread that its bandwidth is out of.
    pub fn best_time(&self) -> &Spread {
        self.device_time.as_ref().unwrap_or(&self.time)
    }

    /// Its bandwidth for a time.
    pub fn bytes_per_s_in(&self, ns: f64) -> f64 {
        self.bytes_per_s * self.best_time().median_ns / ns.max(1.0)
    }
}

/// What measuring costs: the same copies through this program and in a bare loop, in turns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overhead {
    /// Which copies.
    pub what: CopyKey,
    /// Turns of each side.
    pub turns: usize,
    /// Bandwidth through this program by bandwidth in a bare loop: the median of the turns' ratios.
    pub ratio: f64,
    /// A tenth are lower.
    pub p10: f64,
    /// A tenth are higher.
    pub p90: f64,
}

impl Record {
    /// Whether bytes were wrong, or copies broke.
    pub fn has_failed(&self) -> bool {
        !self.failed.is_empty() || self.figures.iter().any(|figure| figure.verdict == Verdict::Wrong)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A record with one figure of everything.
    pub fn example() -> Record {
        let what = CopyKey {
            lender: "0000:01:00.0".into(),
            importer: "0000:02:00.0".into(),
            path: "peer".into(),
            engine: "copy engine".into(),
            direction: Direction::Write,
            size_bytes: 64 << 20,
        };
        let time = Spread::of(&[2.5e6, 2.4e6, 2.6e6, 9e6, 2.5e6, 2.5e6]).unwrap();
        let link = Link {
            narrowest: "16 GT/s x16 at 0000:01:00.0".into(),
            raw_bytes_per_s: 31.51e9,
            max_payload_bytes: Some(256),
            write_ceiling_bytes_per_s: Some(28.8e9),
        };
        let right = Figure {
            verdict: Verdict::Right,
            observer: Some("owner-engine".into()),
            ..Figure::new(what.clone(), time.clone(), None, Some(link), true)
        };
        let wrong = Figure {
            verdict: Verdict::Wrong,
            wrong: Some(Wrong {
                first_wrong_bytes: 0,
                wrong_bytes: 4096,
                of_bytes: 4096,
                looks_like: "zeros".into(),
            }),
            ..Figure::new(
                CopyKey { size_bytes: 4096, direction: Direction::Read, ..what.clone() },
                time.clone(),
                Some(time),
                None,
                false,
            )
        };
        Record {
            schema: SCHEMA.into(),
            version: VERSION,
            began_unix_s: 1,
            machine: crate::machine::tests::example(),
            verified: true,
            places: vec![
                PlaceRecord {
                    name: "0000:01:00.0".into(),
                    about: "a <GPU> & more".into(),
                    pci_address: Some("0000:01:00.0".into()),
                    numa_node: Some(0),
                    lends_bytes: 128 << 20,
                    engines: vec!["copy engine".into()],
                    clocks: vec![Clock {
                        name: "sclk".into(),
                        now_mhz: Some(800),
                        least_mhz: Some(500),
                        most_mhz: Some(2100),
                    }],
                },
                PlaceRecord {
                    name: "0000:02:00.0".into(),
                    about: "another".into(),
                    pci_address: None,
                    numa_node: None,
                    lends_bytes: 0,
                    engines: Vec::new(),
                    clocks: Vec::new(),
                },
            ],
            refused: vec![Refused {
                lender: "0000:01:00.0".into(),
                importer: "vulkan0".into(),
                path: "peer".into(),
                why: "the driver cannot map it".into(),
            }],
            failed: vec![Failed { what: what.clone(), why: "the device is gone".into() }],
            figures: vec![wrong, right],
            overheads: vec![Overhead { what, turns: 5, ratio: 0.99, p10: 0.97, p90: 1.01 }],
        }
    }

    #[test]
    fn shares_are_of_the_link_and_of_the_ceiling() {
        let record = example();
        let figure = &record.figures[1];
        // 64 MiB in 2.5 ms.
        assert!((figure.bytes_per_s / 1e9 - 26.84).abs() < 0.01);
        assert!((figure.link_share.unwrap() - 0.852).abs() < 0.001);
        assert!((figure.ceiling_share.unwrap() - 0.932).abs() < 0.001);
        assert_eq!(record.figures[0].link_share, None);
    }

    #[test]
    fn both_at_once_are_twice_the_bytes_and_no_more_of_the_link() {
        let one = &example().figures[1];
        let what = CopyKey { direction: Direction::Both, ..one.what.clone() };
        let both = Figure::new(what, one.time.clone(), None, one.link.clone(), true);
        assert_eq!(both.bytes_per_s, 2.0 * one.bytes_per_s);
        assert_eq!(both.link_share, one.link_share);
    }

    #[test]
    fn wrong_bytes_and_broken_copies_fail_a_run() {
        let mut record = example();
        assert!(record.has_failed());
        record.failed.clear();
        assert!(record.has_failed());
        record.figures.remove(0);
        assert!(!record.has_failed());
    }
}
