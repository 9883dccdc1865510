//! A kernel that refuses, a reset of several devices, and the end of processes and devices in the middle.

use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use peervram::backends::vfio::{Device, Interface, IoAddressSpace};
use peervram::backends::{
    DmaBuf, DmaRange, DmaRanges, Exporter, Interrupts, Mapping, PciAddress, RawBytes, Region,
};
use peervram::{Direction, Export, Kind, Lender, Trust, Watch};
use peervram_model::misbehaviour::Misbehaviour;

use crate::crossing::{PATIENCE, VRAM, open_node, refused};
use crate::guest::Guest;
use crate::holder::{Hold, Mode};
use crate::lender_process::{self, LenderProcess};
use crate::painted::Painted;
use crate::test::{Test, Verdict};
use crate::witness::{CopyEngine, Screen, Seen, Shader, Witness};

pub const TESTS: &[Test] = &[
    Test::of_revoke("revoke/a-reset-that-the-kernel-refuses-has-revoked", a_refused_reset),
    Test::of_revoke("revoke/a-hot-reset-takes-all-of-its-set", hot_reset_takes_all),
    Test::of_revoke("revoke/a-hot-reset-that-stops-halfway-has-revoked", hot_reset_halfway),
    // Linux 7.3 itself takes pciehp's locks and VFIO's in two orders: on a removal, and on a hot reset.
    Test::of_revoke("revoke/a-device-taken-out-in-mid-copy-hurts-nobody", taken_out)
        .on(|facts| !facts.lockdep)
        .allowing(&["Relaying device request"]),
    Test::of_revoke("revoke/an-owner-that-ends-lets-go-of-its-device", owner_ends),
    Test::of_revoke("revoke/killed-in-mid-revoke-leaves-the-device-usable", killed_in_mid_revoke),
];

/// Somebody else has the device locked: it is reset through sysfs, and takes its time.
fn a_refused_reset(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let painted = Painted::model(guest)?;
    let mut engine = CopyEngine::new(guest.model(1)?.address(), Interface::Cdev)?;
    let attachment = painted.export.attach(engine.importer(), Trust::Unverified)?;
    let mut seen = Seen::default();
    seen.look_until(&mut engine, &attachment, |seen| seen.right >= 1)?;

    // Long enough for a busy machine; and it has to end by itself, for reading configuration space waits until it has.
    model.misbehave(Misbehaviour::SlowReset { ms: 5000 })?;
    let before = model.status()?.generation;
    let file = model.address().sysfs_path().join("reset");
    let elsewhere = thread::spawn(move || fs::write(file, "1"));
    let deadline = Instant::now() + PATIENCE;
    while model.status()?.generation == before {
        ensure!(Instant::now() < deadline, "the reset through sysfs does not begin");
        thread::sleep(Duration::from_millis(5));
    }
    let error = refused(painted.lender.reset(PATIENCE), Kind::Busy)?;
    ensure!(error.raw_os_error() == Some(11), "the errno is {:?}", error.raw_os_error());
    elsewhere.join().map_err(|_| anyhow!("it panicked"))?.context("the reset through sysfs")?;
    model.behave()?;
    ensure!(painted.export.generation() == 1, "the generation is {}", painted.export.generation());
    refused(attachment.enter(Direction::Read), Kind::Revoked)?;

    // Tried again, as the error says.
    painted.lender.reset(PATIENCE)?;
    seen.look_until(&mut engine, &attachment, |seen| seen.generation == 2)
}

/// Two functions of one slot, opened into one address space.
fn twins(guest: &Guest) -> Result<[Device; 2]> {
    let space = IoAddressSpace::new(Interface::Cdev)?;
    let [first, second] = guest.twins()?;
    Ok([Device::open_into(&space, first)?, Device::open_into(&space, second)?])
}

/// A device of a type of its own, as those of a family of GPUs are that know more of a device than VFIO does.
struct OfAFamily(Device);

impl AsRef<Device> for OfAFamily {
    fn as_ref(&self) -> &Device {
        &self.0
    }
}

impl Exporter for OfAFamily {
    fn name(&self) -> String {
        self.0.name()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.0.pci_address()
    }

