//! `Certificate`: which tests a path between two devices has passed, or not, and what voids that.
//!
//! A certificate is of one lender's region and one importer. It has a result for each direction, engine, path and
//! observer, each with the ranges that were lent. It is an observation, made at some places, once; docs/verify.md
//! says what it does not prove.

use std::cmp::Reverse;
use std::fmt;
use std::time::Duration;

use peervram_backends::{DmaRange, DmaRanges, Error, Kind, PciAddress};
use serde::{Deserialize, Serialize};

use super::difference::Difference;
use super::faults::Faults;
use super::fingerprint::{BOOT, DRIVER, Fingerprint, Void};
use super::observer::Observer;
use super::{date, store};
use crate::{Direction, Path, Result};

/// The format of the file. A file of another one is ignored.
pub(crate) const FORMAT: u32 = 1;

const TRIED: &str = "trust a path";

/// One of the two devices.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Party {
    /// Its name, as messages have it.
    pub name: String,
    /// Its PCI address, where it has one.
    pub address: Option<String>,
}

impl Party {
    pub(crate) fn new(name: &str, address: Option<PciAddress>) -> Self {
        Self { name: clean(name), address: address.map(|address| address.to_string()) }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Some(address) if !self.name.contains(address.as_str()) => write!(f, "{} at {address}", self.name),
            _ => f.write_str(&self.name),
        }
    }
}

/// What a certificate is of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// Whose memory.
    pub lender: Party,
    /// Which region of it, for PCI the BAR's number.
    pub region: u32,
    /// Who reaches it.
    pub importer: Party,
}

/// A slice of the region, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// Where it begins.
    pub offset_bytes: u64,
    /// How long it is.
    pub length_bytes: u64,
}

impl From<&DmaRange> for Extent {
    fn from(range: &DmaRange) -> Self {
        Self { offset_bytes: range.offset_bytes, length_bytes: range.length_bytes }
    }
}

impl Extent {
    fn contains(self, other: Self) -> bool {
        let end = |extent: Self| extent.offset_bytes.checked_add(extent.length_bytes);
        other.offset_bytes >= self.offset_bytes
            && matches!((end(self), end(other)), (Some(this), Some(other)) if other <= this)
    }
}

/// One copy, as an engine made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// How much was copied.
    pub size_bytes: u64,
    /// How long that took, from the call of the engine to its return.
    pub time_ns: u64,
}

impl Figure {
    pub(crate) fn new(size_bytes: u64, time: Duration) -> Self {
        Self { size_bytes, time_ns: time.as_nanos().min(u64::MAX.into()) as u64 }
    }

    /// The longer copy of two, or the faster of two as long.
    pub(crate) fn better(a: Option<Self>, b: Option<Self>) -> Option<Self> {
        let (Some(one), Some(other)) = (a, b) else { return a.or(b) };
        let takes_over = (other.size_bytes, Reverse(other.time_ns)) > (one.size_bytes, Reverse(one.time_ns));
        Some(if takes_over { other } else { one })
    }

    /// Millions of bytes a second.
    pub fn mb_per_s(&self) -> f64 {
        self.size_bytes as f64 * 1e3 / self.time_ns.max(1) as f64
    }
}

/// Why a test was not passed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Failure {
    /// Bytes arrived, or did not, and were not those that were sent.
    WrongBytes(Difference),
    /// The importer's engine failed, or did not end in time.
    Engine {
        /// The code of the error's kind: "timed-out".
        code: String,
        /// The error in words.
        message: String,
    },
    /// The kernel's log told of a fault of one of the devices meanwhile.
    Fault {
        /// What it said.
        message: String,
    },
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self::Engine { code: error.kind().code().into(), message: clean(&error.to_string()) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WrongBytes(difference) => difference.fmt(f),
            Self::Engine { code, message } if code == Kind::TimedOut.code() => {
                write!(f, "it did not end in time: {message}")
            }
            Self::Engine { message, .. } => write!(f, "the engine failed: {message}"),
            Self::Fault { message } => write!(f, "the kernel reported a fault: {message}"),
        }
    }
}

