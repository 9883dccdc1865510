//! A client that does not answer: it is named, it is torn, or nothing is taken back.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use peervram::{Kind, RevokeOptions};
use peervram_lab::machine::Facts;

use super::scene::Scene;
use crate::borrower::{Borrower, USER, With};
use crate::broker_process::POOL_BYTES;
use crate::crossing::{PATIENCE, refused};
use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("broker/late-client-is-named-and-torn", named_and_torn)
        .on(Facts::has_peers_by_iommufd)
        .on_any_topology(),
    Test::of_revoke("broker/late-client-whose-import-must-be-freed-is-waited-for", must_be_freed)
        .on(|facts| facts.holder && facts.allows_peers()),
    Test::of_models("broker/client-that-is-stopped-holds-nobody-up", stopped).on_any_topology(),
];

const SOON: Duration = Duration::from_millis(300);

fn named_and_torn(guest: &Guest) -> Verdict {
    let scene = Scene::model(guest.model(0)?.address(), POOL_BYTES)?;
    let mut client = Borrower::start(guest, &scene.socket, &With::Engine(guest.model(1)?.address()))?;
    client.ask("borrow 1048576")?;
    client.ask("attach")?;
    client.ask("store 3")?;

    client.ask("inside")?;
    let error = refused(scene.lender.reset(SOON), Kind::TimedOut)?;
    check_named(&error, &client)?;
    ensure!(client.ask("finish")? == "ok", "called off, and torn");
    ensure!(scene.lender.generation() == 0, "something was taken back");
    // Nothing was taken back after all: it goes on when it has heard of that.
    let heard = client.ask("hear-until called-off")?;
    ensure!(heard.starts_with("draining(reset)"), "it heard {heard:?}");
    ensure!(client.ask("has 3")? == "yes", "other bytes");

    client.ask("inside")?;
    scene.lender.reset(RevokeOptions::within(SOON).or_go_on())?;
    ensure!(scene.lender.generation() == 1, "nothing was taken back");
    ensure!(client.ask("finish")? == "torn", "an access that was not waited for is not torn");
    let heard = client.ask("hear-until restored")?;
    ensure!(heard.starts_with("draining(reset)"), "it heard {heard:?}");
    ensure!(client.ask("store 4")? == "1" && client.ask("has 4")? == "yes", "it does not go on");
    client.ask("return")?;
    scene.wait_until("it is free", |status| status.leases.is_empty() && status.quarantine.is_empty())?;
    drop(client);
    scene.close()
}

fn must_be_freed(guest: &Guest) -> Verdict {
    let scene = Scene::model(guest.model(0)?.address(), POOL_BYTES)?;
    let mut client = Borrower::start(guest, &scene.socket, &With::HolderFreedBefore)?;
    client.ask("borrow 1048576")?;
    client.ask("attach")?;
    client.ask("inside")?;
    // The kernel would wait for the import without end: that is not torn.
    let error = refused(scene.lender.reset(RevokeOptions::within(SOON).or_go_on()), Kind::StillInUse)?;
    check_named(&error, &client)?;
    ensure!(scene.lender.generation() == 0, "something was taken back");
    ensure!(client.ask("finish")? == "ok", "nothing was taken back, and it is torn");
    scene.lender.reset(PATIENCE)?;
    client.ask("look 1")?;
    drop(client);
    scene.close()
}

/// Whom nothing reaches any more is late, and the others are told and answer.
fn stopped(guest: &Guest) -> Verdict {
    let scene = Scene::model(guest.model(0)?.address(), POOL_BYTES)?;
    let mut stopped = Borrower::start(guest, &scene.socket, &With::Nothing)?;
    let mut other = Borrower::start(guest, &scene.socket, &With::Nothing)?;
    stopped.ask("borrow 1048576")?;
    other.ask("borrow 1048576")?;
    stopped.signal(rustix::process::Signal::STOP)?;
    let error = refused(scene.lender.reset(SOON), Kind::TimedOut)?;
    check_named(&error, &stopped)?;
    ensure!(!error.to_string().contains(&format!("process {}", other.id())), "{error}");
    let begun = Instant::now();
    scene.lender.reset(RevokeOptions::within(SOON).or_go_on())?;
    ensure!(begun.elapsed() < PATIENCE / 2, "it took {:?}", begun.elapsed());
    let heard = other.ask("hear-until restored")?;
    ensure!(heard == "draining(reset) called-off draining(reset) restored", "the other heard {heard:?}");
    stopped.signal(rustix::process::Signal::CONT)?;
    let heard = stopped.ask("hear-until restored")?;
    ensure!(heard.starts_with("draining(reset)"), "it heard {heard:?}");
    drop((stopped, other));
    scene.close()
}

fn check_named(error: &peervram::Error, client: &Borrower) -> Result<()> {
    let words = error.to_string();
    for word in [&format!("process {}", client.id()), &format!("user {USER}"), "the lab's client"] {
        ensure!(words.contains(word), "{word:?} is not in {words:?}");
    }
    Ok(())
}
