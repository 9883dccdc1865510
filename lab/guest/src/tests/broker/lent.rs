//! Bytes of a broker's owner are those of its clients, and the other way round.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use peervram::backends::RawBytes;
use peervram::broker::client::Wish;
use peervram::{Kind, Lender, RevokeOptions};
use peervram_lab::machine::Facts;

use super::causes::EXPORTS;
use super::scene::Scene;
use crate::blocks;
use crate::borrower::{Borrower, USER, With};
use crate::broker_process::{MEMORY, POOL_BYTES};
use crate::crossing::{PATIENCE, VRAM, open_device};
use crate::guest::Guest;
use crate::painted::{LAYOUT, Painter};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("broker/unprivileged-client-shows-vram", client_shows)
        .on(Facts::allows_peers)
        .on_any_topology(),
    Test::of_models("broker/unprivileged-client-copies-both-ways", client_copies)
        .on(Facts::has_peers_by_iommufd)
        .on_any_topology(),
    Test::of_models("broker/client-that-cannot-import-is-copied-for", client_is_copied_for).on_any_topology(),
    Test::of_models("broker/sixty-four-leases-are-revoked-as-one", many_leases).on_any_topology(),
];

/// What the owner paints is what the client's screen shows.
fn client_shows(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    let painter = Painter::new(&device, VRAM, Arc::new(RawBytes), EXPORTS)?;
    let scene = Scene::of(Lender::new(device), painter.aperture())?;
    let mut client = Borrower::start(guest, &scene.socket, &With::Screen)?;
    client.ask(&format!("borrow {}", LAYOUT.end_bytes()))?;
    client.ask("attach")?;
    // After it was scrubbed.
    painter.paint()?;
    client.ask("look 0")?;
    let status = scene.operator.status()?;
    ensure!(status.leases[0].user == USER && status.leases[0].process == Some(client.id()), "{status:?}");
    client.ask("return")?;
    scene.wait_until("the lease is free again", |status| {
        status.quarantine.is_empty() && status.leases.is_empty()
    })?;
    drop((client, painter));
    scene.close()
}

/// By two engines: that of the owner, and that of a client who is nobody.
fn client_copies(guest: &Guest) -> Verdict {
    const SIZE_BYTES: u64 = 1 << 20;
    let model = guest.model(0)?;
    let scene = Scene::model(model.address(), POOL_BYTES)?;
    let mut client = Borrower::start(guest, &scene.socket, &With::Engine(guest.model(1)?.address()))?;
    client.ask(&format!("borrow {SIZE_BYTES}"))?;
    client.ask("attach")?;
    ensure!(client.ask("has zeros")? == "yes", "it is not scrubbed");

    let at = scene.operator.status()?.leases[0].ranges[0].offset;
    client.ask("store 7")?;
    let expected = blocks::bytes(7, 0, SIZE_BYTES);
    ensure!(scene.seen(at, SIZE_BYTES)? == expected, "the owner sees other bytes than the client wrote");
    ensure!(
        model.host_checksum(at, SIZE_BYTES)? == peervram::backends::vulkan::checksum(&expected),
        "the host sees other bytes than the client wrote"
    );
    scene.write(at, &blocks::bytes(8, 0, SIZE_BYTES))?;
    ensure!(client.ask("has 8")? == "yes", "the client sees other bytes than the owner wrote");

    // Who is nobody is no operator either, and the next one sees nothing of it.
    client.ask("return")?;
    scene.wait_until("it is free", |status| status.quarantine.is_empty())?;
    client.ask(&format!("borrow {POOL_BYTES}"))?;
    client.ask("attach")?;
    ensure!(client.ask("has zeros")? == "yes", "it shows what somebody else had there");
    let refused = scene.operator.borrow(Wish::of_size(4096).of(MEMORY)).unwrap_err();
    ensure!(refused.kind() == Kind::Exhausted, "{refused}");
    drop(client);
    scene.close()
}

/// By the owner's engine, over memory that broker and client share: no kernel need let devices reach each other.
fn client_is_copied_for(guest: &Guest) -> Verdict {
    const SIZE_BYTES: u64 = (1 << 20) + 4096;
    let model = guest.model(0)?;
    let scene = Scene::model(model.address(), 2 * POOL_BYTES)?;
    let mut client = Borrower::start(guest, &scene.socket, &With::Copies)?;
    client.ask(&format!("borrow {SIZE_BYTES}"))?;
    client.ask("attach")?;
    ensure!(client.ask("has zeros")? == "yes", "it is not scrubbed");
    let at = scene.operator.status()?.leases[0].ranges[0].offset;
    client.ask("store 7")?;
    let expected = blocks::bytes(7, 0, SIZE_BYTES);
    ensure!(
        model.host_checksum(at, SIZE_BYTES)? == peervram::backends::vulkan::checksum(&expected),
        "the host sees other bytes than the client wrote"
    );
    scene.write(at, &blocks::bytes(8, 0, SIZE_BYTES))?;
    ensure!(client.ask("has 8")? == "yes", "the client sees other bytes than the owner wrote");

    // What it was in the middle of is not copied into what comes after.
    client.ask("inside")?;
    scene.lender.reset(RevokeOptions::within(Duration::ZERO).or_go_on())?;
    scene.write(at, &blocks::bytes(9, 0, SIZE_BYTES))?;
    ensure!(client.ask("finish")? == "torn", "an access that was not waited for is not torn");
    let expected = peervram::backends::vulkan::checksum(&blocks::bytes(9, 0, SIZE_BYTES));
    ensure!(model.host_checksum(at, SIZE_BYTES)? == expected, "torn, and copied back all the same");
    client.ask("hear-until restored")?;
    ensure!(client.ask("has 9")? == "yes", "it does not go on");
    client.ask("return")?;
    scene.wait_until("it is free", |status| status.leases.is_empty() && status.quarantine.is_empty())?;
    drop(client);
    scene.close()
}

/// Looking at the kernel's list of dma-bufs and telling clients takes no longer than it must.
fn many_leases(guest: &Guest) -> Verdict {
    let scene = Scene::model(guest.model(0)?.address(), 2 * POOL_BYTES)?;
    let mut took = Vec::new();
    for count in [1, 64] {
        let mut client = Borrower::start(guest, &scene.socket, &With::Nothing)?;
        let begun = Instant::now();
        client.ask(&format!("many {count} 65536"))?;
        let borrowed = begun.elapsed() / count;
        let mut best = Duration::MAX;
        for _ in 0..5 {
            let begun = Instant::now();
            scene.lender.reset(PATIENCE)?;
            best = best.min(begun.elapsed());
            scene.wait_until_scrubbed()?;
        }
        let row = format!("{count} leases");
        guest.cell("broker", &row, "ms for a reset", &format!("{:.1}", best.as_secs_f64() * 1e3))?;
        guest.cell("broker", &row, "ms for a lease", &format!("{:.1}", borrowed.as_secs_f64() * 1e3))?;
        took.push(best);
        drop(client);
        scene
            .wait_until("all are free", |status| status.leases.is_empty() && status.quarantine.is_empty())?;
    }
    // Each is one participant more, and no participant costs more than a few ms of an emulated CPU that is shared.
    ensure!(
        took[1] <= took[0] + Duration::from_millis(64 * 40),
        "one lease: {:?}, 64: {:?}",
        took[0],
        took[1]
    );
    scene.close()
}
