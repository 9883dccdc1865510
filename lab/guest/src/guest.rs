//! The machine as a test sees it: its facts, its devices, its screen.

use anyhow::{Context, Result, bail};
use peervram::backends::PciAddress;
use peervram::backends::pci::Function;
use peervram::backends::vulkan::Instance;
use peervram_lab::link::Link;
use peervram_lab::machine::{Device, Facts, Grace, PciId};
use peervram_lab::wire::{Cell, Event};
use peervram_programs::picture::Picture;
use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};

use crate::card::Card;
use crate::model::Model;
use crate::slot::{self, Slot};
use crate::test::Skip;

const FACTS: &str = "/run/facts.json";
const DEVICES: &str = "/sys/bus/pci/devices";

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
        let is_lender = |device: &Device| matches!(device, Device::SharedMemory { .. });
        self.first(is_lender, "device that only lends")
    }

    /// The PCI addresses of the two functions in one slot (BAR 2 of each is memory); bound to vfio-pci.
    pub fn twins(&self) -> Result<[PciAddress; 2]> {
        let device = self.position(|device| matches!(device, Device::Twins { .. }), "twins")?;
        match &addresses_of(&self.facts, device)?[..] {
            [first, second] => Ok([first.parse()?, second.parse()?]),
            other => bail!("twins are at {other:?}"),
        }
    }

    /// The card with a reset of its own and sleep states.
    pub fn card(&self) -> Result<Card> {
        let device = self.position(|device| matches!(device, Device::Card { .. }), "card")?;
        let Device::Card { size_mib } = self.facts.devices[device] else {
            bail!("device {device} of this machine is no card");
        };
        Ok(Card::new(self.address_of(device)?.parse()?, u64::from(size_mib) << 20))
    }

    /// The network card; bound to vfio-pci.
    pub fn network_card(&self) -> Result<PciAddress> {
        Ok(self.first(|device| *device == Device::NetworkCard, "network card")?.parse()?)
    }

    /// The storage; bound to vfio-pci.
    pub fn storage(&self) -> Result<PciAddress> {
        Ok(self.first(|device| *device == Device::Storage, "storage")?.parse()?)
    }

    /// The PCI address of the virtio GPU.
    pub fn virtio_gpu(&self) -> Result<String> {
        self.first(|device| *device == Device::VirtioGpu, "virtio GPU")
    }

    /// The PCI address of the virtio GPU with 3D.
    pub fn venus_gpu(&self) -> Result<String> {
        self.first(|device| *device == Device::VenusGpu, "virtio GPU with 3D")
    }

    /// The model GPU of that number, counted from zero.
    pub fn model(&self, number: usize) -> Result<Model<'_>> {
        let devices = self.facts.devices.iter().enumerate();
        let device = devices.filter(|(_, device)| device.is_model()).nth(number);
        let (device, _) = device.ok_or_else(|| Skip(format!("this machine has no model GPU {number}")))?;
        Model::new(self, device)
    }

    /// The GPUs whose memory is memory of the machine, and what the firmware says of each.
    pub fn graces(&self) -> Result<Vec<(Model<'_>, Grace)>> {
        let devices = self.facts.devices.iter().enumerate();
        devices
            .filter_map(|(device, kind)| match kind {
                Device::Grace(grace) => Some(Model::new(self, device).map(|model| (model, *grace))),
                _ => None,
            })
            .collect()
    }

    /// All model GPUs.
    pub fn models(&self) -> Result<Vec<Model<'_>>> {
        let count = self.facts.devices.iter().filter(|device| device.is_model()).count();
        (0..count).map(|number| self.model(number)).collect()
    }

    /// The PCI addresses of the row's devices, in its order.
    pub fn addresses(&self) -> Result<Vec<String>> {
        (0..self.facts.devices.len()).map(|device| self.address_of(device)).collect()
    }

    /// The PCI address of the row's device of that number.
    pub fn address_of(&self, device: usize) -> Result<String> {
        address_of(&self.facts, device)
    }

    /// The slot with the device at that PCI address.
    pub fn slot_of(&self, address: &str) -> Result<Slot<'_>> {
        for device in 0..self.facts.devices.len() {
            if slot::functions(self.facts.topology, device)?.contains(&address.parse()?) {
                return Ok(Slot::new(self, device));
            }
        }
        bail!("{address} is no device of this machine's row");
    }

    /// The virtio GPU's primary DRM node.
    pub fn virtio_gpu_node(&self) -> Result<PathBuf> {
        node(&self.virtio_gpu()?, "card")
    }

    /// The primary DRM node of the virtio GPU with 3D.
    pub fn venus_node(&self) -> Result<PathBuf> {
        node(&self.venus_gpu()?, "card")
    }

    /// Binds a PCI function to a driver, whatever it is bound to now. A test leaves it as found.
    pub fn bind(&self, address: &str, driver: &str) -> Result<()> {
        bind(address, driver)
    }

    /// What the virtio GPU shows now.
    pub fn screendump(&self) -> Result<Picture> {
        self.link()?.screendump()
    }

    /// Puts what was found into a table of the machine's report. Rows and columns come in the order in which
    /// they are named first; of what is said twice, the last is printed.
    pub fn cell(&self, table: &str, row: &str, column: &str, text: &str) -> Result<()> {
        let [table, row, column, text] = [table, row, column, text].map(str::to_owned);
        self.link()?.send(&Event::Cell(Cell { table, row, column, text }))
    }

    /// The way to the host.
    pub fn link(&self) -> Result<&Link> {
        match self.link.get() {
            Some(link) => Ok(link),
            None => {
                let link = Link::connect()?;
                Ok(self.link.get_or_init(|| link))
            }
        }
    }

    fn first(&self, wanted: impl Fn(&Device) -> bool, what: &str) -> Result<String> {
        self.address_of(self.position(wanted, what)?)
    }

    /// The place in the row of the first device that is so.
    fn position(&self, wanted: impl Fn(&Device) -> bool, what: &str) -> Result<usize> {
        let device = self.facts.devices.iter().position(wanted);
        Ok(device.ok_or_else(|| Skip(format!("this machine has no {what}")))?)
    }
}

