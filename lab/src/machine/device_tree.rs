//! What the device tree of an arm64 machine says: QEMU's own, and what this machine's has besides.
//!
//! ```text
//! Qemu::device_tree       QEMU's tree of the board
//!   + coherent memory     a node for each GPU below its port: nvidia,gpu-mem-base-pa, nvidia,gpu-mem-size
//!   + host bridges        QEMU's host bridge cut into pieces, each a PCI domain of its own
//!   = device_tree::of     a file in the machine's folder, for QEMU's -dtb
//! ```
//! QEMU's `pxb-pcie` is a root bus beside the first one, which firmware would tell the kernel of by ACPI. Here the kernel sees a
//! host bridge of its own instead: its part of the bus numbers, of configuration space and of the windows for BARs. QEMU decodes
//! all of them in one space, so each address leads where the kernel thinks.

use anyhow::{Context, Result, ensure};

use super::flattened_tree::{Node, cells, number};
use super::grace;
use super::options::options;
use super::tree::RootBus;
use super::{Architecture, Machine, Topology};

/// Its name in the machine's folder.
pub(crate) const FILE: &str = "device-tree";

/// Bytes of configuration space of one bus number.
const BUS_BYTES: u64 = 1 << 20;
const LAST_BUS: u32 = 0xff;

/// `phys.hi` of an address of PCI that is one of ports (IEEE 1275, "PCI Bus Binding").
const IO_SPACE: u32 = 1;

/// QEMU's words for the tree.
pub(crate) fn qemu_arguments(machine: &Machine) -> Vec<String> {
    if differs(machine) { options(&[("-dtb", &format!("/lab/{FILE}"))]) } else { Vec::new() }
}

/// Whether a machine has a tree that is not QEMU's own.
pub(crate) fn differs(machine: &Machine) -> bool {
    let says_more = !grace::said(machine).is_empty() || root_buses(machine).len() > 1;
    machine.architecture() == Architecture::Arm64 && says_more
}

/// The tree of a machine, where QEMU's of its board is `boards`.
pub(crate) fn of(machine: &Machine, boards: &[u8]) -> Result<Vec<u8>> {
    let tree = Node::parse(boards).and_then(|mut tree| change(&mut tree, machine).map(|()| tree));
    Ok(tree.with_context(|| format!("the device tree of {}", machine.name))?.bytes())
}

fn root_buses(machine: &Machine) -> &'static [RootBus] {
    machine.shape.map_or(&[], |shape| shape.tree)
}

fn change(tree: &mut Node, machine: &Machine) -> Result<()> {
    let place =
        tree.children.iter().position(|node| node.name.starts_with("pcie@")).context("no PCI host bridge")?;
    let gpus = grace::said(machine);
    ensure!(
        gpus.is_empty() || machine.topology == Topology::RootPorts,
        "a GPU with coherent memory sits behind a root port"
    );
    tree.children[place].children.extend(gpus.iter().map(port));
    let buses = root_buses(machine);
    if buses.len() > 1 {
        let whole = tree.children.remove(place);
        let pieces = (0..buses.len()).map(|domain| piece(&whole, buses, domain));
        let pieces: Vec<Node> = pieces.collect::<Result<_>>()?;
        tree.children.extend(pieces);
    }
    Ok(())
}

/// A root port with its GPU. The kernel finds the nodes of PCI functions by device and function number (`of_pci_find_child_device`).
fn port(gpu: &grace::Said) -> Node {
    let slot = Topology::slot_of(gpu.device);
    let reg = |device: usize| ("reg", cells(&[(device << 11) as u32, 0, 0, 0, 0]));
    let properties = gpu.integers().map(|(name, value)| (name, value.to_be_bytes().to_vec()));
    let mut function = Node::new("gpu@0,0".into(), &[reg(0)]);
    properties.into_iter().for_each(|(name, value)| function.set(name, value));
    let cells_of =
        [("#address-cells", cells(&[3])), ("#size-cells", cells(&[2])), ("device_type", b"pci\0".into())];
    let mut port = Node::new(
        format!("pcie@{slot:x},0"),
        &[&cells_of[..], &[reg(slot), ("ranges", Vec::new())]].concat(),
    );
    port.children.push(function);
    port
}

/// The part of QEMU's host bridge that is the domain of that number.
fn piece(whole: &Node, buses: &[RootBus], domain: usize) -> Result<Node> {
    let first = u32::from(buses[domain].number);
    let last = buses.get(domain + 1).map_or(LAST_BUS, |next| u32::from(next.number) - 1);
    let reg = whole.get("reg").context("no configuration space")?;
    let base = wide(reg, 0)? + u64::from(first) * BUS_BYTES;
    let ranges = whole.get("ranges").context("no windows")?;
    let ranges: Vec<Vec<u8>> = ranges
        .chunks(28)
        .filter_map(|range| window(range, buses.len(), domain).transpose())
        .collect::<Result<_>>()?;
    let mut piece = whole.clone();
    piece.name = format!("pcie@{base:x}");
    piece.set("linux,pci-domain", cells(&[domain as u32]));
    piece.set("bus-range", cells(&[first, last]));
    piece.set("reg", [base, u64::from(last + 1 - first) * BUS_BYTES].map(u64::to_be_bytes).concat());
    piece.set("ranges", ranges.concat());
    Ok(piece)
}

