//! Clients whose importer cannot take the dma-buf, of memory that they cannot map: their broker copies.

use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use peervram_backends::host::{Backing, HostPool};
use peervram_backends::{
    Aperture, DmaBuf, DmaRanges, Engine, Error, Exporter, HostSlice, Importer, Kind, Mapping, OnRevoke,
    Owner, PciAddress, RawBytes, Region,
};
use serde_json::json;
use tempfile::TempDir;

use super::tests::{MIB, PATIENCE, Raw};
use super::{Broker, Offer, Policy, client};
use crate::staged::{StageCopy, by_cpu};
use crate::{Attachment, Direction, Lender, Mover, Outcome, Path, Result, RevokeCause, RevokeOptions, Trust};

/// More than one window.
const SIZE: u64 = 3 * MIB + 4096;

/// Host memory whose dma-bufs cannot be mapped, as those of a VFIO device.
struct Unmappable(HostPool);

impl Exporter for Unmappable {
    fn name(&self) -> String {
        self.0.name()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        None
    }

    fn regions(&self) -> &[Region] {
        self.0.regions()
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        let buffer = self.0.export(ranges)?;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsFd::as_fd(&buffer).as_raw_fd());
        let write_only = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        DmaBuf::from_fd(write_only.into())
    }

    fn end_export(&self, ranges: &DmaRanges) {
        self.0.end_export(ranges);
    }

    fn exports_new_memory(&self) -> bool {
        true
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        self.0.map(ranges)
    }

    fn check_reachable(&self) -> Result<()> {
        self.0.check_reachable()
    }
}

/// An owner with an engine, which counts what it is asked for.
#[derive(Default)]
struct Counting {
    lender: OnceLock<Weak<Lender<Unmappable>>>,
    moves: AtomicUsize,
}

impl Counting {
    fn copy(&self, ranges: &DmaRanges, way: StageCopy, offset_bytes: u64, host: &HostSlice) -> Result<()> {
        self.moves.fetch_add(1, Ordering::Relaxed);
        let lender = self.lender.get().and_then(Weak::upgrade).unwrap();
        by_cpu(&*lender.device().map(ranges)?, way, offset_bytes, host)
    }
}

impl Owner for Counting {
    fn name(&self) -> &str {
        "a driver"
    }

