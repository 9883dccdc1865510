//! The test of bytes against devices that go wrong in every way: each is caught, and named.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use peervram_backends::host::{Backing, HostMemory};
use peervram_backends::{
    Aperture, DmaBuf, DmaRanges, Engine, Exporter, HostSlice, Importer, Mapping, OnRevoke, Owner, PciAddress,
    Region,
};

use super::*;
use crate::{AttachOptions, Attachment, Direction, Export, Lender, Trust};

const MIB: usize = 1 << 20;
const SIZE_BYTES: usize = 6 * MIB;

/// What is wrong with a device.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wrong {
    Nothing,
    AllOnes,
    Zeros,
    DeadReads,
    DeadWrites,
    StuckFence,
    Shifted(usize),
    /// Offsets wrap at 2 MiB.
    Wraps,
    SwappedWords,
    /// The very last byte of the memory.
    LastByte,
    /// One byte of the memory, wherever it is.
    ByteAt(usize),
    /// Every read brings what the first one brought.
    Stale,
    Refuses,
}

/// An engine that copies by CPU, and goes wrong as it is told.
struct FakeEngine {
    name: &'static str,
    wrong: Mutex<Wrong>,
    cache: Mutex<std::collections::BTreeMap<usize, Vec<u8>>>,
}

impl FakeEngine {
    fn new(wrong: Wrong) -> Self {
        Self { name: "fake engine", wrong: Mutex::new(wrong), cache: Mutex::default() }
    }

    /// The bytes that it takes for those from `from`, which should be read at `offset` of the lent memory.
    fn bend(&self, offset: usize, mut bytes: Vec<u8>) -> Vec<u8> {
        match *self.wrong.lock() {
            Wrong::AllOnes => bytes.fill(0xff),
            Wrong::Zeros => bytes.fill(0),
            Wrong::SwappedWords => bytes.chunks_exact_mut(8).for_each(<[u8]>::reverse),
            Wrong::ByteAt(at) if (offset..offset + bytes.len()).contains(&at) => bytes[at - offset] ^= 1,
            Wrong::LastByte if offset + bytes.len() == SIZE_BYTES => *bytes.last_mut().unwrap() ^= 1,
            _ => {}
        }
        bytes
    }

    fn place(&self, offset: usize, length: usize) -> usize {
        match *self.wrong.lock() {
            Wrong::Shifted(by) => (offset + by).min(SIZE_BYTES - length),
            Wrong::Wraps => offset % (2 * MIB),
            _ => offset,
        }
    }

    fn end(&self, deadline: Instant) -> Result<()> {
        match *self.wrong.lock() {
            Wrong::StuckFence => {
                std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
                Err(Error::new(Kind::TimedOut, "wait for an engine", "fence 1 was not reached"))
            }
            Wrong::Refuses => Err(Error::new(Kind::Os, "copy", "the device\nsaid no")),
            _ => Ok(()),
        }
    }

    fn copy_out(&self, memory: &Mapping, offset: usize, host: &HostSlice, deadline: Instant) -> Result<()> {
        let mut bytes = vec![0; host.length_bytes()];
        memory.read(self.place(offset, bytes.len()), &mut bytes)?;
        let mut bytes = self.bend(offset, bytes);
        if *self.wrong.lock() == Wrong::Stale {
            bytes = self.cache.lock().entry(offset).or_insert(bytes).clone();
        }
        if *self.wrong.lock() != Wrong::DeadReads {
            host.mapping().write(host.offset_bytes(), &bytes)?;
        }
        self.end(deadline)
    }

    fn copy_in(&self, memory: &Mapping, offset: usize, host: &HostSlice, deadline: Instant) -> Result<()> {
        let mut bytes = vec![0; host.length_bytes()];
        host.mapping().read(host.offset_bytes(), &mut bytes)?;
        let bytes = self.bend(offset, bytes);
        if *self.wrong.lock() != Wrong::DeadWrites {
            memory.write(self.place(offset, bytes.len()), &bytes)?;
        }
        self.end(deadline)
    }
}

/// The engine of an importer.
impl Engine<Arc<Mapping>> for FakeEngine {
    fn name(&self) -> &str {
        self.name
    }

