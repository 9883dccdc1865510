//! The machines of the lab: one table, one row each.
//!
//! A row says which kernel, CPU, topology and devices a virtual machine has and what the kernel
//! is expected to answer about peer-to-peer there. To add a machine, add a row to [`MACHINES`];
//! to add a kind of topology or device, add a variant and its QEMU words to [`Topology`] or
//! [`Device`]. Nothing else in the lab knows machines by name.

use serde::{Deserialize, Serialize};

use crate::grace;
use crate::own_kernel::Flavour;
use crate::shape::{self, Shape};
use crate::tree;

pub use crate::device::{Device, PciId};
pub use crate::grace::{Firmware, Grace};
pub use crate::topology::Topology;

/// One virtual machine that the lab can start.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// What a person types.
    pub name: &'static str,
    /// One line: what this machine is there to show.
    pub about: &'static str,
    /// The kernel it boots.
    pub kernel: Kernel,
    /// QEMU's name of the CPU; the kernel's list of whitelisted host bridges looks at it.
    pub cpu: &'static str,
    /// How the devices hang together.
    pub topology: Topology,
    /// Who translates the devices' DMA addresses.
    pub iommu: Iommu,
    /// The devices, the first behind the first port and so on.
    pub devices: &'static [Device],
    /// What it has instead of devices and their ports if its topology is a tree.
    pub shape: Option<&'static Shape>,
    /// What is added to the kernel's command line; a shape has its own.
    pub parameters: &'static str,
    /// What `pci_p2pdma_map_type` is expected to say between the first two devices.
    pub peer_to_peer: PeerToPeer,
    /// Whether the guest can use Vulkan (Mesa lavapipe from the private root).
    pub vulkan: bool,
    /// Whether devices can be taken out and put in while it runs.
    pub hotplug: bool,
    /// Guest memory.
    pub memory_mib: u32,
    /// Whether it runs unless others are named. What is built or booted slowly is asked for by name.
    pub everyday: bool,
}

/// A kernel by where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian's package of this version ("7.3") from this suite.
    Debian {
        /// The first two numbers of the version.
        version: &'static str,
        /// Debian's suite.
        suite: &'static str,
    },
    /// One of the lab's own, built from Debian's source of this version.
    Own {
        /// The first two numbers of the version.
        version: &'static str,
        /// Which one.
        flavour: Flavour,
    },
}

/// Who translates the devices' DMA addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Iommu {
    /// Intel VT-d.
    Intel,
    /// The paravirtual IOMMU of the virtio family.
    Virtio,
}

/// The kernel's word for how one device reaches the memory of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerToPeer {
    /// By bus addresses, below the host bridge.
    BusAddress,
    /// Through a host bridge that the kernel trusts.
    ThroughHostBridge,
    /// Not at all: importing gets `EINVAL`.
    NotSupported,
    /// The kernel cannot export a VFIO dma-buf.
    NoFeature,
}

/// What the guest is told of the machine that it runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// [`Machine::name`].
    pub machine: String,
    /// The version that the row asks for, not the running release.
    pub kernel: String,
    /// [`Machine::cpu`].
    pub cpu: String,
    /// [`Machine::topology`].
    pub topology: Topology,
    /// [`Machine::iommu`].
    pub iommu: Iommu,
    /// [`Machine::peer_to_peer`].
    pub peer_to_peer: PeerToPeer,
    /// [`Machine::vulkan`].
    pub vulkan: bool,
    /// [`Machine::hotplug`].
    pub hotplug: bool,
    /// Whether the lab's importer module can be loaded there.
    pub holder: bool,
    /// Whether its kernel watches its own locks and DMA mappings.
    pub lockdep: bool,
    /// [`Machine::devices`].
    pub devices: Vec<Device>,
}

impl Facts {
    /// Whether the kernel can export a VFIO dma-buf at all.
    pub fn exports_dma_bufs(&self) -> bool {
        self.peer_to_peer != PeerToPeer::NoFeature
    }

    /// Whether a peer is expected to be allowed to import the lender's memory.
    pub fn allows_peers(&self) -> bool {
        matches!(self.peer_to_peer, PeerToPeer::BusAddress | PeerToPeer::ThroughHostBridge)
    }

