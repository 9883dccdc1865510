//! Adopted devices: opened by another process, which gave us its descriptor.
//!
//! A virtual machine monitor that owns a GPU can lend its memory without giving it up: it sends the
//! device's descriptor, and the receiver adopts it. The descriptor can do everything, so what must not be
//! done is kept out here, not by the kernel:
//!
//! - no interrupt set-up: it would replace the owner's eventfd;
//! - no access to configuration space: it would wake the device, and end what the owner set up;
//! - nothing that takes memory back: the owner would not know.
//!
//! An adopted device that is kept keeps the owner's device open after the owner is gone: close it when the
//! owner exits.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FLAGS_PCI, VFIO_PCI_NUM_REGIONS, VFIO_PCI_ROM_REGION_INDEX};

use super::Device;
use super::device::Open;
use crate::uapi::vfio as uapi;
use crate::{Error, Kind, PciAddress, Result};

const TRIED: &str = "adopt a VFIO device";

impl Device {
    /// Takes over a descriptor of the device at `address`, which another process owns: it opened the
    /// device and bound it to its iommufd or container. `fd` is closed with this value, or here where this
    /// fails.
    ///
    /// The kernel is asked which device it is, where it can tell (`vfio-device-syspath` in
    /// `/proc/self/fdinfo`); an older one leaves it to the caller. Only its BARs and what its driver adds
    /// are asked for: describing the ROM would wait for a revoke that the owner has in flight
    /// (`vfio_pci_memory_lock_and_enable`). Each of these questions wakes a device that sleeps for the
    /// time of the answer, as every call on the descriptor does: adopt one that is awake.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where it is the descriptor of another device or of none, or its owner has not
    /// bound it yet.
    pub fn adopt(fd: OwnedFd, address: PciAddress) -> Result<Self> {
        check_identity(&fdinfo(&fd), address)?;
        let no_device = |errno: Errno, why: &'static str| {
            Error::new(Kind::InvalidInput, TRIED, why)
                .on(address)
                .errno(errno)
                .next("have the owner send the descriptor by which it uses the device")
        };
        let info = uapi::device_get_info(&fd).map_err(|errno| match errno {
            Errno::NOTTY => no_device(errno, "the descriptor is no VFIO device"),
            // vfio_device_fops_unl_ioctl: a character device that was opened and not bound.
            Errno::INVAL => no_device(errno, "its owner has not bound it to an address space"),
            errno => Error::os(TRIED, errno).on(address),
        })?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(Error::new(Kind::InvalidInput, TRIED, "it is no PCI device").on(address));
        }
        let own = VFIO_PCI_NUM_REGIONS..info.num_regions.max(VFIO_PCI_NUM_REGIONS);
        let indices = (0..info.num_regions.min(VFIO_PCI_ROM_REGION_INDEX)).chain(own);
        Self::describe(Open { fd, membership: None, space: None }, address, &info, indices)
    }

    /// Whether another process owns it.
    pub fn is_adopted(&self) -> bool {
        self.open.membership.is_none()
    }

    /// Fails where another process owns it.
    pub(super) fn check_owned(&self, tried: &'static str) -> Result<()> {
        if !self.is_adopted() {
            return Ok(());
        }
        Err(Error::new(Kind::Unsupported, tried, "its owner is another process")
            .on(self.address())
            .next("ask the owner to do it"))
    }
}

/// What the kernel says of a descriptor; nothing where `/proc` is not there.
fn fdinfo(fd: &OwnedFd) -> String {
    fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// Fails where the kernel names another device than `address`.
fn check_identity(fdinfo: &str, address: PciAddress) -> Result<()> {
    // vfio_device_show_fdinfo
    let Some(path) = fdinfo.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:")) else {
        return Ok(());
    };
    let name = path.trim().rsplit('/').next().unwrap_or_default();
    if name.parse().is_ok_and(|found: PciAddress| found == address) {
        return Ok(());
    }
    Err(Error::new(Kind::InvalidInput, TRIED, format!("the descriptor is that of {name}"))
        .on(address)
        .next("pass the address of the device whose descriptor it is"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    #[test]
    fn the_kernels_word_is_taken_for_which_device_it_is() {
        let fdinfo = "pos:\t0\nflags:\t02\nmnt_id:\t15\n\
            vfio-device-syspath: /sys/devices/pci0000:00/0000:00:02.0/0000:01:00.0\n";
        check_identity(fdinfo, address("0000:01:00.0")).unwrap();
        let error = check_identity(fdinfo, address("0000:02:00.0")).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidInput);
        assert!(error.to_string().contains("0000:01:00.0"), "{error}");
        // A mediated device has a name of its own.
        let mediated =
            "vfio-device-syspath: /sys/devices/virtual/mtty/mtty/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        assert!(check_identity(mediated, address("0000:01:00.0")).is_err());
    }

    #[test]
    fn a_kernel_that_does_not_tell_is_no_obstacle() {
        check_identity("pos:\t0\nflags:\t02\n", address("0000:01:00.0")).unwrap();
        check_identity("", address("0000:01:00.0")).unwrap();
    }

    #[test]
    fn a_file_that_is_no_device_is_refused_and_closed() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let error = Device::adopt(write, address("0000:01:00.0")).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidInput, "{error}");
        assert!(error.next_step().is_some());
        // End of file on the pipe proves that its only writer was closed.
        assert_eq!(rustix::io::read(&read, &mut [0; 1]).unwrap(), 0);
    }
}
