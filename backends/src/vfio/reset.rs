//! Resets: of the device by the best way that the kernel knows, of the function by its own bit, and of
//! the whole slot or bus (*hot*).
//!
//! Each revokes every dma-buf of the device first, **blocks without a limit** until all importers have
//! unmapped (`vfio_pci_dma_buf_move`), then resets, and brings dma-bufs back with the same descriptors if
//! memory decoding is on. The memory's content is unknown afterwards, also where the call fails: a reset
//! that fails has revoked first.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::Device;
use super::address_space::{Interface, Membership};
use crate::uapi::vfio as uapi;
use crate::{Error, Kind, PciAddress, Result};

// include/uapi/linux/pci_regs.h
const PCI_CAP_ID_EXP: u8 = 0x10;
const PCI_EXP_DEVCAP: u64 = 0x04;
const PCI_EXP_DEVCAP_FLR: u32 = 1 << 28;
const PCI_EXP_DEVCTL: u64 = 0x08;
const PCI_EXP_DEVCTL_BCR_FLR: u16 = 1 << 15;
const PCI_CAP_ID_AF: u8 = 0x13;
const PCI_AF_LENGTH: u64 = 2;
const PCI_AF_CAP_TP: u8 = 1 << 0;
const PCI_AF_CAP_FLR: u8 = 1 << 1;
const PCI_AF_CTRL: u64 = 4;
const PCI_AF_CTRL_FLR: u8 = 1 << 0;

const DEVICE: &str = "reset a VFIO device";
const FUNCTION: &str = "reset a function";
const HOT: &str = "hot-reset a VFIO device";
const ASK_SET: &str = "ask what a hot reset touches";

impl Device {
    /// Resets the device by the first way that the kernel knows for it (`reset_method` in sysfs).
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the device has no reset of its own, and of an adopted device;
    /// [`Kind::MemoryDisabled`] in low power. [`Kind::Busy`] (EAGAIN) where the kernel would not reset now;
    /// [`Kind::TimedOut`] where it was reset and did not come back. The dma-bufs were revoked all the same
    /// then.
    pub fn reset(&self) -> Result<()> {
        self.check_can_reset()?;
        uapi::device_reset(self).map_err(|errno| match errno {
            Errno::AGAIN => Error::new(Kind::Busy, DEVICE, "the kernel could not lock the device or its bus")
                .on(self.address())
                .errno(errno)
                .next("try again"),
            Errno::NOTTY => not_back(DEVICE).on(self.address()).errno(errno),
            errno => Error::os(DEVICE, errno).on(self.address()),
        })
    }

    /// Fails as [`Device::reset`] would before it takes anything back.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] and [`Kind::MemoryDisabled`], as there.
    pub fn check_can_reset(&self) -> Result<()> {
        self.check_owned(DEVICE)?;
        self.check_awake(DEVICE)?;
        if self.can_reset {
            return Ok(());
        }
        Err(Error::new(Kind::Unsupported, DEVICE, "the kernel knows no reset for it")
            .on(self.address())
            .next("a hot reset of its bus is the other way"))
    }

    /// Resets the function by the bit that it has for it, in the PCI Express capability or in that for
    /// advanced features. The kernel sees the write and resets by the way that it prefers.
    ///
    /// **The kernel swallows a reset that failed** (`vfio_exp_config_write`): that this returns says that
    /// the memory was taken back, not that the function was reset. [`Device::reset`] tells.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the function has no such bit, and of an adopted device;
    /// [`Kind::MemoryDisabled`] in low power; else what its configuration space says.
    pub fn function_level_reset(&self) -> Result<()> {
        let (at, bit) = self.function_reset_bit()?;
        self.change_config_word(at, |word| word | bit)
    }

    /// Fails as [`Device::function_level_reset`] would before it takes anything back.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] and [`Kind::MemoryDisabled`], as there.
    pub fn check_can_reset_function(&self) -> Result<()> {
        self.function_reset_bit().map(drop)
    }

    /// In which word of configuration space the bit is, and which it is.
    fn function_reset_bit(&self) -> Result<(u64, u16)> {
        self.check_owned(FUNCTION)?;
        if let Some(express) = self.capability(PCI_CAP_ID_EXP)?.map(u64::from) {
            // The kernel resets only where this says so; the bit is in the upper word.
            let able = self.read_config_word(express + PCI_EXP_DEVCAP + 2)?;
            if u32::from(able) << 16 & PCI_EXP_DEVCAP_FLR != 0 {
                return Ok((express + PCI_EXP_DEVCTL, PCI_EXP_DEVCTL_BCR_FLR));
            }
        }
        if let Some(advanced) = self.capability(PCI_CAP_ID_AF)?.map(u64::from) {
            let [_, able] = self.read_config_word(advanced + PCI_AF_LENGTH)?.to_le_bytes();
            if able & PCI_AF_CAP_FLR != 0 && able & PCI_AF_CAP_TP != 0 {
                // The byte behind it is the status, which is read only.
                return Ok((advanced + PCI_AF_CTRL, PCI_AF_CTRL_FLR.into()));
            }
        }
        Err(Error::new(Kind::Unsupported, FUNCTION, "it has no function-level reset")
            .on(self.address())
            .next("a reset by VFIO, or a hot reset of its bus, are the other ways"))
    }

