//! `Topology`: the PCI tree of a machine, and what else decides how bytes get from one device to another.
//!
//! Read once ([`Topology::read`]), or taken from a machine that is elsewhere ([`Topology::from_json`]);
//! pure after that. It carries what could not be read, with the reason: a verdict that hangs on it is
//! "unknown, because".
//!
//! [`Topology::expected_map_type`] is the kernel's own decision, recomputed.

mod capture;
mod change;
mod config_space;
mod groups;
mod host_bridges;
mod kernel_fault;
mod map_type;
#[cfg(test)]
mod map_type_tests;
mod read;
#[cfg(test)]
mod read_tests;
mod redact;

use serde::{Deserialize, Serialize};

use crate::PciAddress;
use crate::pci::Function;

pub use config_space::{Acs, ConfigSpace, LinkRegisters, MaxPayload, PortType, ResizableBar, Search};
pub use host_bridges::{HostBridge, Release, list_releases, listed, listed_at_last, parse_release};
pub use kernel_fault::{KernelFault, SEVERAL_RANGES};
pub use map_type::{Client, Expected, MapType, Reason, Verdict};
pub use redact::redact_command_line;

/// What was read, or why it was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reading<T> {
    /// What was read.
    Known(T),
    /// Why it was not read.
    Unread(String),
}

impl<T> Reading<T> {
    /// What was read.
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Unread(_) => None,
        }
    }
}

/// A processor, as `/proc/cpuinfo` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// `vendor_id`: "AuthenticAMD". None on architectures that have no such line.
    pub vendor: Option<String>,
    /// `cpu family`.
    pub family: Option<u32>,
    /// `model`.
    pub model: Option<u32>,
    /// `model name`.
    pub name: Option<String>,
    /// `microcode`.
    pub microcode: Option<String>,
}

/// What a function hangs from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Above {
    /// A bridge.
    Bridge(PciAddress),
    /// A host bridge, by its name in sysfs: "pci0000:00". The function is on its root bus.
    HostBridge(String),
}

/// A function and its place in the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The function, as sysfs describes it.
    pub function: Function,
    /// What it hangs from.
    pub above: Above,
    /// Its configuration space.
    pub config: Reading<ConfigSpace>,
    /// The device that reading configuration space would have woken, itself or a bridge above it. Then it was not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sleeper: Option<PciAddress>,
    /// Its IOMMU group's kind of domain: "DMA-FQ", "identity".
    pub iommu_domain: Option<String>,
    /// The physical function, of a virtual one.
    pub physical_function: Option<PciAddress>,
}

impl Place {
    /// Its address.
    pub fn address(&self) -> PciAddress {
        self.function.address
    }

    /// Whether root would have read more of its configuration space. Where it does not answer, or was left asleep, root
    /// reads no more.
    pub fn is_short_of_root(&self) -> bool {
        match &self.config {
            Reading::Known(config) => !config.is_whole() && !config.is_all_ones(),
            Reading::Unread(_) => self.sleeper.is_none(),
        }
    }
}

/// The PCI tree of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// The running kernel's release.
    pub kernel_release: Reading<String>,
    /// Its command line.
    pub command_line: Reading<String>,
    /// Which boot this is.
    pub boot_id: Reading<String>,
    /// The first processor.
    pub cpu: Reading<Cpu>,
    /// Whether it was captured: of another machine, perhaps, and at another time.
    pub is_captured: bool,
    /// The functions, on each bus in the kernel's order.
    places: Vec<Place>,
    /// Whether that order is the kernel's own, and not that of addresses.
    order: Reading<()>,
    /// Whether every function of the machine is there.
    is_whole: bool,
}

impl Topology {
    /// Every function, in order.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// The function at `address`.
    pub fn place(&self, address: PciAddress) -> Option<&Place> {
        self.places.iter().find(|place| place.address() == address)
    }

    /// The function at `address` and the bridges above it, from the bottom up, and the name of the host
    /// bridge at the top.
    ///
    /// # Errors
    /// Which bridge is missing, or that the tree runs in a circle.
    pub fn way_up(&self, address: PciAddress) -> Result<(Vec<&Place>, &str), String> {
        let mut way: Vec<&Place> = Vec::new();
        let mut at = address;
        loop {
            let Some(place) = self.place(at) else {
                return Err(match way.last() {
                    Some(below) => format!("the bridge {at} above {} is missing", below.address()),
                    None => format!("there is no {at}"),
                });
            };
            if way.len() == self.places.len() {
                return Err(format!("the bridges above {address} run in a circle"));
            }
            way.push(place);
            match &place.above {
                Above::Bridge(bridge) => at = *bridge,
                Above::HostBridge(name) => return Ok((way, name)),
            }
        }
    }

    /// The functions on a host bridge's root bus, in order.
    pub fn root_bus(&self, host_bridge: &str) -> impl Iterator<Item = &Place> + use<'_> {
        let host_bridge = host_bridge.to_owned();
        let is_on_it =
            move |place: &&Place| matches!(&place.above, Above::HostBridge(name) if *name == host_bridge);
        self.places.iter().filter(is_on_it)
    }

    /// What could not be read, each with the reason.
    pub fn unread(&self) -> Vec<String> {
        fn why<T>(what: &str, reading: &Reading<T>) -> Option<String> {
            match reading {
                Reading::Known(_) => None,
                Reading::Unread(why) => Some(format!("{what}: {why}")),
            }
        }
        let machine = [
            why("kernel release", &self.kernel_release),
            why("command line", &self.command_line),
            why("boot id", &self.boot_id),
            why("processor", &self.cpu),
            why("order of devices on a bus", &self.order),
        ];
        let config = self.places.iter().map(|place| {
            let what = format!("configuration space of {}", place.address());
            match &place.config {
                Reading::Known(config) if config.is_all_ones() => {
                    Some(format!("{what}: all ones, the device does not answer"))
                }
                Reading::Known(config) if !config.is_whole() => {
                    Some(format!("{what}: only the first {} bytes", config.bytes().len()))
                }
                reading => why(&what, reading),
            }
        });
        machine.into_iter().chain(config).flatten().collect()
    }
}