    fn read(&self, memory: &Arc<Mapping>, offset: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.copy_out(memory, offset as usize, host, deadline)
    }

    fn write(&self, memory: &Arc<Mapping>, offset: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.copy_in(memory, offset as usize, host, deadline)
    }
}

struct FakeImporter {
    engine: Option<FakeEngine>,
    driver: Mutex<String>,
}

impl Importer for FakeImporter {
    type Memory = Arc<Mapping>;

    fn name(&self) -> String {
        "fake importer".into()
    }

    fn driver(&self) -> Option<String> {
        Some(self.driver.lock().clone())
    }

    fn on_revoke(&self) -> OnRevoke {
        OnRevoke::Reimport
    }

    fn governed_by_p2pdma(&self) -> bool {
        false
    }

    fn import(&self, _: &DmaBuf) -> Result<Arc<Mapping>> {
        Err(Error::new(Kind::Unsupported, "import a dma-buf", "it takes mapped memory only"))
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<Arc<Mapping>> {
        Ok(mapping)
    }

    fn engines(&self) -> Vec<&dyn Engine<Arc<Mapping>>> {
        self.engine.iter().map(|engine| engine as _).collect()
    }

    fn release(&self, _: Arc<Mapping>) -> Result<()> {
        Ok(())
    }
}

/// The owner, with an engine on the memory behind the BAR, or on a private mirror of it.
struct FakeOwner {
    vram: Arc<Mapping>,
    engine: FakeEngine,
    has_engine: bool,
    is_flushed: AtomicBool,
}

impl Owner for FakeOwner {
    fn name(&self) -> &str {
        "fake owner"
    }

