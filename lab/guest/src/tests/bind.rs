//! `peervram bind` and `unbind` on a real kernel: a device is taken, lends, and is given back; what the machine needs
//! is not taken.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use peervram::backends::pci::Function;
use peervram::backends::{DmaRange, DmaRanges, Exporter, PciAddress, vfio};
use peervram_lab::machine::{Device, Facts};
use peervram_lab::wire;
use serde_json::Value;

use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("bind/takes-a-device-that-lends-and-gives-it-back", takes_and_gives_back)
        .on(Facts::has_crowded_group)
        .on_any_topology(),
    Test::new("bind/what-the-machine-needs-is-not-taken", what_is_needed_is_not_taken)
        // It needs the device that brings the root file system.
        .on(Facts::has_root)
        .on_any_topology(),
];

const DEVICES: &str = "/sys/bus/pci/devices";
/// The exit code of a request that this device cannot have.
const CANNOT: i32 = 4;

fn peervram(arguments: &[&str]) -> Result<Output> {
    Command::new(format!("{}/peervram", wire::SHARE)).args(arguments).output().context("starting peervram")
}

/// The driver and the override of a function.
fn state(address: &str) -> Result<(Option<String>, String)> {
    let folder = Path::new(DEVICES).join(address);
    let driver = fs::read_link(folder.join("driver")).ok();
    let driver = driver.and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
    Ok((driver, fs::read_to_string(folder.join("driver_override"))?))
}

/// Two functions in one group: the first has no driver and memory, the second a driver of the kernel's.
fn takes_and_gives_back(guest: &Guest) -> Verdict {
    let device = guest.facts().devices.iter().position(|device| *device == Device::CrowdedGroup);
    let address = guest.address_of(device.context("this machine has none")?)?;
    let neighbour = format!("{}.1", address.trim_end_matches(".0"));
    // Another test may have left it to VFIO.
    let folder = Path::new(DEVICES).join(&address);
    fs::write(folder.join("driver_override"), "\n")?;
    if folder.join("driver").exists() {
        fs::write(folder.join("driver/unbind"), &address)?;
    }
    let before = (state(&address)?, state(&neighbour)?);
    ensure!(before.0.0.is_none() && before.1.0.as_deref() == Some("virtio-pci"), "{before:?}");

    let planned = peervram(&["bind", &address, "--dry-run"])?;
    let text = String::from_utf8_lossy(&planned.stdout);
    ensure!(
        planned.status.success() && text.contains(&neighbour) && text.contains("virtio-pci"),
        "{planned:?}"
    );
    ensure!((state(&address)?, state(&neighbour)?) == before, "a dry run has changed something");

    let bound = peervram(&["bind", &address])?;
    ensure!(bound.status.success(), "{bound:?}");
    let is_bound = |state: (Option<String>, String)| state.0.as_deref() == Some("vfio-pci");
    ensure!(is_bound(state(&address)?) && is_bound(state(&neighbour)?), "{bound:?}");
    let again = peervram(&["bind", &address])?;
    ensure!(again.status.success(), "{again:?}");

    let opened = vfio::Device::open(address.parse()?)?;
    if guest.facts().exports_dma_bufs() {
        let region = opened.region(2)?;
        let buffer = opened.export(&DmaRanges::new(region, &[DmaRange::new(0, 4096)])?)?;
        ensure!(buffer.size_bytes() == 4096, "it lends {} bytes", buffer.size_bytes());
    }
    let held = peervram(&["unbind", &address])?;
    let text = String::from_utf8_lossy(&held.stderr);
    let me = std::process::id().to_string();
    ensure!(held.status.code() == Some(1) && text.contains(&me), "{held:?}");
    ensure!(is_bound(state(&address)?), "it was given back under its owner");
    opened.close()?;

    let unbound = peervram(&["unbind", &address])?;
    ensure!(unbound.status.success(), "{unbound:?}");
    ensure!(
        (state(&address)?, state(&neighbour)?) == before,
        "{:?} {:?}",
        state(&address)?,
        state(&neighbour)?
    );
    let nothing = peervram(&["unbind", &address])?;
    ensure!(nothing.status.code() == Some(1), "{nothing:?}");
    Ok(())
}

fn what_is_needed_is_not_taken(guest: &Guest) -> Verdict {
    // The GPU, while this process has its node open.
    let gpu = guest.virtio_gpu()?;
    let node = guest.virtio_gpu_node()?;
    let open = fs::OpenOptions::new().read(true).write(true).open(&node)?;
    let before = state(&gpu)?;
    let refused = peervram(&["bind", &gpu, "--group", "--give-up-screen"])?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(1) && text.contains(&node.display().to_string()), "{refused:?}");
    ensure!(text.contains(&std::process::id().to_string()), "{text}");
    ensure!(state(&gpu)? == before, "it was taken all the same");
    drop(open);

    // Every bridge, and the device that the root file system comes by.
    let bridges: Vec<PciAddress> = (Function::all()?.iter())
        .filter(|function| function.class >> 16 == 6)
        .map(|function| function.address)
        .collect();
    ensure!(!bridges.is_empty(), "this machine has no bridge");
    let said = peervram(&["doctor", "--json"])?;
    let said: Value = serde_json::from_slice(&said.stdout).context("the doctor says no JSON")?;
    let in_use = said["facts"]["in_use"].as_object().context("no uses")?;
    // By its 9p tag: a guest's programs see it at another place than the first process does.
    let has_root = |uses: &Value| {
        let mut uses = uses.as_array().into_iter().flatten();
        uses.any(|used| used["kind"] == "mounted" && used["device"] == "root")
    };
    let of_root: Vec<&String> =
        in_use.iter().filter(|(_, uses)| has_root(uses)).map(|(address, _)| address).collect();
    ensure!(!of_root.is_empty(), "nobody brings the root file system: {in_use:?}");
    for address in bridges.iter().map(PciAddress::to_string).chain(of_root.into_iter().cloned()) {
        let before = state(&address)?;
        let refused = peervram(&["bind", &address, "--group", "--give-up-screen"])?;
        ensure!(refused.status.code() == Some(CANNOT), "{address}: {refused:?}");
        ensure!(state(&address)? == before, "{address} was taken all the same");
    }
    Ok(())
}
