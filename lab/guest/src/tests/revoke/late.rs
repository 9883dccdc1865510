//! Importers that do not answer: ours at the deadline, and one of the kernel's that never unmaps.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use peervram::backends::holders::Census;
use peervram::{Direction, EventKind, Kind, Outcome, RevokeOptions, Trust};

use crate::crossing::{PATIENCE, open_node, refused};
use crate::guest::Guest;
use crate::holder::{Hold, Mode};
use crate::painted::Painted;
use crate::test::{Test, Verdict};
use crate::witness::{Holder, Screen, Seen, Witness};

pub const TESTS: &[Test] = &[
    Test::of_revoke("revoke/who-does-not-answer-is-named-and-the-others-go-on", who_does_not_answer),
    Test::of_revoke("revoke/an-importer-that-never-unmaps-is-named", never_unmaps),
];

fn who_does_not_answer(guest: &Guest) -> Verdict {
    let painted = Painted::card(guest)?;
    let (mut holder, mut screen) = (Holder::new(guest.virtio_gpu()?), Screen::new(guest)?);
    let other = painted.export.attach(holder.importer(), Trust::Unverified)?;
    let silent = Arc::new(painted.export.attach(screen.importer(), Trust::Unverified)?);
    // On another thread, which does not leave.
    let (leave, told) = mpsc::channel::<()>();
    let (entered, is_in) = mpsc::channel();
    let inside = {
        let silent = Arc::clone(&silent);
        thread::spawn(move || {
            let access = silent.enter(Direction::Read).map_err(peervram::Error::from)?;
            entered.send(()).ok();
            told.recv().ok();
            Ok::<_, peervram::Error>(access.finish())
        })
    };
    is_in.recv().context("nobody is inside")?;

    let timeout = Duration::from_millis(200);
    let begun = Instant::now();
    let error = refused(painted.lender.reset(timeout), Kind::TimedOut)?;
    let took = begun.elapsed();
    ensure!(took >= timeout, "named after {took:?}");
    ensure!(error.why().contains("/dev/dri/card") && !error.why().contains("holder"), "{error}");
    ensure!(painted.export.generation() == 0, "something was taken back");
    let mut seen = Seen::default();
    seen.look_until(&mut holder, &other, |seen| seen.right >= 2)?;

    leave.send(()).ok();
    let outcome = inside.join().map_err(|_| anyhow!("it panicked"))??;
    ensure!(outcome == Outcome::Ok, "a revoke that was called off tore an access");
    painted.lender.reset(PATIENCE)?;
    let mut seen = Seen::default();
    seen.look_until(&mut screen, &silent, |seen| seen.right >= 1 && seen.generation == 1)
}

/// A driver of somebody else's: the kernel waits for it, and nothing can end that but the driver.
fn never_unmaps(guest: &Guest) -> Verdict {
    let painted = Painted::card(guest)?;
    let events = painted.lender.events()?;
    let mut screen = Screen::new(guest)?;
    let attachment = painted.export.attach(screen.importer(), Trust::Unverified)?;
    let gpu = guest.virtio_gpu()?;
    // Goes before the lender, or nothing here would ever end.
    let hold = Hold::open()?;
    hold.set_mode(Mode::UntilTold)?;
    hold.attach(&gpu, painted.export.dma_buf().map_err(Clone::clone)?)?;
    hold.map()?;

    let limit = Duration::from_millis(500);
    let options = RevokeOptions::within(PATIENCE).with_call_limit(limit);
    let begun = Instant::now();
    let error = refused(painted.lender.reset(options), Kind::Stuck)?;
    let named_after = begun.elapsed();
    // How much later a busy machine is says nothing: the importer has not unmapped yet, so this did not wait for it.
    ensure!(named_after >= limit && hold.state()?.mapped, "named after {named_after:?}");
    let stuck = loop {
        match events.next_within(PATIENCE)?.context("nobody was told")?.kind {
            EventKind::Stuck(stuck) => break stuck,
            EventKind::Draining { .. } => {}
            other => bail!("heard of {other:?}"),
        }
    };
    let text = error.to_string();
    ensure!(stuck.importers.contains(&gpu) && text.contains(&gpu), "the importer is not named: {text}");
    ensure!(
        stuck.stack.iter().any(|line| line.contains("vfio_pci_dma_buf_move")),
        "the call is in {stuck:?}"
    );
    ensure!(stuck.unread.is_empty(), "{stuck:?}");
    guest.cell(
        "an importer that never unmaps",
        "named",
        "ms after the limit",
        &named_after.saturating_sub(limit).as_millis().to_string(),
    )?;

    // Everything else is answered: of this device, with a reason, and of another as ever.
    refused(attachment.enter(Direction::Read), Kind::Revoked)?;
    refused(painted.lender.reset(PATIENCE), Kind::Busy)?;
    refused(painted.export.attach(open_node(guest)?, Trust::Unverified), Kind::Busy)?;
    Census::take_during_revoke();
    let elsewhere = crate::crossing::Crossing::new(guest, 1)?;
    let other = elsewhere.export.attach(open_node(guest)?, Trust::Unverified)?;
    elsewhere.lender.reset(PATIENCE)?;
    other.current()?;
    other.enter(Direction::Read)?.finish().check()?;
    drop(other);
    elsewhere.close()?;

    hold.unmap()?;
    let event = events.next_within(PATIENCE)?.context("the call did not come back")?;
    ensure!(matches!(event.kind, EventKind::Restored), "heard of {:?}", event.kind);
    let mut seen = Seen::default();
    seen.look_until(&mut screen, &attachment, |seen| seen.right >= 1 && seen.generation == 1)?;
    hold.release()?;
    painted.lender.reset(PATIENCE)?;
    Ok(())
}
