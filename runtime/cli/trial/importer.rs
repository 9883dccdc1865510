//! `Importer`: who is to import, as commands name it, and what is known of it.

use peervram::backends::PciAddress;
use peervram::backends::pci::Function;
use serde::Serialize;

use crate::doctor::{Vulkan, VulkanDevice};

/// An importer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Importer {
    /// As `--importer` has it: "vulkan:0000:03:00.0", "/dev/dri/card0".
    pub name: String,
    /// What it is, with its driver's version where that is told; none where nobody knows it.
    pub about: Option<String>,
    /// As `peervram route` names it; none where it is on no bus, and no CPU.
    #[serde(skip)]
    pub end: Option<String>,
}

impl Importer {
    /// Those that are found: Vulkan devices that take dma-bufs or mapped memory, and the cards of functions other than the
    /// lender.
    pub fn all(lender: PciAddress, vulkan: &Vulkan, functions: &[Function]) -> Vec<Self> {
        let devices = match vulkan {
            Vulkan::Devices(devices) => &devices[..],
            Vulkan::Missing { .. } | Vulkan::Broken { .. } => &[],
        };
        let can = |device: &&VulkanDevice| device.imports_dma_bufs || device.imports_host_pointers;
        let cards = functions.iter().filter(|function| function.address != lender).flat_map(|function| {
            let cards = function.drm_nodes.iter().filter(|node| node.starts_with("card"));
            cards.map(|card| Self {
                name: format!("/dev/dri/{card}"),
                about: function.driver.as_ref().map(|driver| format!("{} by {driver}", function.address)),
                end: Some(function.address.to_string()),
            })
        });
        devices.iter().filter(can).map(Self::vulkan).chain(cards).collect()
    }

    fn vulkan(device: &VulkanDevice) -> Self {
        let about = format!("{} by {}", device.name, device.driver);
        let (name, end) = match device.pci_address {
            Some(address) => (format!("vulkan:{address}"), Some(address.to_string())),
            // "llvmpipe (LLVM 19.1.7, 256 bits)" is found by the part before its version.
            None => {
                let name = device.name.split(" (").next().unwrap_or(&device.name);
                (format!("vulkan:{name}"), device.is_cpu.then(|| "cpu".to_owned()))
            }
        };
        Self { name, about: Some(about), end }
    }

    /// The one of that name, which may be among those that were found.
    pub fn named(name: &str, found: &[Self]) -> Self {
        let known = found.iter().find(|importer| importer.name == name).cloned();
        known.unwrap_or_else(|| Self { name: name.to_owned(), about: None, end: None })
    }

    pub fn is_vulkan(&self) -> bool {
        self.name.starts_with("vulkan")
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn function(address: &str, driver: Option<&str>, drm_nodes: &[&str]) -> Function {
        let function = serde_json::json!({
            "address": address, "vendor_id": 0x1af4, "device_id": 0x1110, "class": 0x05_0000, "driver": driver,
            "iommu_group": null, "numa_node": null, "bars": [], "link": null, "drm_nodes": drm_nodes,
            "memory_enabled": null,
        });
        serde_json::from_value(function).unwrap()
    }

    fn device(name: &str, pci_address: Option<&str>, imports: bool) -> VulkanDevice {
        VulkanDevice {
            name: name.into(),
            driver: "radv 26.1.6".into(),
            pci_address: pci_address.map(|address| address.parse().unwrap()),
            is_cpu: pci_address.is_none(),
            imports_dma_bufs: imports,
            exports_dma_bufs: true,
            imports_host_pointers: false,
        }
    }

    #[test]
    fn everyone_who_can_import_is_found_but_the_lender() {
        let vulkan = Vulkan::Devices(vec![
            device("navi31", Some("0000:03:00.0"), true),
            device("llvmpipe (LLVM 19.1.7, 256 bits)", None, true),
            device("none", Some("0000:04:00.0"), false),
        ]);
        let functions = [
            function("0000:01:00.0", Some("vfio-pci"), &["card2"]),
            function("0000:03:00.0", Some("amdgpu"), &["card0", "renderD128"]),
        ];
        let found = Importer::all("0000:01:00.0".parse().unwrap(), &vulkan, &functions);
        let names: Vec<(&str, Option<&str>)> =
            found.iter().map(|importer| (&*importer.name, importer.end.as_deref())).collect();
        assert_eq!(
            names,
            [
                ("vulkan:0000:03:00.0", Some("0000:03:00.0")),
                ("vulkan:llvmpipe", Some("cpu")),
                ("/dev/dri/card0", Some("0000:03:00.0")),
            ]
        );
        assert_eq!(Importer::named("/dev/dri/card0", &found), found[2]);
        assert_eq!(Importer::named("vulkan:arc", &found).about, None);
    }
}