    fn flush(&self, _: &DmaRanges) -> Result<()> {
        self.is_flushed.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn invalidate(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn quiesce(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn engine(&self) -> Option<&dyn Engine<DmaRanges>> {
        self.has_engine.then_some(self as _)
    }
}

/// The engine of an owner, whose memory it finds by itself.
impl Engine<DmaRanges> for FakeOwner {
    fn name(&self) -> &str {
        "fake owner's engine"
    }

    fn read(&self, _: &DmaRanges, offset: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.engine.copy_out(&self.vram, offset as usize, host, deadline)
    }

    fn write(&self, _: &DmaRanges, offset: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.is_flushed.store(false, Ordering::Relaxed);
        self.engine.copy_in(&self.vram, offset as usize, host, deadline)
    }
}

/// Host memory that says it is a device, of which certificates are kept.
struct FakeDevice(HostMemory);

impl Exporter for FakeDevice {
    fn name(&self) -> String {
        "fffe:fe:1f.7".into()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.name().parse().ok()
    }

    fn regions(&self) -> &[Region] {
        self.0.regions()
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        self.0.export(ranges)
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        self.0.map(ranges)
    }

    fn check_reachable(&self) -> Result<()> {
        self.0.check_reachable()
    }
}

/// A lender, its owner, and an importer.
struct Pair {
    attachment: Attachment<FakeImporter>,
    export: Export,
    owner: Arc<FakeOwner>,
    /// What the BAR shows.
    window: Arc<Mapping>,
    _lender: Lender<FakeDevice>,
}

#[derive(Clone, Copy)]
struct Setup {
    importer: Wrong,
    owner: Wrong,
    owner_has_engine: bool,
    is_mirrored: bool,
}

const GOOD: Setup =
    Setup { importer: Wrong::Nothing, owner: Wrong::Nothing, owner_has_engine: true, is_mirrored: false };

impl Pair {
    fn new(setup: Setup) -> Self {
        let memory = HostMemory::with_backing(SIZE_BYTES as u64, Backing::Memfd).unwrap();
        let ranges = DmaRanges::whole(memory.region()).unwrap();
        let window = memory.map(&ranges).unwrap();
        window.write(0, &before()).unwrap();
        let mirror = HostMemory::with_backing(SIZE_BYTES as u64, Backing::Memfd).unwrap();
        let mirror = mirror.map(&DmaRanges::whole(mirror.region()).unwrap()).unwrap();
        let owner = Arc::new(FakeOwner {
            vram: if setup.is_mirrored { mirror } else { Arc::clone(&window) },
            engine: FakeEngine::new(setup.owner),
            has_engine: setup.owner_has_engine,
            is_flushed: AtomicBool::new(true),
        });
        let lender = Lender::new(FakeDevice(memory));
        let export = lender.export(Aperture::owned(ranges, Arc::clone(&owner) as _)).unwrap();
        let importer = FakeImporter {
            engine: Some(FakeEngine::new(setup.importer)),
            driver: Mutex::new("fake driver 1".into()),
        };
        let attachment = export.attach(Arc::new(importer), Trust::Unverified).unwrap();
        Self { attachment, export, owner, window, _lender: lender }
    }

    fn verify(&self, direction: Direction, limits: &Limits) -> Result<Certificate> {
        self.attachment.verify(direction, limits, &mut |_| ())
    }

    fn grants(&self, certificate: &Certificate, direction: Direction) -> Result<()> {
        certificate.grants(&self.attachment.request(direction))
    }

    fn is_put_back(&self) -> bool {
        let mut now = vec![0; SIZE_BYTES];
        self.window.read(0, &mut now).unwrap();
        now == before()
    }
}

/// What was in the memory before anybody tested it.
fn before() -> Vec<u8> {
    (0..SIZE_BYTES).map(|at| (at / 3) as u8 ^ 0x5a).collect()
}

fn limits() -> Limits {
    Limits { copy_timeout: Duration::from_millis(50), ..Limits::default() }
}

#[test]
fn a_healthy_pair_is_certified_in_both_directions_and_nothing_is_lost() {
    let pair = Pair::new(GOOD);
    let certificate = pair.verify(Direction::Both, &limits()).unwrap();
    pair.grants(&certificate, Direction::Both).unwrap();
    assert!(pair.is_put_back());
    let [read, write] = &certificate.tests[..] else { panic!("{certificate:?}") };
    assert_eq!((read.direction, write.direction), (Direction::Read, Direction::Write));
    assert_eq!(read.observer, Observer::OwnerEngine);
    for test in [read, write] {
        let figure = test.figure.unwrap();
        assert!(figure.size_bytes > MIB as u64 && figure.time_ns > 0, "{figure:?}");
        assert!(test.copied_bytes <= 2 * limits().quick_bytes, "{test:?}");
        assert!(test.places.iter().any(|place| place.name.contains("across 2 MiB")), "{test:?}");
    }
    assert!(pair.owner.is_flushed.load(Ordering::Relaxed), "the owner's last bytes were not flushed");
}

#[test]
fn everything_is_tested_when_asked_for_and_progress_is_told() {
    let pair = Pair::new(GOOD);
    let mut told = Vec::new();
    let limits = Limits { full: true, ..limits() };
    let certificate = pair
        .attachment
        .verify(Direction::Both, &limits, &mut |progress| told.push(progress.done_bytes))
        .unwrap();
    assert_eq!(certificate.tests.len(), 2);
    for test in &certificate.tests {
        let quick: u64 = test.places.iter().map(|place| place.length_bytes).sum();
        let copied = (quick + SIZE_BYTES as u64) * u64::from(run::ROUNDS);
        assert!(test.full && quick > 0);
        assert_eq!(test.copied_bytes, copied, "the places and then everything, in each round");
    }
    assert!(told.contains(&0) && told.contains(&(SIZE_BYTES as u64)), "{told:?}");
    assert!(pair.is_put_back());
}

/// Tests one direction of a pair, expects it not to be granted, and gives what was said.
fn refusal(setup: Setup, direction: Direction) -> String {
    let pair = Pair::new(setup);
    // With a seed of chance, one wrong byte is now and then what was there before, and looks like it.
    let certificate = pair.verify(direction, &Limits { seed: Some(7), ..limits() }).unwrap();
    let error = pair.grants(&certificate, direction).unwrap_err();
    assert_eq!(error.kind(), Kind::Unverified);
    assert!(certificate.check().is_ok());
    error.why().to_owned()
}

#[test]
fn every_fault_of_an_importer_is_caught_and_named() {
    let (read, write) = (Direction::Read, Direction::Write);
    for (importer, direction, words) in [
        (Wrong::AllOnes, read, "all ones"),
        (Wrong::AllOnes, write, "all ones"),
        (Wrong::Zeros, read, "zeros"),
        (Wrong::Zeros, write, "zeros"),
        (Wrong::DeadReads, read, "nothing was read"),
        (Wrong::DeadWrites, write, "nothing was written"),
        (Wrong::StuckFence, read, "did not end in time"),
        (Wrong::StuckFence, write, "did not end in time"),
        (Wrong::Refuses, read, "the device said no"),
        (Wrong::Shifted(4), read, "the bytes of offset"),
        (Wrong::Shifted(4096), read, "the bytes of offset 0x1000, found at 0x0"),
        (Wrong::Shifted(4096), write, "nothing was written"),
        (Wrong::Wraps, read, "the bytes of offset"),
        (Wrong::Wraps, write, "the bytes of offset"),
        (Wrong::SwappedWords, read, "back to front"),
        (Wrong::SwappedWords, write, "back to front"),
        (Wrong::LastByte, read, "1 of 2084864 bytes are wrong, the first at 0x5fffff"),
        (Wrong::LastByte, write, "with 1 flipped bit"),
        (Wrong::Stale, read, "a stale copy"),
    ] {
        let why = refusal(Setup { importer, ..GOOD }, direction);
        assert!(why.contains(words), "{importer:?}, {direction}: {why}");
    }
}

#[test]
fn every_fault_of_an_owners_engine_is_caught() {
    for (owner, direction) in [
        (Wrong::AllOnes, Direction::Read),
        (Wrong::Zeros, Direction::Write),
        (Wrong::DeadReads, Direction::Write),
        (Wrong::DeadWrites, Direction::Read),
        (Wrong::Shifted(8), Direction::Read),
        (Wrong::LastByte, Direction::Write),
    ] {
        refusal(Setup { owner, ..GOOD }, direction);
    }
    // The owner's engine cannot look, so nothing is known about the importer.
    let pair = Pair::new(Setup { owner: Wrong::StuckFence, ..GOOD });
    assert_eq!(pair.verify(Direction::Read, &limits()).unwrap_err().kind(), Kind::TimedOut);
}

#[test]
fn an_import_that_does_not_lie_in_the_other_direction_passes_there() {
    for (importer, direction) in [(Wrong::DeadReads, Direction::Write), (Wrong::DeadWrites, Direction::Read)]
    {
        let pair = Pair::new(Setup { importer, ..GOOD });
        let certificate = pair.verify(Direction::Both, &limits()).unwrap();
        pair.grants(&certificate, direction).unwrap();
        pair.grants(&certificate, Direction::Both).unwrap_err();
    }
}

#[test]
fn a_private_mirror_is_seen_by_the_owners_engine_and_not_through_the_window() {
    let mirrored = Setup { is_mirrored: true, ..GOOD };
    let why = refusal(mirrored, Direction::Read);
    assert!(why.contains("private copy"), "{why}");
    refusal(mirrored, Direction::Write);

    let pair = Pair::new(mirrored);
    let certificate = pair.verify(Direction::Both, &Limits { by_cpu: true, ..limits() }).unwrap();
    assert!(certificate.passed(), "the window shows a private mirror");
    let error = pair.grants(&certificate, Direction::Read).unwrap_err();
    assert!(error.why().contains("same window only"), "{error}");
}

#[test]
fn an_owner_without_an_engine_leaves_the_window_only() {
    let pair = Pair::new(Setup { owner_has_engine: false, ..GOOD });
    let certificate = pair.verify(Direction::Write, &limits()).unwrap();
    assert_eq!(certificate.tests[0].observer, Observer::OwnerCpuThroughBar);
    assert!(certificate.passed() && pair.grants(&certificate, Direction::Write).is_err());
    assert!(pair.is_put_back());
}

#[test]
fn a_stuck_engine_costs_no_more_than_its_limit() {
    let pair = Pair::new(Setup { importer: Wrong::StuckFence, ..GOOD });
    let start = Instant::now();
    let certificate = pair.verify(Direction::Both, &limits()).unwrap();
    // With the default limit each stuck copy would take ten seconds.
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert!(!certificate.passed() && pair.is_put_back());
    // And so does one that is slow, over all.
    let pair = Pair::new(GOOD);
    let limits = Limits { quick_timeout: Duration::ZERO, ..limits() };
    let certificate = pair.verify(Direction::Read, &limits).unwrap();
    let failure = certificate.tests[0].failure.as_ref().unwrap().to_string();
    assert!(failure.contains("did not end in time"), "{failure}");
}

#[test]
fn what_nobody_answers_for_and_who_has_no_engine_is_not_certified() {
    let memory = HostMemory::with_backing(4096, Backing::Memfd).unwrap();
    let ranges = DmaRanges::whole(memory.region()).unwrap();
    let lender = Lender::new(memory);
    let importer = || Arc::new(FakeImporter { engine: None, driver: Mutex::default() });
    for aperture in [
        Aperture::unowned(ranges.clone()),
        Aperture::owned(ranges.clone(), Arc::new(peervram_backends::RawBytes)),
    ] {
        let export = lender.export(aperture).unwrap();
        let attachment = export.attach(importer(), Trust::Unverified).unwrap();
        let error = attachment.verify(Direction::Read, &limits(), &mut |_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.next_step().is_some(), "{error}");
    }
}

#[test]
fn a_path_is_tested_once_until_something_changes() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::at(folder.path());
    let pair = Pair::new(GOOD);
    let importer = pair.attachment.importer();
    let assure = || {
        let access = pair.attachment.enter(Direction::Both).unwrap();
        let target = pair.attachment.target(&access);
        certified_or_tested(Some(&store), &target, Direction::Both, &Limits::default())
            .map(|(evidence, _)| evidence)
    };
    let seed = || store.list().unwrap().certificates[0].1.tests[0].seed;
    assert_eq!(assure().unwrap(), Evidence::Right { window_only: false });
    let first = seed();
    assure().unwrap();
    assert_eq!(seed(), first, "it was tested again");
    *importer.driver.lock() = "fake driver 2".into();
    assure().unwrap();
    let second = seed();
    assert_ne!(second, first, "another driver did not void it");
    let engine = importer.engine.as_ref().unwrap();
    *engine.wrong.lock() = Wrong::AllOnes;
    assure().unwrap();
    assert_eq!(seed(), second, "a current certificate was not believed");
    *importer.driver.lock() = "fake driver 3".into();
    assert_eq!(assure().unwrap_err().kind(), Kind::Unverified);
    *engine.wrong.lock() = Wrong::Nothing;
    assure().unwrap();
}

#[test]
fn a_certificate_is_proof_of_its_path_and_direction() {
    let folder = tempfile::tempdir().unwrap();
    let (store, pair) = (Store::at(folder.path()), Pair::new(GOOD));
    let path = pair.attachment.path();
    let access = pair.attachment.enter(Direction::Both).unwrap();
    let target = pair.attachment.target(&access);
    let is_proven = |path, direction| is_certified(&store, target.export, target.importer, path, direction);
    assert!(!is_proven(path, Direction::Read), "nothing was tested yet");
    certified_or_tested(Some(&store), &target, Direction::Read, &Limits::default()).unwrap();
    assert!(is_proven(path, Direction::Read) && !is_proven(path, Direction::Write));
    assert!(!is_proven(Path::Peer, Direction::Read), "another path");
    *pair.attachment.importer().driver.lock() = "fake driver 2".into();
    assert!(!is_proven(path, Direction::Read), "under another driver");
}

#[test]
fn an_old_look_through_the_window_is_enough_only_where_nobody_sees_more() {
    for owner_has_engine in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let (store, pair) = (Store::at(folder.path()), Pair::new(Setup { owner_has_engine, ..GOOD }));
        let old = pair.verify(Direction::Read, &Limits { by_cpu: true, ..limits() }).unwrap();
        assert_eq!(old.tests[0].observer, Observer::OwnerCpuThroughBar);
        store.keep(old.clone());
        let access = pair.attachment.enter(Direction::Read).unwrap();
        let target = pair.attachment.target(&access);
        let (_, now) =
            certified_or_tested(Some(&store), &target, Direction::Read, &Limits::default()).unwrap();
        let is_seen_by_more = now.tests.iter().any(|test| test.observer == Observer::OwnerEngine);
        assert_eq!(is_seen_by_more, owner_has_engine);
        assert_eq!(now == old, !owner_has_engine, "tested again for nothing, or not at all");
    }
}

#[test]
fn an_attachment_that_asks_is_tested_and_takes_no_path_that_lies() {
    for (importer, direction, is_taken) in [
        (Wrong::Nothing, Direction::Both, true),
        (Wrong::DeadReads, Direction::Write, true),
        (Wrong::DeadReads, Direction::Read, false),
        (Wrong::AllOnes, Direction::Write, false),
    ] {
        let pair = Pair::new(Setup { importer, ..GOOD });
        let again = Arc::clone(pair.attachment.importer());
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::at(folder.path()));
        let options = AttachOptions::new(Trust::Verified(direction)).with_limits(limits()).with_store(store);
        let result = pair.export.attach(again, options);
        assert_eq!(result.is_ok(), is_taken, "{importer:?}, {direction}: {result:?}");
        assert!(pair.is_put_back());
    }
}

/// A stored certificate would be believed of other host memory the next time.
#[test]
fn what_is_tested_of_host_memory_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::at(folder.path()));
    let options = || {
        AttachOptions::new(Trust::Verified(Direction::Both))
            .with_limits(limits())
            .with_store(Arc::clone(&store))
    };
    let pair = Pair::new(GOOD);
    pair.export.attach(Arc::clone(pair.attachment.importer()), options()).unwrap();
    assert_eq!(store.list().unwrap().certificates.len(), 1, "a device's is kept");
    std::fs::remove_dir_all(folder.path()).unwrap();

    let memory = HostMemory::with_backing(SIZE_BYTES as u64, Backing::Memfd).unwrap();
    let ranges = DmaRanges::whole(memory.region()).unwrap();
    let owner = Arc::new(FakeOwner {
        vram: memory.map(&ranges).unwrap(),
        engine: FakeEngine::new(Wrong::Nothing),
        has_engine: true,
        is_flushed: AtomicBool::new(true),
    });
    let lender = Lender::new(memory);
    let export = lender.export(Aperture::owned(ranges, owner)).unwrap();
    let attachment = export.attach(Arc::clone(pair.attachment.importer()), options()).unwrap();
    assert!(attachment.certificate().is_some(), "it was tested");
    assert_eq!(store.list().unwrap().certificates.len(), 0);
}

