//! Attaching with trust: every way of a model GPU to go wrong is found out, another way is taken, and the right
//! bytes arrive by that.

use anyhow::{Context, Result, ensure};
use peervram::{Attachment, Direction, Kind, Mover, Outcome, Path};
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model_driver::ImportingGpu;

use crate::guest::Guest;
use crate::stage::{STAGES, Stage};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("trust/honest-devices-need-no-copy", honest).on_any_topology(),
    Test::of_models("trust/all-ones-are-gone-round", all_ones).on_any_topology(),
    Test::of_models("trust/zeros-are-gone-round", zeros).on_any_topology(),
    Test::of_models("trust/dead-reads-become-the-owners-push", dead_reads).on_any_topology(),
    Test::of_models("trust/dead-writes-are-gone-round", dead_writes).on_any_topology(),
    Test::of_models("trust/a-private-mirror-is-gone-round", mirror).on_any_topology(),
    Test::of_models("trust/a-stuck-fence-is-gone-round", stuck_fence).on_any_topology(),
    Test::of_models("trust/a-lying-owners-engine-is-gone-round", lying_owner).on_any_topology(),
    Test::of_models("trust/a-lying-importers-engine-copies-nothing", lying_importer).on_any_topology(),
];

/// What is lent here: one range, for an iommufd to map.
fn stage<'guest>(guest: &'guest Guest) -> Result<Stage<'guest>> {
    Stage::new(guest, &[4], STAGES)
}

/// Whether bytes cross in `direction`, as the owner has them on one side and the importer on the other.
fn crosses(
    stage: &Stage<'_>,
    attachment: &Attachment<ImportingGpu>,
    direction: Direction,
    seed: u32,
) -> Result<()> {
    if direction.includes(Direction::Read) {
        stage.fill(seed)?;
        let access = attachment.enter(Direction::Read)?;
        stage.finds(access.memory(), seed)?;
        ensure!(access.finish() == Outcome::Ok, "the access is torn");
    }
    if direction.includes(Direction::Write) {
        let access = attachment.enter(Direction::Write)?;
        stage.store(access.memory(), seed + 0x10)?;
        ensure!(access.finish() == Outcome::Ok, "the access is torn");
        stage.is_lent(seed + 0x10)?;
    }
    Ok(())
}

/// Whether what the devices can do directly was refused because of a test.
fn was_found_out(attachment: &Attachment<ImportingGpu>) -> Result<()> {
    ensure!(attachment.path() == Path::Staged, "the path is {}", attachment.path());
    let refused = attachment.refused();
    ensure!(
        refused.iter().any(|(_, error)| error.kind() == Kind::Unverified),
        "no test was failed: {refused:?}"
    );
    Ok(())
}

/// The importing GPU goes wrong with peers, in `ways`; `direction` is found out, and crosses all the same.
fn gone_round(guest: &Guest, ways: &[Misbehaviour], direction: Direction) -> Verdict {
    let stage = stage(guest)?;
    stage.other_model.misbehave(Misbehaviour::PeersOnly)?;
    ways.iter().try_for_each(|&way| stage.other_model.misbehave(way))?;
    let attachment = stage.attach(direction)?;
    was_found_out(&attachment)?;
    crosses(&stage, &attachment, direction, 0x11)?;
    attachment.detach()?;
    Ok(())
}

fn honest(guest: &Guest) -> Verdict {
    let stage = stage(guest)?;
    for direction in [Direction::Read, Direction::Write, Direction::Both] {
        let attachment = stage.attach(direction)?;
        ensure!(attachment.path() != Path::Staged, "it is copied: {:?}", attachment.refused());
        ensure!(attachment.staging().is_none(), "it says how it copies");
        let certificate = attachment.certificate().context("it is trusted for nothing")?;
        let tests = if direction == Direction::Both { 2 } else { 1 };
        ensure!(
            certificate.tests.len() == tests && certificate.tests.iter().all(|test| test.figure.is_some()),
            "its certificate is {certificate:?}"
        );
        crosses(&stage, &attachment, direction, 0x21)?;
        attachment.detach()?;
    }
    Ok(())
}

