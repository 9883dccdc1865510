//! The machine as a test sees it: its facts, its devices, its screen.

use anyhow::{Context, Result, bail};
use peervram_lab::link::Link;
use peervram_lab::machine::Facts;
use peervram_lab::picture::Picture;
use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};

use crate::test::Skip;

const FACTS: &str = "/run/facts.json";
const DEVICES: &str = "/sys/bus/pci/devices";

/// QEMU's `ivshmem-plain`.
const SHARED_MEMORY: (u16, u16) = (0x1af4, 0x1110);
/// A modern virtio GPU.
const VIRTIO_GPU: (u16, u16) = (0x1af4, 0x1050);

/// The machine that this test runs on.
#[derive(Debug)]
pub struct Guest {
    facts: Facts,
    link: OnceCell<Link>,
}

impl Guest {
    /// The machine that this process runs on.
    pub fn new() -> Result<Guest> {
        let text = fs::read(FACTS).with_context(|| format!("reading {FACTS}"))?;
        Ok(Guest { facts: serde_json::from_slice(&text)?, link: OnceCell::new() })
    }

    /// What the machine's row says.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The PCI address of the device that lends its memory (BAR 2); bound to vfio-pci.
    pub fn lender(&self) -> Result<String> {
        let lender = find_lender()?;
        lender.ok_or_else(|| Skip("this machine has no device that lends memory".into()).into())
    }

    /// The PCI address of the virtio GPU.
    pub fn virtio_gpu(&self) -> Result<String> {
        let gpu = find(VIRTIO_GPU)?;
        gpu.ok_or_else(|| Skip("this machine has no virtio GPU".into()).into())
    }

    /// The virtio GPU's primary DRM node.
    pub fn virtio_gpu_node(&self) -> Result<PathBuf> {
        node(&self.virtio_gpu()?, "card")
    }

    /// Binds a PCI function to a driver, whatever it is bound to now. A test leaves it as found.
    pub fn bind(&self, address: &str, driver: &str) -> Result<()> {
        bind(address, driver)
    }

    /// What the virtio GPU shows now.
    pub fn screendump(&self) -> Result<Picture> {
        let link = match self.link.get() {
            Some(link) => link,
            None => {
                let link = Link::connect()?;
                self.link.get_or_init(|| link)
            }
        };
        link.screendump()
    }
}

/// Keeps the facts for the tests, which are processes of their own.
pub fn remember(facts: &Facts) -> Result<()> {
    fs::write(FACTS, serde_json::to_vec(facts)?).with_context(|| format!("writing {FACTS}"))
}

/// The PCI address of the lender, if there is one.
pub fn find_lender() -> Result<Option<String>> {
    find(SHARED_MEMORY)
}

/// Binds a PCI function to a driver through `driver_override`.
pub fn bind(address: &str, driver: &str) -> Result<()> {
    let device = Path::new(DEVICES).join(address);
    let write = |file: &Path, text: &str| {
        fs::write(file, text).with_context(|| format!("writing {text:?} to {}", file.display()))
    };
    write(&device.join("driver_override"), driver)?;
    if device.join("driver").exists() {
        write(&device.join("driver/unbind"), address)?;
    }
    write(Path::new("/sys/bus/pci/drivers_probe"), address)?;
    let bound = fs::read_link(device.join("driver"))
        .with_context(|| format!("{address} is bound to no driver; {driver} did not take it"))?;
    if !bound.ends_with(driver) {
        bail!("{address} is bound to {}, not to {driver}", bound.display());
    }
    Ok(())
}

/// The first PCI function with that vendor and device.
fn find((vendor, device): (u16, u16)) -> Result<Option<String>> {
    let mut addresses: Vec<_> = fs::read_dir(DEVICES)
        .with_context(|| format!("reading {DEVICES}"))?
        .collect::<std::io::Result<Vec<_>>>()?
        .into_iter()
        .map(|entry| entry.path())
        .collect();
    addresses.sort();
    let is = |folder: &Path, file: &str, id: u16| {
        fs::read_to_string(folder.join(file)).is_ok_and(|text| text.trim() == format!("{id:#06x}"))
    };
    Ok(addresses
        .iter()
        .find(|folder| is(folder, "vendor", vendor) && is(folder, "device", device))
        .and_then(|folder| Some(folder.file_name()?.to_string_lossy().into_owned())))
}

/// The DRM node of a PCI function: "card" or "renderD".
fn node(address: &str, prefix: &str) -> Result<PathBuf> {
    // A virtio device sits between the PCI function and its DRM nodes.
    let function = Path::new(DEVICES).join(address);
    let virtio = fs::read_dir(&function)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("virtio")));
    let folders = [Some(function.join("drm")), virtio.map(|path| path.join("drm"))];
    folders
        .into_iter()
        .flatten()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .find(|name| name.starts_with(prefix))
        .map(|name| Path::new("/dev/dri").join(name))
        .with_context(|| format!("{address} has no DRM node {prefix}*: is its driver loaded?"))
}
