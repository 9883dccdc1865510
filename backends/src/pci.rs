//! PCI functions as sysfs shows them.
//!
//! [`PciAddress`] is a value; [`Function`] is what `/sys/bus/pci/devices` said when it was read.
//! Nothing here needs a privilege, opens a device, wakes one or changes anything.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Kind, Result};

/// Where Linux lists PCI functions.
const SYSFS_DEVICES: &str = "/sys/bus/pci/devices";

/// Number of base address registers of an ordinary function.
pub const BAR_COUNT: usize = 6;

/// A PCI function's address: domain, bus, device, function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress {
    /// The domain, or segment; beyond 16 bits behind some controllers (Intel VMD).
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device on the bus, below 32.
    pub device: u8,
    /// The function of the device, below 8.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = Error;

    /// Reads `0000:01:00.0`, or `01:00.0` in domain 0, as `lspci` prints them.
    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (slot, function) = text.rsplit_once('.')?;
            let (bus, device) = slot.rsplit_once(':')?;
            let (domain, bus) = bus.rsplit_once(':').unwrap_or(("0000", bus));
            let hex = |digits: &str, most: usize| {
                let fits =
                    (1..=most).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
                fits.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
            };
            let address = Self {
                domain: hex(domain, 8)?,
                bus: hex(bus, 2)? as u8,
                device: hex(device, 2)? as u8,
                function: hex(function, 1)? as u8,
            };
            (address.device < 32 && address.function < 8).then_some(address)
        };
        parse().ok_or_else(|| {
            Error::new(Kind::InvalidInput, "read a PCI address", format!("{text:?} is none"))
                .next("write it as lspci -D does: 0000:01:00.0")
        })
    }
}

impl TryFrom<String> for PciAddress {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

impl PciAddress {
    /// Its folder in sysfs.
    pub fn sysfs_path(self) -> PathBuf {
        Path::new(SYSFS_DEVICES).join(self.to_string())
    }

    /// The driver it is bound to.
    pub fn driver(self) -> Option<String> {
        link_name(&self.sysfs_path().join("driver"))
    }

    /// The IOMMU group it is in, if there is an IOMMU.
    pub fn iommu_group(self) -> Option<u32> {
        link_name(&self.sysfs_path().join("iommu_group"))?.parse().ok()
    }
}

/// Whether a driver gives its device to user space: vfio-pci and its variants (nvgrace_gpu_vfio_pci).
pub fn is_vfio_driver(driver: &str) -> bool {
    driver.contains("vfio")
}

/// Whether a driver keeps user space from owning the IOMMU group of its device
/// (`iommu_group_claim_dma_owner`). Drivers that do no DMA of their own do not.
pub fn blocks_its_group(driver: &str) -> bool {
    !is_vfio_driver(driver) && !matches!(driver, "pcieport" | "pci-stub")
}

/// A function of the same IOMMU group that has a kernel driver which [blocks](blocks_its_group) the group,
/// and that driver.
pub fn group_blocker(address: PciAddress) -> Option<(PciAddress, String)> {
    let members = list(&address.sysfs_path().join("iommu_group/devices"), |_| true);
    members.iter().filter_map(|member| member.parse().ok()).find_map(|member: PciAddress| {
        Some((member, member.driver().filter(|driver| blocks_its_group(driver))?))
    })
}

/// Whether an IOMMU translates the function's addresses for its kernel driver.
pub fn is_translated(address: PciAddress) -> bool {
    // "DMA" or "DMA-FQ"; "identity" is iommu=pt (Documentation/ABI/testing/sysfs-kernel-iommu_groups).
    fs::read_to_string(address.sysfs_path().join("iommu_group/type"))
        .is_ok_and(|text| text.starts_with("DMA"))
}

/// One base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bar {
    /// Its index, 0 to 5.
    pub index: u32,
    /// Its physical address.
    pub address: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Memory, not I/O ports (`IORESOURCE_MEM`).
    pub is_memory: bool,
    /// Prefetchable, as VRAM is (`IORESOURCE_PREFETCH`).
    pub is_prefetchable: bool,
}

