//! The machines for shapes: a table of its own.
//!
//! One boot of a machine serves several shapes: the kernel reads the ports' ACS control registers
//! whenever it decides, so a test writes them, setting by setting. (It keeps what it has decided until the
//! provider's driver is unbound, so a test unbinds, too.)

use crate::machine::shape::{
    COMPLETION_REDIRECT, REQUEST_REDIRECT, SOURCE_VALIDATION, Setting, Shape, UPSTREAM_FORWARDING,
};
use crate::machine::{Machine, PeerToPeer, Topology};

use super::trees::{
    ACS_SWITCH, CHIPSET, CONVENTIONAL, DOMAINS, FILLED_SLOT, FREE_SLOT, GRACE_HOPPER, HOSTS, INTEGRATED,
    LISTED_SWITCH, MIXED, NESTED, NOT_FIRST, PORTS, SAME_HOST, SWITCH, TRUSTED_HOSTS,
};
use super::{ARM64, DEFAULT};

/// The version of the kernel of all of them.
pub const KERNEL: &str = DEFAULT.kernel.version();

/// With an IOMMU the kernel switches on what isolates functions: all of the above.
const AS_BOOTED: Setting = Setting { name: "as booted", ports: &[], others: None };
const OFF: Setting = Setting { name: "off", ports: &[], others: Some(0) };
const REDIRECTS: u16 = REQUEST_REDIRECT | COMPLETION_REDIRECT;

