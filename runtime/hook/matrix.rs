//! Each hook panics in turn, and each thread that this crate starts fails to start in turn. What the caller saw is
//! written down; afterwards a reset, a new attachment and a close must succeed.
//!
//! A hook or a thread that is new has a row at once: the lists are the enums'.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use peervram_backends::host::{Backing, HostMemory};
use peervram_backends::{
    Aperture, CpuAccess, DmaBuf, DmaRanges, Engine, Error, Exporter, Flag, HostSlice, Importer, Interrupts,
    Kind, Mapping, NotReady, OnRefusal, OnRevoke, Owner, PciAddress, Region, Signal,
};
use rustix::event::{EventfdFlags, eventfd};

use super::Hook;
use crate::export::tests::Anyone;
use crate::revoke::revoker::Revoker;
use crate::sync::{Thread, refused};
use crate::verify::Limits;
use crate::{
    AttachOptions, Attachment, Direction, Export, Lender, Outcome, Path, Result, RevokeCause, RevokeOptions,
    Trust, Watch,
};

const SIZE_BYTES: u64 = 64 << 10;
/// A slice of a relay and a bit, so that both hops are at work.
const TWO_SLICES: u64 = (1 << 20) + 4096;
const PATIENCE: Duration = Duration::from_secs(5);

/// Hooks that this crate never calls: exporters call `retire_mappings` when they close, engines copy for benchmarks only.
/// The broker alone asks whether memory is new.
const NEVER: [Hook; 5] = [
    Hook::ExporterExportsNewMemory,
    Hook::ExporterRetireMappings,
    Hook::ExporterRegions,
    Hook::ExporterProviderBar,
    Hook::EngineCopy,
];

/// What panics, and how often it did.
#[derive(Default)]
struct Fault {
    armed: Mutex<Option<Hook>>,
    hits: AtomicUsize,
}

impl Fault {
    /// Panics, if it is this hook's turn; without a word on the terminal.
    fn pass(&self, hook: Hook) {
        if *self.armed.lock() == Some(hook) {
            self.hits.fetch_add(1, Ordering::SeqCst);
            resume_unwind(Box::new("as it was told"));
        }
    }
}

/// A device, and the engine of whoever drives it.
struct Device {
    fault: Arc<Fault>,
    memory: HostMemory,
}

impl Exporter for Device {
    fn name(&self) -> String {
        self.fault.pass(Hook::ExporterName);
        "device".into()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.fault.pass(Hook::ExporterPciAddress);
        None
    }

    fn regions(&self) -> &[Region] {
        self.fault.pass(Hook::ExporterRegions);
        self.memory.regions()
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        self.fault.pass(Hook::ExporterExport);
        self.memory.export(ranges)
    }

    fn begin_import(&self, _: &DmaRanges, _: &str, _: bool) -> Result<()> {
        self.fault.pass(Hook::ExporterBeginImport);
        Ok(())
    }

    fn end_export(&self, _: &DmaRanges) {
        self.fault.pass(Hook::ExporterEndExport);
    }

    fn exports_new_memory(&self) -> bool {
        self.fault.pass(Hook::ExporterExportsNewMemory);
        false
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        self.fault.pass(Hook::ExporterMap);
        self.memory.map(ranges)
    }

    fn check_reachable(&self) -> Result<()> {
        self.fault.pass(Hook::ExporterCheckReachable);
        Ok(())
    }

    fn wait_until_ready(&self, _: &mut dyn FnMut(&NotReady)) -> Result<()> {
        self.fault.pass(Hook::ExporterWaitUntilReady);
        Ok(())
    }

    fn cpu_access(&self, _: u32) -> CpuAccess {
        self.fault.pass(Hook::ExporterCpuAccess);
        CpuAccess::WriteCombined
    }

    fn provider_bar(&self, region_index: u32) -> u32 {
        self.fault.pass(Hook::ExporterProviderBar);
        region_index
    }

    fn shadow(&self) -> Result<()> {
        self.fault.pass(Hook::ExporterShadow);
        Ok(())
    }

    fn unshadow(&self) -> Result<()> {
        self.fault.pass(Hook::ExporterUnshadow);
        Ok(())
    }