/// The PCI Express link above a function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Present speed, in the kernel's words: "16.0 GT/s PCIe".
    pub speed: String,
    /// Present width in lanes.
    pub width_lanes: u32,
    /// The fastest it could be.
    pub max_speed: String,
    /// The widest it could be, in lanes.
    pub max_width_lanes: u32,
}

/// A PCI function, as sysfs described it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Its address.
    pub address: PciAddress,
    /// Vendor id.
    pub vendor_id: u16,
    /// Device id.
    pub device_id: u16,
    /// Class, subclass and programming interface, as `0x030200`.
    pub class: u32,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// The IOMMU group it is in.
    pub iommu_group: Option<u32>,
    /// The NUMA node it is near, where the firmware says.
    pub numa_node: Option<u32>,
    /// Its base address registers, empty ones left out.
    pub bars: Vec<Bar>,
    /// Its PCI Express link, where it has one, answers, and could be asked without waking anything.
    pub link: Option<Link>,
    /// DRM nodes made for it: `card0`, `renderD128`.
    pub drm_nodes: Vec<String>,
    /// Whether memory decoding is on (`PCI_COMMAND_MEMORY`; of a virtual function always). Unknown where configuration
    /// space is unreadable or all ones, or reading it would wake something.
    pub memory_enabled: Option<bool>,
    /// Whether it answers. The configuration space of a function that fell off the bus, or that a reset has left dead, is
    /// nothing but ones, while its driver, and what sysfs says of its BARs, stay as they were. Unknown where configuration
    /// space is unreadable, or reading it would wake something, and in trees that were captured before this was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<bool>,
    /// The features that a virtio device and its driver have agreed on, the first 64 bits of them; none for other
    /// devices, and where there is no driver. Trees that were captured before it was read lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtio_features: Option<u64>,
}

impl Function {
    /// Reads what sysfs says of `address`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is no such function.
    pub fn read(address: PciAddress) -> Result<Self> {
        Self::read_from(Path::new(SYSFS_DEVICES), address)
    }

    /// Reads every function that sysfs lists, in order of address. Functions that vanish while
    /// they are read are left out.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where sysfs has no PCI bus at all.
    pub fn all() -> Result<Vec<Self>> {
        Self::all_from(Path::new(SYSFS_DEVICES))
    }

    fn all_from(devices: &Path) -> Result<Vec<Self>> {
        let entries = fs::read_dir(devices)
            .map_err(|error| Error::os("list PCI devices", error).on(devices.display()))?;
        let mut addresses: Vec<PciAddress> =
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
        addresses.sort_unstable();
        Ok(addresses.into_iter().filter_map(|address| Self::read_from(devices, address).ok()).collect())
    }

