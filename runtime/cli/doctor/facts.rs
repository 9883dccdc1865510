//! `Facts`: what the doctor knows of a machine, read once.
//!
//! Plain values: what is made of them is decided elsewhere, and tests make machines up. What could not be
//! read is kept with the reason.

use std::collections::BTreeMap;
use std::path::PathBuf;

use peervram::backends::PciAddress;
use peervram::backends::pci::Function;
use peervram::backends::topology::{Reading, Topology};
use serde::{Deserialize, Serialize, Serializer};

use crate::in_use::Use;

/// What is known of a machine.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// `uname -r`.
    pub kernel_release: String,
    /// Those options of [`OPTIONS`](super::kernel_config::OPTIONS) that the kernel was built with: `y`, `m`.
    pub kernel_options: Reading<BTreeMap<String, String>>,
    /// The kernel's command line.
    pub command_line: Reading<String>,
    /// Who asks.
    pub user: User,
    /// The limit of locked memory; none where there is no limit.
    pub memlock_bytes: Option<u64>,
    pub distribution: Distribution,
    /// Whether something says that this is a container.
    pub is_container: bool,
    /// What `/sys/class/iommu` names: dmar0, ivhd0, smmu3.
    pub iommus: Vec<String>,
    /// Whether any interrupt goes through an IOMMU; none where nothing tells.
    pub remaps_interrupts: Option<bool>,
    /// Whether VFIO was told to do without interrupt remapping.
    pub allows_unsafe_interrupts: bool,
    /// Whether vfio-pci is there to bind to.
    pub has_vfio_pci: bool,
    /// Device files that matter.
    pub files: Vec<DeviceFile>,
    /// The character device of each VFIO device that has one: vfio0.
    pub vfio_devices: BTreeMap<PciAddress, String>,
    /// BARs that sysfs offers to resize.
    pub resizable: BTreeMap<PciAddress, Vec<u32>>,
    /// What of the machine hangs on functions; those that nothing hangs on are left out.
    pub in_use: BTreeMap<PciAddress, Vec<Use>>,
    /// Names of the functions that matter, from the machine's own list.
    pub names: BTreeMap<PciAddress, String>,
    #[serde(serialize_with = "as_captured")]
    pub topology: Reading<Topology>,
    pub vulkan: Vulkan,
    pub broker: Broker,
}

/// The user who runs the doctor.
#[derive(Debug, Clone, Serialize)]
pub struct User {
    pub uid: u32,
    /// Which of the groups `video` and `render` they are in.
    pub groups: Vec<String>,
}

/// A distribution of Linux, as `/etc/os-release` has it; empty where nothing tells.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Distribution {
    /// `ID` and `ID_LIKE`, in words.
    pub ids: Vec<String>,
    pub codename: Option<String>,
}

/// A file below `/dev`.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceFile {
    pub path: PathBuf,
    /// Whether this user may open it as it would be used: to read and write, but the kernel's log to read.
    pub is_usable: bool,
    pub mode: u32,
    pub owner_uid: u32,
    pub owner_gid: u32,
}

/// What Vulkan says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vulkan {
    /// The devices of all drivers.
    Devices(Vec<VulkanDevice>),
    /// No loader, or no driver.
    Missing { why: String },
    /// The loader or a driver ended the process that asked, or did not answer.
    Broken { why: String },
}

/// What a broker at the usual socket says to this user.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Broker {
    /// There is no socket.
    Absent { socket: PathBuf },
    /// There is one, and this user gets no answer.
    Silent { socket: PathBuf, why: String },
    /// It answers.
    Answers {
        socket: PathBuf,
        /// What this user may borrow of.
        memories: Vec<LentMemory>,
        /// Whether this user may see who has what, reset and evict.
        is_operator: bool,
    },
}

/// Memory that a broker lends.
#[derive(Debug, Clone, Serialize)]
pub struct LentMemory {
    pub name: String,
    pub free_bytes: u64,
}

/// A physical device, as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VulkanDevice {
    pub name: String,
    pub driver: String,
    pub pci_address: Option<PciAddress>,
    pub is_cpu: bool,
    /// Those that others made; Venus takes its own alone.
    pub imports_dma_bufs: bool,
    pub exports_dma_bufs: bool,
    pub imports_host_pointers: bool,
}

impl Facts {
    /// The functions that matter: GPUs, devices bound to VFIO, devices with a DRM node.
    pub fn functions(&self) -> impl Iterator<Item = &Function> {
        self.all_functions().filter(|function| {
            function.is_gpu() || function.is_bound_to_vfio() || !function.drm_nodes.is_empty()
        })
    }

    /// What of the machine hangs on a function.
    pub fn uses(&self, function: PciAddress) -> &[Use] {
        self.in_use.get(&function).map_or(&[], Vec::as_slice)
    }

    /// Whether a function's configuration space is all ones: it does not answer.
    pub fn is_silent(&self, function: PciAddress) -> bool {
        let place = self.topology.known().and_then(|topology| topology.place(function));
        place.and_then(|place| place.config.known()).is_some_and(|config| config.is_all_ones())
    }

    /// Every function.
    pub fn all_functions(&self) -> impl Iterator<Item = &Function> {
        let places = self.topology.known().map(Topology::places).unwrap_or_default();
        places.iter().map(|place| &place.function)
    }

    /// The file at `path`, if it is there.
    pub fn file(&self, path: &str) -> Option<&DeviceFile> {
        self.files.iter().find(|file| file.path.to_str() == Some(path))
    }

    /// Whether the kernel was built with an option; none where its options were not read.
    pub fn has_option(&self, name: &str) -> Option<bool> {
        Some(self.kernel_options.known()?.contains_key(name))
    }

    pub fn is_root(&self) -> bool {
        self.user.uid == 0
    }

    pub fn vulkan_devices(&self) -> &[VulkanDevice] {
        match &self.vulkan {
            Vulkan::Devices(devices) => devices,
            Vulkan::Missing { .. } | Vulkan::Broken { .. } => &[],
        }
    }

    /// A Vulkan device without a place on the bus that takes mapped memory by its pointer: a CPU.
    pub fn host_pointer_importer(&self) -> Option<&VulkanDevice> {
        self.vulkan_devices().iter().find(|device| device.is_cpu && device.imports_host_pointers)
    }

    /// Whether the processor is of that vendor, as `/proc/cpuinfo` spells it.
    pub fn is_cpu_of(&self, vendor: &str) -> bool {
        let cpu = self.topology.known().and_then(|topology| topology.cpu.known());
        cpu.and_then(|cpu| cpu.vendor.as_deref()) == Some(vendor)
    }
}

/// In the format of captured trees, which other machines can look at.
fn as_captured<S: Serializer>(topology: &Reading<Topology>, serializer: S) -> Result<S::Ok, S::Error> {
    let value = match topology {
        Reading::Known(topology) => {
            let tree: serde_json::Value =
                serde_json::from_str(&topology.to_json()).map_err(serde::ser::Error::custom)?;
            Reading::Known(tree)
        }
        Reading::Unread(why) => Reading::Unread(why.clone()),
    };
    value.serialize(serializer)
}
