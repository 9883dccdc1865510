//! `Machine`: a virtual machine as data, and as QEMU's arguments; [`Facts`], what its guest is told of it.
//!
//! Which ones there are is a table, [`machines`](crate::machines). To add a kind of topology or device, add a variant
//! and its QEMU words to [`Topology`] or [`Device`].

mod device;
pub(crate) mod device_tree;
mod flattened_tree;
pub(crate) mod grace;
pub(crate) mod options;
mod pci_id;
pub mod shape;
mod ssdt;
mod topology;
pub mod tree;

use serde::{Deserialize, Serialize};

use crate::kernel::own_kernel::Flavour;
use options::options;
use shape::Shape;

pub use crate::architecture::Architecture;
pub use device::Device;
pub(crate) use device::{BLOCKS_BYTES, socket_name};
pub use grace::{Firmware, Grace};
pub use pci_id::PciId;
pub use topology::Topology;

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
    /// What the kernel is to take the first device of the root bus for, by which it knows the host bridge. Takes one of our own kernels.
    pub host_bridge: Option<PciId>,
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
    /// Whether it is for real Vulkan drivers, on stand-ins for their GPUs ([`crate::vm::driver`]).
    pub drivers: bool,
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
    /// Arm's SMMUv3.
    Smmu,
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
    /// [`Machine::architecture`].
    pub architecture: Architecture,
    /// [`Machine::cpu`].
    pub cpu: String,
    /// [`Machine::topology`].
    pub topology: Topology,
    /// [`Machine::iommu`].
    pub iommu: Iommu,
    /// [`Machine::host_bridge`].
    pub host_bridge: Option<PciId>,
    /// [`Machine::peer_to_peer`].
    pub peer_to_peer: PeerToPeer,
    /// [`Machine::vulkan`].
    pub vulkan: bool,
    /// [`Machine::drivers`].
    pub drivers: bool,
    /// [`Machine::hotplug`].
    pub hotplug: bool,
    /// Whether the lab's importer module can be loaded there.
    pub holder: bool,
    /// Whether its kernel watches its own locks and DMA mappings.
    pub lockdep: bool,
    /// Whether its kernel maps each of several ranges behind the one before, which none that was released does.
    pub mended: bool,
    /// [`Machine::devices`].
    pub devices: Vec<Device>,
}

impl Facts {
    /// Whether the private root is its userland, with libraries for programs and drivers for Vulkan.
    pub fn has_root(&self) -> bool {
        self.architecture.is_the_hosts()
    }

    /// Whether the kernel can export a VFIO dma-buf at all.
    pub fn exports_dma_bufs(&self) -> bool {
        self.peer_to_peer != PeerToPeer::NoFeature
    }

    /// Whether a peer is expected to be allowed to import the lender's memory.
    pub fn allows_peers(&self) -> bool {
        matches!(self.peer_to_peer, PeerToPeer::BusAddress | PeerToPeer::ThroughHostBridge)
    }

    /// Whether the kernel is expected to map all ranges of a buffer for a peer: where bus addresses do, or where it is mended.
    pub fn maps_several_ranges(&self) -> bool {
        self.peer_to_peer == PeerToPeer::BusAddress || (self.allows_peers() && self.mended)
    }

