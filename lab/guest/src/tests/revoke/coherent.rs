//! Every cause of the table on coherent memory, and what is its own: that it is not ready at once after a reset.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use peervram::backends::RawBytes;
use peervram::backends::vfio::Interface;
use peervram::nvgrace::{Device, RESERVED_REGION, USABLE_REGION};
use peervram::{Direction, EventKind, Kind, RevokeOptions, Trust};
use peervram_lab::machine::Facts;
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model_driver::ModelGpu;

use crate::crossing::{PATIENCE, refused};
use crate::guest::Guest;
use crate::holder::Hold;
use crate::painted::Painted;
use crate::test::{Test, Verdict};
use crate::tests::nvgrace::{grace, open};
use crate::witness::{CopyEngine, Holder, Screen, Seen, Shader, Witness};

use super::table::{ASKED, Cause, causes, survive};

pub const TESTS: &[Test] = &[
    Test::of_grace("nvgrace/every-cause-under-a-screen", under_a_screen).allowing(ASKED_OR_TORN),
    Test::of_grace("nvgrace/every-cause-under-a-screen-of-reserved-memory", under_a_screen_of_reserved)
        .on(|facts| facts.has_reserved_memory())
        .allowing(ASKED_OR_TORN),
    Test::of_grace("nvgrace/every-cause-under-shaders", under_shaders)
        .on(|facts| facts.vulkan)
        .allowing(ASKED),
    Test::of_grace("nvgrace/every-cause-under-an-engine-by-iommufd", under_iommufd)
        .on(Facts::has_peers_by_iommufd)
        .allowing(ASKED),
    Test::of_grace("nvgrace/every-cause-under-an-engine-by-type1", under_type1).allowing(ASKED),
    Test::of_grace("nvgrace/every-cause-under-the-holder", under_the_holder).allowing(ASKED),
    Test::of_grace("nvgrace/every-reset-waits-three-seconds-for-the-memory", every_reset_waits)
        .on_any_topology()
        .allowing(ASKED_OR_TORN),
    Test::of_grace("nvgrace/a-wait-is-told-and-nobody-is-let-in", a_wait_is_told),
    Test::of_grace("nvgrace/importers-of-others-are-not-kept-waiting", others_are_not_kept_waiting),
    Test::of_grace("nvgrace/memory-that-never-gets-ready-stays-away", never_ready_stays_away)
        .on_any_topology(),
];

/// What the kernel may say: that it wants a device back; and of a virtio GPU that was about to show memory when that
/// was taken back under it, whose access ended torn.
const ASKED_OR_TORN: &[&str] = &["Relaying device request", "response 0x1200", "response 0x1205"];

/// How long the model says that its memory is not ready.
const TRAINING: Duration = Duration::from_secs(3);

/// Lends the start of a region.
fn lend(guest: &Guest, region: u32) -> Result<Painted<Device>> {
    let (model, _) = grace(guest)?;
    Painted::lend(open(&model)?, region, Arc::new(RawBytes))
}

/// Whether the kernel resets its slot or bus. It does not where a GH200 sits (`quirk_nvidia_no_bus_reset`).
fn has_hot_reset(guest: &Guest) -> Result<bool> {
    Ok(grace(guest)?.1.id.device & 0xffc0 != 0x2340)
}

/// As the table's; a hot reset that the kernel does not have is refused, and takes nothing back.
fn survive_all_of<W: Witness>(
    guest: &Guest,
    witness: &mut W,
    lend: impl Fn() -> Result<Painted<Device>>,
) -> Verdict {
    let has_hot_reset = has_hot_reset(guest)?;
    for cause in &causes::<Device>() {
        let painted = lend()?;
        let cell = if cause.name == "hot reset" && !has_hot_reset {
            refused(painted.lender.hot_reset(&[], PATIENCE), Kind::Unsupported)?;
            let attachment = painted.export.attach(witness.importer(), Trust::Unverified)?;
            let mut seen = Seen::default();
            seen.look_until(witness, &attachment, |seen| seen.right >= 1 && seen.generation == 0)?;
            "refused".to_owned()
        } else {
            survive(guest, witness, painted, cause)
                .with_context(|| format!("{} under {}", cause.name, witness.name()))?
        };
        guest.cell("revoke", cause.name, witness.name(), &cell)?;
    }
    Ok(())
}

