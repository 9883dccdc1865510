//! What the pages promise of commands, looked at on a real kernel.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use peervram_lab::machine::Facts;
use peervram_lab::wire;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use serde_json::Value;

use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("command-line/looking-opens-no-device", looking_opens_no_device).on_any_topology(),
    Test::new("command-line/looking-changes-nothing", looking_changes_nothing).on_any_topology(),
    Test::new("command-line/reset-with-an-importer-is-survived", reset_with_an_importer)
        .on(|facts| facts.exports_dma_bufs() && Facts::allows_peers(facts)),
];

fn peervram(arguments: &[&str]) -> Result<Output> {
    Command::new(format!("{}/peervram", wire::SHARE)).args(arguments).output().context("starting peervram")
}

/// Reports files below some paths that are opened or written to.
struct Watch {
    descriptor: OwnedFd,
    of: ReadFlags,
}

impl Watch {
    fn new<'a>(
        paths: impl IntoIterator<Item = &'a PathBuf>,
        watch: WatchFlags,
        of: ReadFlags,
    ) -> Result<Watch> {
        let descriptor = inotify::init(CreateFlags::NONBLOCK)?;
        for path in paths {
            inotify::add_watch(&descriptor, path, watch)
                .with_context(|| format!("watching {}", path.display()))?;
        }
        Ok(Watch { descriptor, of })
    }

    /// Whether that happened since it was last asked.
    fn has_seen_any(&self) -> Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.descriptor, &mut buffer);
        let mut count = 0;
        loop {
            match events.next() {
                Ok(event) => count += usize::from(event.events().intersects(self.of)),
                Err(Errno::AGAIN) => return Ok(count > 0),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Runs every command that only looks, and calls `check` after each.
fn look(guest: &Guest, check: impl Fn(&str) -> Verdict) -> Verdict {
    let (lender, gpu) = (guest.lender()?, guest.virtio_gpu()?);
    let node = guest.virtio_gpu_node()?.display().to_string();
    for arguments in [
        &["devices", "--all"][..],
        &["route", "--all"],
        &["route", &lender, &gpu],
        &["route", &lender, &node],
        &["holders"],
        &["holders", &lender],
        &["bind", &lender, "--dry-run"],
        &["capture"],
    ] {
        let output = peervram(arguments)?;
        ensure!(output.status.success(), "{arguments:?}: {output:?}");
        check(&arguments.join(" "))?;
    }
    // Vulkan's drivers open render nodes, in the process that the doctor has for them; VFIO's nodes nobody does.
    let output = Command::new(format!("{}/peervram", wire::SHARE))
        .arg("doctor")
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .output()?;
    ensure!(!output.stdout.is_empty(), "{output:?}");
    check("doctor")
}

/// `devices`, `doctor`, `route` and `holders` open no node of a device: opening one of VFIO's resets it.
fn looking_opens_no_device(guest: &Guest) -> Verdict {
    let mut nodes: Vec<PathBuf> = Vec::new();
    for folder in ["/dev/dri", "/dev/vfio", "/dev/vfio/devices"] {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        nodes.extend(entries.map(|entry| entry.path()).filter(|path| !path.is_dir()));
    }
    nodes.extend([PathBuf::from("/dev/iommu")].into_iter().filter(|path| path.exists()));
    let watch = Watch::new(&nodes, WatchFlags::OPEN, ReadFlags::OPEN)?;
    // First show that the watch sees what it watches for.
    let node = guest.virtio_gpu_node()?;
    ensure!(nodes.contains(&node), "{} is not among {nodes:?}", node.display());
    drop(fs::File::open(&node)?);
    ensure!(watch.has_seen_any()?, "a node was opened, and nobody saw it");

    ensure!(nodes.iter().any(|node| node.starts_with("/dev/vfio")), "nothing is bound to VFIO: {nodes:?}");
    look(guest, |command| {
        ensure!(!watch.has_seen_any()?, "peervram {command} opens a device");
        Ok(())
    })?;
    ensure!(Path::new("/sys/bus/pci/devices").join(guest.lender()?).join("driver").exists());
    Ok(())
}

/// The commands that look open no file for writing by which a device, a driver or the bus is changed.
fn looking_changes_nothing(guest: &Guest) -> Verdict {
    let mut folders = vec![PathBuf::from("/sys/bus/pci"), PathBuf::from("/proc/sys/kernel")];
    for folder in ["/sys/bus/pci/devices", "/sys/bus/pci/drivers", "/sys/module"] {
        let entries = fs::read_dir(folder)?.flatten();
        folders.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    let watch = Watch::new(&folders, WatchFlags::CLOSE_WRITE, ReadFlags::CLOSE_WRITE)?;
    // First show that the watch sees what it watches for.
    let lender = Path::new("/sys/bus/pci/devices").join(guest.lender()?);
    for file in [lender.join("driver_override"), PathBuf::from("/sys/bus/pci/drivers/vfio-pci/unbind")] {
        drop(fs::File::options().write(true).open(&file)?);
        ensure!(watch.has_seen_any()?, "{} was opened for writing, and nobody saw it", file.display());
    }
    look(guest, |command| {
        ensure!(!watch.has_seen_any()?, "peervram {command} opens a file for writing that changes a device");
        Ok(())
    })
}

/// The reset comes back under an import, and the import is good again.
fn reset_with_an_importer(guest: &Guest) -> Verdict {
    let (lender, node) = (guest.lender()?, guest.virtio_gpu_node()?);
    let node = node.display().to_string();
    let output = peervram(&["reset", &lender, "--with", &node, "--json"])?;
    let said: Value =
        serde_json::from_slice(&output.stdout).with_context(|| format!("it says {output:?}"))?;
    ensure!(output.status.code() == Some(0), "{said}");
    let importers = said["importers"].as_array().context("no importers")?;
    ensure!(importers.len() == 1 && importers[0]["good"] == true && importers[0]["path"] == "peer", "{said}");
    let events: Vec<&str> = said["events"]
        .as_array()
        .context("no events")?
        .iter()
        .filter_map(|event| event["event"].as_str())
        .collect();
    ensure!(events.first() == Some(&"draining") && events.contains(&"restored"), "{events:?}");
    ensure!(said["generation"] == 1, "{said}");
    let output = peervram(&["reset", &lender, "--with", &node])?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.code() == Some(0) && text.contains("good again") && text.contains("was reset in"),
        "{output:?}"
    );
    Ok(())
}