    /// Reads it out of another folder than `/sys/bus/pci/devices`: of a copy of it.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_from(devices: &Path, address: PciAddress) -> Result<Self> {
        let folder = devices.join(address.to_string());
        let missing = |error: io::Error| {
            Error::os("find a PCI device", error)
                .on(address)
                .next("lspci -D lists the devices of this machine")
        };
        let number = |name: &str| {
            let text = fs::read_to_string(folder.join(name)).map_err(missing)?;
            let digits = text.trim().trim_start_matches("0x");
            u32::from_str_radix(digits, 16).map_err(|_| {
                Error::new(Kind::Os, "read sysfs", format!("{name} says {:?}", text.trim())).on(address)
            })
        };
        let sleeper = sleeper(&folder);
        let config = if sleeper.is_none() { fs::read(folder.join("config")).ok() } else { None };
        let answers = config
            .as_ref()
            .filter(|config| !config.is_empty())
            .map(|config| config.iter().any(|&byte| byte != 0xff));
        let is_virtual = folder.join("physfn").exists();
        Ok(Self {
            address,
            vendor_id: number("vendor")? as u16,
            device_id: number("device")? as u16,
            class: number("class")?,
            driver: link_name(&folder.join("driver")),
            iommu_group: link_name(&folder.join("iommu_group")).and_then(|name| name.parse().ok()),
            numa_node: decimal(&folder.join("numa_node")),
            bars: parse_bars(&fs::read_to_string(folder.join("resource")).map_err(missing)?),
            // Out of ones the kernel reads a link of 63 lanes (current_link_width_show).
            link: if sleeper.is_none() && answers != Some(false) { read_link(&folder) } else { None },
            drm_nodes: list(&folder.join("drm"), |name| {
                name.starts_with("card") || name.starts_with("render")
            }),
            memory_enabled: if answers == Some(false) {
                None
            } else if is_virtual {
                // It has no such bit (it reads as zero): its memory is there as long as it is (pci_iov_add_virtfn sets
                // no_command_memory).
                Some(true)
            } else {
                config.and_then(|config| Some(config.get(4)? & 1 << 1 != 0))
            },
            answers,
            virtio_features: virtio_features(&folder),
        })
    }

    /// Refuses one that does not [answer](Self::answers): nothing can be lent by it or to it. `tried` is for the error.
    ///
    /// # Errors
    /// [`Kind::Gone`].
    pub fn check_answers(&self, tried: &'static str) -> Result<()> {
        if self.answers != Some(false) {
            return Ok(());
        }
        Err(Error::new(Kind::Gone, tried, "it does not answer: its configuration space is all ones")
            .on(self.address)
            .next("peervram doctor says what may bring it back"))
    }

    /// A display controller or processing accelerator by class: something that may have VRAM.
    pub fn is_gpu(&self) -> bool {
        matches!(self.class >> 16, 0x03 | 0x12)
    }

    /// Whether it is bound to vfio-pci or a variant of it.
    pub fn is_bound_to_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio_driver)
    }

    /// The BAR that is VRAM, if any is: the largest memory BAR, a prefetchable one before others, of a page
    /// or more.
    pub fn largest_memory(&self) -> Option<&Bar> {
        (self.bars.iter())
            .filter(|bar| bar.is_memory && bar.size_bytes >= 4096)
            .max_by_key(|bar| (bar.is_prefetchable, bar.size_bytes))
    }

    /// The BAR at `index`.
    pub fn bar(&self, index: u32) -> Option<&Bar> {
        self.bars.iter().find(|bar| bar.index == index)
    }
}

/// Reads sysfs's `resource`: one line per resource, "start end flags", the BARs first.
fn parse_bars(resource: &str) -> Vec<Bar> {
    // include/linux/ioport.h
    const IORESOURCE_MEM: u64 = 0x200;
    const IORESOURCE_PREFETCH: u64 = 0x2000;
    let parse = |(index, line): (usize, &str)| {
        let mut numbers =
            line.split_whitespace().map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16));
        let (start, end, flags) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        let size_bytes = end.checked_sub(start)?.checked_add(1)?;
        (flags != 0).then_some(Bar {
            index: index as u32,
            address: start,
            size_bytes,
            is_memory: flags & IORESOURCE_MEM != 0,
            is_prefetchable: flags & IORESOURCE_PREFETCH != 0,
        })
    };
    resource.lines().take(BAR_COUNT).enumerate().filter_map(parse).collect()
}

/// The sleeping device that a read of a function's configuration space would wake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sleeper {
    /// The function, in D3cold.
    Itself(PciAddress),
    /// A bridge above it, suspended or in D3cold.
    Bridge(PciAddress),
}

impl Sleeper {
    /// Who.
    pub(crate) fn address(self) -> PciAddress {
        match self {
            Self::Itself(address) | Self::Bridge(address) => address,
        }
    }
}

impl fmt::Display for Sleeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Itself(_) => f.write_str("it sleeps in D3cold, and reading would wake it"),
            Self::Bridge(bridge) => {
                write!(f, "the bridge {bridge} above it sleeps, and reading would wake that")
            }
        }
    }
}

