//! `MapType`: how a device reaches another's memory, as the kernel decides it.
//!
//! `calc_map_type_and_dist` in `drivers/pci/p2pdma.c`, recomputed step by step: the nearest bridge above
//! both; whether any port on the way redirects peer-to-peer requests (ACS); if there is no such bridge, or
//! one redirects, the way leads through the host bridge, which is allowed on CPUs and host bridges that the
//! kernel knows to forward.
//!
//! The kernel decides when an importer maps, not when it attaches; it keeps the answer for each pair until
//! the provider's driver is unbound. It does not ask for iommufd and type1, and it never looks whether the
//! bytes arrive.

use std::fmt;

use serde::Serialize;

use super::host_bridges::{HostBridge, Release, list_releases, listed, parse_release};
use super::{Cpu, Place, PortType, Reading, Search, Topology};
use crate::PciAddress;

/// The kernel's answer, `enum pci_p2pdma_map_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MapType {
    /// By bus addresses, past the IOMMU and below the host bridge.
    BusAddress,
    /// By addresses that the importer's IOMMU translates, through the host bridge.
    ThroughHostBridge,
    /// Not at all: mapping says EINVAL.
    NotSupported,
}

impl fmt::Display for MapType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::BusAddress => "bus address",
            Self::ThroughHostBridge => "through host bridge",
            Self::NotSupported => "not supported",
        })
    }
}

/// Who is to reach the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// A PCI function.
    Pci(PciAddress),
    /// A device that is none: vgem, a platform device. The kernel refuses it without a look.
    NotPci,
}

impl From<PciAddress> for Client {
    fn from(address: PciAddress) -> Self {
        Self::Pci(address)
    }
}

/// What the kernel is expected to answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expected {
    /// This.
    Known(MapType),
    /// One of these.
    Unknown {
        /// The answers that are possible.
        possible: Vec<MapType>,
        /// What was not read, or is not there, and decides.
        because: Vec<String>,
    },
}

impl Expected {
    /// The answer, where it is known.
    pub fn known(&self) -> Option<MapType> {
        match self {
            Self::Known(map_type) => Some(*map_type),
            Self::Unknown { .. } => None,
        }
    }
}

/// What decided, where the answer is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// A bridge is above both, and nothing redirects.
    NothingRedirects,
    /// The CPU's host bridges all forward: AMD's from family 0x17 on.
    TrustedCpu,
    /// Both host bridges are on the kernel's list.
    HostBridgesListed,
    /// The host bridge above this function on its root bus is not on the list.
    HostBridgeNotListed(PciAddress),
    /// The host bridge forwards only between devices below itself.
    NeedsSameHostBridge(PciAddress),
    /// The first function on a root bus is neither at 00.0 nor a root port, so the kernel knows nothing of
    /// its host bridge.
    HostBridgeNameless(PciAddress),
    /// The client is no PCI device.
    ClientNotPci,
}

/// What the kernel is expected to say of a pair, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The answer.
    pub expected: Expected,
    /// What decided it.
    pub reason: Option<Reason>,
    /// How many steps there are from one to the other, as the kernel counts: up and down again.
    pub distance: Option<usize>,
    /// The nearest bridge above both, or the function itself if it is both.
    pub common: Option<PciAddress>,
    /// The functions on the way that redirect, in the kernel's order.
    pub redirects: Vec<PciAddress>,
}

impl Verdict {
    fn unknown(possible: Vec<MapType>, because: Vec<String>) -> Self {
        let expected = Expected::Unknown { possible, because };
        Self { expected, reason: None, distance: None, common: None, redirects: Vec::new() }
    }
}

/// The part of a decision that is known so far.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Known(MapType, Reason),
    Unknown(Vec<String>),
}

