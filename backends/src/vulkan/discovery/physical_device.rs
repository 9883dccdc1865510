//! `PhysicalDevice`: what a Vulkan driver says of one of its devices, as plain values.
//!
//! Read once, by [`Instance::physical_devices`](crate::vulkan::Instance::physical_devices) or when a
//! [`Device`](crate::vulkan::Device) is taken over; holds nothing open.
#![expect(unsafe_code, reason = "queries to the Vulkan driver")]

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ash::{ext, khr, vk};

use super::extensions::{Extension, missing_extensions};
use super::import_policy::{self, ImportPolicy};
use crate::vulkan::failure::failure;
use crate::vulkan::usage::BufferUsage;
use crate::{OnRefusal, OnRevoke, PciAddress, Result};

/// A DRM device node, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DrmNode {
    /// The major number, 226 on Linux.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
}

impl DrmNode {
    /// The number of the node at `path`.
    ///
    /// # Errors
    /// What `stat` says: [`Kind::NotFound`](crate::Kind::NotFound), most likely.
    pub fn from_path(path: &Path) -> Result<Self> {
        let status = fs::metadata(path).map_err(|error| {
            crate::Error::os("find a DRM node", error)
                .on(path.display())
                .next("ls /dev/dri lists the nodes of this machine")
        })?;
        let number = status.rdev();
        Ok(Self { major: rustix::fs::major(number), minor: rustix::fs::minor(number) })
    }

    /// Its path, `/dev/dri/renderD128`, where sysfs knows it.
    pub fn path(self) -> Option<PathBuf> {
        let uevent =
            fs::read_to_string(format!("/sys/dev/char/{}:{}/uevent", self.major, self.minor)).ok()?;
        let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
        Some(Path::new("/dev").join(name))
    }
}

/// A physical device as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PhysicalDevice {
    /// Its name.
    pub name: String,
    /// The driver's name, "radv"; empty where it does not tell (before Vulkan 1.2).
    pub driver_name: String,
    /// The driver's version in its own words, "Mesa 26.1.6"; empty where it does not tell.
    pub driver_version: String,
    /// `VkDriverId`, zero where the driver does not tell.
    pub driver_id: i32,
    /// The Vulkan version it offers: major, minor, patch.
    pub api_version: (u32, u32, u32),
    /// Where it sits on the PCI bus, where the driver tells.
    pub pci_address: Option<PciAddress>,
    /// Its primary DRM node, `/dev/dri/card0`, where the driver tells.
    pub primary_node: Option<DrmNode>,
    /// Its render node, `/dev/dri/renderD128`, where the driver tells.
    pub render_node: Option<DrmNode>,
    /// Whether it is a CPU, in whose address space it works. Venus is none, whatever the host's device is.
    pub is_cpu: bool,
    /// How much memory of its own it has: the largest heap that it calls local. Of a CPU, the host's.
    pub local_memory_bytes: u64,
    /// Whether it says that storage buffers can be imported as dma-bufs. Whether it can map those
    /// of a particular exporter, only an import tells.
    pub can_import_dma_buf: bool,
    /// Whether it says that storage buffers can be exported as dma-bufs.
    pub can_export_dma_buf: bool,
    /// What host pointers must be aligned to, where it can import them.
    pub host_pointer_alignment_bytes: Option<u64>,
    /// Which extensions it lacks, and what that costs.
    pub missing_extensions: Vec<Extension>,
}