    fn flush(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn invalidate(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn quiesce(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn engine(&self) -> Option<&dyn Engine<DmaRanges>> {
        Some(self)
    }
}

impl Engine<DmaRanges> for Counting {
    fn name(&self) -> &str {
        "counting engine"
    }

    fn read(&self, ranges: &DmaRanges, offset_bytes: u64, host: &HostSlice, _: Instant) -> Result<()> {
        self.copy(ranges, StageCopy::Pull, offset_bytes, host)
    }

    fn write(&self, ranges: &DmaRanges, offset_bytes: u64, host: &HostSlice, _: Instant) -> Result<()> {
        self.copy(ranges, StageCopy::Push, offset_bytes, host)
    }
}

/// An importer that has memory of its own, and imports nothing.
struct OwnMemory;

impl Importer for OwnMemory {
    type Memory = Arc<Mapping>;

    fn name(&self) -> String {
        "a CPU driver".into()
    }

    fn on_revoke(&self) -> OnRevoke {
        OnRevoke::Reimport
    }

    fn governed_by_p2pdma(&self) -> bool {
        false
    }

    fn import(&self, _: &DmaBuf) -> Result<Arc<Mapping>> {
        Err(Error::new(Kind::Unsupported, "import a dma-buf", "it imports nothing").on(self.name()))
    }

    fn stage(&self, size_bytes: u64) -> Result<Arc<Mapping>> {
        Mapping::of_host_memory(size_bytes as usize).map(Arc::new)
    }

    fn host_memory(&self, memory: &Arc<Mapping>) -> Option<Arc<Mapping>> {
        Some(Arc::clone(memory))
    }

    fn release(&self, _: Arc<Mapping>) -> Result<()> {
        Ok(())
    }
}

struct Scene {
    lender: Arc<Lender<Unmappable>>,
    _broker: Broker,
    socket: PathBuf,
    _folder: TempDir,
}

impl Scene {
    fn owned_by(owner: Arc<dyn Owner>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("broker");
        let pool = HostPool::with_backing(16 * MIB, Backing::Memfd).unwrap();
        let lender = Arc::new(Lender::new(Unmappable(pool)));
        let ranges = DmaRanges::whole(lender.device().region(0).unwrap()).unwrap();
        let offer = Offer::new("host", &lender, Aperture::owned(ranges, owner)).unwrap();
        let listener = Broker::listen(&socket).unwrap();
        let broker = Broker::serve(listener, vec![offer], Policy::owner_only()).unwrap();
        Self { lender, _broker: broker, socket, _folder: folder }
    }

    fn with_engine() -> (Self, Arc<Counting>) {
        let owner = Arc::new(Counting::default());
        let scene = Self::owned_by(Arc::clone(&owner) as _);
        owner.lender.set(Arc::downgrade(&scene.lender)).unwrap();
        (scene, owner)
    }

    fn borrow(&self) -> client::Lease {
        client::Broker::connect(&self.socket).unwrap().borrow(client::Wish::of_size(SIZE)).unwrap()
    }

    /// What the owner's process sees in a lease.
    fn seen(&self, lease: &client::Lease) -> Vec<u8> {
        let mut seen = vec![0; SIZE as usize];
        let memory = self.lender.device().map(lease.aperture().ranges()).unwrap();
        memory.read(0, &mut seen).unwrap();
        seen
    }

    fn revoke(&self, options: RevokeOptions) -> Result<()> {
        self.lender.revoke(RevokeCause::Reset, "reset a stand-in", options, |_| Ok(()))
    }
}

fn pattern(seed: usize) -> Vec<u8> {
    (0..SIZE as usize).map(|at| (at / 4096 + at * 7 + seed) as u8).collect()
}

/// One access that writes the pattern of `seed` into the copy, and what came of it.
fn write(attachment: &Attachment<OwnMemory>, seed: usize, inside: impl FnOnce()) -> Outcome {
    let access = attachment.enter(Direction::Both).unwrap();
    access.memory().write(0, &pattern(seed)).unwrap();
    inside();
    access.finish()
}

/// The pattern of `seed` as the client's importer sees it.
fn check_read(attachment: &Attachment<OwnMemory>, seed: usize) {
    let access = attachment.enter(Direction::Read).unwrap();
    let mut seen = vec![0; SIZE as usize];
    access.memory().read(0, &mut seen).unwrap();
    assert_eq!(access.finish(), Outcome::Ok);
    assert!(seen == pattern(seed));
}

#[test]
fn the_broker_copies_by_its_cpu_where_the_owner_has_no_engine() {
    let scene = Scene::owned_by(Arc::new(RawBytes));
    let lease = scene.borrow();
    let attachment = lease.attach(Arc::new(OwnMemory), Trust::Unverified).unwrap();
    assert_eq!(attachment.path(), Path::Staged);
    let staging = attachment.staging().unwrap();
    assert_eq!((staging.pull, staging.push), (Mover::Cpu, Some(Mover::Cpu)));
    assert_eq!(write(&attachment, 3, || ()), Outcome::Ok);
    assert!(scene.seen(&lease) == pattern(3));
    // Another attachment has a copy of its own, and sees what is there.
    check_read(&lease.attach(Arc::new(OwnMemory), Trust::Unverified).unwrap(), 3);
}

#[test]
fn the_broker_copies_by_the_owners_engine_which_is_tested_first() {
    let (scene, owner) = Scene::with_engine();
    let lease = scene.borrow();
    let attachment = lease.attach(Arc::new(OwnMemory), Trust::Verified(Direction::Both)).unwrap();
    let staging = attachment.staging().unwrap();
    assert_eq!((staging.pull, staging.push), (Mover::OwnerEngine, Some(Mover::OwnerEngine)));
    let tested = owner.moves.load(Ordering::Relaxed);
    assert!(tested > 0, "the engine was not tested");
    assert_eq!(write(&attachment, 5, || ()), Outcome::Ok);
    assert!(scene.seen(&lease) == pattern(5));
    // Out of the memory and back into it, a window at a time.
    assert_eq!(owner.moves.load(Ordering::Relaxed), tested + 2 * 4);
}

#[test]
fn what_a_client_wrote_is_copied_while_a_revoke_waits_for_it() {
    let scene = Scene::owned_by(Arc::new(RawBytes));
    let lease = scene.borrow();
    let attachment = lease.attach(Arc::new(OwnMemory), Trust::Unverified).unwrap();
    let events = lease.events().unwrap();
    let outcome = std::thread::scope(|scope| {
        let scene = &scene.lender;
        write(&attachment, 9, || {
            scope.spawn(move || {
                let options = RevokeOptions::within(PATIENCE);
                scene.revoke(RevokeCause::Reset, "reset a stand-in", options, |_| Ok(())).unwrap();
            });
            assert_eq!(events.next_within(PATIENCE).unwrap().unwrap().kind.code(), "draining");
        })
    });
    assert_eq!(outcome, Outcome::Ok);
    assert!(scene.seen(&lease) == pattern(9));
}

#[test]
fn nothing_that_was_torn_is_copied_into_the_next_generation() {
    let scene = Scene::owned_by(Arc::new(RawBytes));
    let lease = scene.borrow();
    let attachment = lease.attach(Arc::new(OwnMemory), Trust::Unverified).unwrap();
    assert_eq!(write(&attachment, 1, || ()), Outcome::Ok);
    let torn = write(&attachment, 2, || {
        scene.revoke(RevokeOptions::within(Duration::ZERO).or_go_on()).unwrap();
    });
    assert!(matches!(torn, Outcome::Torn { .. }), "{torn:?}");
    assert!(scene.seen(&lease) == pattern(1));
}

#[test]
fn a_copy_that_makes_no_sense_is_refused() {
    let scene = Scene::owned_by(Arc::new(RawBytes));
    let (mut raw, mut other) = (Raw::connect(&scene.socket), Raw::connect(&scene.socket));
    assert_eq!(raw.code("Window", json!({})), "permission-denied");
    let lease = raw.call("Borrow", json!({ "size": SIZE }))["parameters"]["lease"].clone();
    let copy = |generation: u64, direction: &str, offset: u64, length: u64| {
        json!({
            "lease": lease, "generation": generation, "direction": direction, "offset": offset, "length": length
        })
    };
    assert_eq!(raw.code("Copy", copy(0, "read", 0, 1)), "invalid-input");
    let opened = raw.call("Window", json!({}));
    assert_eq!(opened["parameters"], json!({ "window": 0, "size": MIB }));
    for wrong in [
        copy(0, "both", 0, 1),
        copy(0, "read", 0, 0),
        copy(0, "read", 0, MIB + 1),
        copy(0, "write", SIZE - 1, 2),
        copy(0, "write", u64::MAX, 2),
    ] {
        assert_eq!(raw.code("Copy", wrong), "invalid-input");
    }
    assert_eq!(raw.code("Copy", copy(1, "read", 0, 1)), "revoked");
    let mut of_nobody = copy(0, "read", 0, 1);
    of_nobody["lease"] = json!(77);
    assert_eq!(raw.code("Copy", of_nobody), "not-found");
    // The window is of the connection that opened it.
    assert_eq!(other.code("Copy", copy(0, "read", 0, 1)), "invalid-input");
    assert_eq!(raw.call("Copy", copy(0, "read", SIZE - 1, 1)), json!({ "parameters": {} }));
    assert_eq!(raw.call("Return", json!({ "lease": lease })), json!({ "parameters": {} }));
    assert_eq!(raw.code("Copy", copy(0, "read", 0, 1)), "not-found");
}