    /// Whether it is expected to map a buffer of one range for a peer, and one of several wrongly or not at all.
    pub fn maps_one_range(&self) -> bool {
        self.allows_peers() && !self.maps_several_ranges()
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

    /// Whether devices hang together as on most machines: root ports of a trusted host bridge, behind an IOMMU.
    pub fn has_usual_topology(&self) -> bool {
        let has_usual_iommu = match self.architecture {
            Architecture::X86 => self.cpu == "EPYC" && self.iommu == Iommu::Intel,
            Architecture::Arm64 => self.host_bridge.is_some() && self.iommu == Iommu::Smmu,
        };
        self.topology == Topology::RootPorts && has_usual_iommu
    }

    /// Whether model GPUs can reach each other by iommufd. QEMU's virtio-iommu does not tell vfio-user devices of mappings with the
    /// flag for MMIO, which is how iommufd maps a BAR.
    pub fn has_peers_by_iommufd(&self) -> bool {
        self.iommu != Iommu::Virtio
    }

    /// Whether it has a network card whose engine imports.
    pub fn has_network_card(&self) -> bool {
        self.devices.contains(&Device::NetworkCard)
    }

    /// Whether it has storage whose queue can lie in lent memory.
    pub fn has_storage(&self) -> bool {
        self.devices.contains(&Device::Storage)
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

impl Kernel {
    /// The version that the row asks for.
    pub const fn version(&self) -> &'static str {
        match self {
            Kernel::Debian { version, .. } | Kernel::Own { version, .. } => version,
        }
    }

    /// For which processors.
    pub const fn architecture(&self) -> Architecture {
        match self {
            Kernel::Debian { .. } => Architecture::X86,
            Kernel::Own { flavour, .. } => flavour.architecture(),
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
    /// Of which processors it is: those of its kernel.
    pub const fn architecture(&self) -> Architecture {
        self.kernel.architecture()
    }

    /// What the guest is told of this machine.
    pub fn facts(&self) -> Facts {
        Facts {
            machine: self.name.into(),
            kernel: self.kernel.version().into(),
            architecture: self.architecture(),
            cpu: self.cpu.into(),
            topology: self.topology,
            iommu: self.iommu,
            host_bridge: self.host_bridge,
            peer_to_peer: self.peer_to_peer,
            vulkan: self.vulkan,
            drivers: self.drivers,
            hotplug: self.hotplug,
            holder: self.kernel.own_name().is_some(),
            lockdep: matches!(self.kernel, Kernel::Own { flavour: Flavour::Lockdep, .. }),
            mended: matches!(self.kernel, Kernel::Own { flavour: Flavour::Mended, .. }),
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

    /// The host's memory that it may take: the guest's, and that of its devices.
    pub fn host_memory_mib(&self) -> u64 {
        let of_devices: u64 = self.devices.iter().map(|device| device.host_memory_mib()).sum();
        u64::from(self.memory_mib) + of_devices
    }

    /// Whether its GPU has 3D, which QEMU draws.
    pub fn has_venus(&self) -> bool {
        self.devices.contains(&Device::VenusGpu)
    }

    /// The part of the kernel's command line that is this machine's.
    pub fn command_line(&self) -> String {
        let iommu = match (self.architecture(), self.iommu) {
            (Architecture::X86, Iommu::Intel) => "intel_iommu=on",
            (Architecture::X86, _) => "intel_iommu=off",
            (Architecture::Arm64, _) => "",
        };
        let mut words = vec![iommu.to_string()];
        words.extend(grace::kernel_arguments(self));
        if self.has_venus() {
            // For init: which Vulkan drivers programs are to find.
            words.push("peervram.venus".into());
        }
        words.push(self.shape.map_or(self.parameters, |shape| shape.parameters).into());
        words.retain(|word| !word.is_empty());
        words.join(" ")
    }

    /// QEMU's arguments for the machine itself: what its description by the firmware depends on.
    pub(crate) fn board_arguments(&self) -> Vec<String> {
        let memory = format!("memory-backend-memfd,id=ram,size={}M,share=on", self.memory_mib);
        let coherent = grace::memories(self);
        let of_gpus_mib: u64 = coherent.iter().map(|memory| memory.size_bytes >> 20).sum();
        let mut board = self.architecture().qemu_machine().to_string();
        if self.iommu == Iommu::Smmu {
            board += ",iommu=smmuv3";
        }
        // Else each memory is that of a NUMA node.
        if coherent.is_empty() {
            board += ",memory-backend=ram";
        }
        let mut arguments = options(&[
            ("-machine", &board),
            ("-object", &memory),
            ("-m", &(u64::from(self.memory_mib) + of_gpus_mib).to_string()),
            ("-smp", "2"),
            ("-cpu", self.cpu),
        ]);
        arguments.extend(match self.iommu {
            Iommu::Intel => options(&[("-device", "intel-iommu,intremap=on,caching-mode=on")]),
            Iommu::Virtio => options(&[("-device", "virtio-iommu-pci,addr=1e.0")]),
            Iommu::Smmu => Vec::new(),
        });
        if !coherent.is_empty() {
            arguments.extend(grace::qemu_arguments(&coherent));
        }
        arguments
    }

    /// QEMU's arguments: the machine itself, its bridges and devices.
    pub fn qemu_arguments(&self) -> Vec<String> {
        let mut arguments = self.board_arguments();
        if self.architecture() == Architecture::X86 {
            arguments.extend(grace::ssdt_arguments(self));
        }
        if self.hotplug && self.architecture() == Architecture::X86 {
            // Without it QEMU's ports leave hot-plugging to ACPI, which our own kernels have no driver for.
            arguments.extend(options(&[("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")]));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::MACHINES;

    #[test]
    fn facts_survive_the_wire() {
        let facts = MACHINES[0].facts();
        let text = serde_json::to_string(&facts).unwrap();
        assert_eq!(serde_json::from_str::<Facts>(&text).unwrap(), facts);
    }
}
