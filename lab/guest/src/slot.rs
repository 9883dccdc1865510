//! A slot: the port of a row's device, and what is done to the device from outside.
//!
//! ```text
//! guest.slot_of(address) -> unplug -> (its user closes it) -> wait_until_empty -> plug
//!                        -> port_error
//! ```
//! A test puts back what it took out.

use anyhow::{Context, Result, bail};
use peervram::backends::PciAddress;
use peervram_lab::change::{Change, Severity};
use peervram_lab::machine::Topology;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::Guest;

/// Where bridges of the machine itself are.
const BUS: &str = "/sys/bus/pci/devices";

/// How long a device that was put in may take to be found. The kernel waits for the link, one second.
const PLUG_LIMIT: Duration = Duration::from_secs(15);

/// A port of this machine and the row's device behind it.
#[derive(Debug)]
pub struct Slot<'guest> {
    guest: &'guest Guest,
    device: usize,
}

impl<'guest> Slot<'guest> {
    /// The slot of the row's device with that number.
    pub fn new(guest: &'guest Guest, device: usize) -> Slot<'guest> {
        Slot { guest, device }
    }

    /// The functions that are in it now.
    pub fn functions(&self) -> Result<Vec<PciAddress>> {
        functions(self.guest.facts().topology, self.device)
    }

    /// Presses the button of the slot, and does not wait. The kernel gives people five seconds to press it
    /// again, then asks the device's driver to let go. vfio-pci tells its user, and the kernel waits until
    /// the user has closed the device; then the slot is switched off and is empty.
    pub fn unplug(&self) -> Result<()> {
        self.change(Change::Unplug(self.device))
    }

    /// Waits until nothing is in it.
    pub fn wait_until_empty(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        while !self.functions()?.is_empty() {
            if start.elapsed() > limit {
                bail!("device {} is still in its slot after {} s", self.device, limit.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Puts the device in again, as new, and waits until it is bound as it was when the machine began.
    pub fn plug(&self) -> Result<()> {
        self.change(Change::Plug(self.device))?;
        let wanted = &self.guest.facts().devices[self.device];
        let start = Instant::now();
        while self.functions()?.len() < wanted.functions() {
            if start.elapsed() > PLUG_LIMIT {
                bail!("device {} was put in and is not found within {} s", self.device, PLUG_LIMIT.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
        let lent = if wanted.lends() { self.functions()? } else { Vec::new() };
        for address in lent {
            // Seen on the bus is not yet ready for a driver.
            while let Err(error) = self.guest.bind(&address.to_string(), "vfio-pci") {
                if start.elapsed() > PLUG_LIMIT {
                    return Err(error);
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Has the port above it report an error. The kernel asks the drivers of all that is below it (vfio-pci
    /// tells its user); where the error is fatal it resets the link, and with it the device.
    pub fn port_error(&self, severity: Severity) -> Result<()> {
        self.change(Change::PortError(self.device, severity))
    }

    fn change(&self, change: Change) -> Result<()> {
        self.guest.link()?.change(change)
    }
}

/// The functions behind the port of the row's device of that number, in order.
pub fn functions(topology: Topology, device: usize) -> Result<Vec<PciAddress>> {
    children(&port(topology, device)?)
}

/// The port's folder; [`Topology`] decides where ports are.
fn port(topology: Topology, device: usize) -> Result<PathBuf> {
    let root_port = |number: usize| Path::new(BUS).join(format!("0000:00:{number:02x}.0"));
    match topology {
        Topology::RootPorts => Ok(root_port(device + 2)),
        Topology::Tree => bail!("a tree has no slots with numbers"),
        Topology::Switch => {
            let only = |folder: &Path| -> Result<PathBuf> {
                let found = children(folder)?;
                let [address] = found[..] else { bail!("{} leads to {found:?}", folder.display()) };
                Ok(folder.join(address.to_string()))
            };
            let upstream = only(&root_port(2))?;
            let ports = children(&upstream)?;
            let port = ports.get(device).with_context(|| format!("the switch has no port {device}"))?;
            Ok(upstream.join(port.to_string()))
        }
    }
}

/// The PCI functions below a bridge, in order.
fn children(bridge: &Path) -> Result<Vec<PciAddress>> {
    let entries = fs::read_dir(bridge).with_context(|| format!("looking into {}", bridge.display()))?;
    let mut addresses: Vec<PciAddress> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    addresses.sort_unstable();
    Ok(addresses)
}
