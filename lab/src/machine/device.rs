//! A device of a machine: what it calls itself, and QEMU's words for it.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::grace::Grace;
use super::options::options;
use super::pci_id::PciId;
use super::topology::Topology;

/// A device of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// QEMU's `ivshmem-plain`: a PCI function whose BAR 2 is plain memory; the lender.
    SharedMemory {
        /// Size of BAR 2.
        size_mib: u32,
    },
    /// Another such function, whose IOMMU group holds a second function that has a kernel driver: nobody in
    /// user space may own it.
    CrowdedGroup,
    /// Two functions like [`Device::SharedMemory`] in one slot: one IOMMU group, and one reset for both.
    Twins {
        /// Size of each one's BAR 2.
        size_mib: u32,
    },
    /// QEMU's NVMe controller, for its persistent memory region: BAR 4 is plain memory, and shows nothing
    /// until a register in BAR 0 enables it. It has a reset of its own (FLR) and sleep states.
    Card {
        /// Size of BAR 4, a power of two.
        size_mib: u32,
    },
    /// QEMU's igb, an Intel 82576: it sends frames to itself, so that its DMA reads and writes what it imports. Its engine is
    /// QEMU's own, and tells of no fault.
    NetworkCard,
    /// QEMU's NVMe controller with a memory buffer of its own (CMB) in BAR 2, where a queue can lie, and a megabyte of blocks.
    Storage,
    /// A virtio GPU with blob resources: the GPU that imports, and whose screen is dumped.
    VirtioGpu,
    /// A virtio GPU with 3D, whose Vulkan driver in the guest is Venus: it has the host's driver do the work, which
    /// is lavapipe in the private root. It imports nothing, and exports its memory.
    VenusGpu,
    /// A GPU with engines of its own, served by `peervram-model`: it lends and it does DMA.
    ModelGpu {
        /// What it calls itself; drivers look at it.
        id: PciId,
        /// Size of its VRAM; BAR 2 shows all of it. A power of two, 16 or more.
        vram_mib: u32,
    },
    /// A model GPU whose VRAM is memory of the machine and behind no BAR; it belongs to the kernel's nvgrace
    /// driver.
    Grace(Grace),
}

/// The file with the blocks of a machine's storage, as QEMU sees it.
const BLOCKS: &str = "/lab/blocks";
/// How long that file is.
pub(crate) const BLOCKS_BYTES: u64 = 1 << 20;

impl Device {
    /// What it calls itself on the bus.
    pub fn id(&self) -> PciId {
        match self {
            Device::SharedMemory { .. } | Device::CrowdedGroup | Device::Twins { .. } => PciId::SHARED_MEMORY,
            Device::Card { .. } | Device::Storage => PciId::CARD,
            Device::NetworkCard => PciId::NETWORK_CARD,
            Device::VirtioGpu | Device::VenusGpu => PciId::VIRTIO_GPU,
            Device::ModelGpu { id, .. } => *id,
            Device::Grace(grace) => grace.id,
        }
    }

    /// How many functions of that name it has.
    pub fn functions(&self) -> usize {
        if matches!(self, Device::Twins { .. }) { 2 } else { 1 }
    }

    /// Whether it is a model GPU whose VRAM is behind a BAR.
    pub fn is_model(&self) -> bool {
        matches!(self, Device::ModelGpu { .. })
    }

    /// Whether a process of the lab's serves it: model GPUs of both kinds.
    pub fn is_served(&self) -> bool {
        matches!(self, Device::ModelGpu { .. } | Device::Grace(_))
    }

