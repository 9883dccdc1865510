//! The real Vulkan driver that a test runs under, and what is said to the stand-in for its GPU (`lab/drm`).

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use peervram::backends::vulkan::{Device, Instance, Selector};
use peervram_lab::driver::{self, Ground, VulkanDriver};
use peervram_lab::wire;

use crate::guest::Guest;
use crate::skip;
use crate::tests;

/// Where each test's talk with its stand-in is.
const TALK: &str = "/run/drm";

/// The version of Mesa that the lab's drivers were tried with: of this one they start.
pub const MESA: &str = "26.1.6";

/// A driver, and its stand-in.
pub struct Driver {
    pub vulkan: &'static VulkanDriver,
    talk: PathBuf,
}

/// What a test under the driver of that name is started with.
pub fn environment(name: &str) -> Result<Vec<(&'static str, OsString)>> {
    let guest = Guest::new()?;
    let vulkan = named(name)?;
    let talk = Path::new(TALK).join(name);
    fs::create_dir_all(&talk).with_context(|| format!("making {}", talk.display()))?;
    let address = guest.virtio_gpu()?;
    let node = match vulkan.kernel {
        // Another one that attaches statically.
        "nouveau" => tests::drm::vgem().context("this kernel has no vgem")?.path().to_owned(),
        _ => guest.virtio_gpu_node()?,
    };
    let library = Path::new(wire::SHARE).join(driver::LIBRARY);
    Ok(vulkan.environment(&library, &Ground { node: &node, address: &address, talk: &talk }))
}

fn named(name: &str) -> Result<&'static VulkanDriver> {
    VulkanDriver::named(name).with_context(|| format!("the lab has no Vulkan driver {name}"))
}

impl Driver {
    /// The one that this process was started under; it has been told nothing yet.
    pub fn of_test() -> Result<Self> {
        let name = std::env::var(driver::VARIABLE).context("this test is under no driver")?;
        let driver = Self { vulkan: named(&name)?, talk: Path::new(TALK).join(name) };
        if !Path::new(&driver.vulkan.shim()).exists() {
            skip!("the private root has no {}: mesa-drm-shim brings it", driver.vulkan.shim());
        }
        for file in [ERRNOS, SUBMISSIONS, ADDRESS] {
            fs::remove_file(driver.talk.join(file)).ok();
        }
        Ok(driver)
    }

    /// A device of it, at the address of the device whose kernel driver is asked.
    pub fn open(&self, guest: &Guest) -> Result<Arc<Device>> {
        let opened = Instance::open().and_then(|instance| instance.open_device(&Selector::Any));
        let device = match opened {
            Ok(device) => device,
            Err(error) => {
                let version = mesa_version()?;
                if !version.starts_with(MESA) {
                    skip!("{} of Mesa {version} does not start on this stand-in: {error}", self.vulkan.name);
                }
                return Err(error)
                    .with_context(|| format!("starting {} of Mesa {version}", self.vulkan.name));
            }
        };
        let description = device.description();
        ensure!(description.driver_name == self.vulkan.driver, "the driver is {}", description.driver_name);
        let expected = match fs::read_to_string(self.talk.join(ADDRESS)) {
            Ok(elsewhere) => elsewhere,
            Err(_) => guest.virtio_gpu()?,
        };
        let address = description.pci_address.map(|address| address.to_string());
        ensure!(address.as_ref() == Some(&expected), "the GPU is at {address:?}, not at {expected}");
        Ok(Arc::new(device))
    }

    /// Has the GPU be elsewhere on the bus from the next device on.
    pub fn place_at(&self, address: &str) -> Result<()> {
        fs::write(self.talk.join(ADDRESS), address).context("talking to the stand-in")
    }

    /// Has a call fail with an errno from now on, or none.
    pub fn fail(&self, call: Option<(&str, i32)>) -> Result<()> {
        let text = call.map(|(call, errno)| format!("{call} {errno}\n")).unwrap_or_default();
        fs::write(self.talk.join(ERRNOS), text).context("talking to the stand-in")
    }

    /// How many imports each submission has listed so far.
    pub fn submissions(&self) -> Result<Vec<usize>> {
        let text = fs::read_to_string(self.talk.join(SUBMISSIONS)).unwrap_or_default();
        text.lines().map(|line| line.parse().context("the stand-in says no number")).collect()
    }
}

const ERRNOS: &str = "errnos";
const SUBMISSIONS: &str = "submissions";
const ADDRESS: &str = "address";

/// The version of the root's Vulkan drivers, as Debian counts.
fn mesa_version() -> Result<String> {
    let status = fs::read_to_string("/var/lib/dpkg/status").context("reading the root's packages")?;
    let package = status.split("\n\n").find(|package| package.starts_with("Package: mesa-vulkan-drivers\n"));
    let version = package.and_then(|package| package.lines().find_map(|line| line.strip_prefix("Version: ")));
    Ok(version.context("the root has no mesa-vulkan-drivers")?.to_owned())
}