    fn retire_mappings(&self) -> Result<()> {
        self.fault.pass(Hook::ExporterRetireMappings);
        Ok(())
    }

    fn close_device(&self) -> Result<()> {
        self.fault.pass(Hook::ExporterCloseDevice);
        Ok(())
    }

    fn interrupts(&self) -> Result<Interrupts> {
        self.fault.pass(Hook::ExporterInterrupts);
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        Ok(Interrupts { error: Some(fd), request: None })
    }
}

/// Copies by CPU, for an importer and for an owner.
fn copy(from: (&Mapping, usize), to: (&Mapping, usize), length_bytes: usize) -> Result<()> {
    let mut bytes = vec![0; length_bytes];
    from.0.read(from.1, &mut bytes)?;
    to.0.write(to.1, &bytes)
}

struct Driver {
    fault: Arc<Fault>,
    vram: Arc<Mapping>,
}

impl Owner for Driver {
    fn name(&self) -> &str {
        self.fault.pass(Hook::OwnerName);
        "driver"
    }

    fn flush(&self, _: &DmaRanges) -> Result<()> {
        self.fault.pass(Hook::OwnerFlush);
        Ok(())
    }

    fn invalidate(&self, _: &DmaRanges) -> Result<()> {
        self.fault.pass(Hook::OwnerInvalidate);
        Ok(())
    }

    fn quiesce(&self, _: &DmaRanges) -> Result<()> {
        self.fault.pass(Hook::OwnerQuiesce);
        Ok(())
    }

    fn resume(&self, _: &DmaRanges) -> Result<()> {
        self.fault.pass(Hook::OwnerResume);
        Ok(())
    }

    fn engine(&self) -> Option<&dyn Engine<DmaRanges>> {
        self.fault.pass(Hook::OwnerEngine);
        Some(self)
    }
}

impl Engine<DmaRanges> for Driver {
    fn name(&self) -> &str {
        self.fault.pass(Hook::EngineName);
        "owner's engine"
    }

    fn read(&self, _: &DmaRanges, at: u64, host: &HostSlice, _: Instant) -> Result<()> {
        self.fault.pass(Hook::EngineRead);
        copy((&self.vram, at as usize), (host.mapping(), host.offset_bytes()), host.length_bytes())
    }

    fn write(&self, _: &DmaRanges, at: u64, host: &HostSlice, _: Instant) -> Result<()> {
        self.fault.pass(Hook::EngineWrite);
        copy((host.mapping(), host.offset_bytes()), (&self.vram, at as usize), host.length_bytes())
    }
}

/// An importer that takes memory by one path.
struct Card {
    fault: Arc<Fault>,
    path: Path,
    on_revoke: OnRevoke,
    vram: Arc<Mapping>,
}

fn limits() -> Limits {
    Limits { quick_bytes: 64 << 10, ..Limits::default() }
}

fn refuses() -> Error {
    Error::new(Kind::Unsupported, "import", "not by this path")
}

impl Importer for Card {
    type Memory = Arc<Mapping>;

    fn name(&self) -> String {
        self.fault.pass(Hook::ImporterName);
        "card".into()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.fault.pass(Hook::ImporterPciAddress);
        None
    }

    fn driver(&self) -> Option<String> {
        self.fault.pass(Hook::ImporterDriver);
        None
    }

    fn on_revoke(&self) -> OnRevoke {
        self.fault.pass(Hook::ImporterOnRevoke);
        self.on_revoke
    }

    fn on_refusal(&self) -> OnRefusal {
        self.fault.pass(Hook::ImporterOnRefusal);
        // Asked whether the kernel decides at all, and it is not.
        OnRefusal::LosesDevice
    }

    fn governed_by_p2pdma(&self) -> bool {
        self.fault.pass(Hook::ImporterGovernedByP2pdma);
        false
    }

