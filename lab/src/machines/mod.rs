//! The machines of the lab: one table, one row each.
//!
//! A row says which kernel, CPU, topology and devices a virtual machine has and what the kernel is expected to answer
//! about peer-to-peer there. To add a machine, add a row to [`MACHINES`]. Nothing else in the lab knows machines by
//! name.

pub mod shapes;
mod trees;

use crate::kernel::own_kernel::Flavour;
use crate::machine::{Device, Firmware, Grace, Iommu, Kernel, Machine, PciId, PeerToPeer, Topology};

const SMALL_7_3: Kernel = Kernel::Own { version: "7.3", flavour: Flavour::Small };
const LOCKDEP_7_3: Kernel = Kernel::Own { version: "7.3", flavour: Flavour::Lockdep };
const MENDED_7_3: Kernel = Kernel::Own { version: "7.3", flavour: Flavour::Mended };
const ARM64_7_3: Kernel = Kernel::Own { version: "7.3", flavour: Flavour::SmallArm64 };
const DEBIAN_7_3: Kernel = Kernel::Debian { version: "7.3", suite: "trixie-backports" };
const DEBIAN_6_12: Kernel = Kernel::Debian { version: "6.12", suite: "trixie" };

pub(crate) const DEFAULT: Machine = Machine {
    name: "small-epyc-root-ports",
    about: "our own Linux 7.3, a trusted host bridge between lender and importer (the default)",
    kernel: SMALL_7_3,
    cpu: "EPYC",
    topology: Topology::RootPorts,
    iommu: Iommu::Intel,
    host_bridge: None,
    devices: &[Device::SharedMemory { size_mib: 256 }, Device::VirtioGpu, Device::CrowdedGroup],
    shape: None,
    parameters: "",
    peer_to_peer: PeerToPeer::ThroughHostBridge,
    vulkan: true,
    drivers: false,
    hotplug: false,
    memory_mib: 1024,
    everyday: true,
};

const DEBIAN: Machine = Machine { kernel: DEBIAN_7_3, ..DEFAULT };

const MODEL: Device = Device::ModelGpu { id: PciId::MODEL, vram_mib: 256 };

/// One driver's memory under another one, in one process; and a GPU that imports nothing.
const TWO_DRIVERS: Machine = Machine {
    name: "small-two-drivers",
    about: "a GPU with 3D, so two Vulkan drivers that are not of one kind: Venus and lavapipe",
    devices: &[Device::SharedMemory { size_mib: 64 }, Device::VenusGpu],
    ..DEFAULT
};

const TWO_MODELS: Machine = Machine {
    name: "small-two-models-root-ports",
    about: "two model GPUs, each behind its root port",
    devices: &[MODEL, MODEL],
    vulkan: false,
    ..DEFAULT
};

/// Engines that are not of this project, and IOMMUs that stop them.
const REFEREE: Machine = Machine {
    name: "small-network-card",
    about: "a device that only lends, QEMU's network card, whose DMA imports from it, and storage",
    devices: &[Device::SharedMemory { size_mib: 64 }, Device::NetworkCard, Device::Storage],
    vulkan: false,
    memory_mib: 512,
    ..DEFAULT
};

/// Real Vulkan drivers on stand-ins for their GPUs. The virtio GPU says what the kernel says of an import.
const DRIVERS: Machine = Machine {
    name: "small-drivers",
    about: "real Vulkan drivers (RADV, ANV, NVK) import from a lender, on stand-ins for their GPUs",
    devices: &[Device::SharedMemory { size_mib: 64 }, Device::VirtioGpu],
    drivers: true,
    ..DEFAULT
};

/// Every cause of a revoke, against every kind of importer.
const REVOKE: Machine = Machine {
    name: "small-revoke",
    about: "every kind of lender and importer, and slots whose devices can be taken out",
    devices: &[
        Device::SharedMemory { size_mib: 256 },
        Device::VirtioGpu,
        MODEL,
        MODEL,
        Device::Card { size_mib: 64 },
        Device::Twins { size_mib: 64 },
    ],
    hotplug: true,
    ..DEFAULT
};

/// GPUs whose memory is coherent with the CPU: one as it should be, an importer of each kind, one of whose
/// memory the firmware says nothing, and one whose link is down.
const GRACE: Machine = Machine {
    name: "small-gh200",
    about: "a GH200 with the hardware bug that takes a reserved memory, under the kernel's nvgrace driver",
    devices: &GH200.with_company(),
    hotplug: true,
    ..DEFAULT
};