/// One test: of one engine, in one direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tested {
    /// Read or write, as the importer sees it.
    pub direction: Direction,
    /// The importer's engine.
    pub engine: String,
    /// Who looked for the owner.
    pub observer: Observer,
    /// The name of the path.
    pub path: String,
    /// What was lent.
    pub ranges: Vec<Extent>,
    /// Whether all of that was tested, or some places.
    pub full: bool,
    /// The places of the quick test, each with why.
    pub places: Vec<String>,
    /// What the patterns were made from.
    pub seed: u64,
    /// When, in UTC: "2026-11-24T19:41:00Z".
    pub when: String,
    /// How much the importer's engine copied, all rounds together.
    pub copied_bytes: u64,
    /// The engine's longest copy.
    pub figure: Option<Figure>,
    /// What the kernel said meanwhile.
    pub faults: Faults,
    /// Why it was not passed.
    pub failure: Option<Failure>,
}

impl Tested {
    /// How long ago it was made, by the system's clock; nothing where that was set back since.
    pub fn age(&self) -> Option<Duration> {
        date::age(&self.when)
    }

    /// Whether bytes were right and nothing was reported.
    pub fn passed(&self) -> bool {
        self.failure.is_none()
    }

    /// Whether it says the same about the same as `other`, later or earlier.
    fn is_like(&self, other: &Self) -> bool {
        self.is_of_engine(other) && self.observer == other.observer && self.ranges == other.ranges
    }

    fn is_of_engine(&self, other: &Self) -> bool {
        (self.direction, &self.engine, &self.path) == (other.direction, &other.engine, &other.path)
    }

    /// Whether all of `ranges` was lent when it was made.
    fn covers(&self, ranges: &DmaRanges) -> bool {
        ranges.as_slice().iter().all(|range| {
            let range = Extent::from(range);
            self.ranges.iter().any(|extent| extent.contains(range))
        })
    }
}

/// What has been tested between two devices, and under which circumstances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Certificate {
    pub(crate) format: u32,
    /// Which machine, as a number made of its id.
    pub(crate) machine: String,
    /// Of what.
    pub subject: Subject,
    /// Whether it is good after a reboot, if nothing else has changed.
    pub outlives_reboots: bool,
    /// The tests.
    pub tests: Vec<Tested>,
    /// What it was made under.
    pub fingerprint: Fingerprint,
}

impl Certificate {
    /// Of this machine.
    pub(crate) fn new(
        subject: Subject,
        outlives_reboots: bool,
        tests: Vec<Tested>,
        fingerprint: Fingerprint,
    ) -> Self {
        Self { format: FORMAT, machine: store::machine(), subject, outlives_reboots, tests, fingerprint }
    }

    /// Whether every test was passed, whoever looked.
    pub fn passed(&self) -> bool {
        self.tests.iter().all(Tested::passed)
    }

    /// Whether everything is as it was when it was made.
    ///
    /// # Errors
    /// What is not.
    pub fn is_current(&self, now: &Fingerprint) -> Result<(), Vec<Void>> {
        let mut changes = self.fingerprint.changes(now);
        changes.retain(|change| !(self.outlives_reboots && change.what() == BOOT));
        if changes.is_empty() { Ok(()) } else { Err(changes) }
    }

    /// What things are like now, as far as can be told without opening the importer: its user-space driver is
    /// taken to be the same.
    pub fn fingerprint_now(&self) -> Fingerprint {
        let address = |party: &Party| party.address.as_deref().and_then(|address| address.parse().ok());
        let driver = self.fingerprint.line(DRIVER).map(str::to_owned);
        Fingerprint::now(address(&self.subject.lender), address(&self.subject.importer), driver)
    }