    /// The driver that it is bound to where it lends.
    pub fn driver(&self) -> &'static str {
        if matches!(self, Device::Grace(_)) { "nvgrace_gpu_vfio_pci" } else { "vfio-pci" }
    }

    /// Whether its memory is lent, so that it belongs to vfio-pci or a variant of it.
    pub fn lends(&self) -> bool {
        match self {
            Device::SharedMemory { .. }
            | Device::Twins { .. }
            | Device::Card { .. }
            | Device::Storage
            | Device::ModelGpu { .. }
            | Device::Grace(_) => true,
            Device::CrowdedGroup | Device::NetworkCard | Device::VirtioGpu | Device::VenusGpu => false,
        }
    }

    /// Whether a test opens it by VFIO, to lend its memory or to have its engine import.
    pub fn is_for_vfio(&self) -> bool {
        self.lends() || *self == Device::NetworkCard
    }

    /// This device behind the port of the same number.
    pub(crate) fn qemu_arguments(self, index: usize, topology: Topology) -> Vec<String> {
        const LIFE: u32 = 0;
        let memories = self.qemu_memories(index, LIFE);
        let memories = memories.iter().flat_map(|memory| options(&[("-object", memory)]));
        let functions = self.qemu_functions(index, topology, LIFE);
        let blocks = matches!(self, Device::Storage)
            .then(|| format!("driver=file,node-name=blocks{index},filename={BLOCKS}"));
        let blocks = blocks.iter().flat_map(|blocks| options(&[("-blockdev", blocks)]));
        memories
            .chain(blocks)
            .chain(functions.iter().flat_map(|function| options(&[("-device", function)])))
            .collect()
    }

    /// What QEMU calls a function of the row's device of that number.
    pub(crate) fn qemu_name(index: usize, function: usize) -> String {
        format!("device{index}.{function}")
    }

    /// The sizes of the memories behind its BARs that QEMU makes, function by function.
    fn sizes_behind_bars_mib(self) -> Vec<u32> {
        match self {
            Device::SharedMemory { size_mib } | Device::Card { size_mib } => vec![size_mib],
            Device::Twins { size_mib } => vec![size_mib, size_mib],
            Device::CrowdedGroup => vec![1],
            Device::NetworkCard
            | Device::Storage
            | Device::VirtioGpu
            | Device::VenusGpu
            | Device::ModelGpu { .. }
            | Device::Grace(_) => vec![],
        }
    }

    /// The host's memory that it takes, whoever makes it.
    pub(crate) fn host_memory_mib(self) -> u64 {
        match self {
            Device::ModelGpu { vram_mib, .. } => vram_mib.into(),
            Device::Grace(grace) => grace.memory_mib.into(),
            _ => self.sizes_behind_bars_mib().into_iter().map(u64::from).sum(),
        }
    }

    /// QEMU's words for the memory behind its BARs, function by function. A device that is plugged
    /// in again gets new memory: `life` counts how often.
    pub(crate) fn qemu_memories(self, index: usize, life: u32) -> Vec<String> {
        let sizes_mib = self.sizes_behind_bars_mib();
        let memory = |(function, size_mib)| {
            format!("memory-backend-memfd,id=vram{index}.{function}.{life},size={size_mib}M,share=on")
        };
        sizes_mib.iter().enumerate().map(memory).collect()
    }

    /// QEMU's words for its functions, in order.
    pub(crate) fn qemu_functions(self, index: usize, topology: Topology, life: u32) -> Vec<String> {
        let name = |function| Device::qemu_name(index, function);
        let shared_memory = |function: usize| {
            let place = format!("id={},bus=port{index},addr=0.{function}", name(function));
            format!("ivshmem-plain,memdev=vram{index}.{function}.{life},{place}")
        };
        let virtio_gpu = |name: String| {
            format!("id={name},bus=port{index},blob=true,{},disable-legacy=on", iommu_platform(topology))
        };
        match self {
            Device::SharedMemory { .. } => vec![shared_memory(0)],
            Device::CrowdedGroup => vec![
                format!("{},multifunction=on", shared_memory(0)),
                format!("virtio-rng-pci,id={},bus=port{index},addr=0.1", name(1)),
            ],
            Device::Twins { .. } => vec![format!("{},multifunction=on", shared_memory(0)), shared_memory(1)],
            Device::Card { .. } => {
                let memory = format!("vram{index}.0.{life}");
                vec![format!("nvme,id={},serial={memory},pmrdev={memory},bus=port{index}", name(0))]
            }
            Device::Storage => {
                let place = format!("id={},bus=port{index}", name(0));
                vec![format!("nvme,{place},serial=blocks{index},cmb_size_mb=1,drive=blocks{index}")]
            }
            Device::NetworkCard => vec![format!("igb,id={},bus=port{index}", name(0))],
            Device::VirtioGpu => vec![format!("virtio-gpu-pci,{}", virtio_gpu(name(0)))],
            // hostmem: a BAR in which memory of the host's driver is shown to the guest's CPU.
            Device::VenusGpu => {
                vec![format!("virtio-gpu-gl-pci,{},venus=on,hostmem=512M", virtio_gpu(name(0)))]
            }
            // A socket's address is no single word, so the device is written as JSON.
            Device::ModelGpu { .. } | Device::Grace(_) => vec![
                json!({
                    "driver": "vfio-user-pci",
                    "id": name(0),
                    "bus": format!("port{index}"),
                    "socket": { "type": "unix", "path": format!("/lab/{}", socket_name(index)) },
                })
                .to_string(),
            ],
        }
    }
}