impl Topology {
    /// What the kernel is expected to answer when `client` maps memory of `provider`.
    pub fn expected_map_type(&self, provider: PciAddress, client: impl Into<Client>) -> Verdict {
        use MapType::{BusAddress, NotSupported, ThroughHostBridge};
        let Client::Pci(client) = client.into() else {
            let expected = Expected::Known(NotSupported);
            let reason = Some(Reason::ClientNotPci);
            return Verdict { expected, reason, distance: None, common: None, redirects: Vec::new() };
        };
        let (a, b) = match (self.way_up(provider), self.way_up(client)) {
            (Ok(a), Ok(b)) => (a, b),
            (a, b) => {
                let because = [a.err(), b.err()].into_iter().flatten().collect();
                return Verdict::unknown(vec![BusAddress, ThroughHostBridge, NotSupported], because);
            }
        };

        let meeting = a.0.iter().enumerate().find_map(|(up, place)| {
            let down = b.0.iter().position(|other| other.address() == place.address())?;
            Some((up, down))
        });
        // All of the provider's side, the common bridge too; of the client's what is below it. Without a
        // common bridge the kernel looks at the provider's side, and what it finds there decides nothing.
        let on_the_way: Vec<&Place> = match meeting {
            Some((up, down)) => a.0[..=up].iter().chain(&b.0[..down]).copied().collect(),
            None => a.0.clone(),
        };
        let (mut redirects, mut unread) = (Vec::new(), Vec::new());
        for place in on_the_way {
            match redirection(place) {
                Ok(true) => redirects.push(place.address()),
                Ok(false) => {}
                Err(why) => unread.push(why),
            }
        }
        let distance = match meeting {
            Some((up, down)) => up + down,
            None => a.0.len() + b.0.len(),
        };
        let common = meeting.map(|(up, _)| a.0[up].address());

        let (expected, reason) = if common.is_some() && redirects.is_empty() && unread.is_empty() {
            (Expected::Known(BusAddress), Some(Reason::NothingRedirects))
        } else {
            let through = self.through_host_bridges(a.1, b.1);
            let may_stay_below = common.is_some() && redirects.is_empty();
            match through {
                Decision::Known(map_type, reason) if !may_stay_below => {
                    (Expected::Known(map_type), Some(reason))
                }
                Decision::Known(map_type, _) => {
                    (Expected::Unknown { possible: vec![BusAddress, map_type], because: unread }, None)
                }
                Decision::Unknown(because) => {
                    let mut possible = vec![ThroughHostBridge, NotSupported];
                    let mut all = because;
                    if may_stay_below {
                        possible.insert(0, BusAddress);
                        all.extend(unread);
                    }
                    (Expected::Unknown { possible, because: all }, None)
                }
            }
        };
        Verdict { expected, reason, distance: Some(distance), common, redirects }
    }

    /// `cpu_supports_p2pdma`, then `host_bridge_whitelist`.
    fn through_host_bridges(&self, a: &str, b: &str) -> Decision {
        let cpu = match &self.cpu {
            Reading::Known(cpu) if is_trusted(cpu) => {
                return Decision::Known(MapType::ThroughHostBridge, Reason::TrustedCpu);
            }
            Reading::Known(_) => None,
            Reading::Unread(why) => Some(format!("the processor is not known: {why}")),
        };
        match (self.host_bridges_listed(a, b), cpu) {
            // On the list, it does not matter which CPU it is.
            (Decision::Known(MapType::NotSupported, _), Some(cpu)) => Decision::Unknown(vec![cpu]),
            (Decision::Unknown(because), cpu) => Decision::Unknown(because.into_iter().chain(cpu).collect()),
            (decision, _) => decision,
        }
    }

    fn host_bridges_listed(&self, a: &str, b: &str) -> Decision {
        if a == b {
            return self.host_bridge_listed(a, true);
        }
        match self.host_bridge_listed(a, false) {
            Decision::Known(MapType::ThroughHostBridge, _) => self.host_bridge_listed(b, false),
            Decision::Unknown(because) => match self.host_bridge_listed(b, false) {
                // Either way it is refused.
                refused @ Decision::Known(MapType::NotSupported, _) => refused,
                Decision::Known(..) => Decision::Unknown(because),
                Decision::Unknown(others) => Decision::Unknown(because.into_iter().chain(others).collect()),
            },
            refused => refused,
        }
    }