impl PhysicalDevice {
    /// What imports mean to its driver.
    pub fn import_policy(&self) -> &'static ImportPolicy {
        import_policy::of(self.driver_id)
    }

    /// What a dma-buf's import needs around a revoke. Where the driver is not known, freeing before
    /// the revoke is right for all.
    pub fn on_revoke(&self) -> OnRevoke {
        // A driver for CPUs maps what it imports itself, whatever it is called.
        if self.is_cpu { OnRevoke::Reimport } else { self.import_policy().on_revoke }
    }

    /// What becomes of a `VkDevice` where the kernel refuses to map an import of it. Where the driver is not known, it is
    /// taken for lost.
    pub fn on_refusal(&self) -> OnRefusal {
        if self.is_cpu { OnRefusal::ImportFails } else { self.import_policy().on_refusal }
    }

    /// Whether dma-bufs that others made can be tried. Venus imports those of its own renderer alone, whatever it says
    /// of itself: `vn_renderer_bo_create_from_dma_buf` in Mesa wants a resource that the host has made, and the kernel's
    /// virtio-gpu attaches to no other device's memory where it has 3D.
    pub fn imports_foreign_dma_bufs(&self) -> bool {
        self.can_import_dma_buf && !is_venus(self.driver_id)
    }

    /// Asks the driver. `instance` is of Vulkan 1.1 or later.
    ///
    /// # Errors
    /// [`Kind::Vulkan`](crate::Kind::Vulkan) where the extensions cannot be listed.
    pub(crate) fn describe(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Result<Self> {
        // SAFETY: `physical` is a physical device of `instance`, which the caller keeps alive.
        let extensions = unsafe { instance.enumerate_device_extension_properties(physical) }
            .map_err(|result| failure("list a Vulkan device's extensions", result))?;
        let names: Vec<CString> = extensions
            .iter()
            .filter_map(|extension| Some(extension.extension_name_as_c_str().ok()?.to_owned()))
            .collect();
        let has = |name: &CStr| names.iter().any(|present| present.as_c_str() == name);
        // SAFETY: as above.
        let basic = unsafe { instance.get_physical_device_properties(physical) };

        let mut driver = vk::PhysicalDeviceDriverProperties::default();
        let mut pci = vk::PhysicalDevicePCIBusInfoPropertiesEXT::default();
        let mut drm = vk::PhysicalDeviceDrmPropertiesEXT::default();
        let mut host = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
        let (has_pci, has_drm) = (has(ext::pci_bus_info::NAME), has(ext::physical_device_drm::NAME));
        let has_host = has(ext::external_memory_host::NAME);
        // A driver may be asked only for structures that it knows.
        let mut all = vk::PhysicalDeviceProperties2::default();
        if basic.api_version >= vk::API_VERSION_1_2 || has(khr::driver_properties::NAME) {
            all = all.push_next(&mut driver);
        }
        if has_pci {
            all = all.push_next(&mut pci);
        }
        if has_drm {
            all = all.push_next(&mut drm);
        }
        if has_host {
            all = all.push_next(&mut host);
        }
        if basic.api_version >= vk::API_VERSION_1_1 {
            // SAFETY: as above; every structure in the chain is initialised and outlives the call.
            unsafe { instance.get_physical_device_properties2(physical, &mut all) };
        }
        let missing_extensions = missing_extensions(names.iter().map(CString::as_c_str));
        let has_dma_buf = has(khr::external_memory_fd::NAME) && has(ext::external_memory_dma_buf::NAME);

        let can = |handle_type, feature| {
            basic.api_version >= vk::API_VERSION_1_1
                && external_features(instance, physical, BufferUsage::default().flags(), handle_type)
                    .contains(feature)
        };
        let (importable, exportable) =
            (vk::ExternalMemoryFeatureFlags::IMPORTABLE, vk::ExternalMemoryFeatureFlags::EXPORTABLE);

        // SAFETY: as above.
        let memory = unsafe { instance.get_physical_device_memory_properties(physical) };
        let heaps = memory.memory_heaps_as_slice().iter();
        let local = heaps.filter(|heap| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));

        let text =
            |text: Result<&CStr, _>| text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self {
            name: text(basic.device_name_as_c_str()),
            driver_name: text(driver.driver_name_as_c_str()),
            driver_version: text(driver.driver_info_as_c_str()),
            driver_id: driver.driver_id.as_raw(),
            api_version: (
                vk::api_version_major(basic.api_version),
                vk::api_version_minor(basic.api_version),
                vk::api_version_patch(basic.api_version),
            ),
            pci_address: has_pci.then_some(PciAddress {
                domain: pci.pci_domain,
                bus: pci.pci_bus as u8,
                device: pci.pci_device as u8,
                function: pci.pci_function as u8,
            }),
            primary_node: (has_drm && drm.has_primary != 0)
                .then_some(DrmNode { major: drm.primary_major as u32, minor: drm.primary_minor as u32 }),
            render_node: (has_drm && drm.has_render != 0)
                .then_some(DrmNode { major: drm.render_major as u32, minor: drm.render_minor as u32 }),
            // Venus hands on what the host's driver says, for which the memory is another one.
            is_cpu: basic.device_type == vk::PhysicalDeviceType::CPU && !is_venus(driver.driver_id.as_raw()),
            local_memory_bytes: local.map(|heap| heap.size).max().unwrap_or(0),
            can_import_dma_buf: has_dma_buf
                && can(vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT, importable),
            can_export_dma_buf: has_dma_buf
                && can(vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT, exportable),
            host_pointer_alignment_bytes: (has_host
                && can(vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT, importable))
            .then_some(host.min_imported_host_pointer_alignment),
            missing_extensions,
        })
    }
}

