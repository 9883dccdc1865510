//! A tree of bridges and functions below one or more host bridges: data, and QEMU's words for it.
//!
//! ```ignore
//! const TREE: &[RootBus] = &[
//!     root_bus(0x00, &[root_port(2, 0, &[switch(&[port(0, &[function(0, 0)]), acs_port(1, &[function(0, 0)])])])]),
//!     root_bus(0x40, &[function(1, 0)]),
//! ];
//! ```
//! What is in it is named by its place, as the kernel's parameters name it (`pci_dev_str_match_path`):
//! `00:02.0/00.0/01.0` is the second port of that switch. Which bus numbers bridges get is the firmware's to
//! say, so a guest goes down the same way to find out.
//!
//! Absent: what sees through a function. Each is QEMU's `ivshmem-plain`, whose BAR 2 is plain memory, or a
//! model GPU where it matters what it calls itself.

use serde_json::json;

use crate::machine::{PciId, words};
use crate::model;

/// Where QEMU's own host bridge is; the others are devices on its root bus.
const FIRST_ROOT_BUS: &str = "pcie.0";

/// Slots of the first root bus that are for other host bridges, from this one on.
const HOST_BRIDGE_SLOTS: usize = 0x10;

/// What a model GPU of a tree has: the least that there is.
const VRAM_MIB: u32 = 16;

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
    /// A model GPU that calls itself so.
    Model(PciId),
}

/// A host bridge; see [`RootBus`].
pub const fn root_bus(number: u8, below: &'static [Node]) -> RootBus {
    RootBus { number, below }
}

/// A root port.
pub const fn root_port(device: u8, function: u8, below: &'static [Node]) -> Node {
    Node { device, function, part: Part::Port, below }
}

/// The upstream port of a switch, with its downstream ports below.
pub const fn switch(below: &'static [Node]) -> Node {
    Node { device: 0, function: 0, part: Part::Upstream, below }
}

/// A downstream port without ACS.
pub const fn port(device: u8, below: &'static [Node]) -> Node {
    Node { device, function: 0, part: Part::Downstream, below }
}

/// A downstream port with ACS.
pub const fn acs_port(device: u8, below: &'static [Node]) -> Node {
    Node { device, function: 0, part: Part::Port, below }
}

/// A bridge from PCI Express to conventional PCI.
pub const fn express_to_conventional(device: u8, below: &'static [Node]) -> Node {
    Node { device, function: 0, part: Part::ExpressToConventional, below }
}

/// The same on a root bus.
pub const fn chipset_to_conventional(device: u8, below: &'static [Node]) -> Node {
    Node { device, function: 0, part: Part::ChipsetToConventional, below }
}

/// A bridge from conventional PCI to conventional PCI.
pub const fn conventional(device: u8, below: &'static [Node]) -> Node {
    Node { device, function: 0, part: Part::Conventional, below }
}

/// A function with a page of memory to lend.
pub const fn function(device: u8, function: u8) -> Node {
    Node { device, function, part: Part::Function, below: &[] }
}

/// A function that calls itself so.
pub const fn model(device: u8, vendor: u16, id: u16) -> Node {
    Node { device, function: 0, part: Part::Model(PciId { vendor, device: id }), below: &[] }
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

/// Functions in a tree, in order; the others are bridges.
pub fn functions(tree: &[RootBus]) -> Vec<Placed> {
    placed(tree).into_iter().filter(|placed| !placed.node.is_bridge()).collect()
}

/// The model GPUs in a tree, with their numbers: what each calls itself and its VRAM.
pub(crate) fn models(tree: &[RootBus]) -> Vec<(usize, PciId, u32)> {
    let models = placed(tree).into_iter().enumerate();
    let model = |(number, placed): (usize, Placed)| match placed.node.part {
        Part::Model(id) => Some((number, id, VRAM_MIB)),
        _ => None,
    };
    models.filter_map(model).collect()
}

/// QEMU's arguments for a tree.
pub(crate) fn qemu_arguments(tree: &[RootBus]) -> Vec<String> {
    let mut arguments = Vec::new();
    let other_bridges = tree.iter().filter(|root| root.number != 0).enumerate();
    for (index, root) in other_bridges {
        let slot = HOST_BRIDGE_SLOTS + index;
        let bridge = format!("pxb-pcie,id={},bus_nr={},addr={slot:x}.0", root.qemu_bus(), root.number);
        arguments.extend(words(&[("-device", &bridge)]));
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
    /// Whether it is a bridge.
    pub fn is_bridge(&self) -> bool {
        !matches!(self.part, Part::Function | Part::Model(_))
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
            Part::Model(_) => {
                let device = json!({
                    "driver": "vfio-user-pci",
                    "id": name,
                    "bus": bus,
                    "addr": format!("{device:x}.{function:x}"),
                    "socket": { "type": "unix", "path": format!("/lab/{}", model::socket_name(number)) },
                });
                return words(&[("-device", &device.to_string())]);
            }
        };
        let multifunction = if self.multifunction { ",multifunction=on" } else { "" };
        let device = format!("{driver},id={name},bus={bus},addr={device:x}.{function:x}{multifunction}");
        let memory = format!("memory-backend-memfd,id=memory{number},size=1M,share=on");
        match part {
            Part::Function => words(&[("-object", &memory), ("-device", &device)]),
            _ => words(&[("-device", &device)]),
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
        root_bus(0x40, &[model(0, 0x10de, 0x2f95), root_port(1, 0, &[express_to_conventional(0, &[])])]),
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
            "40:00.0",
            "40:01.0",
            "40:01.0/00.0",
        ];
        assert_eq!(paths, expected);
        assert_eq!(functions(TREE).len(), 4);
    }

    #[test]
    fn words_are_qemus() {
        let arguments = qemu_arguments(TREE);
        let devices: Vec<&String> = arguments.iter().skip(1).step_by(2).collect();
        let expected = [
            "pxb-pcie,id=host40,bus_nr=64,addr=10.0",
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
        let model: serde_json::Value = serde_json::from_str(devices[11]).unwrap();
        assert_eq!((&model["bus"], &model["addr"]), (&json!("host40"), &json!("0.0")));
        assert_eq!(models(TREE), [(9, PciId { vendor: 0x10de, device: 0x2f95 }, VRAM_MIB)]);
    }
}