#[test]
fn an_access_does_no_more_than_was_tested() {
    let (read, write, both) = (Direction::Read, Direction::Write, Direction::Both);
    let pair = Pair::new(GOOD);
    for (trust, entered) in [
        (Trust::Verified(read), vec![read]),
        (Trust::Verified(write), vec![write]),
        (Trust::Verified(both), vec![read, write, both]),
        (Trust::Unverified, vec![read, write, both]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::at(folder.path()));
        let options = AttachOptions::new(trust).with_limits(limits()).with_store(store);
        let attachment = pair.export.attach(Arc::clone(pair.attachment.importer()), options).unwrap();
        for direction in [read, write, both] {
            match attachment.enter(direction) {
                Ok(access) => {
                    assert!(entered.contains(&direction), "{trust:?} let in to {direction}");
                    assert_eq!(access.direction(), direction);
                }
                Err(refused) => {
                    assert!(!entered.contains(&direction), "{trust:?}, {direction}: {refused}");
                    assert_eq!((refused.generation, refused.cause), (0, None));
                    let error = Error::from(refused);
                    assert_eq!(error.kind(), Kind::Unverified);
                    assert!(error.next_step().unwrap().contains("Verified(Direction::Both)"), "{error}");
                }
            }
        }
        // A test is how trust begins: it asks for none.
        attachment.verify(both, &limits(), &mut |_| ()).unwrap();
    }
}