fn under_a_screen(guest: &Guest) -> Verdict {
    survive_all_of(guest, &mut Screen::new(guest)?, || lend(guest, USABLE_REGION))
}

fn under_a_screen_of_reserved(guest: &Guest) -> Verdict {
    survive_all_of(guest, &mut Screen::new(guest)?, || lend(guest, RESERVED_REGION))
}

fn under_shaders(guest: &Guest) -> Verdict {
    survive_all_of(guest, &mut Shader::new()?, || lend(guest, USABLE_REGION))
}

/// The same, with a driver of the GPU's engine as the owner: it rests around each revoke.
fn lend_driven(guest: &Guest) -> Result<Painted<Device>> {
    let device = open(&grace(guest)?.0)?;
    let driver = ModelGpu::with_memory(device.as_ref(), device.region(USABLE_REGION)?)?;
    Painted::lend(device, USABLE_REGION, Arc::new(driver))
}

fn under_iommufd(guest: &Guest) -> Verdict {
    let mut engine = CopyEngine::new(guest.model(0)?.address(), Interface::Cdev)?;
    survive_all_of(guest, &mut engine, || lend_driven(guest))
}

fn under_type1(guest: &Guest) -> Verdict {
    let mut engine = CopyEngine::new(guest.model(0)?.address(), Interface::Group)?;
    survive_all_of(guest, &mut engine, || lend_driven(guest))
}

fn under_the_holder(guest: &Guest) -> Verdict {
    survive_all_of(guest, &mut Holder::new(guest.virtio_gpu()?), || lend(guest, USABLE_REGION))
}

/// Those causes that reset the GPU: right bytes afterwards, and not before the memory says that it is ready.
fn every_reset_waits(guest: &Guest) -> Verdict {
    let (model, _) = grace(guest)?;
    let mut screen = Screen::new(guest)?;
    let has_hot_reset = has_hot_reset(guest)?;
    let mut resets = 0;
    let causes = causes::<Device>();
    let resetting = |cause: &&Cause<Device>| cause.resets && (has_hot_reset || cause.name != "hot reset");
    for cause in causes.iter().filter(resetting) {
        let painted = lend(guest, USABLE_REGION)?;
        model.misbehave(Misbehaviour::SlowReady { ms: TRAINING.as_millis() as u64 })?;
        let begin = Instant::now();
        let cell = survive(guest, &mut screen, painted, cause).with_context(|| cause.name)?;
        let took = begin.elapsed();
        ensure!(took >= TRAINING, "{}: over after {} ms", cause.name, took.as_millis());
        guest.cell("revoke", cause.name, "virtio-gpu, 3 s not ready", &cell)?;
        model.behave()?;
        resets += 1;
    }
    ensure!(resets == if has_hot_reset { 6 } else { 5 }, "{resets} causes reset the GPU");
    Ok(())
}