fn all_ones(guest: &Guest) -> Verdict {
    gone_round(guest, &[Misbehaviour::AllOnes], Direction::Both)
}

fn zeros(guest: &Guest) -> Verdict {
    gone_round(guest, &[Misbehaviour::Zeros], Direction::Read)
}

fn dead_reads(guest: &Guest) -> Verdict {
    let stage = stage(guest)?;
    stage.other_model.misbehave(Misbehaviour::PeersOnly)?;
    stage.other_model.misbehave(Misbehaviour::DeadReads)?;
    for direction in [Direction::Read, Direction::Both] {
        let attachment = stage.attach(direction)?;
        was_found_out(&attachment)?;
        let pull = attachment.staging().map(|how| how.pull);
        ensure!(pull == Some(Mover::OwnerEngine), "the owner's engine does not push: {pull:?}");
        crosses(&stage, &attachment, direction, 0x31)?;
        attachment.detach()?;
    }
    // An importer that only writes needs no reads.
    let attachment = stage.attach(Direction::Write)?;
    ensure!(attachment.path() != Path::Staged, "it is copied: {:?}", attachment.refused());
    crosses(&stage, &attachment, Direction::Write, 0x51)?;
    Ok(())
}

fn dead_writes(guest: &Guest) -> Verdict {
    gone_round(guest, &[Misbehaviour::DeadWrites], Direction::Write)
}

/// The lender's engine works on other memory than what its BAR shows: that is what the owner means, and what a
/// peer does not see.
fn mirror(guest: &Guest) -> Verdict {
    let stage = stage(guest)?;
    stage.lender_model.misbehave(Misbehaviour::Mirror)?;
    let attachment = stage.attach(Direction::Both)?;
    was_found_out(&attachment)?;
    stage.fill(0x61)?;
    let access = attachment.enter(Direction::Read)?;
    stage.finds(access.memory(), 0x61)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    Ok(())
}

/// The importer's engine reports no copy as done, so bytes are copied to host memory that it reaches, and no further.
fn stuck_fence(guest: &Guest) -> Verdict {
    let stage = Stage::new(guest, &[4], 0..0)?;
    stage.other_model.misbehave(Misbehaviour::StuckFence)?;
    let attachment = stage.attach(Direction::Read)?;
    was_found_out(&attachment)?;
    stage.fill(0x71)?;
    let access = attachment.enter(Direction::Read)?;
    stage.host_has(access.memory(), 0x71)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    stage.other_model.behave()?;
    Ok(())
}

/// An owner whose engine lies neither verifies nor copies: the importer copies if it was seen to be right, else the CPU.
fn lying_owner(guest: &Guest) -> Verdict {
    for lie in [Misbehaviour::AllOnes, Misbehaviour::Zeros, Misbehaviour::DeadReads, Misbehaviour::DeadWrites]
    {
        let stage = stage(guest)?;
        stage.lender_model.misbehave(lie)?;
        let attachment = stage.attach(Direction::Both)?;
        was_found_out(&attachment)?;
        let how = attachment.staging();
        let is_others = |mover| mover != Mover::OwnerEngine;
        ensure!(
            how.as_ref().is_some_and(|how| is_others(how.pull) && how.push.is_some_and(is_others)),
            "{lie:?}: it says {how:?}"
        );
        // A fill loads nothing, so the device itself is right.
        crosses(&stage, &attachment, Direction::Both, 0x22)?;
        attachment.detach()?;
        stage.lender_model.behave()?;
    }
    Ok(())
}

/// An engine that is wrong with host memory, too, can bring nothing to VRAM of its own.
fn lying_importer(guest: &Guest) -> Verdict {
    let stage = stage(guest)?;
    stage.other_model.misbehave(Misbehaviour::AllOnes)?;
    let error = stage.attach(Direction::Read).err().context("it is trusted")?;
    ensure!(error.to_string().contains("by staged"), "it says {error}");
    Ok(())
}
