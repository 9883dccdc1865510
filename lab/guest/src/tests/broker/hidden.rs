//! A client dies, and somebody still has its memory: a message that nobody received, or a handle of a GPU. Nobody is
//! given it before the kernel has freed it.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use peervram::backends::holders::Attachments;
use peervram::backends::{DmaBuf, DmaRange, Importer};
use peervram::broker::{Status, client::Wish};
use peervram::{Kind, Lender};
use peervram_lab::machine::Facts;

use super::scene::Scene;
use crate::blocks;
use crate::borrower::{Borrower, With, receive_descriptor};
use crate::broker_process::{MEMORY, POOL_BYTES};
use crate::crossing::{VRAM, open_device, open_node};
use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("broker/hidden-descriptor-keeps-memory-in-quarantine", in_a_message).on_any_topology(),
    Test::new("broker/handle-of-a-gpu-keeps-memory-in-quarantine", behind_a_handle)
        .on(Facts::allows_peers)
        .on_any_topology(),
];

const SIZE_BYTES: u64 = 1 << 20;

/// Borrows, leaves something in the memory, hides the descriptor, and dies. Gives the inode and where the memory is.
fn hide(guest: &Guest, scene: &Scene) -> Result<(UnixStream, u64, u64)> {
    let mut client = Borrower::start(guest, &scene.socket, &With::Nothing)?;
    client.ask(&format!("borrow {SIZE_BYTES}"))?;
    let at = scene.operator.status()?.leases[0].ranges[0].offset;
    scene.write(at, &blocks::bytes(5, 0, SIZE_BYTES))?;
    let inode = client.ask("hide")?.parse()?;
    let (socket, _) = client.kill()?;
    scene.wait_until("it is in quarantine", |status| {
        status.leases.is_empty() && is_quarantined(status, inode)
    })?;
    Ok((socket, inode, at))
}

fn is_quarantined(status: &Status, inode: u64) -> bool {
    matches!(&status.quarantine[..], [one] if one.inode == Some(inode) && one.size == SIZE_BYTES)
}

fn is_listed(inode: u64) -> Result<bool> {
    let listed = Attachments::read().map_err(|unread| anyhow::anyhow!("{unread}"))?;
    Ok(listed.has_buffer(inode))
}

/// Nobody is given that memory, by size or by name.
fn check_nobody_is_given_it(scene: &Scene, inode: u64, at: u64) -> Result<()> {
    ensure!(is_listed(inode)?, "the kernel does not list {inode}");
    let all = scene.memory()?.size;
    let range = [DmaRange::new(at, SIZE_BYTES)];
    for wish in [Wish::of_size(all).of(MEMORY), Wish::of_ranges(MEMORY, &range)] {
        let error = scene.operator.borrow(wish).err().context("memory of a dead client was lent")?;
        ensure!(error.kind() == Kind::Exhausted, "{error}");
    }
    // It lasts: longer than the broker's first looks.
    std::thread::sleep(std::time::Duration::from_millis(300));
    ensure!(is_quarantined(&scene.operator.status()?, inode), "the quarantine ended by itself");
    // And a reset changes nothing about who has the descriptor.
    match scene.lender.reset(crate::crossing::PATIENCE) {
        Err(error) if error.kind() != Kind::Unsupported => return Err(error.into()),
        _ => {}
    }
    ensure!(is_quarantined(&scene.operator.status()?, inode), "a reset ended the quarantine");
    Ok(())
}

/// It comes back scrubbed.
fn check_it_comes_back(scene: Scene, inode: u64, at: u64) -> Verdict {
    scene.wait_until("the quarantine is over", |status| status.quarantine.is_empty())?;
    ensure!(!is_listed(inode)?, "the kernel still lists {inode}");
    let lease = scene.operator.borrow(Wish::of_ranges(MEMORY, &[DmaRange::new(at, SIZE_BYTES)]))?;
    ensure!(
        scene.seen(at, SIZE_BYTES)? == vec![0; SIZE_BYTES as usize],
        "it shows what the dead client had there"
    );
    drop(lease);
    scene.close()
}

fn in_a_message(guest: &Guest) -> Verdict {
    let scene = Scene::model(guest.model(0)?.address(), POOL_BYTES)?;
    let (socket, inode, at) = hide(guest, &scene)?;
    check_nobody_is_given_it(&scene, inode, at)?;
    // The message with it.
    drop(socket);
    check_it_comes_back(scene, inode, at)
}

fn behind_a_handle(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    let ranges = peervram::backends::DmaRanges::new(device.region(VRAM)?, &[DmaRange::new(0, POOL_BYTES)])?;
    let owner = std::sync::Arc::new(peervram::backends::RawBytes);
    let scene = Scene::of(Lender::new(device), peervram::backends::Aperture::owned(ranges, owner))?;
    let (socket, inode, at) = hide(guest, &scene)?;
    let node = open_node(guest)?;
    let buffer = DmaBuf::from_fd(receive_descriptor(&socket)?)?;
    let memory = node.import(&buffer)?;
    buffer.close();
    drop(socket);
    check_nobody_is_given_it(&scene, inode, at)?;
    node.release(memory)?;
    check_it_comes_back(scene, inode, at)
}
