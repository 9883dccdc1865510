//! Other slots, other kernels, other hardware.

use peervram_backends::PciAddress;
use peervram_backends::topology::{Above, MapType, Place, PortType, Search, Topology, list_releases};

use super::{Fix, FixKind, Needs, allows};

/// More slots than these help nobody to choose.
const SLOTS_MAX: usize = 3;

/// Free slots of this machine in which one of both would be below a bridge of the other, or below a host bridge
/// that forwards; then one that is taken, if no free one will do.
pub(super) fn moves(topology: &Topology, provider: PciAddress, client: PciAddress) -> Vec<Fix> {
    let ports = || topology.places().iter().filter(|place| is_slot(place));
    let is_free = |port: &&Place| topology.below(port.address()).next().is_none();
    let mut found: Vec<Move> =
        ports().filter(is_free).flat_map(|port| both(topology, provider, client, port, None)).collect();
    if found.is_empty() {
        let taken = ports().filter_map(|port| {
            let mut below = topology.below(port.address());
            let only = below.next()?.address();
            let is_a_card = below.next().is_none() && topology.below(only).next().is_none();
            (is_a_card && ![provider, client].contains(&only)).then_some((port, only))
        });
        found =
            taken.flat_map(|(port, by)| both(topology, provider, client, port, Some(by))).take(1).collect();
    }
    // Prefer slots that give bus addresses to those through the host bridge, then the shorter way.
    found.sort_by_key(|found| (found.then != MapType::BusAddress, found.distance));
    found.truncate(SLOTS_MAX);
    found.into_iter().map(|found| found.fix()).collect()
}

struct Move {
    function: PciAddress,
    port: PciAddress,
    taken_by: Option<PciAddress>,
    then: MapType,
    distance: Option<usize>,
}

impl Move {
    fn fix(self) -> Fix {
        let taken = self.taken_by.map(|by| format!(", where {by} is now")).unwrap_or_default();
        Fix {
            kind: FixKind::MoveCard,
            what: format!("Put the card at {} into the slot of {}{taken}", self.function, self.port),
            commands: Vec::new(),
            price: match self.then {
                MapType::BusAddress => "both then share the switch's way to the processor",
                _ => "the way leads through the host bridge, which is slower than a switch",
            }
            .into(),
            needs: Needs::Hands,
            then: Some(self.then),
            groups: None,
        }
    }
}

fn both(
    topology: &Topology,
    provider: PciAddress,
    client: PciAddress,
    port: &Place,
    taken_by: Option<PciAddress>,
) -> Vec<Move> {
    let moved = |function: PciAddress| {
        let changed = topology.moved(function, port.address());
        let then = allows(&changed, provider, client)?;
        let distance = changed.expected_map_type(provider, client).distance;
        Some(Move { function, port: port.address(), taken_by, then, distance })
    };
    // Virtual functions and those of a chip go with it.
    let is_a_card = |function: &PciAddress| {
        topology.place(*function).is_some_and(|place| {
            place.physical_function.is_none()
                && function.function == 0
                && matches!(place.above, Above::Bridge(_))
        })
    };
    [client, provider].into_iter().filter(is_a_card).filter_map(moved).collect()
}

fn is_slot(place: &Place) -> bool {
    let Some(config) = place.config.known().filter(|config| !config.is_all_ones()) else { return false };
    matches!(config.port_type(), Search::Found(PortType::RootPort | PortType::Downstream))
        && config.is_slot() == Search::Found(true)
}

/// The first release whose list has the host bridges.
pub(super) fn newer_kernel(topology: &Topology, provider: PciAddress, client: PciAddress) -> Option<Fix> {
    let release = list_releases().into_iter().find_map(|(major, minor, patch)| {
        let release = format!("{major}.{minor}.{patch}");
        Some((allows(&topology.with_kernel_release(&release), provider, client)?, release))
    });
    let (then, release) = release?;
    Some(Fix {
        kind: FixKind::NewerKernel,
        what: format!("Boot Linux {release} or newer: its list has this host bridge"),
        commands: Vec::new(),
        price: "another kernel".into(),
        needs: Needs::Reboot,
        then: Some(then),
        groups: None,
    })
}

/// The last resort: other hardware.
pub(super) fn other_hardware() -> Fix {
    Fix {
        kind: FixKind::OtherHardware,
        what: "No setting makes a host bridge forward that the kernel does not trust. Put both cards below one PCIe \
               switch (a backplane or riser with one), or into a machine with an AMD processor from Zen on or a \
               listed server host bridge"
            .into(),
        commands: Vec::new(),
        price: "hardware. Until then lend through memory of the host: slower, and it works".into(),
        needs: Needs::Hands,
        then: None,
        groups: None,
    }
}