const fn only(name: &'static str, ports: &'static [(&'static str, u16)]) -> Setting {
    Setting { name, ports, others: Some(0) }
}

const fn but(name: &'static str, ports: &'static [(&'static str, u16)]) -> Setting {
    Setting { name, ports, others: None }
}

const fn everywhere(name: &'static str, bits: u16) -> Setting {
    Setting { name, ports: &[], others: Some(bits) }
}

const PLAIN: Machine = Machine {
    name: "",
    about: "",
    topology: Topology::Tree,
    devices: &[],
    // Pair by pair; nobody asks the row.
    peer_to_peer: PeerToPeer::NotSupported,
    vulkan: false,
    memory_mib: 512,
    ..DEFAULT
};

const fn machine(
    name: &'static str,
    about: &'static str,
    cpu: &'static str,
    shape: &'static Shape,
) -> Machine {
    Machine { name, about, cpu, shape: Some(shape), ..PLAIN }
}

/// The same, run only when it is asked for.
const fn on_demand(machine: Machine) -> Machine {
    Machine { everyday: false, ..machine }
}

/// One of 64-bit Arm, behind an SMMUv3, run only when it is asked for.
const fn arm64(name: &'static str, about: &'static str, shape: &'static Shape) -> Machine {
    let (kernel, cpu, iommu) = (ARM64.kernel, ARM64.cpu, ARM64.iommu);
    on_demand(Machine { kernel, iommu, ..machine(name, about, cpu, shape) })
}

const PLAIN_SETTINGS: &[Setting] = &[AS_BOOTED, OFF];

const PORTS_SETTINGS: &[Setting] = &[
    AS_BOOTED,
    OFF,
    only("one root port redirects", &[("00:03.0", REDIRECTS)]),
    everywhere("validation only", SOURCE_VALIDATION | UPSTREAM_FORWARDING),
];

const ACS_SWITCH_SETTINGS: &[Setting] = &[
    AS_BOOTED,
    OFF,
    only("one port redirects", &[("00:02.0/00.0/00.0", REDIRECTS)]),
    only("one port redirects requests", &[("00:02.0/00.0/01.0", REQUEST_REDIRECT)]),
    only("one port redirects answers", &[("00:02.0/00.0/03.0", COMPLETION_REDIRECT)]),
    only("root ports redirect", &[("00:02.0", REDIRECTS), ("00:03.0", REDIRECTS)]),
    everywhere("validation only", SOURCE_VALIDATION | UPSTREAM_FORWARDING),
    but("two ports off", &[("00:02.0/00.0/00.0", 0), ("00:02.0/00.0/02.0", 0)]),
];

const NESTED_SETTINGS: &[Setting] = &[
    AS_BOOTED,
    OFF,
    only("outer ports redirect", &[("00:02.0/00.0/00.0", REDIRECTS), ("00:02.0/00.0/01.0", REDIRECTS)]),
    only("one inner port redirects", &[("00:02.0/00.0/00.0/00.0/01.0", REDIRECTS)]),
    but("outer ports off", &[("00:02.0/00.0/00.0", 0), ("00:02.0/00.0/01.0", 0)]),
];

const MIXED_SETTINGS: &[Setting] = &[
    AS_BOOTED,
    OFF,
    only("above conventional PCI", &[("00:02.0/00.0/00.0", REDIRECTS)]),
    only("above the inner switch", &[("00:02.0/00.0/01.0", REQUEST_REDIRECT)]),
];

const LISTED_SWITCH_SETTINGS: &[Setting] =
    &[AS_BOOTED, OFF, only("one port redirects", &[("00:02.0/00.0/00.0", REDIRECTS)])];

const CHIPSET_SETTINGS: &[Setting] =
    &[AS_BOOTED, OFF, only("one port redirects", &[("00:02.0/00.0/01.0", REQUEST_REDIRECT)])];

/// Every machine for shapes.
pub const MACHINES: &[Machine] = &[
    machine(
        "shapes-ports-epyc",
        "root ports, two of them in one slot, and two functions behind one; a CPU that is trusted",
        "EPYC",
        &Shape { tree: PORTS, parameters: "", settings: PORTS_SETTINGS },
    ),
    machine(
        "shapes-ports-skylake",
        "the same, and a CPU that is not trusted",
        "Skylake-Client",
        &Shape { tree: PORTS, parameters: "", settings: PORTS_SETTINGS },
    ),
    machine(
        REFUSED_BY_SLOT,
        "a card beside a switch with a free slot; a CPU that is not trusted",
        "Skylake-Client",
        &Shape { tree: FREE_SLOT, parameters: "", settings: &[] },
    ),
    machine(
        FIXED_BY_SLOT,
        "the same with the card in that slot",
        "Skylake-Client",
        &Shape { tree: FILLED_SLOT, parameters: "", settings: &[] },
    ),
    machine(
        "shapes-switch-opteron",
        "a switch without ACS; an AMD CPU from before those that are trusted",
        "Opteron_G3",
        &Shape { tree: SWITCH, parameters: "", settings: PLAIN_SETTINGS },
    ),
    on_demand(machine(
        "shapes-switch-milan",
        "a switch without ACS; a CPU that is trusted",
        "EPYC-Milan",
        &Shape { tree: SWITCH, parameters: "", settings: PLAIN_SETTINGS },
    )),
    machine(
        REFUSED_BY_ACS,
        "a switch with ACS; a CPU that is not trusted",
        "Haswell",
        &Shape { tree: ACS_SWITCH, parameters: "", settings: ACS_SWITCH_SETTINGS },
    ),
    on_demand(machine(
        "shapes-acs-switch-rome",
        "a switch with ACS; a CPU that is trusted",
        "EPYC-Rome",
        &Shape { tree: ACS_SWITCH, parameters: "", settings: ACS_SWITCH_SETTINGS },
    )),
    machine(
        FIXED_BY_PARAMETER,
        "a switch with ACS, of whose ports the kernel is told to let two alone",
        "Skylake-Client",
        &Shape {
            tree: ACS_SWITCH,
            parameters: "pci=disable_acs_redir=00:02.0/00.0/00.0;00:02.0/00.0/01.0",
            settings: &[AS_BOOTED],
        },
    ),
    on_demand(machine(
        "shapes-acs-switch-all-parameters",
        "a switch with ACS; the kernel is told to redirect nowhere",
        "Haswell",
        &Shape { tree: ACS_SWITCH, parameters: "pci=disable_acs_redir=pci:0:0", settings: &[AS_BOOTED] },
    )),
    on_demand(machine(
        "shapes-acs-switch-config",
        "a switch with ACS; the kernel is told bit by bit what two ports redirect",
        "Dhyana",
        &Shape {
            tree: ACS_SWITCH,
            parameters: "pci=config_acs=0000100@00:02.0/00.0/00.0;0001000@00:02.0/00.0/01.0",
            settings: &[AS_BOOTED],
        },
    )),
    machine(
        "shapes-nested-skylake-server",
        "switches below switches, with ACS and without; a CPU that is not trusted",
        "Skylake-Server",
        &Shape { tree: NESTED, parameters: "", settings: NESTED_SETTINGS },
    ),
    on_demand(machine(
        "shapes-nested-epyc",
        "switches below switches, with ACS and without; a CPU that is trusted",
        "EPYC",
        &Shape { tree: NESTED, parameters: "", settings: NESTED_SETTINGS },
    )),
    on_demand(machine(
        "shapes-nested-phenom",
        "switches below switches, with ACS and without; an AMD CPU from before those that are trusted",
        "phenom",
        &Shape { tree: NESTED, parameters: "", settings: NESTED_SETTINGS },
    )),
    machine(
        "shapes-hosts-genoa",
        "three host bridges; a CPU that is trusted",
        "EPYC-Genoa",
        &Shape { tree: HOSTS, parameters: "", settings: PLAIN_SETTINGS },
    ),
    on_demand(machine(
        "shapes-hosts-skylake",
        "three host bridges, none of them on the kernel's list",
        "Skylake-Client",
        &Shape { tree: HOSTS, parameters: "", settings: PLAIN_SETTINGS },
    )),
    machine(
        "shapes-trusted-hosts",
        "two host bridges on the kernel's list, and one that is not",
        "Icelake-Server",
        &Shape { tree: TRUSTED_HOSTS, parameters: "", settings: PLAIN_SETTINGS },
    ),
    machine(
        "shapes-same-host",
        "host bridges on the kernel's list, of which two are trusted only with themselves",
        "SandyBridge",
        &Shape { tree: SAME_HOST, parameters: "", settings: PLAIN_SETTINGS },
    ),
    machine(
        "shapes-not-first",
        "host bridges that would be on the kernel's list if another device came first",
        "Broadwell",
        &Shape { tree: NOT_FIRST, parameters: "", settings: PLAIN_SETTINGS },
    ),
    machine(
        "shapes-chipset",
        "the machine's own host bridge is on the kernel's list, trusted only with itself",
        "Westmere",
        &Shape { tree: CHIPSET, parameters: "", settings: CHIPSET_SETTINGS },
    ),
    machine(
        "shapes-conventional-dhyana",
        "conventional bridges; a CPU that is AMD's but for the name",
        "Dhyana",
        &Shape { tree: CONVENTIONAL, parameters: "", settings: PLAIN_SETTINGS },
    ),
    on_demand(machine(
        "shapes-conventional-epyc",
        "conventional bridges; a CPU that is trusted",
        "EPYC",
        &Shape { tree: CONVENTIONAL, parameters: "", settings: PLAIN_SETTINGS },
    )),
    machine(
        "shapes-integrated-penryn",
        "functions on the root bus; a CPU that is not trusted",
        "Penryn",
        &Shape { tree: INTEGRATED, parameters: "", settings: PLAIN_SETTINGS },
    ),
    on_demand(machine(
        "shapes-integrated-turin",
        "functions on the root bus; a CPU that is trusted",
        "EPYC-Turin",
        &Shape { tree: INTEGRATED, parameters: "", settings: PLAIN_SETTINGS },
    )),
    machine(
        "shapes-mixed-cascadelake",
        "all kinds of bridges at once; a CPU that is not trusted",
        "Cascadelake-Server",
        &Shape { tree: MIXED, parameters: "", settings: MIXED_SETTINGS },
    ),
    on_demand(machine(
        "shapes-mixed-milan",
        "all kinds of bridges at once; a CPU that is trusted",
        "EPYC-Milan",
        &Shape { tree: MIXED, parameters: "", settings: MIXED_SETTINGS },
    )),
    arm64(
        "shapes-arm64-ports",
        "64-bit Arm: root ports; a host bridge that is not on the kernel's list",
        &Shape { tree: PORTS, parameters: "", settings: PORTS_SETTINGS },
    ),
    arm64(
        "shapes-arm64-switch",
        "64-bit Arm: a switch with ACS; a host bridge that is not on the kernel's list",
        &Shape { tree: ACS_SWITCH, parameters: "", settings: ACS_SWITCH_SETTINGS },
    ),
    arm64(
        "shapes-arm64-listed-switch",
        "64-bit Arm: a switch with ACS; a host bridge that is on the kernel's list",
        &Shape { tree: LISTED_SWITCH, parameters: "", settings: LISTED_SWITCH_SETTINGS },
    ),
    arm64(
        "shapes-arm64-domains",
        "64-bit Arm: three PCI domains, the host bridges of two of them on the kernel's list",
        &Shape { tree: DOMAINS, parameters: "", settings: PLAIN_SETTINGS },
    ),
    arm64(
        "shapes-arm64-gh200",
        "64-bit Arm: PCI domains as with GH200s, one for each root port; no host bridge is on the list",
        &Shape { tree: GRACE_HOPPER, parameters: "", settings: PLAIN_SETTINGS },
    ),
];

/// Where redirecting ports refuse a pair.
pub const REFUSED_BY_ACS: &str = "shapes-acs-switch-haswell";
/// The same with the parameter that mends it.
pub const FIXED_BY_PARAMETER: &str = "shapes-acs-switch-parameter";
/// Where a card is beside a switch with a free slot.
pub const REFUSED_BY_SLOT: &str = "shapes-free-slot";
/// The same with the card in that slot.
pub const FIXED_BY_SLOT: &str = "shapes-filled-slot";

/// The shape of the machine of that name.
pub fn of(machine: &str) -> Option<&'static Shape> {
    MACHINES.iter().find(|row| row.name == machine)?.shape
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tree::{Part, placed};
    use std::collections::HashSet;

    #[test]
    fn shapes_are_distinct() {
        let mut seen = HashSet::new();
        for machine in MACHINES {
            let shape = machine.shape.unwrap();
            for setting in shape.settings {
                let tree = format!("{:?}", shape.tree);
                let bits = (setting.ports, setting.others);
                assert!(
                    seen.insert((tree, machine.cpu, shape.parameters, bits)),
                    "{}: {}",
                    machine.name,
                    setting.name
                );
            }
        }
        assert!(seen.len() >= 40, "{} shapes", seen.len());
    }

    #[test]
    fn settings_name_ports_that_have_the_register() {
        for machine in MACHINES {
            let shape = machine.shape.unwrap();
            let placed = placed(shape.tree);
            for (port, _) in shape.settings.iter().flat_map(|setting| setting.ports) {
                let node = placed.iter().find(|placed| placed.path == *port);
                assert!(
                    node.is_some_and(|placed| placed.node.part == Part::Port),
                    "{}: {port}",
                    machine.name
                );
            }
        }
    }
}
