//! Copies in the place of a path: right bytes both ways, and nothing copied back that should not be.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use peervram::backends::{DmaRanges, Flag, Importer, OnRevoke, RawBytes};
use peervram::{Attachment, Direction, Error, Kind, Mover, Outcome, Path, RevokeOptions};
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model::registers::ENGINE_RATE;
use peervram_model_driver::{ImportingGpu, REGISTER_BAR};

use crate::crossing::{PATIENCE, refused};
use crate::guest::Guest;
use crate::stage::{STAGES, Stage, store};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("staged/bytes-cross-both-ways-by-two-engines", two_engines),
    Test::of_models("staged/host-memory-is-filled-by-one-engine", host_memory),
    Test::of_models("staged/without-an-engine-the-cpu-copies-and-says-so", by_cpu),
    Test::of_models("staged/who-only-reads-copies-nothing-back", only_reads),
    Test::of_models("staged/work-in-flight-is-copied-back-after-its-signal", in_flight),
    Test::of_models("staged/overlapping-accesses-share-one-copy", overlapping),
    Test::of_models("staged/a-revoke-waits-for-what-is-copied-back", revoke_waits),
    Test::of_models("staged/what-was-torn-is-not-copied-back", torn),
    Test::of_models("staged/a-copy-gives-way-to-a-revoke", gives_way),
    Test::of_models("staged/a-copy-back-that-fails-is-told", fails).on_any_topology(),
];

/// Two models between which nothing leads, and an attachment.
fn staged<'guest>(
    guest: &'guest Guest,
    stages: std::ops::Range<u64>,
    direction: Direction,
) -> Result<(Attachment<ImportingGpu>, Stage<'guest>)> {
    let mut stage = Stage::new(guest, &[5, 1], stages)?;
    part(&mut stage)?;
    let attachment = stage.attach(direction)?;
    ensure!(attachment.path() == Path::Staged, "the path is {}", attachment.path());
    ensure!(attachment.refused().len() == 2, "refused: {:?}", attachment.refused());
    Ok((attachment, stage))
}

/// Takes the way between the two away.
fn part(stage: &mut Stage<'_>) -> Result<()> {
    let importer = Arc::get_mut(&mut stage.importer).expect("nothing was attached yet");
    importer.forget_peers();
    Ok(())
}

fn two_engines(guest: &Guest) -> Verdict {
    let (attachment, stage) = staged(guest, STAGES, Direction::Both)?;
    let how = attachment.staging();
    let is_by_engines = how.as_ref().is_some_and(|how| {
        how.pull == Mover::OwnerEngine && how.push == Some(Mover::OwnerEngine) && !how.in_host_memory
    });
    ensure!(is_by_engines, "it says {how:?}");
    for seed in [0x11, 0x31] {
        stage.fill(seed)?;
        let access = attachment.enter(Direction::Both)?;
        stage.finds(access.memory(), seed)?;
        stage.store(access.memory(), seed + 0x10)?;
        stage.is_lent(seed)?;
        ensure!(access.finish() == Outcome::Ok, "the access is torn");
        stage.is_lent(seed + 0x10)?;
    }
    attachment.detach()?;
    Ok(())
}

fn host_memory(guest: &Guest) -> Verdict {
    let (attachment, stage) = staged(guest, 0..0, Direction::Both)?;
    ensure!(attachment.staging().is_some_and(|how| how.in_host_memory), "it says {:?}", attachment.staging());
    stage.fill(0x21)?;
    let access = attachment.enter(Direction::Both)?;
    stage.host_has(access.memory(), 0x21)?;
    stage.finds(access.memory(), 0x21)?;
    stage.store(access.memory(), 0x41)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    stage.is_lent(0x41)?;
    Ok(())
}

fn by_cpu(guest: &Guest) -> Verdict {
    let mut stage = Stage::owned_by(guest, &[5, 1], STAGES, |_| Arc::new(RawBytes))?;
    part(&mut stage)?;
    let attachment = stage.attach(Direction::Both)?;
    let how = attachment.staging();
    let says_so = how.as_ref().is_some_and(|how| {
        how.pull == Mover::Cpu && how.why_cpu.as_ref().is_some_and(|why| why.contains("raw bytes"))
    });
    ensure!(says_so, "it says {how:?}");
    stage.fill(0x12)?;
    let access = attachment.enter(Direction::Both)?;
    stage.finds(access.memory(), 0x12)?;
    stage.store(access.memory(), 0x42)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    stage.is_lent(0x42)?;
    Ok(())
}

fn only_reads(guest: &Guest) -> Verdict {
    let (attachment, stage) = staged(guest, STAGES, Direction::Read)?;
    stage.fill(0x13)?;
    let access = attachment.enter(Direction::Read)?;
    stage.store(access.memory(), 0x43)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    stage.is_lent(0x13)?;
    // An access that would write is refused as untested; nothing is copied back.
    for direction in [Direction::Write, Direction::Both] {
        let error = refused(attachment.enter(direction), Kind::Unverified)?;
        ensure!(error.next_step().is_some_and(|next| next.contains("Verified")), "it says {error}");
    }
    // The next one has what is lent again.
    let access = attachment.enter(Direction::Read)?;
    stage.finds(access.memory(), 0x13)?;
    access.finish().check()?;
    Ok(())
}

