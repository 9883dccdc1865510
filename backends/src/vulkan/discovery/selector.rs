//! `Selector`: which of several physical devices is meant.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

use super::physical_device::{DrmNode, PhysicalDevice};
use crate::vulkan::failure::INSTALL_A_DRIVER;
use crate::{Error, Kind, PciAddress, Result};

/// What a person says to mean one physical device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Selector {
    /// The first that can import, one that is no CPU before one that is.
    #[default]
    Any,
    /// The one at this PCI address.
    Pci(PciAddress),
    /// The one with this primary or render node.
    Drm(PathBuf),
    /// The one of that number, from zero on, as [`Instance::physical_devices`](crate::vulkan::Instance::physical_devices) lists them:
    /// two drivers of one GPU, or two GPUs of one name, differ in nothing else.
    Number(usize),
    /// The first whose driver's name is this, else the first whose name or driver's name contains it, upper and lower
    /// case alike. A device of Venus's bears the name of the host's within its own.
    Name(String),
}

impl FromStr for Selector {
    type Err = Infallible;

    /// Reads `0000:01:00.0`, `/dev/dri/renderD128`, or else a part of a name; nothing means any.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.parse() {
            _ if text.is_empty() => Self::Any,
            _ if text.contains('/') => Self::Drm(text.into()),
            Ok(address) => Self::Pci(address),
            Err(_) => Self::Name(text.into()),
        })
    }
}

impl Selector {
    /// The index of the device that is meant.
    ///
    /// # Errors
    /// [`Kind::VulkanMissing`] where there is none at all, [`Kind::NotFound`] where none is meant;
    /// the error lists those that are there.
    pub fn choose(&self, devices: &[PhysicalDevice]) -> Result<usize> {
        const TRIED: &str = "find a Vulkan device";
        if devices.is_empty() {
            return Err(Error::new(Kind::VulkanMissing, TRIED, "no driver lists one").next(INSTALL_A_DRIVER));
        }
        let found = match self {
            Self::Any => (0..devices.len()).min_by_key(|&index| {
                let device = &devices[index];
                let can_import =
                    device.imports_foreign_dma_bufs() || device.host_pointer_alignment_bytes.is_some();
                (!can_import, device.is_cpu, index)
            }),
            Self::Number(number) => (*number < devices.len()).then_some(*number),
            Self::Pci(address) => devices.iter().position(|device| device.pci_address == Some(*address)),
            Self::Drm(path) => {
                let node = Some(DrmNode::from_path(path)?);
                devices.iter().position(|device| device.primary_node == node || device.render_node == node)
            }
            Self::Name(part) => {
                let part = part.to_lowercase();
                let position = |is_meant: &dyn Fn(&str, &str) -> bool| {
                    devices.iter().position(|device| {
                        is_meant(&device.name.to_lowercase(), &device.driver_name.to_lowercase())
                    })
                };
                position(&|_, driver| driver == part)
                    .or_else(|| position(&|name, driver| name.contains(&part) || driver.contains(&part)))
            }
        };
        found.ok_or_else(|| {
            let present: Vec<_> = devices
                .iter()
                .map(|device| match device.pci_address {
                    Some(address) => format!("{} at {address}", device.name),
                    None => device.name.clone(),
                })
                .collect();
            Error::new(Kind::NotFound, TRIED, format!("none is {self}"))
                .next(format!("there is {}", present.join(", ")))
        })
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Any => f.write_str("any device"),
            Self::Number(number) => write!(f, "number {number}"),
            Self::Pci(address) => write!(f, "at {address}"),
            Self::Drm(path) => write!(f, "behind {}", path.display()),
            Self::Name(part) => write!(f, "named {part:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, is_cpu: bool, can_import_dma_buf: bool, pci: Option<&str>) -> PhysicalDevice {
        PhysicalDevice {
            name: name.into(),
            driver_name: String::new(),
            driver_version: String::new(),
            driver_id: 0,
            api_version: (1, 3, 0),
            pci_address: pci.map(|text| text.parse().unwrap()),
            primary_node: None,
            // /dev/null's number, which is the same everywhere.
            render_node: pci.map(|_| DrmNode { major: 1, minor: 3 }),
            is_cpu,
            local_memory_bytes: 0,
            can_import_dma_buf,
            can_export_dma_buf: can_import_dma_buf,
            host_pointer_alignment_bytes: None,
            missing_extensions: Vec::new(),
        }
    }

    fn three() -> Vec<PhysicalDevice> {
        vec![
            device("llvmpipe (LLVM 19)", true, true, None),
            device("Old GPU", false, false, None),
            device("AMD Radeon Pro", false, true, Some("0000:03:00.0")),
        ]
    }

    #[test]
    fn text_means_an_address_a_node_or_a_name() {
        assert_eq!("".parse(), Ok(Selector::Any));
        assert_eq!("03:00.0".parse(), Ok(Selector::Pci("0000:03:00.0".parse().unwrap())));
        assert_eq!("/dev/dri/card0".parse(), Ok(Selector::Drm("/dev/dri/card0".into())));
        assert_eq!("llvmpipe".parse(), Ok(Selector::Name("llvmpipe".into())));
    }

    #[test]
    fn any_prefers_what_can_import_and_is_no_cpu() {
        assert_eq!(Selector::Any.choose(&three()).unwrap(), 2);
        assert_eq!(Selector::Any.choose(&three()[..2]).unwrap(), 0);
        assert_eq!(Selector::Any.choose(&three()[1..2]).unwrap(), 0);
    }

    #[test]
    fn the_one_that_is_meant_is_found() {
        let choose = |text: &str| text.parse::<Selector>().unwrap().choose(&three());
        assert_eq!(choose("03:00.0").unwrap(), 2);
        assert_eq!(choose("/dev/null").unwrap(), 2);
        assert_eq!(choose("LLVM").unwrap(), 0);
        assert_eq!(Selector::Number(1).choose(&three()).unwrap(), 1);
        assert_eq!(Selector::Number(3).choose(&three()).unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn a_drivers_name_comes_before_a_part_of_a_name() {
        let mut venus = device("Virtio-GPU Venus (llvmpipe (LLVM 19))", false, true, Some("0000:02:00.0"));
        venus.driver_name = "venus".into();
        venus.driver_id = ash::vk::DriverId::MESA_VENUS.as_raw();
        let mut lavapipe = device("llvmpipe (LLVM 19)", true, true, None);
        lavapipe.driver_name = "llvmpipe".into();
        let both = [venus, lavapipe];
        let choose = |text: &str| text.parse::<Selector>().unwrap().choose(&both).unwrap();
        assert_eq!((choose("llvmpipe"), choose("Venus"), choose("virtio")), (1, 0, 0));
        // It takes nobody else's memory, so it is not the one for those who name none.
        assert_eq!(choose(""), 1);
    }

    #[test]
    fn what_is_not_there_is_an_error_that_lists_what_is() {
        let error = Selector::Name("geforce".into()).choose(&three()).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("AMD Radeon Pro at 0000:03:00.0"), "{error}");
        assert_eq!(Selector::Any.choose(&[]).unwrap_err().kind(), Kind::VulkanMissing);
        let node = Selector::Drm("/dev/dri/no-such-node".into()).choose(&three()).unwrap_err();
        assert_eq!(node.kind(), Kind::NotFound);
    }
}