    /// Every device that a hot reset of this one would reset, itself among them: all of its slot, or all
    /// of its bus and below.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where neither slot nor bus can be reset, and of an adopted device;
    /// [`Kind::MemoryDisabled`] in low power.
    pub fn reset_set(&self) -> Result<Vec<PciAddress>> {
        self.check_owned(ASK_SET)?;
        self.check_awake(ASK_SET)?;
        let info = uapi::device_get_pci_hot_reset_info(self).map_err(|errno| match errno {
            Errno::NODEV => no_bus_reset(ASK_SET).on(self.address()).errno(errno),
            // vfio_pci_fill_devs
            Errno::PERM => Error::new(Kind::Unsupported, ASK_SET, "a device of its bus is in no IOMMU group")
                .on(self.address())
                .errno(errno)
                .next("reset the function alone"),
            errno => Error::os(ASK_SET, errno).on(self.address()),
        })?;
        parse_reset_set(&info).map_err(|error| error.on(self.address()))
    }

    /// Resets the slot or bus that this device is on, with everything there. `others` are the devices
    /// that this process owns there besides; who is not on the bus does not matter. Opened by character
    /// device, they must share one [`IoAddressSpace`](super::IoAddressSpace).
    ///
    /// Every device on the bus is revoked, one after the other, and brought back. **A failed hot reset has
    /// revoked all the same**: of an unknown part of them, and their memory's content is unknown.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where neither slot nor bus can be reset, and of an adopted device;
    /// [`Kind::MemoryDisabled`] in low power; [`Kind::GroupNotViable`] (EINVAL) names who on the bus is not ours;
    /// [`Kind::Busy`] where the memory of one of them is being used or taken back at this moment (EBUSY), or
    /// the kernel could not lock the bus (EAGAIN); [`Kind::TimedOut`] where the bus was reset and the device
    /// did not come back.
    pub fn hot_reset(&self, others: &[&Device]) -> Result<()> {
        self.check_owned(HOT)?;
        for device in others.iter().chain([&self]) {
            device.check_awake(HOT)?;
        }
        let set = self.reset_set()?;
        let ours = || others.iter().copied().chain([self]);
        // One group may hold several of them.
        let mut groups: Vec<_> = (ours())
            .filter(|device| set.contains(&device.address()))
            .filter_map(|device| match &device.open.membership {
                Some(Membership::Group { group }) if self.interface() == Some(Interface::Group) => {
                    Some(group)
                }
                _ => None,
            })
            .collect();
        groups.sort_by_key(|group| Arc::as_ptr(group));
        groups.dedup_by_key(|group| Arc::as_ptr(group));
        let groups: Vec<_> = groups.into_iter().map(|group| group.as_fd()).collect();
        uapi::device_pci_hot_reset(self, &groups).map_err(|errno| {
            let error = match errno {
                Errno::NODEV => no_bus_reset(HOT),
                Errno::NOTTY => not_back(HOT),
                Errno::INVAL => {
                    let foreign = set.iter().copied().filter(|&a| ours().all(|device| device.address() != a));
                    not_ours(&foreign.collect::<Vec<_>>())
                }
                Errno::BUSY => Error::new(
                    Kind::Busy,
                    HOT,
                    "the memory of a device on the bus is being used or taken back",
                )
                .next("finish what is in flight on all of them, and try again"),
                Errno::AGAIN => {
                    Error::new(Kind::Busy, HOT, "the kernel could not lock the bus").next("try again")
                }
                errno => Error::os(HOT, errno),
            };
            error.on(self.address()).errno(errno)
        })
    }
}

/// ENOTTY of a reset that the kernel has, and tried (`pci_dev_wait`, `pci_bridge_wait_for_secondary_bus`).
fn not_back(tried: &'static str) -> Error {
    Error::new(Kind::TimedOut, tried, "it was reset, and did not come back in the time that the kernel gives it")
        .next("look at the kernel's log, and read the device before it is trusted; a second reset may bring it back")
}

fn no_bus_reset(tried: &'static str) -> Error {
    Error::new(Kind::Unsupported, tried, "neither its slot nor its bus can be reset")
        .next("reset the function alone, where it can be")
}

