//! gbm buffer objects of lent memory: the cases of `lab/gbm`, a program that is linked against libgbm.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use peervram_lab::machine::{Facts, PeerToPeer};
use peervram_lab::wire::SHARE;

use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("gbm/buffer-object-shows-the-memory", |guest| on_screen(guest, "scan-out")).on(can_import),
    Test::new("gbm/compositor-shows-by-its-own-open-file", |guest| on_screen(guest, "compositor"))
        .on(can_import),
    Test::new("gbm/buffer-object-is-made-again-after-a-reset", |guest| on_screen(guest, "revoke"))
        .on(can_import),
    Test::new("gbm/refusals-say-what-the-kernel-says", |guest| on_screen(guest, "refusals"))
        .on(can_import)
        .on_any_topology(),
    Test::new("gbm/refused-route-is-named", |guest| on_screen(guest, "no-route"))
        .on(|facts| facts.has_root() && facts.peer_to_peer == PeerToPeer::NotSupported),
    Test::new("gbm/importer-that-cannot-is-named", importer_that_cannot)
        .on(|facts| facts.has_root() && facts.exports_dma_bufs())
        .on_any_topology(),
];

/// libgbm is in the private root.
fn can_import(facts: &Facts) -> bool {
    facts.has_root() && facts.allows_peers()
}

/// A case with the GPU that has a screen.
fn on_screen(guest: &Guest, name: &str) -> Verdict {
    case(guest, name, &guest.virtio_gpu_node()?)
}

fn importer_that_cannot(guest: &Guest) -> Verdict {
    let Some(vgem) = super::drm::vgem() else { crate::skip!("this kernel has no vgem") };
    case(guest, "importer-that-cannot", vgem.path())
}

fn case(guest: &Guest, name: &str, node: &Path) -> Verdict {
    let mut command = Command::new(format!("{SHARE}/peervram-lab-gbm"));
    command.args([name, &guest.lender()?]).arg(node);
    let output = command.output().context("starting the program with gbm")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name}: {}: {}", output.status, said.trim_end());
    Ok(())
}
