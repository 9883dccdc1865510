//! A tree of bridges and functions below one or more host bridges: data, and QEMU's words for it.
//!
//! ```text
//! const TREE: &[RootBus] = &[
//!     root_bus(0x00, &[root_port(2, 0, &[switch(&[port(0, &[function(0, 0)]), acs_port(1, &[function(0, 0)])])])]),
//!     root_bus(0x40, &[function(1, 0)]),
//! ];
//! ```
//! What is in it is named by its place, as the kernel's parameters name it (`pci_dev_str_match_path`):
//! `00:02.0/00.0/01.0` is the second port of that switch. Which bus numbers bridges get is the firmware's to
//! say, so a guest goes down the same way to find out.
//!
//! The kernel knows a host bridge by the first device on its root bus, and QEMU has few to choose from: it
//! lets nothing but bridges onto the root bus of a `pxb-pcie`, and each bridge has one name. So the guest can
//! make the kernel take one for another ([`Node::taken_for`]), as the kernel's own quirks do.
//!
//! Absent: devices of several kinds. Each function is QEMU's `ivshmem-plain`, whose BAR 2 is plain memory.

use super::options::options;
use super::pci_id::PciId;

/// Where QEMU's own host bridge is; the others are devices on its root bus.
const FIRST_ROOT_BUS: &str = "pcie.0";

/// Slots of the first root bus that are for other host bridges, from this one on.
const HOST_BRIDGE_SLOTS: usize = 0x10;

/// A host bridge and what is below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootBus {
    /// The number of its bus; 0 is QEMU's own, the others are `pxb-pcie`.
    pub number: u8,
    /// What is on the bus.
    pub below: &'static [Node],
}

/// A bridge or a function, at a place on a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its device number.
    pub device: u8,
    /// Its function number.
    pub function: u8,
    /// What it is.
    pub part: Part,
    /// What the kernel is to take it for.
    pub taken_for: Option<PciId>,
    /// What is on its bus, if it is a bridge.
    pub below: &'static [Node],
}

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// QEMU's `pcie-root-port`, which has ACS. On a root bus it is a root port. QEMU lets it sit below a
    /// switch's upstream port, too, and Linux takes it for a downstream port there: QEMU's own have no ACS.
    Port,
    /// QEMU's `x3130-upstream`: a switch, with its downstream ports below.
    Upstream,
    /// QEMU's `xio3130-downstream`: a switch's downstream port without ACS.
    Downstream,
    /// QEMU's `pcie-pci-bridge`: from PCI Express to conventional PCI.
    ExpressToConventional,
    /// QEMU's `i82801b11-bridge`: the same, where the chipset has it.
    ChipsetToConventional,
    /// QEMU's `pci-bridge`: from conventional PCI to conventional PCI.
    Conventional,
    /// QEMU's `ivshmem-plain`.
    Function,
    /// What QEMU has there by itself: its host bridge's own device, at 00.0 of its root bus.
    Chipset,
}

/// A host bridge; see [`RootBus`].
pub const fn root_bus(number: u8, below: &'static [Node]) -> RootBus {
    RootBus { number, below }
}

/// A root port.
pub const fn root_port(device: u8, function: u8, below: &'static [Node]) -> Node {
    node(device, function, Part::Port, below)
}

/// The upstream port of a switch, with its downstream ports below.
pub const fn switch(below: &'static [Node]) -> Node {
    node(0, 0, Part::Upstream, below)
}

/// A downstream port without ACS.
pub const fn port(device: u8, below: &'static [Node]) -> Node {
    node(device, 0, Part::Downstream, below)
}

/// A downstream port with ACS.
pub const fn acs_port(device: u8, below: &'static [Node]) -> Node {
    node(device, 0, Part::Port, below)
}

/// A bridge from PCI Express to conventional PCI.
pub const fn express_to_conventional(device: u8, below: &'static [Node]) -> Node {
    node(device, 0, Part::ExpressToConventional, below)
}

/// The same on a root bus.
pub const fn chipset_to_conventional(device: u8, below: &'static [Node]) -> Node {
    node(device, 0, Part::ChipsetToConventional, below)
}

/// A bridge from conventional PCI to conventional PCI.
pub const fn conventional(device: u8, below: &'static [Node]) -> Node {
    node(device, 0, Part::Conventional, below)
}

/// A function with a page of memory to lend.
pub const fn function(device: u8, function: u8) -> Node {
    node(device, function, Part::Function, &[])
}

/// The device at 00.0 of QEMU's own root bus.
pub const fn chipset() -> Node {
    node(0, 0, Part::Chipset, &[])
}

const fn node(device: u8, function: u8, part: Part, below: &'static [Node]) -> Node {
    Node { device, function, part, taken_for: None, below }
}

/// A node and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// `00:02.0/00.0/01.0`: the root bus's number, then one step for each bridge.
    pub path: String,
    /// QEMU's name of the bus that it is on.
    bus: String,
    /// Whether another function shares its device number.
    multifunction: bool,
    /// What is there.
    pub node: Node,
}

/// Everything in a tree, bridges before what is below them.
pub fn placed(tree: &[RootBus]) -> Vec<Placed> {
    let mut all = Vec::new();
    for root in tree {
        place(root.below, &root.qemu_bus(), &|step| format!("{:02x}:{step}", root.number), &mut all);
    }
    all
}

