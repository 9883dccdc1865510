//! What `peervram doctor` says of real machines, as root and as nobody.

use anyhow::{Context, Result, ensure};
use peervram::backends::pci;
use peervram_lab::machine::{Device, Facts};
use peervram_lab::wire;
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("doctor/machine-that-lends-is-told-so", lends).on(Facts::allows_peers),
    Test::new("doctor/refused-route-asks-for-other-slots", refused_route)
        .on(|facts| facts.exports_dma_bufs() && !facts.allows_peers()),
    Test::new("doctor/old-kernel-comes-first", old_kernel).on(|facts| !facts.exports_dma_bufs()),
    Test::new("doctor/who-crowds-a-group-is-named", crowded_group)
        .on(Facts::has_crowded_group)
        .on_any_topology(),
    Test::new("doctor/nobody-is-told-what-is-closed", nobody)
        // Without both there is more to do than is shown at once.
        .on(|facts| facts.vulkan || facts.allows_peers())
        .on_any_topology(),
    Test::of_models("doctor/model-gpus-reach-each-other", models).on(Facts::exports_dma_bufs),
];

/// The overflow user, who owns nothing.
const NOBODY: u32 = 65534;
/// What the doctor exits with where nothing can be lent.
const CANNOT_RUN_HERE: i32 = 4;

fn lends(guest: &Guest) -> Verdict {
    let (said, code) = json(&mut doctor())?;
    let (lender, gpu) = (guest.lender()?, guest.virtio_gpu()?);
    ensure!(code == Some(0) && said["verdict"] == "can-lend", "{code:?}: {}", said["headline"]);
    let pair = pair(&said, &lender, &gpu)?;
    ensure!(pair["state"] == "now" && pair["path"] == "peer", "{pair}");
    let page = page(&mut doctor())?;
    ensure!(page.contains("can lend memory now") && page.contains(&lender), "{page}");
    // Another test may have left the crowded device with a step of its own before.
    let steps = said["what_to_do"].as_array().context("no steps")?;
    let is_named = |step: &Value| step["turn"] == "try" && step["commands"].to_string().contains(&lender);
    ensure!(steps.iter().any(is_named), "{}", said["what_to_do"]);
    Ok(())
}

fn refused_route(guest: &Guest) -> Verdict {
    let (said, _) = json(&mut doctor())?;
    let pair = pair(&said, &guest.lender()?, &guest.virtio_gpu()?)?;
    ensure!(pair["state"] == "never", "{pair}");
    ensure!(turns(&said).contains(&"slots"), "{:?}", turns(&said));
    Ok(())
}

fn old_kernel(_guest: &Guest) -> Verdict {
    let (said, _) = json(&mut doctor())?;
    ensure!(turns(&said).first() == Some(&"kernel"), "{:?}", turns(&said));
    let page = page(&mut doctor())?;
    ensure!(page.contains("makes no dma-bufs") && page.contains("1. Boot Linux 7.1"), "{page}");
    Ok(())
}

fn crowded_group(guest: &Guest) -> Verdict {
    let device = guest.facts().devices.iter().position(|device| *device == Device::CrowdedGroup);
    let address = guest.address_of(device.context("this machine has none")?)?;
    guest.bind(&address, "vfio-pci")?;
    let (neighbour, driver) = pci::group_blocker(address.parse()?).context("nobody is in the way")?;
    let (said, _) = json(&mut doctor())?;
    let findings = said["findings"].as_array().context("no findings")?;
    let found = findings.iter().find(|finding| finding["code"] == "group-not-viable");
    let seen = found.with_context(|| format!("{findings:?}"))?["seen"].to_string();
    ensure!(seen.contains(&neighbour.to_string()) && seen.contains(&driver), "{seen}");
    let page = page(&mut doctor())?;
    ensure!(page.contains(&format!("sudo peervram bind {address}")), "{page}");
    let takes = |line: &str| line.contains("unbind") && line.contains(&neighbour.to_string());
    ensure!(!page.lines().any(takes), "{page}");
    Ok(())
}

/// Whoever may open nothing still sees devices, pairs and what to ask for.
fn nobody(guest: &Guest) -> Verdict {
    let (said, code) = json(doctor().uid(NOBODY).gid(NOBODY))?;
    ensure!(code == Some(CANNOT_RUN_HERE), "it exits with {code:?}: {}", said["headline"]);
    let lender = guest.lender()?;
    let page = page(doctor().uid(NOBODY).gid(NOBODY))?;
    let expected = ["you may not open /dev/vfio/", "not read without root", "udev", "sudo peervram doctor"];
    for text in expected.into_iter().chain([lender.as_str()]) {
        ensure!(page.contains(text), "no {text:?} in\n{page}");
    }
    let pair = pair(&said, &lender, &guest.virtio_gpu()?)?;
    ensure!(pair["state"] != "now", "{pair}");
    Ok(())
}

fn models(guest: &Guest) -> Verdict {
    let (said, code) = json(&mut doctor())?;
    ensure!(code == Some(0), "it exits with {code:?}: {}", said["headline"]);
    let [a, b] = [guest.address_of(0)?, guest.address_of(1)?];
    let pair = pair(&said, &a, &b)?;
    ensure!(pair["state"] == "now" && pair["path"] == "address-space", "{pair}");
    Ok(())
}

fn doctor() -> Command {
    let mut command = Command::new(format!("{}/peervram", wire::SHARE));
    command.arg("doctor");
    command
}

fn json(command: &mut Command) -> Result<(Value, Option<i32>)> {
    let output = run(command.arg("--json"))?;
    let said = serde_json::from_slice(&output.stdout).with_context(|| format!("it says {output:?}"))?;
    Ok((said, output.status.code()))
}

fn page(command: &mut Command) -> Result<String> {
    let page = String::from_utf8(run(command)?.stdout)?;
    let wide = page.lines().find(|line| line.chars().count() > 80);
    ensure!(wide.is_none(), "a line is too wide: {wide:?}");
    Ok(page)
}

fn run(command: &mut Command) -> Result<Output> {
    command.output().context("starting the doctor")
}

fn pair<'said>(said: &'said Value, lender: &str, importer: &str) -> Result<&'said Value> {
    let pairs = said["pairs"].as_array().context("no pairs")?;
    let found = pairs.iter().find(|pair| pair["lender"] == lender && pair["importer"] == importer);
    found.with_context(|| format!("no pair of {lender} and {importer} in {pairs:?}"))
}

fn turns(said: &Value) -> Vec<&str> {
    let steps = said["what_to_do"].as_array().map_or(&[][..], Vec::as_slice);
    steps.iter().filter_map(|step| step["turn"].as_str()).collect()
}