    /// Whether its tests are enough to trust `ranges` of its region by `path` in `direction`: each engine that
    /// was tested passed, and the owner's own engine looked (or the CPU, where `window_only` suffices).
    ///
    /// # Errors
    /// [`Kind::Unverified`], and why.
    pub fn grants(
        &self,
        direction: Direction,
        path: Path,
        ranges: &DmaRanges,
        window_only: bool,
    ) -> Result<()> {
        direction.each().iter().try_for_each(|&way| self.grants_one(way, path, ranges, window_only))
    }

    fn grants_one(&self, way: Direction, path: Path, ranges: &DmaRanges, window_only: bool) -> Result<()> {
        let refuse = |why: String, next: &'static str| {
            Err(Error::new(Kind::Unverified, TRIED, why)
                .on(format!("{} from {}", self.subject.importer, self.subject.lender))
                .next(next))
        };
        let tests: Vec<&Tested> =
            self.tests.iter().filter(|test| test.direction == way && test.path == path.name()).collect();
        if let Some((test, failure)) = tests.iter().find_map(|test| Some((test, test.failure.as_ref()?))) {
            let why = format!("a {way} by the {} went wrong: {failure}", test.engine);
            return refuse(why, "docs/verify.md says what each kind of wrong bytes mostly comes from");
        }
        let covering: Vec<&&Tested> = tests.iter().filter(|test| test.covers(ranges)).collect();
        if covering.is_empty() {
            let why = format!("no {way} of these ranges was tested by {path}");
            return refuse(why, "run peervram verify");
        }
        for test in &covering {
            let is_observed = window_only
                || covering
                    .iter()
                    .any(|other| other.engine == test.engine && other.observer == Observer::OwnerEngine);
            if !is_observed {
                let why = format!(
                    "a {way} by the {} was seen through the same window only, which may show a private copy",
                    test.engine
                );
                return refuse(why, "lend with an owner that has an engine, or attach unverified");
            }
        }
        Ok(())
    }

    /// Adds what an `older` one knows and this one does not say anew. A failure replaces everything that was
    /// known of its engine in its direction, and a pass replaces failures.
    pub(crate) fn inherit(&mut self, older: &Self) {
        let is_news = |old: &&Tested| {
            !self
                .tests
                .iter()
                .any(|new| new.is_like(old) || new.is_of_engine(old) && (!new.passed() || !old.passed()))
        };
        let mut kept: Vec<Tested> = older.tests.iter().filter(is_news).cloned().collect();
        // The latest stay.
        kept.sort_by(|a, b| b.when.cmp(&a.when));
        kept.truncate(MOST_TESTS.saturating_sub(self.tests.len()));
        self.tests.append(&mut kept);
    }

    /// Whether what was read from a file can be a certificate. Nothing in it was trusted before.
    pub(crate) fn check(&self) -> Result<(), String> {
        let texts = |test: &Tested| {
            let failure = match &test.failure {
                None => vec![],
                Some(Failure::WrongBytes(difference)) => {
                    vec![&difference.expected, &difference.seen, &difference.looks_like]
                }
                Some(Failure::Engine { code, message }) => vec![code, message],
                Some(Failure::Fault { message }) => vec![message],
            };
            let faults = match &test.faults {
                Faults::Watched(said) => said.iter().collect(),
                Faults::NotWatched(why) => vec![why],
            };
            let own = [&test.engine, &test.path, &test.when];
            own.into_iter().chain(&test.places).chain(failure).chain(faults).all(|text| fits(text))
        };
        let Subject { lender, importer, .. } = &self.subject;
        let names =
            [&lender.name, &importer.name].into_iter().chain(&lender.address).chain(&importer.address);
        let lines = self.fingerprint.lines().flat_map(|(what, value)| [what, value]);
        if self.tests.is_empty() || self.tests.len() > MOST_TESTS {
            return Err(format!("{} tests", self.tests.len()));
        }
        if self.fingerprint.lines().next().is_none() {
            return Err("no fingerprint, so that nothing would void it".into());
        }
        if !names.map(String::as_str).chain(lines).all(fits) || !self.tests.iter().all(texts) {
            return Err("a text that is too long or has control characters".into());
        }
        for test in &self.tests {
            if test.direction == Direction::Both {
                return Err("a test of both directions at once".into());
            }
            if test.ranges.is_empty() || test.ranges.iter().any(|extent| !extent.contains(*extent)) {
                return Err("ranges that are none".into());
            }
        }
        Ok(())
    }
}