fn place(nodes: &[Node], bus: &str, path: &dyn Fn(&str) -> String, all: &mut Vec<Placed>) {
    for &node in nodes {
        let path = path(&format!("{:02x}.{:x}", node.device, node.function));
        let multifunction = nodes.iter().filter(|other| other.device == node.device).count() > 1;
        let placed = Placed { path: path.clone(), bus: bus.into(), multifunction, node };
        let own_bus = placed.qemu_name();
        all.push(placed);
        place(node.below, &own_bus, &|step| format!("{path}/{step}"), all);
    }
}

/// QEMU's arguments for a tree.
pub(crate) fn qemu_arguments(tree: &[RootBus]) -> Vec<String> {
    let mut arguments = Vec::new();
    let other_bridges = tree.iter().filter(|root| root.number != 0).enumerate();
    for (index, root) in other_bridges {
        let slot = HOST_BRIDGE_SLOTS + index;
        let (name, number) = (root.qemu_bus(), root.number);
        let bridge = format!("pxb-pcie,id={name},bus_nr={number},bus={FIRST_ROOT_BUS},addr={slot:x}.0");
        arguments.extend(options(&[("-device", &bridge)]));
    }
    for (number, placed) in placed(tree).iter().enumerate() {
        arguments.extend(placed.qemu_arguments(number));
    }
    arguments
}

impl RootBus {
    fn qemu_bus(&self) -> String {
        if self.number == 0 { FIRST_ROOT_BUS.into() } else { format!("host{:02x}", self.number) }
    }
}

impl Node {
    /// The same, which the kernel is to take for another device.
    pub const fn taken_for(self, vendor: u16, device: u16) -> Node {
        Node { taken_for: Some(PciId { vendor, device }), ..self }
    }
}

impl Placed {
    /// QEMU's name of it, and of its bus.
    fn qemu_name(&self) -> String {
        format!("at{}", self.path.replace([':', '/'], "-"))
    }

    fn qemu_arguments(&self, number: usize) -> Vec<String> {
        let Node { device, function, part, .. } = self.node;
        let (name, bus) = (self.qemu_name(), &self.bus);
        let driver = match part {
            // Chassis and slot are a hot-plug slot's number, which no two may share.
            Part::Port => format!("pcie-root-port,chassis={number}"),
            Part::Upstream => "x3130-upstream".into(),
            Part::Downstream => format!("xio3130-downstream,chassis={number}"),
            Part::ExpressToConventional => "pcie-pci-bridge".into(),
            Part::ChipsetToConventional => "i82801b11-bridge".into(),
            Part::Conventional => format!("pci-bridge,chassis_nr={}", number + 1),
            Part::Function => format!("ivshmem-plain,memdev=memory{number}"),
            Part::Chipset => return Vec::new(),
        };
        let multifunction = if self.multifunction { ",multifunction=on" } else { "" };
        let device = format!("{driver},id={name},bus={bus},addr={device:x}.{function:x}{multifunction}");
        let memory = format!("memory-backend-memfd,id=memory{number},size=1M,share=on");
        match part {
            Part::Function => options(&[("-object", &memory), ("-device", &device)]),
            _ => options(&[("-device", &device)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &[RootBus] = &[
        root_bus(
            0x00,
            &[
                root_port(2, 0, &[switch(&[port(0, &[function(0, 0), function(0, 1)]), acs_port(1, &[])])]),
                chipset_to_conventional(3, &[conventional(1, &[function(2, 0)])]),
            ],
        ),
        root_bus(0x40, &[root_port(1, 0, &[express_to_conventional(0, &[])])]),
    ];

    #[test]
    fn places_are_the_kernels() {
        let paths: Vec<String> = placed(TREE).into_iter().map(|placed| placed.path).collect();
        let expected = [
            "00:02.0",
            "00:02.0/00.0",
            "00:02.0/00.0/00.0",
            "00:02.0/00.0/00.0/00.0",
            "00:02.0/00.0/00.0/00.1",
            "00:02.0/00.0/01.0",
            "00:03.0",
            "00:03.0/01.0",
            "00:03.0/01.0/02.0",
            "40:01.0",
            "40:01.0/00.0",
        ];
        assert_eq!(paths, expected);
    }

    #[test]
    fn words_are_qemus() {
        let arguments = qemu_arguments(TREE);
        let devices: Vec<&String> = arguments.iter().skip(1).step_by(2).collect();
        let expected = [
            "pxb-pcie,id=host40,bus_nr=64,bus=pcie.0,addr=10.0",
            "pcie-root-port,chassis=0,id=at00-02.0,bus=pcie.0,addr=2.0",
            "x3130-upstream,id=at00-02.0-00.0,bus=at00-02.0,addr=0.0",
            "xio3130-downstream,chassis=2,id=at00-02.0-00.0-00.0,bus=at00-02.0-00.0,addr=0.0",
            "memory-backend-memfd,id=memory3,size=1M,share=on",
            "ivshmem-plain,memdev=memory3,id=at00-02.0-00.0-00.0-00.0,bus=at00-02.0-00.0-00.0,addr=0.0,\
             multifunction=on",
        ];
        for (device, expected) in devices.iter().zip(expected) {
            assert_eq!(*device, expected);
        }
        let has = |wanted: &str| devices.iter().any(|device| device.as_str() == wanted);
        assert!(has("i82801b11-bridge,id=at00-03.0,bus=pcie.0,addr=3.0"));
        assert!(has("pci-bridge,chassis_nr=8,id=at00-03.0-01.0,bus=at00-03.0,addr=1.0"));
        assert!(has("pcie-pci-bridge,id=at40-01.0-00.0,bus=at40-01.0,addr=0.0"));
    }
}