    /// Whether it has a device that only lends, and a GPU with a screen that imports.
    pub fn has_lender_and_screen(&self) -> bool {
        let lends = |device: &Device| matches!(device, Device::SharedMemory { .. });
        self.devices.iter().any(lends) && self.devices.contains(&Device::VirtioGpu)
    }

    /// Whether programs find two Vulkan drivers there: Venus, and lavapipe. Such a machine is for tests of its own.
    pub fn has_two_vulkan_drivers(&self) -> bool {
        self.vulkan && self.devices.contains(&Device::VenusGpu)
    }

    /// Whether it has a device whose group nobody in user space may own.
    pub fn has_crowded_group(&self) -> bool {
        self.devices.contains(&Device::CrowdedGroup)
    }

    /// Whether it has model GPUs.
    pub fn has_models(&self) -> bool {
        self.devices.iter().any(Device::is_model)
    }

    /// Whether it has GPUs whose memory is memory of the machine. Such a machine is for tests of its own.
    pub fn has_grace(&self) -> bool {
        self.devices.iter().any(|device| matches!(device, Device::Grace(_)))
    }

    /// Whether one of them has reserved memory besides.
    pub fn has_reserved_memory(&self) -> bool {
        self.devices.iter().any(|device| matches!(device, Device::Grace(grace) if grace.has_mig_bug))
    }

    /// Whether they tell by CXL when their memory is ready.
    pub fn has_cxl(&self) -> bool {
        self.devices.iter().any(|device| matches!(device, Device::Grace(grace) if grace.has_cxl))
    }

    /// Whether it has every kind of lender and of importer at once. Such a machine is for tests of its own:
    /// what is for one kind has machines enough.
    pub fn has_every_importer(&self) -> bool {
        let has = |wanted: fn(&Device) -> bool| self.devices.iter().any(wanted);
        self.has_lender_and_screen()
            && self.has_models()
            && self.vulkan
            && has(|device| matches!(device, Device::Card { .. }))
            && has(|device| matches!(device, Device::Twins { .. }))
    }
}

const SMALL_7_3: Kernel = Kernel::Own { version: "7.3", flavour: Flavour::Small };
const LOCKDEP_7_3: Kernel = Kernel::Own { version: "7.3", flavour: Flavour::Lockdep };
const DEBIAN_7_3: Kernel = Kernel::Debian { version: "7.3", suite: "trixie-backports" };
const DEBIAN_6_12: Kernel = Kernel::Debian { version: "6.12", suite: "trixie" };

pub(crate) const DEFAULT: Machine = Machine {
    name: "small-epyc-root-ports",
    about: "our own Linux 7.3, a trusted host bridge between lender and importer (the default)",
    kernel: SMALL_7_3,
    cpu: "EPYC",
    topology: Topology::RootPorts,
    iommu: Iommu::Intel,
    devices: &[Device::SharedMemory { size_mib: 256 }, Device::VirtioGpu, Device::CrowdedGroup],
    shape: None,
    parameters: "",
    peer_to_peer: PeerToPeer::ThroughHostBridge,
    vulkan: true,
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

/// What takes memory back, against everybody who may have it then.
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
            // In no table yet.
            id: PciId { vendor: 0x10de, device: 0x7777 },
            has_cxl: true,
            ..GB200
        }
        .with_company(),
        everyday: false,
        ..GRACE
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
    MACHINES.iter().chain(shape::MACHINES)
}

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