/// Keeps the facts for the tests, which are processes of their own.
pub fn remember(facts: &Facts) -> Result<()> {
    fs::write(FACTS, serde_json::to_vec(facts)?).with_context(|| format!("writing {FACTS}"))
}

/// Binds every device that lends, or whose engine imports, to vfio-pci, or to the variant of it that is its own.
pub fn bind_lenders(facts: &Facts) -> Result<()> {
    let lenders = facts.devices.iter().enumerate().filter(|(_, device)| device.is_for_vfio());
    for (device, _) in lenders {
        for address in addresses_of(facts, device)? {
            bind(&address, facts.devices[device].driver())?;
        }
    }
    Ok(())
}

/// Whether the host's side of Venus works: QEMU goes on without it.
pub fn check_venus() -> Result<()> {
    let listed = match Instance::open().and_then(|instance| instance.physical_devices()) {
        Ok(devices) if devices.iter().any(|device| device.driver_name == "venus") => return Ok(()),
        Ok(devices) => format!(
            "only {} is listed",
            devices.iter().map(|device| &*device.name).collect::<Vec<_>>().join(", ")
        ),
        Err(error) => error.to_string(),
    };
    bail!(
        "the virtio GPU has no Venus ({listed}): in the private root, virgl_render_server or the driver that it works \
         with, lavapipe, does not start"
    )
}

fn address_of(facts: &Facts, device: usize) -> Result<String> {
    Ok(addresses_of(facts, device)?.swap_remove(0))
}

/// The functions of a device: what is behind its port.
fn addresses_of(facts: &Facts, device: usize) -> Result<Vec<String>> {
    let wanted = facts.devices.get(device).with_context(|| format!("this machine has no device {device}"))?;
    let found = slot::functions(facts.topology, device)?;
    for address in &found {
        let Function { vendor_id: vendor, device_id: device, .. } = Function::read(*address)?;
        let id = PciId { vendor, device };
        if address.function == 0 && id != wanted.id() {
            bail!("at {address} is {id}, not {}", wanted.id());
        }
    }
    if found.is_empty() {
        bail!("device {device} of this machine, {}, is not on the bus", wanted.id());
    }
    Ok(found.iter().map(PciAddress::to_string).collect())
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

/// The DRM node of a PCI function: "card" or "renderD".
fn node(address: &str, prefix: &str) -> Result<PathBuf> {
    let nodes = Function::read(address.parse()?)?.drm_nodes;
    let name = nodes.iter().find(|name| name.starts_with(prefix));
    let name = name.with_context(|| format!("{address} has no DRM node {prefix}*: is its driver loaded?"))?;
    Ok(Path::new("/dev/dri").join(name))
}