/// The socket by which QEMU speaks with the device's model, in the machine's folder.
pub(crate) fn socket_name(index: usize) -> String {
    format!("model{index}")
}

/// How a virtio GPU reaches the guest's memory. On: the guest hands out IO virtual addresses; without it the device would take them for physical
/// ones and refuse late, seen only in the kernel's log. Behind a switch the kernel hands out bus addresses, which on
/// real hardware the switch routes before any IOMMU sees them. QEMU's switch sends everything to the IOMMU, so there
/// the device goes past it.
fn iommu_platform(topology: Topology) -> &'static str {
    match topology {
        Topology::RootPorts => "iommu_platform=on",
        Topology::Switch | Topology::Tree => "iommu_platform=off",
    }
}

#[cfg(test)]
mod tests {
    use crate::machines::named;

    #[test]
    fn a_model_is_behind_its_port() {
        let arguments = named("two-models-root-ports").unwrap().qemu_arguments();
        let is_second = |word: &&String| word.contains("/lab/model1\"") && word.contains("\"port1\"");
        let device = arguments.iter().find(is_second).unwrap();
        let device: serde_json::Value = serde_json::from_str(device).unwrap();
        assert_eq!(device["driver"], "vfio-user-pci");
    }

    #[test]
    fn a_gpu_with_3d_is_told_of_to_init_and_is_no_screen() {
        let machine = named("small-two-drivers").unwrap();
        let arguments = machine.qemu_arguments().join(" ");
        assert!(arguments.contains("virtio-gpu-gl-pci,id=device1.0,bus=port1,blob=true,iommu_platform=on"));
        assert!(arguments.contains("venus=on,hostmem=512M"), "{arguments}");
        assert!(machine.command_line().split(' ').any(|word| word == "peervram.venus"));
        let facts = machine.facts();
        assert!(facts.has_two_vulkan_drivers() && !facts.has_lender_and_screen());
        assert!(!named("small-revoke").unwrap().command_line().contains("venus"));
    }

    #[test]
    fn twins_share_a_slot_and_have_their_own_memory() {
        let arguments = named("small-revoke").unwrap().qemu_arguments();
        let twins: Vec<&String> = arguments.iter().filter(|word| word.contains("id=device5.")).collect();
        assert_eq!(twins.len(), 2);
        assert!(twins.iter().all(|twin| twin.contains("bus=port5,")), "{twins:?}");
        assert!(twins[0].contains("memdev=vram5.0.0,") && twins[0].ends_with("addr=0.0,multifunction=on"));
        assert!(twins[1].contains("memdev=vram5.1.0,") && twins[1].ends_with("addr=0.1"));
    }
}
