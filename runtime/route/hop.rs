//! `Hop`: a function on the way, and what it does to what passes.

use peervram_backends::PciAddress;
use peervram_backends::topology::{
    Above, Acs, MaxPayload, Place, PortType, Reading, Search, Topology, Verdict,
};

use super::{End, LinkSpeed};

/// A function on the way, or a bridge above one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hop {
    /// Its address.
    pub address: PciAddress,
    /// What it is: "root port".
    pub role: &'static str,
    /// Its access control: none where it has none.
    pub acs: Result<Option<Acs>, String>,
    /// Whether it sends requests of this way up.
    pub redirects: bool,
    /// The link that it is an end of.
    pub link: Option<Link>,
    /// How long its packets' payloads may be.
    pub max_payload: Option<MaxPayload>,
    /// Whether bytes pass it; bridges above the nearest common one are shown and not passed.
    pub is_passed: bool,
    /// Whether bytes pass its link. They do not pass that of a switch's upstream port which they only come up to, to turn
    /// and go down by another port.
    pub uses_link: bool,
}

/// A link, as both of its ends allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Link {
    /// The link as it runs now.
    pub now: LinkSpeed,
    /// The link at its best.
    pub at_most: LinkSpeed,
}

impl Link {
    /// Whether it could carry more.
    pub fn is_narrowed(self) -> bool {
        self.now.width_lanes < self.at_most.width_lanes || self.now.speed < self.at_most.speed
    }
}

/// The provider and what is above it, then what is above the client down to it, without repetitions.
pub(super) fn way(
    topology: &Topology,
    provider: PciAddress,
    client: &End,
    verdict: Option<&Verdict>,
) -> Vec<Hop> {
    let above = |address: PciAddress| -> Vec<PciAddress> {
        match topology.way_up(address) {
            Ok((way, _)) => way.iter().map(|place| place.address()).collect(),
            // As far as it goes.
            Err(_) => vec![address],
        }
    };
    let up = above(provider);
    let mut down = match client {
        End::Function(address) => above(*address),
        End::Cpu | End::NotPci(_) => Vec::new(),
    };
    down.retain(|address| !up.contains(address));
    down.reverse();

    // Below a common bridge that redirects nothing, nothing goes further up.
    let turns_at = verdict.and_then(|verdict| verdict.common.filter(|_| verdict.redirects.is_empty()));
    let turn = turns_at.and_then(|common| up.iter().position(|address| *address == common));
    // Without a common bridge, redirecting ports decide nothing.
    let redirects = match verdict {
        Some(Verdict { common: Some(_), redirects, .. }) => redirects.as_slice(),
        _ => &[],
    };
    let last_up = turn.unwrap_or(up.len());
    up.iter()
        .enumerate()
        .map(|(step, address)| (*address, step <= last_up, turn == Some(step)))
        .chain(down.iter().map(|address| (*address, true, false)))
        .filter_map(|(address, is_passed, turns)| {
            let place = topology.place(address)?;
            let hop = hop(topology, place, redirects.contains(&address));
            Some(Hop { is_passed, uses_link: is_passed && (!turns || faces_down(place)), ..hop })
        })
        .collect()
}

/// A function that the way passes.
fn hop(topology: &Topology, place: &Place, redirects: bool) -> Hop {
    let address = place.address();
    let config = place.config.known().filter(|config| !config.is_all_ones());
    let acs = match (&place.config, config) {
        (Reading::Unread(why), _) => Err(why.clone()),
        (_, None) => Err("it does not answer, all it says is ones".into()),
        (_, Some(config)) => match config.acs() {
            Search::Found(acs) => Ok(Some(acs)),
            Search::Absent => Ok(None),
            Search::Unread => Err("its configuration space was not read as far".into()),
        },
    };
    Hop {
        address,
        role: role(place),
        acs,
        redirects,
        link: link(topology, place),
        max_payload: config.and_then(|config| config.max_payload().found()),
        is_passed: true,
        uses_link: true,
    }
}

fn port_type(place: &Place) -> Option<PortType> {
    place.config.known().filter(|config| !config.is_all_ones())?.port_type().found()
}

fn role(place: &Place) -> &'static str {
    match port_type(place) {
        // QEMU lets one sit below a switch, where Linux takes it for a downstream port.
        Some(PortType::RootPort) if matches!(place.above, Above::Bridge(_)) => "switch, downstream port",
        Some(PortType::RootPort) => "root port",
        Some(PortType::Upstream) => "switch, upstream port",
        Some(PortType::Downstream) => "switch, downstream port",
        Some(PortType::ToPci) => "bridge to PCI",
        Some(PortType::FromPci) => "bridge from PCI",
        Some(PortType::RootComplexEndpoint) => "integrated endpoint",
        _ => match place.config.known().and_then(|config| config.is_bridge()) {
            Some(true) => "bridge",
            _ if place.physical_function.is_some() => "virtual function",
            _ => "endpoint",
        },
    }
}

/// Whether it is a port of a root complex or a switch.
pub(super) fn is_port(place: &Place) -> bool {
    matches!(port_type(place), Some(PortType::RootPort | PortType::Upstream | PortType::Downstream))
}

/// Whether the link of a port is the one below it.
pub(super) fn faces_down(place: &Place) -> bool {
    matches!(port_type(place), Some(PortType::RootPort | PortType::Downstream))
}

fn link(topology: &Topology, place: &Place) -> Option<Link> {
    let end = |place: &Place| place.config.known()?.link().found().filter(|link| link.width_lanes > 0);
    let own = end(place)?;
    let other = if faces_down(place) {
        topology.below(place.address()).find_map(end)
    } else {
        match &place.above {
            Above::Bridge(bridge) => topology.place(*bridge).and_then(end),
            Above::HostBridge(_) => None,
        }
    };
    let other = other.unwrap_or(own);
    Some(Link {
        now: LinkSpeed { speed: own.speed, width_lanes: own.width_lanes },
        at_most: LinkSpeed {
            speed: own.max_speed.min(other.max_speed),
            width_lanes: own.max_width_lanes.min(other.max_width_lanes),
        },
    })
}
