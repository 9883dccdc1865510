//! `Candidate`: a device that lends, or could if it were bound to vfio-pci.

use peervram::backends::PciAddress;
use peervram::backends::pci::{Bar, Function, blocks_its_group};
use peervram::backends::topology::parse_release;

use super::facts::{DeviceFile, Facts};
use crate::devices::LEAST_VRAM_BYTES;
use crate::in_use::Use;

/// Drivers of displays without memory that anybody would borrow: emulated ones, and those of management
/// controllers.
const NOT_WORTH_LENDING: [&str; 9] =
    ["virtio-pci", "bochs-drm", "ast", "mgag200", "cirrus", "cirrus-qemu", "qxl", "vmwgfx", "hyperv_drm"];

/// A device that might lend.
pub struct Candidate<'a> {
    pub function: &'a Function,
    /// What it would lend.
    pub memory: &'a Bar,
    pub is_bound: bool,
    /// It answers nothing but ones.
    pub is_silent: bool,
    /// Functions of its group whose drivers keep user space out.
    pub blockers: Vec<(PciAddress, &'a str)>,
    /// What opening it takes, by character device and by group; the files that are not there are left out.
    pub by_cdev: Option<[Option<&'a DeviceFile>; 2]>,
    pub by_group: Option<[Option<&'a DeviceFile>; 2]>,
}

impl<'a> Candidate<'a> {
    /// All of the machine, in its order. Where one is bound to VFIO, those that are not go on as they are.
    pub fn all(facts: &'a Facts) -> Vec<Self> {
        let mut all: Vec<Self> =
            facts.functions().filter_map(|function| Self::new(facts, function)).collect();
        if all.iter().any(|candidate| candidate.is_bound) {
            all.retain(|candidate| candidate.is_bound);
        }
        all
    }

    fn new(facts: &'a Facts, function: &'a Function) -> Option<Self> {
        let memory = function.largest_memory()?;
        let is_bound = function.is_bound_to_vfio();
        let is_dull = function.driver.as_deref().is_some_and(|driver| NOT_WORTH_LENDING.contains(&driver));
        let is_worth_it = function.is_gpu() && memory.size_bytes >= LEAST_VRAM_BYTES && !is_dull;
        if !is_bound && !is_worth_it {
            return None;
        }
        let is_neighbour = |other: &&Function| {
            other.address != function.address
                && other.iommu_group.is_some()
                && other.iommu_group == function.iommu_group
        };
        let blockers = (facts.all_functions().filter(is_neighbour))
            .filter_map(|other| {
                Some((other.address, other.driver.as_deref().filter(|driver| blocks_its_group(driver))?))
            })
            .collect();
        let by_cdev = facts
            .vfio_devices
            .get(&function.address)
            .map(|name| [facts.file(&format!("/dev/vfio/devices/{name}")), facts.file("/dev/iommu")]);
        let by_group = function
            .iommu_group
            .map(|group| [facts.file(&format!("/dev/vfio/{group}")), facts.file("/dev/vfio/vfio")]);
        let is_silent = facts.is_silent(function.address);
        Some(Self { function, memory, is_bound, is_silent, blockers, by_cdev, by_group })
    }

    pub fn address(&self) -> PciAddress {
        self.function.address
    }

    /// Whether this user can open the files that it takes.
    pub fn is_openable(&self) -> bool {
        let usable = |files: &Option<[Option<&DeviceFile>; 2]>| {
            files.is_some_and(|files| files.iter().all(|file| file.is_some_and(|file| file.is_usable)))
        };
        usable(&self.by_cdev) || usable(&self.by_group)
    }

    /// Whether it can be opened and used now.
    pub fn is_ready(&self) -> bool {
        self.is_bound && !self.is_silent && self.blockers.is_empty() && self.is_openable()
    }

    /// What would lose its driver if this were to lend, and what of the machine hangs on each.
    pub fn needed<'f>(&self, facts: &'f Facts) -> Vec<(PciAddress, &'f [Use])> {
        let own = (!self.is_bound).then_some(self.address());
        let taken = own.into_iter().chain(self.blockers.iter().map(|(other, _)| *other));
        taken.map(|function| (function, facts.uses(function))).filter(|(_, uses)| !uses.is_empty()).collect()
    }

    /// The command that binds it, with what has to go along.
    pub fn bind_command(&self) -> String {
        let address = self.address();
        let is_of_card = |other: &PciAddress| {
            (other.domain, other.bus, other.device) == (address.domain, address.bus, address.device)
        };
        let group = if self.blockers.iter().all(|(other, _)| is_of_card(other)) { "" } else { " --group" };
        format!("sudo peervram bind {address}{group}")
    }
}

/// Whether the kernel makes dma-bufs of VFIO memory, as far as is known.
pub fn exports_dma_bufs(facts: &Facts) -> bool {
    let is_old = parse_release(&facts.kernel_release).is_some_and(|release| release < (6, 19, 0));
    !is_old && facts.has_option("VFIO_PCI_DMABUF") != Some(false)
}