fn is_venus(driver_id: i32) -> bool {
    driver_id == vk::DriverId::MESA_VENUS.as_raw()
}

/// What can be done with buffers of `usage` in memory of `handle_type`.
pub(crate) fn external_features(
    instance: &ash::Instance,
    physical: vk::PhysicalDevice,
    usage: vk::BufferUsageFlags,
    handle_type: vk::ExternalMemoryHandleTypeFlags,
) -> vk::ExternalMemoryFeatureFlags {
    let asked = vk::PhysicalDeviceExternalBufferInfo::default().usage(usage).handle_type(handle_type);
    let mut answer = vk::ExternalBufferProperties::default();
    // SAFETY: `physical` is a physical device of `instance`, which is of Vulkan 1.1 or later.
    unsafe { instance.get_physical_device_external_buffer_properties(physical, &asked, &mut answer) };
    answer.external_memory_properties.external_memory_features
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_a_number_and_a_path() {
        let null = DrmNode::from_path(Path::new("/dev/null")).unwrap();
        assert_eq!(null, DrmNode { major: 1, minor: 3 });
        assert_eq!(null.path().as_deref(), Some(Path::new("/dev/null")));
        assert_eq!(DrmNode { major: 4095, minor: 1 }.path(), None);
    }

    /// A device of that driver.
    fn device(driver_id: vk::DriverId, is_cpu: bool) -> PhysicalDevice {
        PhysicalDevice {
            name: String::new(),
            driver_name: String::new(),
            driver_version: String::new(),
            driver_id: driver_id.as_raw(),
            api_version: (1, 3, 0),
            pci_address: None,
            primary_node: None,
            render_node: None,
            is_cpu,
            local_memory_bytes: 0,
            can_import_dma_buf: true,
            can_export_dma_buf: true,
            host_pointer_alignment_bytes: None,
            missing_extensions: Vec::new(),
        }
    }

    #[test]
    fn the_driver_decides_what_a_revoke_asks_for() {
        let on_revoke = |driver_id, is_cpu| device(driver_id, is_cpu).on_revoke();
        assert_eq!(on_revoke(vk::DriverId::MESA_LLVMPIPE, true), OnRevoke::Reimport);
        assert_eq!(on_revoke(vk::DriverId::MESA_RADV, false), OnRevoke::FreeBefore);
        assert_eq!(on_revoke(vk::DriverId::AMD_OPEN_SOURCE, false), OnRevoke::FreeBefore);
        assert_eq!(on_revoke(vk::DriverId::INTEL_OPEN_SOURCE_MESA, false), OnRevoke::FreeBefore);
        assert_eq!(on_revoke(vk::DriverId::from_raw(0), false), OnRevoke::FreeBefore);
        assert_eq!(on_revoke(vk::DriverId::from_raw(0), true), OnRevoke::Reimport);
    }

    #[test]
    fn a_refusal_is_taken_for_the_end_of_a_device_unless_its_driver_is_known() {
        let on_refusal = |driver_id, is_cpu| device(driver_id, is_cpu).on_refusal();
        for driver in
            [vk::DriverId::MESA_RADV, vk::DriverId::INTEL_OPEN_SOURCE_MESA, vk::DriverId::from_raw(0)]
        {
            assert_eq!(on_refusal(driver, false), OnRefusal::LosesDevice, "{}", driver.as_raw());
        }
        assert_eq!(on_refusal(vk::DriverId::MESA_NVK, false), OnRefusal::ImportFails);
        assert_eq!(on_refusal(vk::DriverId::from_raw(0), true), OnRefusal::ImportFails);
    }
}
