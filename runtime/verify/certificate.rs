//! `Certificate`: which tests a path between two devices has passed, or not, and what voids that.
//!
//! A certificate is of one lender's region and one importer. It has a result for each direction, engine, path and
//! observer, each with the ranges that were lent. It is an observation, made at some places, once; docs/verify.md
//! says what it does not prove.

use std::cmp::Reverse;
use std::time::Duration;

use peervram_backends::{Error, Kind};
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::faults::Faults;
use super::fingerprint::{BOOT, DRIVER, Fingerprint, Void};
use super::observer::Observer;
use super::places::VerifiedPart;
use super::subject::{Extent, Party, Request, Subject};
use super::text::fits;
use super::{date, store};
use crate::{Direction, Result};

/// The format of the file. A file of another one is ignored.
pub(crate) const FORMAT: u32 = 2;

const TRIED: &str = "trust a path";

/// One copy, as an engine made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
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
        a.into_iter().chain(b).max_by_key(|figure| (figure.size_bytes, Reverse(figure.time_ns)))
    }

    /// Millions of bytes a second.
    pub fn mb_per_s(&self) -> f64 {
        self.size_bytes as f64 * 1e3 / self.time_ns.max(1) as f64
    }
}

/// One test: of one engine, in one direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
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
    /// Whether all of that was to be tested, or some places.
    pub full: bool,
    /// The places of the quick test, each with why.
    pub places: Vec<VerifiedPart>,
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

    fn is_of_engine(&self, other: &Self) -> bool {
        (self.direction, &self.engine, &self.path) == (other.direction, &other.engine, &other.path)
    }

    /// Where bytes were first seen to be wrong, from the start of what was lent.
    pub(crate) fn first_wrong_bytes(&self) -> Option<u64> {
        match &self.failure {
            Some(Failure::WrongBytes(difference)) => Some(difference.first_wrong_bytes),
            _ => None,
        }
    }

    /// Whether `older` has nothing to say any more that this one does not.
    ///
    /// A failure takes back every pass of its engine in its direction. A pass takes back a failure where it looked
    /// for it: on the same ranges, with an observer who sees as much, and everywhere if the failure came of a test
    /// of everything, else at least where bytes were wrong.
    fn replaces(&self, older: &Self) -> bool {
        let looked_as_far =
            self.ranges == older.ranges && self.observer >= older.observer && (self.full || !older.full);
        let looked_there =
            |wrong_bytes: u64| self.full || self.places.iter().any(|place| place.contains(wrong_bytes));
        self.is_of_engine(older)
            && match (self.passed(), older.passed()) {
                (false, true) => true,
                (true, true) => looked_as_far && self.observer == older.observer,
                (true, false) => looked_as_far && older.first_wrong_bytes().is_none_or(looked_there),
                // A test ends at what is wrong first, so one failure does not look for the other.
                (false, false) => looked_as_far && self.first_wrong_bytes() == older.first_wrong_bytes(),
            }
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
    /// The system state at test time; a change voids the certificate.
    pub fingerprint: Fingerprint,
}

impl Certificate {
    /// A certificate of this machine.
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
    /// The lines of the fingerprint that changed.
    pub fn is_current(&self, now: &Fingerprint) -> Result<(), Vec<Void>> {
        let mut changes = self.fingerprint.changes(now);
        changes.retain(|change| !(self.outlives_reboots && change.what() == BOOT));
        if changes.is_empty() { Ok(()) } else { Err(changes) }
    }

    /// The present system state, as far as it can be read without opening the importer: its user-space driver is
    /// taken to be the same.
    pub fn fingerprint_now(&self) -> Fingerprint {
        let address = |party: &Party| party.address.as_deref().and_then(|address| address.parse().ok());
        let driver = self.fingerprint.line(DRIVER).map(str::to_owned);
        Fingerprint::now(address(&self.subject.lender), address(&self.subject.importer), driver)
    }