const GH200: Grace = Grace {
    id: PciId { vendor: 0x10de, device: 0x2345 },
    memory_mib: 1600,
    has_mig_bug: true,
    has_cxl: false,
    firmware: Firmware::NamesMemory,
};

const GB200: Grace =
    Grace { id: PciId { vendor: 0x10de, device: 0x2941 }, memory_mib: 768, has_mig_bug: false, ..GH200 };

impl Grace {
    /// It, what imports from it, a plain lender to compare it with, and others of its kind whose firmware says
    /// less.
    const fn with_company(self) -> [Device; 6] {
        let silent = Grace { firmware: Firmware::NamesNone, ..self };
        let down = Grace { firmware: Firmware::NamesNoBytes, ..self };
        let plain = Device::SharedMemory { size_mib: 64 };
        [Device::Grace(self), Device::VirtioGpu, plain, MODEL, Device::Grace(silent), Device::Grace(down)]
    }
}

/// One of NVIDIA's CPUs: Linux 7.3 knows its host bridges to forward. (Grace's own, 10de:22b1, are not on its list.)
const LISTED_HOST_BRIDGE: PciId = PciId { vendor: 0x10de, device: 0x2f95 };

/// As the default, on 64-bit Arm. No Vulkan: busybox is the userland.
const ARM64: Machine = Machine {
    name: "arm64-smmu",
    about: "64-bit Arm: an SMMUv3, and a trusted host bridge between lender and importer",
    kernel: ARM64_7_3,
    cpu: "neoverse-n1",
    iommu: Iommu::Smmu,
    host_bridge: Some(LISTED_HOST_BRIDGE),
    vulkan: false,
    hotplug: true,
    ..DEFAULT
};

/// QEMU's SMMUv3 cannot tell vfio-user devices what is mapped.
const ARM64_GRACE: Machine = Machine {
    name: "arm64-gh200",
    about: "64-bit Arm: a GH200 whose memory begins at 4 GiB, as a device tree says, under the kernel's nvgrace driver",
    iommu: Iommu::Virtio,
    devices: &GH200.with_company(),
    // The machine's own memory ends where the GPU's begins.
    memory_mib: 3072,
    ..ARM64
};