    fn import(&self, _: &DmaBuf) -> Result<Arc<Mapping>> {
        self.fault.pass(Hook::ImporterImport);
        if self.path == Path::Peer { Ok(Arc::clone(&self.vram)) } else { Err(refuses()) }
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<Arc<Mapping>> {
        self.fault.pass(Hook::ImporterImportHostPointer);
        if self.path == Path::HostPointer { Ok(mapping) } else { Err(refuses()) }
    }

    fn stage(&self, size_bytes: u64) -> Result<Arc<Mapping>> {
        self.fault.pass(Hook::ImporterStage);
        Ok(Arc::new(Mapping::of_host_memory(size_bytes as usize)?))
    }

    fn host_memory(&self, _: &Arc<Mapping>) -> Option<Arc<Mapping>> {
        self.fault.pass(Hook::ImporterHostMemory);
        None
    }

    fn engines(&self) -> Vec<&dyn Engine<Arc<Mapping>>> {
        self.fault.pass(Hook::ImporterEngines);
        vec![self]
    }

    fn engine_names(&self) -> Vec<String> {
        self.fault.pass(Hook::ImporterEngineNames);
        vec!["card's engine".into()]
    }

    fn release(&self, _: Arc<Mapping>) -> Result<()> {
        self.fault.pass(Hook::ImporterRelease);
        Ok(())
    }
}

impl Engine<Arc<Mapping>> for Card {
    fn name(&self) -> &str {
        self.fault.pass(Hook::EngineName);
        "card's engine"
    }

    fn read(&self, memory: &Arc<Mapping>, at: u64, host: &HostSlice, _: Instant) -> Result<()> {
        self.fault.pass(Hook::EngineRead);
        copy((memory, at as usize), (host.mapping(), host.offset_bytes()), host.length_bytes())
    }

    fn write(&self, memory: &Arc<Mapping>, at: u64, host: &HostSlice, _: Instant) -> Result<()> {
        self.fault.pass(Hook::EngineWrite);
        copy((host.mapping(), host.offset_bytes()), (memory, at as usize), host.length_bytes())
    }
}

struct Work {
    fault: Arc<Fault>,
    flag: Flag,
}

impl Signal for Work {
    fn wait(&self, timeout: Duration) -> Result<bool> {
        self.fault.pass(Hook::SignalWait);
        self.flag.wait(timeout)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.fault.pass(Hook::SignalDrop);
    }
}

/// One device, lent, and what was seen of it.
struct World {
    fault: Arc<Fault>,
    vram: Arc<Mapping>,
    lender: Lender<Device>,
    saw: Vec<String>,
}

impl World {
    fn new(armed: Option<Hook>, size_bytes: u64) -> Self {
        let fault = Arc::new(Fault { armed: Mutex::new(armed), ..Fault::default() });
        let memory = HostMemory::with_backing(size_bytes, Backing::Memfd).unwrap();
        let vram = memory.map(&DmaRanges::whole(memory.region()).unwrap()).unwrap();
        let device = Device { fault: Arc::clone(&fault), memory };
        let lender =
            catch_unwind(AssertUnwindSafe(|| Lender::with_revoker(Arc::new(Revoker::default()), device)))
                .expect("a panic reached whoever lends");
        Self { fault, vram, lender, saw: Vec::new() }
    }

    fn export(&self) -> Result<Export> {
        let ranges = DmaRanges::whole(self.lender.device().raw().memory.region()).unwrap();
        let driver = Driver { fault: Arc::clone(&self.fault), vram: Arc::clone(&self.vram) };
        self.lender.export(Aperture::owned(ranges, Arc::new(driver)))
    }

    fn card(&self, path: Path, on_revoke: OnRevoke) -> Arc<Card> {
        let (fault, vram) = (Arc::clone(&self.fault), Arc::clone(&self.vram));
        Arc::new(Card { fault, path, on_revoke, vram })
    }

    fn reset(&self) -> Result<()> {
        let fault = Arc::clone(&self.fault);
        let options = RevokeOptions::within(PATIENCE).or_go_on();
        self.lender.revoke(RevokeCause::Reset, "reset a device", options, move |_| {
            fault.pass(Hook::RevokingCall);
            Ok(())
        })
    }

    /// Does a step of the device's life, and notes what is not as it is without a fault.
    fn note<T>(&mut self, what: &str, step: impl FnOnce(&Self) -> Result<T>) -> Option<T> {
        match catch_unwind(AssertUnwindSafe(|| step(self))) {
            Ok(Ok(value)) => return Some(value),
            Ok(Err(error)) => self.saw.push(format!("{what}: {}", error.kind().code())),
            Err(_) => self.saw.push(format!("{what}: A PANIC")),
        }
        None
    }