impl Kernel {
    /// The version that the row asks for.
    pub const fn version(&self) -> &'static str {
        match self {
            Kernel::Debian { version, .. } | Kernel::Own { version, .. } => version,
        }
    }

    /// Its name if it is one of our own.
    pub fn own_name(&self) -> Option<&'static str> {
        match self {
            Kernel::Debian { .. } => None,
            Kernel::Own { flavour, .. } => Some(flavour.name()),
        }
    }
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

    /// What the guest is told of this machine.
    pub fn facts(&self) -> Facts {
        Facts {
            machine: self.name.into(),
            kernel: self.kernel.version().into(),
            cpu: self.cpu.into(),
            topology: self.topology,
            iommu: self.iommu,
            peer_to_peer: self.peer_to_peer,
            vulkan: self.vulkan,
            hotplug: self.hotplug,
            holder: self.kernel.own_name().is_some(),
            lockdep: matches!(self.kernel, Kernel::Own { flavour: Flavour::Lockdep, .. }),
            devices: self.devices.to_vec(),
        }
    }

    /// The kernel modules that this machine wants, dependencies and file systems left out.
    pub fn modules(&self) -> Vec<&'static str> {
        if self.kernel.own_name().is_some() {
            // Everything is built in.
            return Vec::new();
        }
        let mut modules = vec!["vfio_iommu_type1", "vfio-pci"];
        if self.iommu == Iommu::Virtio {
            modules.insert(0, "virtio_iommu");
        }
        if self.devices.contains(&Device::VirtioGpu) || self.has_venus() {
            modules.push("virtio-gpu");
        }
        // Fences for tests, and an importer that refuses.
        modules.push("vgem");
        modules
    }

    /// Whether its GPU has 3D, which QEMU draws.
    pub fn has_venus(&self) -> bool {
        self.devices.contains(&Device::VenusGpu)
    }

    /// The part of the kernel's command line that is this machine's.
    pub fn command_line(&self) -> String {
        let iommu = match self.iommu {
            Iommu::Intel => "intel_iommu=on",
            Iommu::Virtio => "intel_iommu=off",
        };
        let mut words = vec![iommu.to_string()];
        words.extend(grace::memories(self).iter().map(|memory| memory.kernel_argument()));
        if self.has_venus() {
            // For init: which Vulkan drivers programs are to find.
            words.push("peervram.venus".into());
        }
        words.push(self.shape.map_or(self.parameters, |shape| shape.parameters).into());
        words.retain(|word| !word.is_empty());
        words.join(" ")
    }

    /// QEMU's arguments for the machine itself: CPU, memory, bridges and devices.
    pub fn qemu_arguments(&self) -> Vec<String> {
        let memory = format!("memory-backend-memfd,id=ram,size={}M,share=on", self.memory_mib);
        let coherent = grace::memories(self);
        let of_gpus_mib: u64 = coherent.iter().map(|memory| memory.size_bytes >> 20).sum();
        let mut arguments = words(&[
            match coherent.is_empty() {
                true => ("-machine", "q35,kernel-irqchip=split,memory-backend=ram"),
                // Each memory is that of a NUMA node then.
                false => ("-machine", "q35,kernel-irqchip=split"),
            },
            ("-object", &memory),
            ("-m", &(u64::from(self.memory_mib) + of_gpus_mib).to_string()),
            ("-smp", "2"),
            ("-cpu", self.cpu),
            match self.iommu {
                Iommu::Intel => ("-device", "intel-iommu,intremap=on,caching-mode=on"),
                Iommu::Virtio => ("-device", "virtio-iommu-pci,addr=1e.0"),
            },
        ]);
        if !coherent.is_empty() {
            arguments.extend(grace::qemu_arguments(&coherent));
        }
        if self.hotplug {
            // Without it QEMU's ports leave hot-plugging to ACPI, which our own kernels have no driver for.
            arguments.extend(words(&[("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")]));
        }
        arguments.extend(self.topology.qemu_arguments(self.devices.len()));
        for (index, device) in self.devices.iter().enumerate() {
            arguments.extend(device.qemu_arguments(index, self.topology));
        }
        if let Some(shape) = self.shape {
            arguments.extend(tree::qemu_arguments(shape.tree));
        }
        arguments
    }
}

/// Arguments of pairs of an option and its value.
pub(crate) fn words(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs.iter().flat_map(|(option, value)| [option.to_string(), value.to_string()]).collect()
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

    #[test]
    fn facts_survive_the_wire() {
        let facts = MACHINES[0].facts();
        let text = serde_json::to_string(&facts).unwrap();
        assert_eq!(serde_json::from_str::<Facts>(&text).unwrap(), facts);
    }
}