/// A domain's part of a window. Nothing here has ports, and the first domain keeps their window.
fn window(range: &[u8], domains: usize, domain: usize) -> Result<Option<Vec<u8>>> {
    let kind = number(range, 0)?;
    if kind >> 24 & 3 == IO_SPACE {
        return Ok((domain == 0).then(|| range.to_vec()));
    }
    let part = wide(range, 20)? / domains as u64 / BUS_BYTES * BUS_BYTES;
    let offset = part * domain as u64;
    let [on_the_bus, to_the_cpu] = [wide(range, 4)? + offset, wide(range, 12)? + offset];
    Ok(Some([cells(&[kind]), [on_the_bus, to_the_cpu, part].map(u64::to_be_bytes).concat()].concat()))
}

/// A number of two cells.
fn wide(bytes: &[u8], at: usize) -> Result<u64> {
    Ok(u64::from(number(bytes, at)?) << 32 | u64::from(number(bytes, at + 4)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::named;

    /// As QEMU's, with less in it.
    fn board() -> Node {
        let windows = [
            cells(&[0x0100_0000, 0, 0, 0, 0x3eff_0000, 0, 0x1_0000]),
            cells(&[0x0200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, 0x2eff_0000]),
            cells(&[0x0300_0000, 0x80, 0, 0x80, 0, 0x80, 0]),
        ];
        let bridge = Node::new(
            "pcie@10000000".into(),
            &[
                ("reg", cells(&[0x40, 0x1000_0000, 0, 0x1000_0000])),
                ("ranges", windows.concat()),
                ("dma-coherent", vec![]),
            ],
        );
        Node { children: vec![Node::new("memory@40000000".into(), &[]), bridge], ..Node::default() }
    }

    #[test]
    fn a_gpus_memory_is_named_below_its_port() {
        let machine = named("arm64-gh200").unwrap();
        let mut tree = board();
        change(&mut tree, machine).unwrap();
        let bridge = &tree.children[1];
        let said: Vec<&str> = bridge.children.iter().map(|port| port.name.as_str()).collect();
        // Of the one between these the firmware is silent.
        assert_eq!(said, ["pcie@2,0", "pcie@7,0"]);
        let gpu = &bridge.children[0].children[0];
        assert_eq!(gpu.get("nvidia,gpu-mem-base-pa").unwrap(), cells(&[1, 0]), "it is not at 4 GiB");
        assert_eq!(gpu.get("nvidia,gpu-mem-size").unwrap(), cells(&[0, 1600 << 20]));
        assert_eq!(bridge.children[0].get("reg").unwrap(), cells(&[0x1000, 0, 0, 0, 0]));
        assert_eq!(bridge.children[1].children[0].get("nvidia,gpu-mem-size").unwrap(), cells(&[0, 0]));
        assert_eq!(qemu_arguments(machine), ["-dtb", "/lab/device-tree"]);
        assert_eq!(machine.command_line(), "mem=3072M");
    }

    #[test]
    fn each_root_bus_is_a_domain() {
        let machine = named("shapes-arm64-domains").unwrap();
        let buses = root_buses(machine);
        let mut tree = board();
        change(&mut tree, machine).unwrap();
        let bridges: Vec<&Node> =
            tree.children.iter().filter(|node| node.name.starts_with("pcie@")).collect();
        assert_eq!(bridges.len(), buses.len());
        let mut ends = [0; 2];
        for (domain, (bridge, bus)) in bridges.iter().zip(buses).enumerate() {
            assert_eq!(bridge.get("linux,pci-domain").unwrap(), cells(&[domain as u32]));
            assert_eq!(number(bridge.get("bus-range").unwrap(), 0).unwrap(), u32::from(bus.number));
            let base = 0x40_1000_0000 + u64::from(bus.number) * BUS_BYTES;
            assert_eq!(wide(bridge.get("reg").unwrap(), 0).unwrap(), base);
            assert_eq!(bridge.name, format!("pcie@{base:x}"));
            let ranges = bridge.get("ranges").unwrap();
            let ranges: Vec<&[u8]> = ranges.chunks(28).skip(usize::from(domain == 0)).collect();
            assert_eq!(ranges.len(), 2);
            for (range, end) in ranges.iter().zip(&mut ends) {
                let start = wide(range, 12).unwrap();
                assert!(start >= *end, "{start:#x} is below {end:#x}");
                *end = start + wide(range, 20).unwrap();
            }
        }
        assert!(ends[0] <= 0x3eff_0000 && ends[1] <= 0x100_0000_0000, "{ends:x?}");
    }

    #[test]
    fn other_machines_have_qemus_own() {
        for name in ["arm64-smmu", "small-gh200", "shapes-hosts-genoa"] {
            assert!(qemu_arguments(named(name).unwrap()).is_empty(), "{name}");
        }
    }
}