    /// Everything that can be done with lent memory, once.
    fn live(&mut self) {
        if self.lender.watch() == Watch::Unwatched {
            self.saw.push("lend: unwatched".into());
        }
        let fault = Arc::clone(&self.fault);
        let _subscription = self.lender.on_event(move |_| fault.pass(Hook::Callback));
        // The one below may be held by work that goes on after this life.
        self.note("export and end it", |it| it.export().map(drop));
        let Some(export) = self.note("export", Self::export) else { return };
        self.note("print", |_| Ok(format!("{export:?}")));
        let mut attached: Vec<Attachment<Card>> = Vec::new();
        for path in [Path::Peer, Path::HostPointer, Path::Staged] {
            let attach = |it: &Self| Ok(export.attach(it.card(path, OnRevoke::Reimport), Trust::Unverified)?);
            let Some(attachment) = self.note(&format!("attach by {path}"), attach) else { continue };
            if attachment.path() != path {
                self.saw.push(format!("{} for {path}", attachment.path()));
            }
            attached.push(attachment);
        }
        let verified = AttachOptions::new(Trust::Verified(Direction::Both)).with_limits(limits());
        let attach = |it: &Self| Ok(export.attach(it.card(Path::Peer, OnRevoke::Reimport), verified)?);
        attached.extend(self.note("attach verified", attach));
        for attachment in &attached {
            self.note("use", |_| outcome(attachment.enter(Direction::Both)?.finish()));
            self.note("work", |it| {
                let work = Work { fault: Arc::clone(&it.fault), flag: Flag::new() };
                let flag = work.flag.clone();
                let in_flight = attachment.enter(Direction::Both)?.finish_when(work);
                flag.set();
                match in_flight.wait(PATIENCE) {
                    Some(ended) => outcome(ended),
                    None => {
                        let _ = in_flight.abandon();
                        Err(Error::new(Kind::TimedOut, "wait for work", "nobody knows"))
                    }
                }
            });
        }
        if let Some(attachment) = attached.first() {
            self.note("verify", |it| {
                let fault = Arc::clone(&it.fault);
                attachment.verify(Direction::Both, &limits(), &mut |_| fault.pass(Hook::Progress)).map(drop)
            });
        }
        self.note("reset", Self::reset);
        for attachment in &attached {
            self.note("import again", |_| attachment.current().map(drop));
            self.note("use again", |_| outcome(attachment.enter(Direction::Both)?.finish()));
        }
        // Work that its attachment leaves.
        if let Some(attachment) = attached.pop() {
            let flag = Flag::new();
            self.note("leave work", |_| Ok(attachment.enter(Direction::Read)?.finish_when(flag.clone())));
            drop(attachment);
            flag.set();
        }
        self.note("detach", |_| attached.into_iter().try_for_each(Attachment::detach));
    }

    /// What is seen of a lender that is dropped while an import that must be freed first is in somebody's hands.
    fn drop_in_use(mut self) -> Vec<String> {
        let Some(export) = self.note("export", Self::export) else { return self.saw };
        let attach =
            |it: &Self| Ok(export.attach(it.card(Path::Peer, OnRevoke::FreeBefore), Trust::Unverified)?);
        let Some(attachment) = self.note("attach", attach) else { return self.saw };
        let in_use = attachment.current().unwrap();
        let events = export.events().unwrap();
        let Self { lender, mut saw, .. } = self;
        drop(lender);
        if export.attach_is_refused_as().is_none_or(|kind| kind != Kind::Gone) {
            saw.push("drop in use: open until something is detached".into());
        }
        // Threads are to be had again; for the drop of a lender that was too late.
        refused::set(None);
        drop(in_use);
        drop(attachment);
        let deadline = Instant::now() + PATIENCE;
        while export.attach_is_refused_as() != Some(Kind::Gone) {
            if Instant::now() > deadline {
                saw.push("drop in use: NEVER CLOSED".into());
                break;
            }
            let _ = events.next_within(Duration::from_millis(20));
        }
        saw
    }