/// How many tests one certificate keeps.
const MOST_TESTS: usize = 64;
/// The longest text: the kernel's longest command line is 4096 bytes, and paths and messages are shorter.
const MOST_TEXT_BYTES: usize = 8 << 10;

fn fits(text: &str) -> bool {
    text.len() <= MOST_TEXT_BYTES && !text.chars().any(char::is_control)
}

/// The text as a certificate may have it: others' names and messages can be anything.
pub(crate) fn clean(text: &str) -> String {
    let mut kept = String::new();
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if kept.len() + c.len_utf8() > MOST_TEXT_BYTES {
            break;
        }
        kept.push(c);
    }
    kept
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One that a test of 16 MiB left, of `engine` in `direction`.
    pub(crate) fn tested(direction: Direction, engine: &str, observer: Observer) -> Tested {
        Tested {
            direction,
            engine: engine.into(),
            observer,
            path: Path::Peer.name().into(),
            ranges: vec![Extent { offset_bytes: 0, length_bytes: 16 << 20 }],
            full: false,
            places: vec!["start: 0x0+0x10000".into()],
            seed: 7,
            when: "2026-11-24T19:41:00Z".into(),
            copied_bytes: 1 << 20,
            figure: Some(Figure { size_bytes: 1 << 20, time_ns: 81_250 }),
            faults: Faults::Watched(Vec::new()),
            failure: None,
        }
    }

    pub(crate) fn certificate(tests: Vec<Tested>) -> Certificate {
        let party = |address: &str| Party { name: address.into(), address: Some(address.into()) };
        let subject = Subject { lender: party("0000:01:00.0"), region: 2, importer: party("0000:02:00.0") };
        let mut fingerprint = Fingerprint::default();
        fingerprint.add("the kernel command line", "quiet");
        fingerprint.add(BOOT, "one");
        Certificate::new(subject, false, tests, fingerprint)
    }

    pub(crate) fn ranges(offset_bytes: u64, length_bytes: u64) -> DmaRanges {
        let region = peervram_backends::Region {
            index: 2,
            size_bytes: 1 << 30,
            file_offset_bytes: 0,
            flags: peervram_backends::RegionFlags { read: true, write: true, mmap: true },
            capabilities: Vec::new(),
        };
        DmaRanges::new(&region, &[DmaRange::new(offset_bytes, length_bytes)]).unwrap()
    }

    fn failed(mut tested: Tested) -> Tested {
        tested.failure = Some(Failure::Fault { message: "DMAR: fault".into() });
        tested
    }

    const ENGINE: Observer = Observer::OwnerEngine;
    const WINDOW: Observer = Observer::OwnerCpuThroughBar;

    /// Whether it grants, and the reason why not.
    fn grants(certificate: &Certificate, direction: Direction, ranges: &DmaRanges, window: bool) -> String {
        match certificate.grants(direction, Path::Peer, ranges, window) {
            Ok(()) => "yes".into(),
            Err(error) => {
                assert_eq!(error.kind(), Kind::Unverified);
                error.why().to_owned()
            }
        }
    }

    #[test]
    fn it_grants_what_was_tested_and_nothing_else() {
        let certificate = certificate(vec![tested(Direction::Read, "copy engine", ENGINE)]);
        let whole = ranges(0, 16 << 20);
        assert_eq!(grants(&certificate, Direction::Read, &whole, false), "yes");
        assert_eq!(grants(&certificate, Direction::Read, &ranges(4096, 4096), false), "yes");
        let untested = "no write of these ranges was tested by peer";
        assert_eq!(grants(&certificate, Direction::Write, &whole, false), untested);
        assert_eq!(grants(&certificate, Direction::Both, &whole, false), untested);
        let beyond = grants(&certificate, Direction::Read, &ranges(8 << 20, 16 << 20), false);
        assert_eq!(beyond, "no read of these ranges was tested by peer");
        let other = certificate.grants(Direction::Read, Path::HostPointer, &whole, false).unwrap_err();
        assert!(other.why().contains("by host-pointer"), "{other}");
    }

    #[test]
    fn the_window_alone_grants_nothing_unless_it_suffices_by_name() {
        let window = certificate(vec![tested(Direction::Read, "copy engine", WINDOW)]);
        let whole = ranges(0, 16 << 20);
        assert!(grants(&window, Direction::Read, &whole, false).contains("same window only"));
        assert_eq!(grants(&window, Direction::Read, &whole, true), "yes");
        let both = certificate(vec![
            tested(Direction::Read, "copy engine", WINDOW),
            tested(Direction::Read, "copy engine", ENGINE),
        ]);
        assert_eq!(grants(&both, Direction::Read, &whole, false), "yes");
    }

    #[test]
    fn one_engine_that_fails_is_enough_to_refuse() {
        let certificate = certificate(vec![
            tested(Direction::Read, "transfer queue", ENGINE),
            failed(tested(Direction::Read, "compute queue", ENGINE)),
        ]);
        let why = grants(&certificate, Direction::Read, &ranges(0, 4096), true);
        assert_eq!(why, "a read by the compute queue went wrong: the kernel reported a fault: DMAR: fault");
    }

    #[test]
    fn a_change_voids_and_says_why() {
        let certificate = certificate(vec![tested(Direction::Read, "copy engine", ENGINE)]);
        certificate.is_current(&certificate.fingerprint).unwrap();
        let mut now = certificate.fingerprint.clone();
        now.add("the kernel command line", "quiet pci=disable_acs_redir=00:02.0");
        let changes = certificate.is_current(&now).unwrap_err();
        assert_eq!(
            changes[0].to_string(),
            "the kernel command line was quiet and is quiet pci=disable_acs_redir=00:02.0"
        );
    }

    #[test]
    fn a_reboot_voids_unless_it_is_to_outlive_that() {
        let mut certificate = certificate(vec![tested(Direction::Read, "copy engine", ENGINE)]);
        let mut now = certificate.fingerprint.clone();
        now.add(BOOT, "two");
        assert_eq!(certificate.is_current(&now).unwrap_err()[0].to_string(), "the boot was one and is two");
        certificate.outlives_reboots = true;
        certificate.is_current(&now).unwrap();
    }

    #[test]
    fn passes_of_several_apertures_add_up_and_a_failure_replaces_them() {
        let read = || tested(Direction::Read, "copy engine", ENGINE);
        let mut later = read();
        later.ranges[0].offset_bytes = 32 << 20;
        let mut sum = certificate(vec![later]);
        sum.inherit(&certificate(vec![read(), tested(Direction::Write, "copy engine", ENGINE)]));
        assert_eq!(sum.tests.len(), 3);
        let mut broken = certificate(vec![failed(read())]);
        broken.inherit(&sum);
        let left: Vec<_> = broken.tests.iter().map(|test| (test.direction, test.passed())).collect();
        assert_eq!(left, [(Direction::Read, false), (Direction::Write, true)]);
        let mut mended = certificate(vec![read()]);
        mended.inherit(&broken);
        assert!(mended.passed());
    }

    proptest! {
        #[test]
        fn cleaned_text_fits(text in "\\PC{0,64}|.{0,64}", times in 1_usize..400) {
            prop_assert!(fits(&clean(&text.repeat(times))));
        }
    }
}