/// The device that a read of the configuration space or link of the function in `folder` would wake, as the files
/// `config` and `current_link_*` do (`pci_config_pm_runtime_get`). A read would also end the low power that a virtual
/// machine monitor has chosen for it.
pub(crate) fn sleeper(folder: &Path) -> Option<Sleeper> {
    let folder = fs::canonicalize(folder).ok()?;
    // Reading these two files does not touch the device.
    let says = |folder: &Path, name: &str, word: &str| {
        fs::read_to_string(folder.join(name)).is_ok_and(|text| text.trim() == word)
    };
    let mut way_up = folder.ancestors().map_while(|at| {
        let address: PciAddress = at.file_name()?.to_str()?.parse().ok()?;
        Some((at, address))
    });
    let (itself, address) = way_up.next()?;
    if says(itself, "power_state", "D3cold") {
        return Some(Sleeper::Itself(address));
    }
    let mut asleep = way_up.filter(|(above, _)| {
        says(above, "power_state", "D3cold")
            || says(above, "power/runtime_status", "suspended")
            || says(above, "power/runtime_status", "suspending")
    });
    asleep.next().map(|(_, bridge)| Sleeper::Bridge(bridge))
}

fn read_link(folder: &Path) -> Option<Link> {
    let text = |name: &str| Some(fs::read_to_string(folder.join(name)).ok()?.trim().to_owned());
    let link = Link {
        speed: text("current_link_speed")?,
        width_lanes: decimal(&folder.join("current_link_width"))?,
        max_speed: text("max_link_speed")?,
        max_width_lanes: decimal(&folder.join("max_link_width"))?,
    };
    // Root-complex integrated endpoints show a link of width 0 at an unknown speed.
    (link.width_lanes > 0).then_some(link)
}

/// The features of the virtio device that a function is the transport of.
fn virtio_features(folder: &Path) -> Option<u64> {
    let device = list(folder, |name| name.starts_with("virtio")).into_iter().next()?;
    parse_features(&fs::read_to_string(folder.join(device).join("features")).ok()?)
}

/// Reads sysfs's `features`: a digit for each bit, the lowest first (`features_show` in `drivers/virtio/virtio.c`).
/// Before a driver has agreed on any, all are zero.
fn parse_features(text: &str) -> Option<u64> {
    let digits = text.trim().bytes().take(64).enumerate();
    let bit = |(index, digit)| match digit {
        b'0' => Some(0),
        b'1' => Some(1_u64 << index),
        _ => None,
    };
    let features: u64 = digits.map(bit).sum::<Option<u64>>()?;
    (features != 0).then_some(features)
}