    /// What must succeed now.
    fn afterwards(self) -> [String; 3] {
        let said = |result: std::thread::Result<Result<()>>| match result {
            Ok(Ok(())) => "ok".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "A PANIC".to_owned(),
        };
        let reset = said(catch_unwind(AssertUnwindSafe(|| self.reset())));
        let attach = said(catch_unwind(AssertUnwindSafe(|| {
            let export = self.export()?;
            for path in [Path::Peer, Path::HostPointer, Path::Staged] {
                let attachment = export.attach(self.card(path, OnRevoke::Reimport), Trust::Unverified)?;
                outcome(attachment.enter(Direction::Both)?.finish())?;
                assert_eq!(attachment.path(), path);
            }
            Ok(())
        })));
        let close = said(catch_unwind(AssertUnwindSafe(|| self.lender.close(PATIENCE).map_err(Error::from))));
        [reset, attach, close]
    }
}

impl Export {
    /// The kind of the error that an attachment would be refused with.
    fn attach_is_refused_as(&self) -> Option<Kind> {
        self.attach(Arc::new(Anyone), Trust::Unverified).err().map(|error| error.kind())
    }
}

fn outcome(outcome: Outcome) -> Result<()> {
    match outcome {
        Outcome::Ok => Ok(()),
        other => Err(Error::new(Kind::Os, "use lent memory", format!("it ended as {other:?}"))),
    }
}

/// What was seen, each once and in order.
fn in_short(saw: &[String]) -> String {
    let mut once: Vec<&str> = Vec::new();
    for line in saw {
        if !once.contains(&line.as_str()) {
            once.push(line);
        }
    }
    if once.is_empty() { "nothing".into() } else { once.join(", ") }
}

#[test]
fn whatever_panics_and_whatever_thread_does_not_start_a_reset_a_close_and_an_attachment_succeed_afterwards() {
    let mut failed = Vec::new();
    println!(
        "{:<48}{:<10}{:<10}{:<10}what the caller saw",
        "panics, or does not start", "reset", "attach", "close"
    );
    let mut row = |what: &str, saw: &[String], after: [String; 3]| {
        let saw = in_short(saw);
        println!("{what:<48}{:<10}{:<10}{:<10}{saw}", after[0], after[1], after[2]);
        let is_well =
            after.iter().all(|said| said == "ok") && !saw.contains("A PANIC") && !saw.contains("NEVER");
        if !is_well {
            failed.push(what.to_owned());
        }
    };

    let mut sound = World::new(None, TWO_SLICES);
    sound.live();
    assert_eq!(in_short(&sound.saw), "nothing", "a life without a fault");
    row("nothing", &[], sound.afterwards());

    for &hook in Hook::ALL {
        let mut world = World::new(Some(hook), SIZE_BYTES);
        world.live();
        let (fault, mut saw) = (Arc::clone(&world.fault), std::mem::take(&mut world.saw));
        // What closes a device is called at its end only.
        if hook == Hook::ExporterCloseDevice {
            let closed = World::new(Some(hook), SIZE_BYTES);
            let result = catch_unwind(AssertUnwindSafe(|| closed.lender.close(PATIENCE)));
            fault.hits.fetch_add(closed.fault.hits.load(Ordering::SeqCst), Ordering::SeqCst);
            saw.push(match result {
                Ok(Ok(())) => "close: ok".into(),
                Ok(Err(kept)) => format!("close: {}", kept.error().kind().code()),
                Err(_) => "close: A PANIC".into(),
            });
        }
        *fault.armed.lock() = None;
        row(hook.name(), &saw, world.afterwards());
        let was_called = fault.hits.load(Ordering::SeqCst) > 0;
        assert_eq!(was_called, !NEVER.contains(&hook), "{hook} was called, or was not");
    }

    for thread in Thread::ALL {
        refused::set(Some(thread));
        let mut world = World::new(None, TWO_SLICES);
        world.live();
        let mut saw = std::mem::take(&mut world.saw);
        if thread == Thread::Close {
            saw.extend(World::new(None, SIZE_BYTES).drop_in_use());
        }
        refused::set(None);
        row(&format!("the thread {}", thread.name()), &saw, world.afterwards());
    }
    assert!(failed.is_empty(), "not well: {failed:?}");
}