    /// Whether its tests are enough for what is asked: each of the engines was tested by that path, in each
    /// direction, on exactly those ranges in their order, and passed; and the owner's own engine looked (or the CPU,
    /// where a window is enough).
    ///
    /// # Errors
    /// [`Kind::Unverified`], and why.
    pub fn grants(&self, request: &Request) -> Result<()> {
        if request.engines.is_empty() {
            return self.refuse(
                "the importer names no engine, so no test is of it".into(),
                "attach unverified, or by an importer whose device has an engine",
            );
        }
        let ways = request.direction.each();
        ways.iter().try_for_each(|&way| {
            request.engines.iter().try_for_each(|engine| self.grants_one(way, engine, request))
        })
    }

    fn grants_one(&self, way: Direction, engine: &str, request: &Request) -> Result<()> {
        let path = request.path.name();
        let is_of_it = |test: &&Tested| (test.direction, &*test.engine, &*test.path) == (way, engine, path);
        let tests: Vec<&Tested> = self.tests.iter().filter(is_of_it).collect();
        if let Some(failure) = tests.iter().find_map(|test| test.failure.as_ref()) {
            let why = format!("a {way} by the {engine} went wrong: {failure}");
            return self.refuse(why, "docs/verify.md says what each kind of wrong bytes mostly comes from");
        }
        let mut of_ranges = tests.iter().filter(|test| test.ranges == request.ranges).peekable();
        if of_ranges.peek().is_none() {
            let why = format!("no {way} of these ranges by the {engine} was tested by {path}");
            return self.refuse(why, "run peervram verify");
        }
        if !request.window_only && of_ranges.all(|test| test.observer != Observer::OwnerEngine) {
            let why = format!(
                "a {way} by the {engine} was seen through the same window only, which may show a private copy"
            );
            return self.refuse(why, "lend with an owner that has an engine, or attach unverified");
        }
        Ok(())
    }

    fn refuse(&self, why: String, next: &'static str) -> Result<()> {
        let on = format!("{} from {}", self.subject.importer, self.subject.lender);
        Err(Error::new(Kind::Unverified, TRIED, why).on(on).next(next))
    }

    /// Where tests of what is asked for went wrong, from the start of what is lent.
    pub(crate) fn wrong_places(&self, request: &Request) -> Vec<u64> {
        let is_of_it = |test: &&Tested| {
            request.direction.includes(test.direction)
                && test.path == request.path.name()
                && test.ranges == request.ranges
        };
        self.tests.iter().filter(is_of_it).filter_map(Tested::first_wrong_bytes).collect()
    }

    /// Adds what an `older` one knows and no test of this one [replaces](Tested::replaces).
    pub(crate) fn inherit(&mut self, older: &Self) {
        let is_left = |old: &&Tested| !self.tests.iter().any(|new| new.replaces(old));
        let mut kept: Vec<Tested> = older.tests.iter().filter(is_left).cloned().collect();
        // Failures stay, and the latest of the others.
        kept.sort_by(|a, b| a.passed().cmp(&b.passed()).then_with(|| b.when.cmp(&a.when)));
        kept.truncate(MOST_TESTS.saturating_sub(self.tests.len()));
        self.tests.append(&mut kept);
    }

    /// Adds the failures alone of one that was made under the same circumstances, but is to outlive other ones.
    pub(crate) fn inherit_failures(&mut self, older: &Self) {
        let tests = older.tests.iter().filter(|test| !test.passed()).cloned().collect();
        self.inherit(&Self { tests, ..older.clone() });
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
            let places = test.places.iter().map(|place| &place.name);
            own.into_iter().chain(places).chain(failure).chain(faults).all(|text| fits(text))
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
            if test.ranges.is_empty() || test.ranges.iter().any(|extent| extent.end_bytes().is_none()) {
                return Err("ranges that are none".into());
            }
        }
        Ok(())
    }
}

