//! What is left in memory: nothing that the next one sees, also where the device is reset meanwhile.

use std::time::{Duration, Instant};

use anyhow::ensure;
use peervram::RevokeCause;
use peervram::backends::DmaRange;
use peervram::broker::client::Wish;
use peervram_lab::machine::Facts;

use super::scene::Scene;
use crate::blocks;
use crate::borrower::{Borrower, With};
use crate::broker_process::{MEMORY, POOL_BYTES};
use crate::crossing::{PATIENCE, VRAM};
use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("broker/memory-of-one-user-is-zeros-for-the-next", zeros_for_the_next)
        .on(Facts::has_peers_by_iommufd)
        .on_any_topology(),
    Test::of_models("broker/reset-while-memory-is-scrubbed", reset_while_scrubbing).on_any_topology(),
];

const SIZE_BYTES: u64 = 1 << 20;

/// By the engine of the client, and by what the host has.
fn zeros_for_the_next(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let scene = Scene::model(model.address(), POOL_BYTES)?;
    let with = With::Engine(guest.model(1)?.address());
    let zeros = peervram::backends::vulkan::checksum(&vec![0; SIZE_BYTES as usize]);
    for round in 0..3 {
        let mut client = Borrower::start(guest, &scene.socket, &with)?;
        client.ask(&format!("borrow {SIZE_BYTES}"))?;
        client.ask("attach")?;
        ensure!(client.ask("has zeros")? == "yes", "round {round}: it shows what somebody else had there");
        let at = scene.operator.status()?.leases[0].ranges[0].offset;
        ensure!(model.host_checksum(at, SIZE_BYTES)? == zeros, "round {round}: the host sees other bytes");
        client.ask(&format!("store {round}"))?;
        match round {
            0 => drop(client.ask("return")?),
            1 => drop(client.kill()?),
            // Evicted: it still has the descriptor, so its memory is nobody's until it ends.
            _ => {
                let lease = scene.operator.status()?.leases[0].lease;
                scene.operator.evict(lease)?;
                let heard = client.ask("hear-until gone")?;
                ensure!(heard == "draining(exporter-gone) gone", "it heard {heard:?}");
                ensure!(
                    scene.memory()?.quarantined == SIZE_BYTES,
                    "who was evicted has the descriptor still"
                );
                drop(client);
            }
        }
        scene.wait_until("it is free", |status| status.leases.is_empty() && status.quarantine.is_empty())?;
        scene.wait_until_scrubbed()?;
        ensure!(model.host_checksum(at, SIZE_BYTES)? == zeros, "round {round}: it is not scrubbed");
    }
    scene.close()
}

/// What was scrubbed before a reset is scrubbed again, and who waits for it gets it.
fn reset_while_scrubbing(guest: &Guest) -> Verdict {
    const POOL: u64 = 64 << 20;
    let model = guest.model(0)?;
    let scene = Scene::model(model.address(), POOL)?;
    let mut resets = 0;
    for (round, wait_ms) in [0, 5, 20, 50].into_iter().enumerate() {
        std::thread::sleep(Duration::from_millis(wait_ms));
        resets += u64::from(scene.memory()?.unscrubbed > 0);
        // What a reset leaves in memory is not known: here it is something at the beginning, which is scrubbed first.
        let left = blocks::bytes(round as u32 + 1, 0, SIZE_BYTES);
        scene.lender.revoke(RevokeCause::Reset, "reset a device that forgets", PATIENCE, move |device| {
            device.reset()?;
            device.write(VRAM, 0, &left)
        })?;
    }
    ensure!(resets >= 2, "it was scrubbed before it was reset");
    let begun = Instant::now();
    // Which piece is scrubbed first depends on what the last reset met: the beginning is waited for by name.
    let lease = scene.operator.borrow(Wish::of_ranges(MEMORY, &[DmaRange::new(0, SIZE_BYTES)]))?;
    let waited = begun.elapsed();
    ensure!(scene.seen(0, SIZE_BYTES)? == vec![0; SIZE_BYTES as usize], "it is not scrubbed");
    guest.cell("broker", "borrow after a reset", "ms", &waited.as_millis().to_string())?;
    drop(lease);
    scene.wait_until_scrubbed()?;
    scene.close()
}