    /// `__host_bridge_whitelist`, by the first function on the root bus. Where that is not known, every function there
    /// may be it, and they may all come out the same.
    fn host_bridge_listed(&self, host_bridge: &str, same_host_bridge: bool) -> Decision {
        let mut functions = self.root_bus(host_bridge);
        let why = match &self.order {
            Reading::Known(()) => {
                return match functions.next() {
                    Some(first) => self.listed_by(first, same_host_bridge),
                    None => Decision::Unknown(vec![format!("{host_bridge} has no functions")]),
                };
            }
            Reading::Unread(why) => {
                format!("which function is the first on {host_bridge} is not known: {why}")
            }
        };
        let mut decisions = functions.map(|first| self.listed_by(first, same_host_bridge));
        match decisions.next() {
            Some(Decision::Known(map_type, reason))
                if self.is_whole
                    && decisions
                        .all(|other| matches!(other, Decision::Known(answer, _) if answer == map_type)) =>
            {
                Decision::Known(map_type, reason)
            }
            _ => Decision::Unknown(vec![why]),
        }
    }

    /// Whether the host bridge is on the list, if this is the first function on its root bus.
    fn listed_by(&self, first: &Place, same_host_bridge: bool) -> Decision {
        match names_its_host_bridge(first) {
            Ok(true) => {}
            Ok(false) => {
                let reason = Reason::HostBridgeNameless(first.address());
                return Decision::Known(MapType::NotSupported, reason);
            }
            Err(why) => return Decision::Unknown(vec![why]),
        }
        let (vendor_id, device_id) = (first.function.vendor_id, first.function.device_id);
        let answer = |release: Release| match listed(vendor_id, device_id, release) {
            Some(HostBridge { same_host_bridge: true, .. }) if !same_host_bridge => {
                Decision::Known(MapType::NotSupported, Reason::NeedsSameHostBridge(first.address()))
            }
            Some(_) => Decision::Known(MapType::ThroughHostBridge, Reason::HostBridgesListed),
            None => Decision::Known(MapType::NotSupported, Reason::HostBridgeNotListed(first.address())),
        };
        let release = match &self.kernel_release {
            Reading::Known(text) => {
                parse_release(text).ok_or_else(|| format!("Linux {text:?} is no release"))
            }
            Reading::Unread(why) => Err(format!("the kernel's release is not known: {why}")),
        };
        match release {
            Ok(release) => answer(release),
            Err(why) => {
                let mut answers = list_releases().into_iter().map(answer);
                let first = answers.next();
                match first {
                    Some(first) if answers.all(|other| other == first) => first,
                    _ => Decision::Unknown(vec![why]),
                }
            }
        }
    }
}

/// Whether the kernel takes the ids of the first function on a root bus for the host bridge's (`pci_host_bridge_dev`).
fn names_its_host_bridge(first: &Place) -> Result<bool, String> {
    if (first.address().device, first.address().function) == (0, 0) {
        return Ok(true);
    }
    let unread = |why: &str| Err(format!("whether {} is a root port is not known: {why}", first.address()));
    match &first.config {
        Reading::Known(config) if config.is_all_ones() => unread("it does not answer"),
        Reading::Known(config) => match config.port_type() {
            Search::Found(port_type) => Ok(port_type == PortType::RootPort),
            Search::Absent => Ok(false),
            Search::Unread => unread("its configuration space was not read as far"),
        },
        Reading::Unread(why) => unread(why),
    }
}

/// Whether a function redirects; or why that is not known.
fn redirection(place: &Place) -> Result<bool, String> {
    let unread = |why: &str| Err(format!("whether {} redirects (ACS) is not known: {why}", place.address()));
    match &place.config {
        Reading::Unread(why) => unread(why),
        // A device that fell off the bus. The kernel would take its ones for bits.
        Reading::Known(config) if config.is_all_ones() => unread("it does not answer, all it says is ones"),
        Reading::Known(config) => match config.acs() {
            Search::Found(acs) => Ok(acs.redirects()),
            Search::Absent => Ok(false),
            Search::Unread => unread("its configuration space was not read as far"),
        },
    }
}

/// `cpu_supports_p2pdma`: AMD, of the first Zen or newer. (Hygon's are another vendor.)
fn is_trusted(cpu: &Cpu) -> bool {
    cpu.vendor.as_deref() == Some("AuthenticAMD") && cpu.family.is_some_and(|family| family >= 0x17)
}
