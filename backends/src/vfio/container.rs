//! The older interface: `/dev/vfio/vfio` (a container) and `/dev/vfio/GROUP`.
//!
//! The container comes from `vfio-ioctls`, which checks version and IOMMU model. Groups and
//! devices are opened here: that crate's own device handle panics on drop when the device was
//! unbound meanwhile, and loses errnos.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::VFIO_TYPE1v2_IOMMU;
use vfio_ioctls::{VfioContainer, VfioError};

use crate::uapi::vfio as uapi;
use crate::{Error, Kind, PciAddress, Result, pci};

/// A container with the groups that are in it now.
pub(super) struct Container {
    container: VfioContainer,
    groups: Mutex<HashMap<u32, Weak<Group>>>,
}

/// One IOMMU group, inside a container as long as it is open.
pub(super) struct Group {
    file: File,
    /// Closed after the group.
    _container: Arc<Container>,
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Container {
    pub(super) fn open() -> Result<Arc<Self>> {
        let container = VfioContainer::new(None).map_err(|error| match error {
            VfioError::OpenContainer(error) => Error::os("open a VFIO container", error)
                .on("/dev/vfio/vfio")
                .next("load vfio-pci and vfio_iommu_type1, and run as root or as the owner of /dev/vfio"),
            other => Error::new(Kind::Unsupported, "open a VFIO container", other.to_string())
                .on("/dev/vfio/vfio")
                .next("load vfio_iommu_type1"),
        })?;
        Ok(Arc::new(Self { container, groups: Mutex::default() }))
    }

    /// Opens `address` in its group, which joins the container if it is not there yet.
    pub(super) fn open_device(self: &Arc<Self>, address: PciAddress) -> Result<(OwnedFd, Arc<Group>)> {
        let number = address.iommu_group().ok_or_else(|| {
            Error::new(Kind::Unsupported, "open a VFIO device", "it is in no IOMMU group")
                .on(address)
                .next("enable the IOMMU in the firmware and on the kernel command line (intel_iommu=on)")
        })?;
        let group = self.group(number, address)?;
        let name = CString::new(address.to_string()).expect("an address has no NUL");
        let device = uapi::group_get_device_fd(&group.file, &name)
            .map_err(|errno| Error::os("open a VFIO device", errno).on(address))?;
        Ok((device, group))
    }

    fn group(self: &Arc<Self>, number: u32, address: PciAddress) -> Result<Arc<Group>> {
        const TRIED: &str = "take an IOMMU group";
        let mut groups = self.groups.lock();
        groups.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = groups.get(&number).and_then(Weak::upgrade) {
            return Ok(group);
        }
        let path = format!("/dev/vfio/{number}");
        let failed = |errno: Errno| Error::os(TRIED, errno).on(format!("{path}, {address}"));
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| {
            let error = Error::os(TRIED, error).on(format!("{path}, {address}"));
            let next = match error.kind() {
                Kind::Busy => {
                    "end the program that holds it (fuser names it); a group has one owner".to_owned()
                }
                Kind::NotFound => {
                    "load vfio-pci; where the kernel has no VFIO groups, /dev/iommu is needed".to_owned()
                }
                _ => format!("run as root, or give yourself {path} with chown"),
            };
            error.next(next)
        })?;
        if !uapi::group_is_viable(&file).map_err(failed)? {
            return Err(not_viable(TRIED, address, number));
        }
        uapi::group_set_container(&file, self.as_fd()).map_err(failed)?;
        // The first group that joins brings the IOMMU model with it; when the last leaves, it goes.
        if groups.is_empty() {
            uapi::set_iommu(self.as_fd(), VFIO_TYPE1v2_IOMMU).map_err(|errno| {
                failed(errno).next(if errno == Errno::PERM {
                    "this IOMMU does not remap interrupts: allow_unsafe_interrupts=1 of vfio_iommu_type1 accepts that"
                } else {
                    "load vfio_iommu_type1"
                })
            })?;
        }
        let group = Arc::new(Group { file, _container: Arc::clone(self) });
        groups.insert(number, Arc::downgrade(&group));
        Ok(group)
    }

    /// The container itself, for mapping memory into it.
    pub(super) fn vfio(&self) -> &VfioContainer {
        &self.container
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.container)
    }
}

/// Names who keeps user space from owning the group of `address`.
pub(super) fn not_viable(tried: &'static str, address: PciAddress, number: u32) -> Error {
    let why = match pci::group_blocker(address) {
        Some((member, driver)) => format!("{member} is in its IOMMU group and is bound to {driver}"),
        None => "another device of its IOMMU group has a kernel driver".to_owned(),
    };
    Error::new(Kind::GroupNotViable, tried, why).on(address).next(format!(
        "sudo peervram bind {address} --group takes along what is in /sys/kernel/iommu_groups/{number}/devices, unless \
         something of the machine hangs on it"
    ))
}

/// Borrows the descriptor of a type that predates `AsFd`.
#[expect(unsafe_code, reason = "a descriptor without a lifetime")]
pub(super) fn borrow<T: AsRawFd>(owner: &T) -> BorrowedFd<'_> {
    // SAFETY: the owner keeps its descriptor open as long as it is borrowed here.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}