/// Machines with one lender and one importer, or a few; the default first. Our own kernel is the everyday
/// one; Debian's are what users run.
pub const MACHINES: &[Machine] = &[
    DEFAULT,
    Machine {
        name: "small-epyc-switch",
        about: "both devices under one switch: bus addresses",
        ..DEFAULT.under_a_switch()
    },
    Machine {
        name: "small-skylake-root-ports",
        about: "a host bridge that the kernel does not trust: import is refused",
        ..DEFAULT.without_trust()
    },
    Machine {
        name: "small-skylake-switch",
        about: "a host bridge that the kernel does not trust, but a switch below it",
        ..DEFAULT.without_trust().under_a_switch()
    },
    Machine {
        name: "small-virtio-iommu",
        about: "as the default, but a paravirtual IOMMU translates",
        iommu: Iommu::Virtio,
        ..DEFAULT
    },
    Machine {
        name: "lockdep-epyc-root-ports",
        about: "as the default, with a kernel that watches its locks and DMA mappings",
        kernel: LOCKDEP_7_3,
        everyday: false,
        ..DEFAULT
    },
    Machine {
        name: "mended-epyc-root-ports",
        about: "as the default, with a kernel that maps several ranges right",
        kernel: MENDED_7_3,
        everyday: false,
        ..DEFAULT
    },
    Machine {
        name: "mended-virtio-iommu",
        about: "a kernel that maps several ranges right, and a paravirtual IOMMU translates",
        kernel: MENDED_7_3,
        iommu: Iommu::Virtio,
        everyday: false,
        ..DEFAULT
    },
    Machine {
        name: PASSTHROUGH,
        about: "two devices that lend, and an IOMMU that does not translate for kernel drivers",
        devices: &[Device::SharedMemory { size_mib: 64 }, Device::Card { size_mib: 64 }],
        parameters: "iommu=pt",
        vulkan: false,
        ..DEFAULT
    },
    TWO_DRIVERS,
    TWO_MODELS,
    Machine {
        name: "lockdep-two-models-root-ports",
        about: "two model GPUs, with a kernel that watches its locks and DMA mappings",
        kernel: LOCKDEP_7_3,
        everyday: false,
        ..TWO_MODELS
    },
    Machine {
        name: "small-two-models-virtio-iommu",
        about: "two model GPUs, and a paravirtual IOMMU translates",
        iommu: Iommu::Virtio,
        ..TWO_MODELS
    },
    Machine {
        name: "small-two-models-switch",
        about: "two model GPUs under one switch",
        ..TWO_MODELS.under_a_switch()
    },
    Machine {
        name: "small-peer-copy",
        about: "two model GPUs, a device that only lends, and Vulkan: for the benchmark of copies",
        devices: &[MODEL, MODEL, Device::SharedMemory { size_mib: 256 }],
        vulkan: true,
        everyday: false,
        ..TWO_MODELS
    },
    Machine {
        name: "small-peer-copy-large",
        about: "a device that only lends and a model GPU, for copies of 256 MiB",
        devices: &[
            Device::SharedMemory { size_mib: 256 },
            // A little less than half of it is what it copies to.
            Device::ModelGpu { id: PciId::MODEL, vram_mib: 1024 },
        ],
        // Copies take an eighth of the host's memory at most.
        memory_mib: 3072,
        everyday: false,
        ..TWO_MODELS
    },
    REFEREE,
    Machine {
        name: "small-network-card-virtio-iommu",
        about: "as before, and a paravirtual IOMMU translates",
        iommu: Iommu::Virtio,
        ..REFEREE
    },
    Machine {
        name: REFEREES,
        about: "a network card, a model GPU and a device that only lends, and room for the kernel's own tests",
        devices: &[Device::NetworkCard, MODEL, Device::SharedMemory { size_mib: 64 }],
        // They map a gigabyte.
        memory_mib: 3072,
        everyday: false,
        ..REFEREE
    },
    DRIVERS,
    Machine {
        name: "small-drivers-refused",
        about: "the same drivers, and a host bridge that the kernel does not trust: a map is refused",
        ..DRIVERS.without_trust()
    },
    REVOKE,
    Machine {
        name: "lockdep-revoke",
        about: "every kind of lender and importer, with a kernel that watches its locks and DMA mappings",
        kernel: LOCKDEP_7_3,
        everyday: false,
        ..REVOKE
    },
    GRACE,
    Machine {
        name: "lockdep-gh200",
        about: "a GH200, under a kernel that watches its locks and DMA mappings",
        kernel: LOCKDEP_7_3,
        everyday: false,
        ..GRACE
    },
    Machine {
        name: "small-gh200-fixed",
        about: "a GH200 without the hardware bug: all of its memory is usable",
        devices: &Grace { has_mig_bug: false, memory_mib: 640, ..GH200 }.with_company(),
        everyday: false,
        ..GRACE
    },
    Machine {
        name: "small-gb200",
        about: "a GB200, under the kernel's nvgrace driver",
        devices: &GB200.with_company(),
        everyday: false,
        ..GRACE
    },
    Machine {
        name: "small-grace-cxl",
        about: "a later GPU, which tells by CXL whether its memory is ready, under the kernel's nvgrace driver",
        devices: &Grace {
            // No driver has this PCI id in its table yet.
            id: PciId { vendor: 0x10de, device: 0x7777 },
            has_cxl: true,
            ..GB200
        }
        .with_company(),
        everyday: false,
        ..GRACE
    },
    ARM64,
    Machine {
        name: "arm64-smmu-switch",
        about: "64-bit Arm, an SMMUv3, both devices under one switch: bus addresses",
        everyday: false,
        ..ARM64.under_a_switch()
    },
    Machine {
        name: "arm64-smmu-untrusted",
        about: "64-bit Arm, an SMMUv3, a host bridge that the kernel does not know: import is refused",
        host_bridge: None,
        peer_to_peer: PeerToPeer::NotSupported,
        everyday: false,
        ..ARM64
    },
    Machine {
        name: "arm64-two-models-virtio-iommu",
        about: "64-bit Arm, two model GPUs, and a paravirtual IOMMU translates",
        iommu: Iommu::Virtio,
        devices: &[MODEL, MODEL],
        everyday: false,
        ..ARM64
    },
    ARM64_GRACE,
    Machine {
        name: "arm64-gb200",
        about: "64-bit Arm: a GB200 whose memory begins at 4 GiB, under the kernel's nvgrace driver",
        devices: &GB200.with_company(),
        everyday: false,
        ..ARM64_GRACE
    },
    Machine {
        name: "epyc-root-ports",
        about: "Debian's Linux 7.3, a trusted host bridge between lender and importer",
        ..DEBIAN
    },
    Machine {
        name: "epyc-switch",
        about: "Debian's Linux 7.3, both devices under one switch: bus addresses",
        ..DEBIAN.under_a_switch()
    },
    Machine {
        name: "skylake-root-ports",
        about: "Debian's Linux 7.3, a host bridge that it does not trust: import is refused",
        ..DEBIAN.without_trust()
    },
    Machine {
        name: "skylake-switch",
        about: "Debian's Linux 7.3, a host bridge that it does not trust, but a switch below it",
        ..DEBIAN.without_trust().under_a_switch()
    },
    Machine {
        name: "two-models-root-ports",
        about: "Debian's Linux 7.3, two model GPUs, each behind its root port",
        kernel: DEBIAN_7_3,
        everyday: false,
        ..TWO_MODELS
    },
    Machine {
        name: "two-models-virtio-iommu",
        about: "Debian's Linux 7.3, two model GPUs, and a paravirtual IOMMU translates",
        kernel: DEBIAN_7_3,
        everyday: false,
        iommu: Iommu::Virtio,
        ..TWO_MODELS
    },
    Machine {
        name: "two-models-switch",
        about: "Debian's Linux 7.3, two model GPUs under one switch",
        kernel: DEBIAN_7_3,
        everyday: false,
        ..TWO_MODELS.under_a_switch()
    },
    Machine {
        name: "linux-6.12",
        about: "Debian's Linux 6.12, without VFIO_DEVICE_FEATURE_DMA_BUF",
        kernel: DEBIAN_6_12,
        peer_to_peer: PeerToPeer::NoFeature,
        ..DEFAULT
    },
];