    fn regions(&self) -> &[Region] {
        self.0.regions()
    }

    fn export(&self, ranges: &DmaRanges) -> peervram::Result<DmaBuf> {
        self.0.export(ranges)
    }

    fn map(&self, ranges: &DmaRanges) -> peervram::Result<Arc<Mapping>> {
        self.0.map(ranges)
    }

    fn check_reachable(&self) -> peervram::Result<()> {
        self.0.check_reachable()
    }

    fn shadow(&self) -> peervram::Result<()> {
        self.0.shadow()
    }

    fn unshadow(&self) -> peervram::Result<()> {
        self.0.unshadow()
    }

    fn retire_mappings(&self) -> peervram::Result<()> {
        self.0.retire_mappings()
    }

    fn close_device(&self) -> peervram::Result<()> {
        self.0.close_device()
    }

    fn interrupts(&self) -> peervram::Result<Interrupts> {
        self.0.interrupts()
    }
}

/// A hot reset of lenders of two types.
fn hot_reset_takes_all(guest: &Guest) -> Verdict {
    let [first, second] = twins(guest)?;
    let addresses = [first.address(), second.address()];
    let first = Painted::lend(first, VRAM, Arc::new(RawBytes))?;
    let second = Painted::lend(OfAFamily(second), VRAM, Arc::new(RawBytes))?;
    let set = first.lender.reset_set()?;
    ensure!(set == addresses, "the set is {set:?}");
    let screen = Screen::new(guest)?;
    let mut screens = [screen.beside(), screen];
    let attach = |export: &Export, screen: &Screen| export.attach(screen.importer(), Trust::Unverified);
    let attachments = [attach(&first.export, &screens[0])?, attach(&second.export, &screens[1])?];

    // Nobody's importers are forgotten, whichever of the two is asked.
    let error = refused(first.lender.hot_reset(&[], PATIENCE), Kind::InvalidInput)?;
    ensure!(error.why().contains(&addresses[1].to_string()), "{error}");
    let error = refused(second.lender.hot_reset(&[], PATIENCE), Kind::InvalidInput)?;
    ensure!(error.why().contains(&addresses[0].to_string()), "{error}");
    ensure!((first.export.generation(), second.export.generation()) == (0, 0), "something was taken back");

    first.lender.hot_reset(&[&second.lender], PATIENCE)?;
    for (attachment, screen) in attachments.iter().zip(&mut screens) {
        let mut seen = Seen::default();
        seen.look_until(screen, attachment, |seen| seen.right >= 1 && seen.generation == 1)?;
    }
    second.lender.hot_reset(&[&second.lender, &first.lender], PATIENCE)?;
    ensure!((first.export.generation(), second.export.generation()) == (2, 2), "one was left out");
    for (attachment, screen) in attachments.iter().zip(&mut screens) {
        let mut seen = Seen::default();
        seen.look_until(screen, attachment, |seen| seen.right >= 1 && seen.generation == 2)?;
    }
    Ok(())
}

/// The second function's memory is being taken back, and that hangs: the kernel has revoked the first when
/// it finds out.
fn hot_reset_halfway(guest: &Guest) -> Verdict {
    let [first, second] = twins(guest)?;
    let painted = Painted::lend(first, VRAM, Arc::new(RawBytes))?;
    let mut screen = Screen::new(guest)?;
    let attachment = painted.export.attach(screen.importer(), Trust::Unverified)?;
    let mut seen = Seen::default();
    seen.look_until(&mut screen, &attachment, |seen| seen.right >= 1)?;

    let buffer = second.export(&DmaRanges::new(second.region(VRAM)?, &[DmaRange::new(0, 4096)])?)?;
    let second = Arc::new(second);
    let hold = Hold::open()?;
    hold.set_mode(Mode::UntilTold)?;
    hold.attach(&guest.virtio_gpu()?, &buffer)?;
    hold.map()?;
    let hanging = {
        let second = Arc::clone(&second);
        thread::spawn(move || second.set_memory_enabled(false))
    };
    let deadline = Instant::now() + PATIENCE;
    while hold.state()?.invalidations == 0 {
        ensure!(Instant::now() < deadline, "the second function's memory is not being taken back");
        thread::sleep(Duration::from_millis(5));
    }

    let error = refused(painted.lender.hot_reset(&[], PATIENCE), Kind::Busy)?;
    ensure!(error.raw_os_error() == Some(16), "the errno is {:?}", error.raw_os_error());
    hold.unmap()?;
    hanging.join().map_err(|_| anyhow!("it panicked"))??;
    ensure!(painted.export.generation() == 1, "the generation is {}", painted.export.generation());
    seen.look_until(&mut screen, &attachment, |seen| seen.generation == 1)?;
    second.set_memory_enabled(true)?;
    Ok(())
}