fn not_ours(foreign: &[PciAddress]) -> Error {
    if foreign.is_empty() {
        return Error::new(Kind::GroupNotViable, HOT, "the devices on its bus are not in one address space")
            .next("open all of them into one IoAddressSpace, and bind what is left to vfio-pci");
    }
    let names: Vec<String> = foreign.iter().map(PciAddress::to_string).collect();
    Error::new(
        Kind::GroupNotViable,
        HOT,
        format!("{} would be reset, too, and is not ours", names.join(", ")),
    )
    .next("bind it to vfio-pci, and open it into the same IoAddressSpace")
}

/// Reads a `struct vfio_pci_hot_reset_info` with its array.
fn parse_reset_set(info: &[u8]) -> Result<Vec<PciAddress>> {
    let malformed = |why: String| Error::new(Kind::Os, ASK_SET, why);
    let word = |at: usize| {
        let bytes = info.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_ne_bytes(bytes))
    };
    let count = word(8).ok_or_else(|| malformed(format!("the kernel's answer has {} bytes", info.len())))?;
    let devices = &info[uapi::HOT_RESET_HEADER_BYTES..];
    let told = devices.as_chunks::<{ uapi::DEPENDENT_DEVICE_BYTES }>().0;
    let told = usize::try_from(count)
        .ok()
        .and_then(|count| told.get(..count))
        .ok_or_else(|| malformed(format!("the kernel tells of {count} devices in {} bytes", info.len())))?;
    let address = |&[_, _, _, _, segment_low, segment_high, bus, devfn]: &[u8; 8]| PciAddress {
        domain: u16::from_ne_bytes([segment_low, segment_high]).into(),
        bus,
        device: devfn >> 3,
        function: devfn & 7,
    };
    Ok(told.iter().map(address).collect())
}

/// What the above says of the kernel's header.
#[cfg(all(test, feature = "host"))]
pub(super) fn claims() -> [(&'static str, usize); 11] {
    [
        ("PCI_CAP_ID_EXP", PCI_CAP_ID_EXP.into()),
        ("PCI_EXP_DEVCAP", PCI_EXP_DEVCAP as usize),
        ("PCI_EXP_DEVCAP_FLR", PCI_EXP_DEVCAP_FLR as usize),
        ("PCI_EXP_DEVCTL", PCI_EXP_DEVCTL as usize),
        ("PCI_EXP_DEVCTL_BCR_FLR", PCI_EXP_DEVCTL_BCR_FLR.into()),
        ("PCI_CAP_ID_AF", PCI_CAP_ID_AF.into()),
        ("PCI_AF_LENGTH", PCI_AF_LENGTH as usize),
        ("PCI_AF_CAP_TP", PCI_AF_CAP_TP.into()),
        ("PCI_AF_CAP_FLR", PCI_AF_CAP_FLR.into()),
        ("PCI_AF_CTRL", PCI_AF_CTRL as usize),
        ("PCI_AF_CTRL_FLR", PCI_AF_CTRL_FLR.into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info(count: u32, devices: &[[u8; 8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [12 + 8 * devices.len() as u32, 0, count] {
            bytes.extend(word.to_ne_bytes());
        }
        devices.iter().for_each(|device| bytes.extend(device));
        bytes
    }

    fn device(segment: u16, bus: u8, devfn: u8) -> [u8; 8] {
        let [low, high] = segment.to_ne_bytes();
        [1, 0, 0, 0, low, high, bus, devfn]
    }

    #[test]
    fn addresses_are_read_in_order() {
        let bytes = info(2, &[device(0, 1, 0), device(1, 0xAF, 0x1F << 3 | 7), device(9, 9, 9)]);
        let names: Vec<String> = parse_reset_set(&bytes).unwrap().iter().map(PciAddress::to_string).collect();
        // The third lies in the room that the kernel did not use.
        assert_eq!(names, ["0000:01:00.0", "0001:af:1f.7"]);
        assert!(parse_reset_set(&info(0, &[])).unwrap().is_empty());
    }

    #[test]
    fn counts_that_cannot_be_are_refused() {
        for bytes in [info(2, &[device(0, 1, 0)]), info(u32::MAX, &[]), vec![0; 11], Vec::new()] {
            assert_eq!(parse_reset_set(&bytes).unwrap_err().kind(), Kind::Os);
        }
    }

    #[test]
    fn who_is_not_ours_is_named() {
        let error = not_ours(&["0000:02:00.1".parse().unwrap(), "0000:02:00.2".parse().unwrap()]);
        assert_eq!(error.kind(), Kind::GroupNotViable);
        assert!(error.to_string().contains("0000:02:00.1, 0000:02:00.2"), "{error}");
        assert!(not_ours(&[]).to_string().contains("one address space"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(set) = parse_reset_set(&bytes) {
                prop_assert!(set.iter().all(|address| address.device < 32 && address.function < 8));
            }
        }
    }
}