/// The machine that boots what users run, and needs no kernel to be built.
pub const STOCK: &str = "epyc-root-ports";

/// Every machine of the lab: [`MACHINES`] and those for shapes.
pub fn all() -> impl Iterator<Item = &'static Machine> {
    MACHINES.iter().chain(shapes::MACHINES)
}

/// The machine of the kernel's own tests.
pub const REFEREES: &str = "small-referees";

/// The machine whose IOMMU passes kernel drivers' addresses on.
pub const PASSTHROUGH: &str = "small-passthrough";

/// The machines that run unless others are named.
pub fn everyday() -> impl Iterator<Item = &'static Machine> {
    all().filter(|machine| machine.everyday)
}

/// The machine of that name.
pub fn named(name: &str) -> Option<&'static Machine> {
    all().find(|machine| machine.name == name)
}

impl Machine {
    /// The same with both devices under one switch.
    const fn under_a_switch(self) -> Machine {
        Machine { topology: Topology::Switch, peer_to_peer: PeerToPeer::BusAddress, ..self }
    }

    /// The same with a CPU whose host bridge the kernel does not trust.
    const fn without_trust(self) -> Machine {
        Machine { cpu: "Skylake-Client", peer_to_peer: PeerToPeer::NotSupported, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for machine in all() {
            assert_eq!(named(machine.name).unwrap().about, machine.about);
        }
        assert!(named(STOCK).is_some_and(|machine| machine.kernel.own_name().is_none()));
        assert!(named("pdp-11").is_none());
    }

    #[test]
    fn root_ports_have_no_switch() {
        let arguments = named("epyc-root-ports").unwrap().qemu_arguments().join(" ");
        assert!(arguments.contains("pcie-root-port,id=port1,chassis=2,addr=3.0"));
        assert!(arguments.contains("virtio-gpu-pci,id=device1.0,bus=port1,blob=true"));
        assert!(!arguments.contains("x3130"));
    }

    #[test]
    fn a_switch_has_one_root_port() {
        let arguments = named("skylake-switch").unwrap().qemu_arguments().join(" ");
        assert_eq!(arguments.matches("pcie-root-port").count(), 1);
        let devices = named("skylake-switch").unwrap().devices.len();
        assert_eq!(arguments.matches("xio3130-downstream").count(), devices);
        assert!(arguments.contains("-cpu Skylake-Client"));
    }
}