/// An importer that says to be the same as that of a pair, with another engine.
fn twin(name: &'static str, wrong: Wrong) -> Arc<FakeImporter> {
    let engine = FakeEngine { name, ..FakeEngine::new(wrong) };
    Arc::new(FakeImporter { engine: Some(engine), driver: Mutex::new("fake driver 1".into()) })
}

fn attach(
    pair: &Pair,
    importer: Arc<FakeImporter>,
    store: &Arc<Store>,
    limits: Limits,
) -> Result<Attachment<FakeImporter>> {
    let trust = Trust::Verified(Direction::Read);
    let options = AttachOptions::new(trust).with_limits(limits).with_store(Arc::clone(store));
    Ok(pair.export.attach(importer, options)?)
}

/// Once an application's certificate was believed by another one, whose one engine nobody had tested.
#[test]
fn an_engine_that_was_never_tested_is_tested_whatever_another_one_passed() {
    let pair = Pair::new(GOOD);
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::at(folder.path()));
    let attached = attach(&pair, twin("compute queue", Wrong::Nothing), &store, limits()).unwrap();
    attached.detach().unwrap();
    let error = attach(&pair, twin("transfer queue", Wrong::AllOnes), &store, limits()).unwrap_err();
    assert!(error.why().contains("a read by the transfer queue went wrong"), "{error}");
    // The first one's still counts.
    let seed = |engine: &str| {
        let listing = store.list().unwrap();
        let tests = listing.certificates[0].1.tests.iter();
        tests.filter(|test| test.engine == engine).map(|test| test.seed).next().unwrap()
    };
    let before = seed("compute queue");
    attach(&pair, twin("compute queue", Wrong::AllOnes), &store, limits()).unwrap();
    assert_eq!(seed("compute queue"), before, "it was tested again");
}