fn taken_out(guest: &Guest) -> Verdict {
    let slot = guest.slot_of(&guest.card()?.address().to_string())?;
    let painted = Painted::card(guest)?;
    let mut shader = Shader::new()?;
    let attachment = painted.export.attach(shader.importer(), Trust::Unverified)?;
    let mut seen = Seen::default();
    seen.look_until(&mut shader, &attachment, |seen| seen.right >= 1)?;
    slot.unplug()?;
    seen.look_until(&mut shader, &attachment, |seen| seen.gone)?;
    slot.wait_until_empty(PATIENCE)?;
    drop((attachment, painted));
    slot.plug()?;

    let painted = Painted::card(guest)?;
    let attachment = painted.export.attach(shader.importer(), Trust::Unverified)?;
    let mut seen = Seen::default();
    seen.look_until(&mut shader, &attachment, |seen| seen.right >= 1)
}

/// Another process opened the device and gave it to us; we hold it no longer than it lives.
fn owner_ends(guest: &Guest) -> Verdict {
    let address = guest.lender()?;
    let (mut owner, _buffer) = LenderProcess::start(&address, 1 << 20, 1)?;
    let lender = Lender::adopted(owner.adopt_device(&address)?, owner.pidfd()?)?;
    ensure!(lender.watch() == Watch::Unwatched, "an adopted device is {:?}", lender.watch());
    refused(lender.reset(PATIENCE), Kind::Unsupported)?;
    refused(lender.set_memory_enabled(false, PATIENCE), Kind::Unsupported)?;
    ensure!(lender.generation() == 0, "what is not ours was taken back");
    let ranges = DmaRanges::new(lender.device().region(VRAM)?, &[DmaRange::new(0, 1 << 20)])?;
    let view = lender.device().map(&ranges)?;
    let export = lender.export(peervram::backends::Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let attachment = export.attach(open_node(guest)?, Trust::Unverified)?;
    attachment.enter(Direction::Read)?.finish().check()?;

    let events = attachment.events()?;
    owner.kill()?;
    loop {
        let event = events.next_within(PATIENCE)?.context("the owner's end was not heard of")?;
        if let peervram::EventKind::Gone = event.kind {
            break;
        }
    }
    refused(attachment.enter(Direction::Read), Kind::Gone)?;
    let mut seen = [0; 4];
    view.read(0, &mut seen)?;
    ensure!(seen == [0xFF; 4], "what is left of the mapping shows {seen:x?}");
    // Nothing in this process keeps the device open.
    drop(owner);
    crate::crossing::open_device(guest)?;
    Ok(())
}

fn killed_in_mid_revoke(guest: &Guest) -> Verdict {
    let address = guest.card()?.address().to_string();
    let node = guest.virtio_gpu_node()?;
    for after_ms in [0, 3, 10, 30, 60, 100, 150, 250] {
        lender_process::revoke_until_killed(&address, &node, Duration::from_millis(after_ms))?;
        let painted =
            Painted::card(guest).with_context(|| format!("killed {after_ms} ms into its revokes"))?;
        let mut screen = Screen::new(guest)?;
        let attachment = painted.export.attach(screen.importer(), Trust::Unverified)?;
        let mut seen = Seen::default();
        seen.look_until(&mut screen, &attachment, |seen| seen.right >= 1)?;
        painted.lender.reset(PATIENCE)?;
        seen.look_until(&mut screen, &attachment, |seen| seen.generation == 1)?;
    }
    Ok(())
}