fn a_wait_is_told(guest: &Guest) -> Verdict {
    let (model, _) = grace(guest)?;
    let painted = lend(guest, USABLE_REGION)?;
    let mut screen = Screen::new(guest)?;
    let attachment = painted.export.attach(screen.importer(), Trust::Unverified)?;
    let mut seen = Seen::default();
    seen.look_until(&mut screen, &attachment, |seen| seen.right >= 1)?;
    let events = painted.export.events()?;
    model.misbehave(Misbehaviour::SlowReady { ms: TRAINING.as_millis() as u64 })?;

    // Far less than the wait: the kernel is back, so nothing is stuck.
    let options = RevokeOptions::within(PATIENCE).with_call_limit(Duration::from_millis(500));
    let told = thread::scope(|scope| {
        let revoker = scope.spawn(|| painted.lender.reset(options));
        let mut told = Vec::new();
        while let Some(event) = events.next_within(PATIENCE)? {
            match event.kind {
                EventKind::NotReady(why) => {
                    refused(attachment.enter(Direction::Read), Kind::Revoked)?;
                    told.push((*why).clone());
                }
                EventKind::Restored => break,
                EventKind::Draining { .. } => {}
                other => anyhow::bail!("{} was told", other.code()),
            }
        }
        revoker.join().map_err(|_| anyhow!("the reset panicked"))??;
        Ok(told)
    })?;
    ensure!(told.len() >= 3, "in three seconds it was told {} times: {told:?}", told.len());
    let last = told.last().context("nothing was told")?;
    ensure!(last.waited >= TRAINING / 2 && last.limit > TRAINING, "{last}");
    let words = if guest.facts().has_cxl() { "CXL" } else { "C2C link" };
    ensure!(told.iter().all(|why| why.reason.contains(words)), "{told:?}");
    seen.look_until(&mut screen, &attachment, |seen| seen.generation == 1)
}

/// A driver that has the dma-buf by itself maps it again when the kernel's reset is over, while the lender still waits for the memory.
fn others_are_not_kept_waiting(guest: &Guest) -> Verdict {
    let (model, _) = grace(guest)?;
    let painted = lend(guest, USABLE_REGION)?;
    let hold = Hold::open()?;
    hold.attach(&guest.virtio_gpu()?, painted.export.dma_buf().map_err(Clone::clone)?)?;
    hold.map()?;
    model.misbehave(Misbehaviour::StuckReady)?;
    thread::scope(|scope| {
        let revoker = scope.spawn(|| painted.lender.reset(PATIENCE));
        let maps_again = || -> Result<()> {
            let deadline = Instant::now() + PATIENCE;
            // Taken away, and given back.
            while hold.state()?.invalidations < 2 {
                ensure!(Instant::now() < deadline, "the kernel does not give it back");
                thread::sleep(Duration::from_millis(5));
            }
            hold.map().context("mapping while the lender waits")?;
            ensure!(hold.state()?.mapped && !revoker.is_finished(), "the lender does not wait");
            Ok(())
        };
        let mapped = maps_again();
        model.behave()?;
        revoker.join().map_err(|_| anyhow!("the reset panicked"))??;
        mapped
    })
}

/// The link does not come up after a reset: an error with the reason, and the next reset that works gives it back.
fn never_ready_stays_away(guest: &Guest) -> Verdict {
    let (model, _) = grace(guest)?;
    let painted = lend(guest, USABLE_REGION)?;
    let mut screen = Screen::new(guest)?;
    let attachment = painted.export.attach(screen.importer(), Trust::Unverified)?;
    model.misbehave(Misbehaviour::StuckReady)?;
    let begin = Instant::now();
    let error = refused(painted.lender.reset(PATIENCE), Kind::TimedOut)?;
    let took = begin.elapsed().as_secs();
    let limit = if guest.facts().has_cxl() { 16 } else { 30 };
    ensure!(took >= limit, "given up after {took} s");
    ensure!(error.next_step().is_some(), "{error}");
    ensure!(painted.export.generation() == 1, "the generation is {}", painted.export.generation());
    refused(attachment.enter(Direction::Read), Kind::Revoked)?;
    // The link comes up while somebody waits.
    painted.lender.device().wait_until_ready(&mut |_| model.behave().unwrap_or(()))?;
    painted.lender.reset(PATIENCE)?;
    let mut seen = Seen::default();
    seen.look_until(&mut screen, &attachment, |seen| seen.generation == 2)
}