/// Once the next quick test, which looks elsewhere, took back what a test of everything had found.
#[test]
fn a_failure_that_only_a_full_test_finds_is_looked_for_again() {
    let at = 4 * MIB + 12345;
    let pair = Pair::new(GOOD);
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::at(folder.path()));
    let (quick, full) = (limits(), Limits { full: true, ..limits() });
    // A quick test that knows of nothing does not see it.
    let other = tempfile::tempdir().unwrap();
    let other = Arc::new(Store::at(other.path()));
    attach(&pair, twin("fake engine", Wrong::ByteAt(at)), &other, quick.clone()).unwrap();

    let error = attach(&pair, twin("fake engine", Wrong::ByteAt(at)), &store, full.clone()).unwrap_err();
    assert!(error.why().contains("the first at 0x403039"), "{error}");
    for _ in 0..2 {
        let error = attach(&pair, twin("fake engine", Wrong::ByteAt(at)), &store, quick.clone()).unwrap_err();
        assert!(error.why().contains("the first at 0x403039"), "{error}");
    }
    // A test that the application starts itself uses the store of its attachment, too.
    let options = AttachOptions::new(Trust::Unverified).with_store(Arc::clone(&store));
    let importer = twin("fake engine", Wrong::ByteAt(at));
    let unverified = pair.export.attach(importer, options).unwrap();
    let certificate = unverified.verify(Direction::Read, &quick, &mut |_| ()).unwrap();
    assert!(!certificate.passed() && !certificate.tests[0].full);

    // Mended: a quick pass lets in, and is made each time; a full one is believed.
    let seeds = || -> Vec<u64> {
        let tests = store.list().unwrap().certificates[0].1.tests.clone();
        tests.iter().filter(|test| test.passed()).map(|test| test.seed).collect()
    };
    attach(&pair, twin("fake engine", Wrong::Nothing), &store, quick.clone()).unwrap();
    let first = seeds();
    attach(&pair, twin("fake engine", Wrong::Nothing), &store, quick.clone()).unwrap();
    assert_ne!(seeds(), first, "a failure of a test of everything was taken back by a quick one");
    attach(&pair, twin("fake engine", Wrong::Nothing), &store, full).unwrap();
    let last = seeds();
    attach(&pair, twin("fake engine", Wrong::Nothing), &store, quick).unwrap();
    assert_eq!(seeds(), last, "it was tested again after everything had been");
}
