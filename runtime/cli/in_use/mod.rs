//! `InUse`: what of the machine hangs on a PCI function: mounted file systems, the network, the console, programs.
//!
//! [`InUse::read`] reads it, [`InUse::of`] answers for one function. Whoever takes a driver off a function asks
//! here first. Nothing is opened but ordinary files.
//!
//! A function that others hang from, a bridge or a controller, has the uses of everything below it: sysfs nests
//! devices as they hang from each other, and a use belongs to every function on the way to it.

mod read;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use peervram::backends::PciAddress;
use serde::Serialize;

/// One thing that would be lost if a function lost its driver.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Use {
    /// A file system is mounted from it.
    Mounted { device: String, at: String },
    /// Memory is swapped to it.
    Swap { device: String },
    /// Another block device is made of it: a volume of LVM or dm-crypt, a RAID.
    PartOf { device: String, of: String },
    /// A ZFS pool is mounted, and may be on it.
    PoolPerhaps { device: String, pool: String },
    /// The machine's routes lead over it.
    Network { interface: String, is_default: bool },
    /// The kernel's console is a serial port of it.
    SerialConsole { tty: String },
    /// The text console is shown by it.
    TextConsole { framebuffer: String },
    /// The firmware shows its messages on it.
    BootDisplay,
    /// A keyboard or mouse is plugged into it.
    Input { name: String },
    /// A process has a node of it open.
    Open { node: String, by: String },
    /// It has virtual functions, which would go with it.
    VirtualFunctions { count: u32 },
}

impl Use {
    /// Whether it is no more than a picture on a screen.
    pub fn is_screen(&self) -> bool {
        matches!(self, Self::TextConsole { .. } | Self::BootDisplay)
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { device, at } => write!(f, "{device} is mounted at {at}"),
            Self::Swap { device } => write!(f, "memory is swapped to {device}"),
            Self::PartOf { device, of } => write!(f, "{device} is part of {of}"),
            Self::PoolPerhaps { device, pool } => write!(f, "{device} may be part of the ZFS pool {pool}"),
            Self::Network { interface, is_default: true } => {
                write!(f, "the default route is over {interface}")
            }
            Self::Network { interface, is_default: false } => write!(f, "a route is over {interface}"),
            Self::SerialConsole { tty } => write!(f, "{tty} is the kernel's console"),
            Self::TextConsole { framebuffer } => write!(f, "the text console is shown on {framebuffer}"),
            Self::BootDisplay => f.write_str("it is the display of the firmware"),
            Self::Input { name } => write!(f, "{name:?} is plugged into it"),
            Self::Open { node, by } => write!(f, "{by} has {node} open"),
            Self::VirtualFunctions { count } => write!(f, "it has {count} virtual functions"),
        }
    }
}

/// "nvme0n1p2 is mounted at /, memory is swapped to nvme0n1p3".
pub fn words(uses: &[Use]) -> String {
    uses.iter().map(Use::to_string).collect::<Vec<_>>().join(", ")
}

/// What a machine stands on, as it was read.
#[derive(Debug, Default)]
pub struct InUse {
    /// Block devices, by name.
    block: BTreeMap<String, Node>,
    /// The block device and the place of every mount that has one.
    mounts: BTreeSet<(String, String)>,
    swaps: BTreeSet<String>,
    /// Network interfaces, by name.
    interfaces: BTreeMap<String, Node>,
    /// Interfaces that routes lead over, and whether the default one does.
    routes: BTreeMap<String, bool>,
    /// What needs no further thought: functions, and the use of them.
    plain: Vec<(Vec<PciAddress>, Use)>,
    /// What could not be seen, with the reason.
    unread: Vec<String>,
}

/// A device of the kernel's.
#[derive(Debug, Default)]
struct Node {
    /// The PCI functions that it hangs from, from the root port down.
    functions: Vec<PciAddress>,
    /// What it is made of, by name: the slaves of a volume, the ports of a bridge.
    parts: Vec<String>,
}

impl InUse {
    /// What hangs on a function, or on what is below it.
    pub fn of(&self, function: PciAddress) -> Vec<Use> {
        self.all().remove(&function).unwrap_or_default()
    }

    /// The same of every function that has a use.
    pub fn all(&self) -> BTreeMap<PciAddress, Vec<Use>> {
        let mut found: BTreeMap<PciAddress, BTreeSet<Use>> = BTreeMap::new();
        let mut add = |functions: BTreeSet<PciAddress>, used: Use| {
            for function in functions {
                found.entry(function).or_default().insert(used.clone());
            }
        };
        for (device, at) in &self.mounts {
            let used = Use::Mounted { device: device.clone(), at: at.clone() };
            add(functions(&self.block, device), used);
        }
        for device in &self.swaps {
            add(functions(&self.block, device), Use::Swap { device: device.clone() });
        }
        for (of, node) in &self.block {
            for device in &node.parts {
                let used = Use::PartOf { device: device.clone(), of: of.clone() };
                add(functions(&self.block, device), used);
            }
        }
        for (interface, &is_default) in &self.routes {
            let used = Use::Network { interface: interface.clone(), is_default };
            add(functions(&self.interfaces, interface), used);
        }
        for (functions, used) in &self.plain {
            add(functions.iter().copied().collect(), used.clone());
        }
        found.into_iter().map(|(function, uses)| (function, uses.into_iter().collect())).collect()
    }

    /// What could not be seen, with the reason.
    pub fn unread(&self) -> &[String] {
        &self.unread
    }
}

/// The functions of a device and of all that it is made of.
fn functions(nodes: &BTreeMap<String, Node>, name: &str) -> BTreeSet<PciAddress> {
    let (mut found, mut seen) = (BTreeSet::new(), BTreeSet::new());
    let mut waiting = vec![name];
    while let Some(name) = waiting.pop() {
        // Devices that are made of each other would be a fault of the kernel; nothing is looked at twice.
        if let Some(node) = nodes.get(name).filter(|_| seen.insert(name)) {
            found.extend(&node.functions);
            waiting.extend(node.parts.iter().map(String::as_str));
        }
    }
    found
}