fn in_flight(guest: &Guest) -> Verdict {
    let (attachment, stage) = staged(guest, STAGES, Direction::Both)?;
    stage.fill(0x14)?;
    let access = attachment.enter(Direction::Both)?;
    stage.store(access.memory(), 0x44)?;
    let flag = Flag::new();
    let in_flight = access.finish_when(flag.clone());
    ensure!(in_flight.wait(Duration::ZERO).is_none(), "it ended without its signal");
    stage.is_lent(0x14)?;
    flag.set();
    ensure!(in_flight.wait(PATIENCE) == Some(Outcome::Ok), "it ended as something else");
    stage.is_lent(0x44)?;

    // Work that nobody saw the end of is not copied.
    let access = attachment.enter(Direction::Both)?;
    stage.store(access.memory(), 0x54)?;
    let outcome = access.finish_when(Flag::new()).abandon();
    ensure!(outcome == Outcome::NotCopiedBack, "it ended as {outcome:?}");
    stage.is_lent(0x44)?;
    Ok(())
}

fn overlapping(guest: &Guest) -> Verdict {
    let (attachment, stage) = staged(guest, STAGES, Direction::Both)?;
    stage.fill(0x15)?;
    let first = attachment.enter(Direction::Both)?;
    stage.store(first.memory(), 0x45)?;
    // A copy now would take back what is not pushed yet.
    let second = attachment.enter(Direction::Both)?;
    stage.finds(second.memory(), 0x45)?;
    ensure!(first.finish() == Outcome::Ok && second.finish() == Outcome::Ok, "they are torn");
    stage.is_lent(0x45)?;
    Ok(())
}

/// The access that is inside when a revoke begins is copied back before the memory goes.
fn revoke_waits(guest: &Guest) -> Verdict {
    let (attachment, stage) = staged(guest, STAGES, Direction::Both)?;
    stage.fill(0x16)?;
    let access = attachment.enter(Direction::Both)?;
    stage.store(access.memory(), 0x46)?;
    thread::scope(|scope| {
        let reset = scope.spawn(|| stage.lender.reset(PATIENCE));
        while attachment.enter(Direction::Both).is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
        ensure!(access.finish() == Outcome::Ok, "the access is torn");
        reset.join().map_err(|_| anyhow::anyhow!("the thread that resets panicked"))??;
        Ok(())
    })?;
    // The model keeps its VRAM over a reset.
    stage.is_lent(0x46)?;
    // A copy is not stale.
    ensure!(attachment.is_current(), "it wants a new import");
    let access = attachment.enter(Direction::Both)?;
    stage.finds(access.memory(), 0x46)?;
    access.finish().check()?;
    Ok(())
}

/// Goes on at a deadline that nobody keeps.
fn impatient() -> RevokeOptions {
    RevokeOptions::within(Duration::from_millis(50)).or_go_on()
}

fn torn(guest: &Guest) -> Verdict {
    let (attachment, stage) = staged(guest, STAGES, Direction::Both)?;
    stage.fill(0x17)?;
    let lent = thread::scope(|scope| {
        let (told, inside) = std::sync::mpsc::channel();
        let (go_on, over) = std::sync::mpsc::channel();
        let (attachment, importer, ranges) = (&attachment, &*stage.importer, &stage.ranges);
        let holder = scope.spawn(move || -> Result<Outcome> {
            let access = attachment.enter(Direction::Both).map_err(Error::from)?;
            store(importer, ranges, access.memory(), 0x47)?;
            told.send(())?;
            over.recv()?;
            Ok(access.finish())
        });
        inside.recv()?;
        let reset = stage.lender.reset(impatient());
        go_on.send(())?;
        let outcome = holder.join().map_err(|_| anyhow::anyhow!("the holder panicked"))??;
        if importer.on_revoke() == OnRevoke::FreeBefore {
            // The machine knows of importers, not of paths: one that may have to be freed first is never torn.
            refused(reset, Kind::StillInUse)?;
            ensure!(outcome == Outcome::Ok, "it ended as {outcome:?}");
            return Ok(0x47);
        }
        reset?;
        ensure!(matches!(outcome, Outcome::Torn { .. }), "it ended as {outcome:?}");
        Ok(0x17)
    })?;
    stage.is_lent(lent)?;
    Ok(())
}

fn gives_way(guest: &Guest) -> Verdict {
    let (attachment, stage) = staged(guest, STAGES, Direction::Both)?;
    // Six MiB take three seconds at least.
    let device = stage.lender.device();
    let registers = device.map(&DmaRanges::whole(device.region(REGISTER_BAR)?)?)?;
    registers.store_u32(ENGINE_RATE as usize, 2)?;
    thread::scope(|scope| {
        let copy = scope.spawn(|| attachment.enter(Direction::Both).map(drop));
        thread::sleep(Duration::from_millis(100));
        stage.lender.reset(PATIENCE)?;
        let refused = copy.join().map_err(|_| anyhow::anyhow!("the thread that copies panicked"))?;
        let error: Error =
            refused.err().map(Error::from).ok_or_else(|| anyhow::anyhow!("it copied to the end"))?;
        ensure!(error.kind() == Kind::Revoked, "it says {error}");
        Ok(())
    })?;
    stage.fill(0x18)?;
    let access = attachment.enter(Direction::Both)?;
    stage.finds(access.memory(), 0x18)?;
    access.finish().check()?;
    Ok(())
}

/// The importer's engine ends nothing any more: what it has cannot be fetched.
fn fails(guest: &Guest) -> Verdict {
    let (attachment, stage) = staged(guest, STAGES, Direction::Both)?;
    stage.fill(0x19)?;
    let access = attachment.enter(Direction::Both)?;
    stage.store(access.memory(), 0x49)?;
    stage.other_model.misbehave(Misbehaviour::StuckFence)?;
    let outcome = access.finish();
    ensure!(outcome == Outcome::NotCopiedBack, "it ended as {outcome:?}");
    stage.is_lent(0x19)?;
    stage.other_model.behave()?;
    let access = attachment.enter(Direction::Both)?;
    stage.finds(access.memory(), 0x19)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    Ok(())
}