/// How many tests one certificate keeps.
const MOST_TESTS: usize = 64;

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use peervram_backends::{DmaRange, DmaRanges};

    use super::super::difference::Difference;
    use super::super::pattern::{Pattern, Purpose};
    use super::super::text::{MOST_TEXT_BYTES, clean};
    use super::*;
    use crate::Path;

    /// One that a test of 16 MiB left, of `engine` in `direction`.
    pub(crate) fn tested(direction: Direction, engine: &str, observer: Observer) -> Tested {
        Tested {
            direction,
            engine: engine.into(),
            observer,
            path: Path::Peer.name().into(),
            ranges: vec![Extent { offset_bytes: 0, length_bytes: 16 << 20 }],
            full: false,
            places: vec![VerifiedPart { offset_bytes: 0, length_bytes: 64 << 10, name: "start".into() }],
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

    /// What a test of 16 MiB by one engine answers, where nothing else is said.
    pub(crate) fn request(direction: Direction) -> Request {
        Request::new(vec!["copy engine".into()], direction, Path::Peer, &ranges(0, 16 << 20))
    }

    /// Whether it grants, and the reason why not.
    fn grants(certificate: &Certificate, request: &Request) -> String {
        match certificate.grants(request) {
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
        let read = request(Direction::Read);
        assert_eq!(grants(&certificate, &read), "yes");
        let untested = "no write of these ranges by the copy engine was tested by peer";
        assert_eq!(grants(&certificate, &request(Direction::Write)), untested);
        assert_eq!(grants(&certificate, &request(Direction::Both)), untested);
        for (offset_bytes, length_bytes) in [(4096, 4096), (0, 16 << 10), (8 << 20, 16 << 20), (0, 32 << 20)]
        {
            let other = Request { ranges: vec![Extent { offset_bytes, length_bytes }], ..read.clone() };
            let why = grants(&certificate, &other);
            assert_eq!(why, "no read of these ranges by the copy engine was tested by peer", "{other:?}");
        }
        let other = Request { path: Path::HostPointer, ..read };
        assert!(grants(&certificate, &other).contains("by host-pointer"));
    }

    /// Once an application with a compute queue passed, and one with a transfer queue alone was believed.
    #[test]
    fn an_engine_that_was_not_tested_is_not_granted() {
        let all = |engines: &[&str]| Request {
            engines: engines.iter().map(|&engine| engine.into()).collect(),
            ..request(Direction::Read)
        };
        let tested = |engine| tested(Direction::Read, engine, ENGINE);
        let certificate = certificate(vec![tested("compute shader"), tested("copy commands")]);
        assert_eq!(grants(&certificate, &all(&["copy commands", "compute shader"])), "yes");
        assert_eq!(grants(&certificate, &all(&["compute shader"])), "yes");
        for engines in [&["transfer queue"][..], &["compute shader", "transfer queue"], &["compute"]] {
            assert!(grants(&certificate, &all(engines)).contains("was tested by peer"), "{engines:?}");
        }
        assert!(grants(&certificate, &all(&[])).contains("names no engine"));
        // A name is compared as it is kept.
        let odd = Request::new(vec!["odd\nname".into()], Direction::Read, Path::Peer, &ranges(0, 4096));
        assert_eq!(odd.engines, ["odd name"]);
    }

    #[test]
    fn the_window_alone_grants_nothing_unless_it_suffices_by_name() {
        let window = certificate(vec![tested(Direction::Read, "copy engine", WINDOW)]);
        let read = request(Direction::Read);
        assert!(grants(&window, &read).contains("same window only"));
        assert_eq!(grants(&window, &read.clone().window_only(true)), "yes");
        assert!(grants(&window, &read.clone().window_only(true).window_only(false)).contains("window"));
        let both = certificate(vec![
            tested(Direction::Read, "copy engine", WINDOW),
            tested(Direction::Read, "copy engine", ENGINE),
        ]);
        assert_eq!(grants(&both, &read), "yes");
        // The owner's engine saw other ranges than those requested.
        let mut elsewhere = tested(Direction::Read, "copy engine", ENGINE);
        elsewhere.ranges[0].offset_bytes = 32 << 20;
        let both = certificate(vec![tested(Direction::Read, "copy engine", WINDOW), elsewhere]);
        assert!(grants(&both, &read).contains("same window only"));
    }

    #[test]
    fn one_of_its_engines_that_fails_is_enough_to_refuse() {
        let certificate = certificate(vec![
            tested(Direction::Read, "transfer queue", ENGINE),
            failed(tested(Direction::Read, "compute queue", ENGINE)),
        ]);
        let of = |engines: &[&str]| Request {
            engines: engines.iter().map(|&engine| engine.into()).collect(),
            window_only: true,
            ..request(Direction::Read)
        };
        let why = grants(&certificate, &of(&["transfer queue", "compute queue"]));
        assert_eq!(why, "a read by the compute queue went wrong: the kernel reported a fault: DMAR: fault");
        assert_eq!(grants(&certificate, &of(&["transfer queue"])), "yes");
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

    /// The importer is not opened for it.
    #[test]
    fn the_present_state_has_the_driver_that_was_there() {
        let mut certificate = certificate(Vec::new());
        certificate.fingerprint.add(DRIVER, "radv Mesa 26.1.6");
        let now = certificate.fingerprint_now();
        assert_eq!(now.line(DRIVER), Some("radv Mesa 26.1.6"));
        assert!(now.line("the kernel").is_some(), "{now:?}");
        assert!(
            now.lines().any(|(what, _)| what.contains("0000:02:00.0")),
            "the importer is not in it: {now:?}"
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
        assert_eq!(mended.tests.len(), 2);
    }

    /// Wrong at that byte.
    fn wrong_at(mut tested: Tested, first_wrong_bytes: u64) -> Tested {
        let (sent, seen) = (Pattern::new(7, Direction::Read, 0, Purpose::Sent), [0x5A; 4096]);
        let found = Difference::find(&sent, first_wrong_bytes, &seen, 16 << 20, &[], None);
        tested.failure = found.map(Failure::WrongBytes);
        assert_eq!(tested.first_wrong_bytes(), Some(first_wrong_bytes));
        tested
    }

    /// What is left of `older` when `newer` was kept after it.
    fn left(newer: &Tested, older: &Tested) -> bool {
        let mut sum = certificate(vec![newer.clone()]);
        sum.inherit(&certificate(vec![older.clone()]));
        assert_eq!(sum.tests[0], *newer);
        sum.tests.len() == 2
    }

    #[test]
    fn a_pass_takes_back_a_failure_only_where_it_looked_for_it() {
        let quick = tested(Direction::Read, "copy engine", ENGINE);
        let full = Tested { full: true, ..quick.clone() };
        let (near, far) = (4096, 12 << 20);
        // A failure of a full test is taken back only by another full test.
        for wrong in [wrong_at(full.clone(), near), wrong_at(full.clone(), far), failed(full.clone())] {
            assert!(left(&quick, &wrong), "a quick pass took back {wrong:?}");
            assert!(!left(&full, &wrong), "a full pass left {wrong:?}");
        }
        // A failure of a quick test is taken back by a pass that looked where bytes were wrong.
        assert!(!left(&quick, &wrong_at(quick.clone(), near)));
        assert!(left(&quick, &wrong_at(quick.clone(), far)));
        assert!(!left(&full, &wrong_at(quick.clone(), far)));
        assert!(!left(&quick, &failed(quick.clone())));
        // Not taken back: by an observer that sees less, on other ranges, or for another engine, direction or path.
        let mut elsewhere = full.clone();
        elsewhere.ranges[0].length_bytes += 4096;
        for newer in [
            Tested { observer: WINDOW, ..full.clone() },
            elsewhere,
            Tested { engine: "other".into(), ..full.clone() },
            Tested { direction: Direction::Write, ..full.clone() },
            Tested { path: Path::HostPointer.name().into(), ..full.clone() },
        ] {
            assert!(left(&newer, &wrong_at(quick.clone(), near)), "{newer:?} took back a failure");
        }
        // An observer that sees more does take it back.
        assert!(!left(&full, &wrong_at(Tested { observer: WINDOW, ..quick }, near)));
    }

    #[test]
    fn passes_and_failures_of_the_same_do_not_pile_up_and_none_is_lost() {
        let quick = tested(Direction::Read, "copy engine", ENGINE);
        let full = Tested { full: true, ..quick.clone() };
        assert!(!left(&quick, &quick) && !left(&full, &quick) && !left(&full, &full));
        assert!(left(&quick, &full), "a quick pass says less than one of everything");
        assert!(left(&Tested { observer: WINDOW, ..quick.clone() }, &quick));
        let wrong = |tested: &Tested, at| wrong_at(tested.clone(), at);
        assert!(!left(&wrong(&quick, 4096), &wrong(&quick, 4096)));
        assert!(left(&wrong(&quick, 4096), &wrong(&full, 4096)));
        assert!(left(&wrong(&full, 4096), &wrong(&full, 8192)), "one failure does not look for the other");
    }

    #[test]
    fn where_too_many_are_known_failures_stay_and_the_latest() {
        let numbered = |number: u32, is_right| {
            let when = format!("2026-11-24T19:41:{number:02}Z");
            let test =
                Tested { engine: format!("engine {number}"), when, ..tested(Direction::Read, "", ENGINE) };
            if is_right { test } else { failed(test) }
        };
        let mut sum = certificate(vec![numbered(99, true)]);
        let older = (0..60).map(|number| numbered(number, number != 3)).collect();
        sum.inherit(&certificate(older));
        let mut more = certificate((60..70).map(|number| numbered(number, true)).collect());
        more.inherit(&sum);
        assert_eq!(more.tests.len(), MOST_TESTS);
        assert!(more.tests.iter().any(|test| test.engine == "engine 3"), "the failure was dropped");
        assert!(!more.tests.iter().any(|test| test.engine == "engine 0"), "the oldest was kept");
        assert!(more.tests.iter().any(|test| test.engine == "engine 59"));
        more.check().unwrap();
    }

    #[test]
    fn wrong_places_are_those_of_what_is_asked() {
        let quick = tested(Direction::Read, "copy engine", ENGINE);
        let mut elsewhere = wrong_at(quick.clone(), 4096);
        elsewhere.ranges[0].offset_bytes = 4096;
        let certificate = certificate(vec![
            wrong_at(quick.clone(), 8192),
            failed(tested(Direction::Read, "other", ENGINE)),
            wrong_at(Tested { direction: Direction::Write, ..quick.clone() }, 12288),
            wrong_at(Tested { path: Path::HostPointer.name().into(), ..quick }, 16384),
            elsewhere,
        ]);
        assert_eq!(certificate.wrong_places(&request(Direction::Read)), [8192]);
        assert_eq!(certificate.wrong_places(&request(Direction::Both)), [8192, 12288]);
    }

    #[test]
    fn the_longer_copy_counts_and_of_two_as_long_the_faster() {
        let figure = |size_bytes, time_ns| Figure { size_bytes, time_ns };
        let better = |a, b| Figure::better(Some(a), Some(b)).unwrap();
        let (short, long, slow) = (figure(10, 1), figure(20, 9), figure(20, 11));
        for (a, b, expected) in
            [(short, long, long), (long, short, long), (long, slow, long), (slow, long, long)]
        {
            assert_eq!(better(a, b), expected, "{a:?}, {b:?}");
        }
        assert_eq!(Figure::better(None, Some(short)), Some(short));
        assert_eq!(Figure::better(Some(short), None), Some(short));
        assert_eq!(Figure::better(None, None), None);
        assert_eq!(Figure::new(7, Duration::from_micros(3)), figure(7, 3000));
        assert!((figure(3_000_000, 1_500_000).mb_per_s() - 2000.0).abs() < 1e-9);
        assert!((figure(5, 0).mb_per_s() - 5000.0).abs() < 1e-9, "no time is divided by");
    }

    #[test]
    fn a_device_is_called_by_its_name_and_its_address_once() {
        let party = |name: &str, address: Option<&str>| {
            Party { name: name.into(), address: address.map(str::to_owned) }.to_string()
        };
        assert_eq!(party("radv", None), "radv");
        assert_eq!(party("radv", Some("0000:02:00.0")), "radv at 0000:02:00.0");
        assert_eq!(party("radv of 0000:02:00.0", Some("0000:02:00.0")), "radv of 0000:02:00.0");
    }

    #[test]
    fn failures_are_told_apart_in_words() {
        let engine = |kind: Kind| Failure::from(&Error::new(kind, "copy", "fence 1")).to_string();
        assert!(engine(Kind::TimedOut).starts_with("it did not end in time: "), "{}", engine(Kind::TimedOut));
        assert!(engine(Kind::Gone).starts_with("the engine failed: "), "{}", engine(Kind::Gone));
        let fault = Failure::Fault { message: "DMAR: fault".into() };
        assert_eq!(fault.to_string(), "the kernel reported a fault: DMAR: fault");
        let wrong = wrong_at(tested(Direction::Read, "", ENGINE), 4096);
        assert!(wrong.failure.unwrap().to_string().contains("of 4096 bytes are wrong, the first at 0x1000"));
    }

    #[test]
    fn it_passed_where_every_test_did() {
        let read = || tested(Direction::Read, "copy engine", ENGINE);
        assert!(certificate(vec![read(), read()]).passed());
        assert!(!certificate(vec![read(), failed(read())]).passed());
        // Made in the past, and by the clock of somebody else.
        assert!(read().age().is_some());
        assert_eq!(Tested { when: "9000-01-01T00:00:00Z".into(), ..read() }.age(), None);
    }

    #[test]
    fn what_cannot_be_a_certificate_is_refused() {
        let read = || tested(Direction::Read, "copy engine", ENGINE);
        let why = |certificate: Certificate| certificate.check().unwrap_err();
        certificate(vec![read(); MOST_TESTS]).check().unwrap();
        assert_eq!(why(certificate(vec![read(); MOST_TESTS + 1])), "65 tests");
        assert_eq!(why(certificate(vec![read(); MOST_TESTS + 2])), "66 tests");
        assert_eq!(why(certificate(Vec::new())), "0 tests");
        assert_eq!(why(certificate(vec![Tested { ranges: Vec::new(), ..read() }])), "ranges that are none");
        let mut endless = read();
        endless.ranges.push(Extent { offset_bytes: u64::MAX, length_bytes: 1 });
        assert_eq!(why(certificate(vec![endless])), "ranges that are none");
        let mut no_fingerprint = certificate(vec![read()]);
        no_fingerprint.fingerprint = Fingerprint::default();
        assert!(why(no_fingerprint).contains("no fingerprint"));
        // One text too many is enough, wherever it is.
        let long = "x".repeat(MOST_TEXT_BYTES);
        certificate(vec![Tested { engine: long.clone(), ..read() }]).check().unwrap();
        let longer = format!("{long}x");
        let mut named = certificate(vec![read()]);
        named.subject.importer.name.clone_from(&longer);
        let mut placed = read();
        placed.places[0].name.push('\n');
        for of_a_text in [
            named,
            certificate(vec![read(), Tested { engine: longer.clone(), ..read() }]),
            certificate(vec![placed]),
            certificate(vec![Tested { faults: Faults::NotWatched("\u{7}".into()), ..read() }]),
            certificate(vec![Tested { failure: Some(Failure::Fault { message: longer }), ..read() }]),
        ] {
            assert!(why(of_a_text).contains("too long or has control characters"));
        }
    }

    #[test]
    fn text_is_cut_between_two_letters_and_only_where_it_is_too_long() {
        let as_long = "x".repeat(MOST_TEXT_BYTES);
        assert_eq!(clean(&as_long), as_long);
        assert_eq!(clean(&format!("{as_long}y")), as_long);
        let end = "x".repeat(MOST_TEXT_BYTES - 1);
        assert_eq!(clean(&format!("{end}\u{e9}z")), end);
        assert_eq!(clean("a\tb"), "a b");
    }

    fn several() -> impl Strategy<Value = Vec<Extent>> {
        let extent = (0_u64..4, 1_u64..3)
            .prop_map(|(at, length)| Extent { offset_bytes: at << 20, length_bytes: length << 20 });
        prop::collection::vec(extent, 1..4)
    }

    proptest! {
        /// Whatever was lent and is lent now: the same ranges in the same order, or nothing.
        #[test]
        fn several_ranges_are_granted_in_their_order_alone(then in several(), now in several(), same: bool) {
            let now = if same { then.clone() } else { now };
            let mut test = tested(Direction::Read, "copy engine", ENGINE);
            test.ranges = then.clone();
            let asked = Request { ranges: now.clone(), ..request(Direction::Read) };
            prop_assert_eq!(certificate(vec![test]).grants(&asked).is_ok(), then == now);
        }

        #[test]
        fn cleaned_text_fits(text in "\\PC{0,64}|.{0,64}", times in 1_usize..400) {
            prop_assert!(fits(&clean(&text.repeat(times))));
        }
    }
}