fn decimal(path: &Path) -> Option<u32> {
    // A negative number is how numa_node says "none".
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

fn list(folder: &Path, keep: impl Fn(&str) -> bool) -> Vec<String> {
    let names = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> =
        names.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.retain(|name| keep(name));
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_are_read_as_lspci_writes_them() {
        let address: PciAddress = "0000:01:00.0".parse().unwrap();
        assert_eq!(address, PciAddress { domain: 0, bus: 1, device: 0, function: 0 });
        assert_eq!("01:00.0".parse::<PciAddress>().unwrap(), address);
        let behind_vmd: PciAddress = "10000:e1:1f.7".parse().unwrap();
        assert_eq!(behind_vmd.domain, 0x10000);
        assert_eq!(behind_vmd.to_string(), "10000:e1:1f.7");
    }

    #[test]
    fn what_is_no_address_is_refused_with_an_example() {
        for text in
            ["", "gpu0", "01:00", "1:2:3:4.0", "0000:01:20.0", "0000:01:00.8", "0000:001:00.0", "+0:+1:+2.+3"]
        {
            let error = text.parse::<PciAddress>().unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{text}");
            assert!(error.to_string().contains("0000:01:00.0"), "{error}");
        }
    }

    #[test]
    fn a_function_is_read_from_its_folder() {
        let devices = tempfile::tempdir().unwrap();
        let folder = devices.path().join("0000:01:00.0");
        fs::create_dir_all(folder.join("drm/card0")).unwrap();
        fs::create_dir_all(folder.join("drm/renderD128")).unwrap();
        let put = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        put("vendor", "0x10de\n");
        put("device", "0x2342\n");
        put("class", "0x030200\n");
        put("numa_node", "-1\n");
        put(
            "resource",
            "0x0000000080000000 0x0000000080ffffff 0x0000000000040200\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x000000c000000000 0x000000c00fffffff 0x000000000014220c\n\
             garbage\n",
        );
        put("current_link_speed", "16.0 GT/s PCIe\n");
        put("current_link_width", "8\n");
        put("max_link_speed", "32.0 GT/s PCIe\n");
        put("max_link_width", "16\n");
        fs::write(folder.join("config"), [0xde, 0x10, 0x42, 0x23, 0x06, 0x04]).unwrap();
        fs::create_dir(folder.join("virtio2")).unwrap();
        put("virtio2/features", "11011000000000000000000000001100110000001000000000000000000000000001\n");
        std::os::unix::fs::symlink("../../../bus/pci/drivers/vfio-pci", folder.join("driver")).unwrap();
        std::os::unix::fs::symlink("../../../kernel/iommu_groups/17", folder.join("iommu_group")).unwrap();

        let all = Function::all_from(devices.path()).unwrap();
        let [function] = &all[..] else { panic!("{all:?}") };
        assert!(function.is_gpu());
        assert_eq!(function.driver.as_deref(), Some("vfio-pci"));
        assert_eq!((function.iommu_group, function.numa_node), (Some(17), None));
        assert_eq!(function.bars.len(), 2);
        let vram = function.bar(2).unwrap();
        assert_eq!((vram.size_bytes, vram.is_memory, vram.is_prefetchable), (256 << 20, true, true));
        assert!(!function.bar(0).unwrap().is_prefetchable);
        assert_eq!(function.link.as_ref().unwrap().max_width_lanes, 16);
        assert_eq!(function.drm_nodes, ["card0", "renderD128"]);
        assert_eq!((function.memory_enabled, function.answers), (Some(true), Some(true)));
        assert_eq!(function.virtio_features, Some(0x0103_3000_001b));

        // Whoever is not root sees 64 bytes.
        for size_bytes in [64, 4096] {
            fs::write(folder.join("config"), vec![0xff; size_bytes]).unwrap();
            let dead = Function::read_from(devices.path(), function.address).unwrap();
            assert_eq!((dead.answers, dead.memory_enabled, dead.link), (Some(false), None, None));
        }
        // A virtual function has ones for its ids, and for nothing else.
        fs::write(folder.join("config"), [0xff, 0xff, 0xff, 0xff, 0, 0]).unwrap();
        let answers = || Function::read_from(devices.path(), function.address).unwrap().answers;
        assert_eq!(answers(), Some(true));
        fs::write(folder.join("config"), []).unwrap();
        assert_eq!(answers(), None);
        fs::remove_file(folder.join("config")).unwrap();
        assert_eq!(answers(), None);
    }

    #[test]
    fn features_are_bits_or_nothing() {
        assert_eq!(parse_features("1001\n"), Some(0b1001));
        assert_eq!(parse_features(&"0".repeat(128)), None);
        assert_eq!(parse_features("10x1"), None);
        assert_eq!(parse_features(""), None);
    }

    #[test]
    fn an_unknown_address_says_where_to_look() {
        let devices = tempfile::tempdir().unwrap();
        let error = Function::read_from(devices.path(), "0000:7f:00.0".parse().unwrap()).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("0000:7f:00.0") && error.to_string().contains("lspci"), "{error}");
    }

    proptest! {
        #[test]
        fn printed_addresses_are_read_back(domain in any::<u32>(), bus: u8, device in 0_u8..32, function in 0_u8..8) {
            let address = PciAddress { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse::<PciAddress>().unwrap(), address);
        }

        #[test]
        fn any_text_is_survived(text in ".{0,24}", resource in ".{0,80}") {
            let _ = text.parse::<PciAddress>();
            prop_assert!(parse_bars(&resource).len() <= BAR_COUNT);
            let _ = parse_features(&resource);
        }
    }
}
