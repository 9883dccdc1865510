//! `IoAddressSpace`: where a VFIO device's DMA addresses mean something.
//!
//! A device must be opened into one before it can be used, even if it never does DMA. Devices that
//! are to reach each other's memory share one.

use std::fs::OpenOptions;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use iommufd_ioctls::{IommuFd, IommufdError, IommufdIoas};
use rustix::io::Errno;

use super::container::{Container, Group, borrow, not_viable};
use super::iova_allocator::{self, IovaAllocator};
use super::iova_ranges::{parse_type1_info, read_bus_addresses, without};
use crate::{Error, Kind, PciAddress, Result, pci, uapi};

/// VFIO's two ways to open a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interface {
    /// `/dev/vfio/devices/vfioN` and `/dev/iommu`: kernels with `CONFIG_VFIO_DEVICE_CDEV` and `CONFIG_IOMMUFD`.
    Cdev,
    /// `/dev/vfio/GROUP` and `/dev/vfio/vfio`: kernels with `CONFIG_VFIO_GROUP` and `CONFIG_VFIO_CONTAINER`.
    Group,
}

impl Interface {
    /// `cdev` or `group`, for messages and `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cdev => "cdev",
            Self::Group => "group",
        }
    }
}

/// An IO address space: an iommufd IOAS, or a container with type1v2.
///
/// Devices opened into it keep it alive.
///
/// As an [`Importer`](crate::Importer) it makes memory of other devices reachable for the DMA of its own.
#[derive(Clone)]
pub struct IoAddressSpace {
    pub(super) space: Space,
    pub(super) iovas: Arc<IovaAllocator>,
}

#[derive(Clone)]
pub(super) enum Space {
    Iommufd { iommufd: Arc<IommuFd>, ioas: Arc<IommufdIoas> },
    Container(Arc<Container>),
}

impl std::fmt::Debug for IoAddressSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoAddressSpace").field("interface", &self.interface()).finish_non_exhaustive()
    }
}

/// What keeps an open device in its address space. Dropped after the device's descriptor.
pub(super) enum Membership {
    Cdev { _ioas: Arc<IommufdIoas> },
    Group { group: Arc<Group> },
}

impl Membership {
    pub(super) fn interface(&self) -> Interface {
        match self {
            Self::Cdev { .. } => Interface::Cdev,
            Self::Group { .. } => Interface::Group,
        }
    }
}

impl IoAddressSpace {
    /// An empty address space by the given interface.
    ///
    /// # Errors
    /// The kernel lacks the interface, or its files may not be opened.
    pub fn new(interface: Interface) -> Result<Self> {
        let space = match interface {
            Interface::Cdev => {
                let iommufd = Arc::new(IommuFd::new().map_err(iommufd_error)?);
                let ioas = Arc::new(IommufdIoas::new(Arc::clone(&iommufd)).map_err(iommufd_error)?);
                Space::Iommufd { iommufd, ioas }
            }
            Interface::Group => Space::Container(Container::open()?),
        };
        Ok(Self { space, iovas: Arc::default() })
    }

    /// The interface that devices in it are opened by.
    pub fn interface(&self) -> Interface {
        match self.space {
            Space::Iommufd { .. } => Interface::Cdev,
            Space::Container(_) => Interface::Group,
        }
    }

    /// The IO addresses that mappings are placed at, from 4 GiB on: those that the kernel allows the devices in it now,
    /// without those that a PCI bus of this machine answers itself (BARs, and windows of bridges). A request to one of
    /// the latter might reach a neighbour behind the same switch and no IOMMU.
    ///
    /// The kernel's part is `IOMMU_IOAS_IOVA_RANGES`, or type1's `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`. The windows of
    /// host bridges are known to root only; without them an address may be one that a device gets which is plugged
    /// in later.
    ///
    /// # Errors
    /// What the kernel says; or sysfs cannot be read.
    pub fn usable_iovas(&self) -> Result<Vec<RangeInclusive<u64>>> {
        let allowed = self.allowed_iovas().map_err(|error| error.on(self.interface().name()))?;
        let below = [0..=iova_allocator::FIRST - 1];
        Ok(without(&without(&allowed, &below), &read_bus_addresses()?))
    }

    /// What the kernel allows the devices that are in it now.
    fn allowed_iovas(&self) -> Result<Vec<RangeInclusive<u64>>> {
        const TRIED: &str = "ask which IO addresses may be used";
        match &self.space {
            Space::Iommufd { iommufd, ioas } => {
                let ranges = uapi::iommufd::ioas_iova_ranges(borrow(&**iommufd), ioas.id())
                    .map_err(|errno| Error::os(TRIED, errno))?;
                Ok(ranges.into_iter().map(|(first, last)| first..=last).collect())
            }
            Space::Container(container) => {
                let info =
                    uapi::vfio::iommu_get_info(container.as_fd()).map_err(|errno| Error::os(TRIED, errno))?;
                let ranges = parse_type1_info(&info).map_err(|why| Error::new(Kind::Os, TRIED, why))?;
                // Before Linux 5.4 a container did not say; those that export dma-bufs do.
                Ok(ranges.unwrap_or_else(|| vec![0..=u64::MAX]))
            }
        }
    }

    pub(super) fn open_device(&self, address: PciAddress) -> Result<(OwnedFd, Membership)> {
        match &self.space {
            Space::Iommufd { iommufd, ioas } => {
                let device = open_cdev(address)?;
                let failed = |errno: Errno| {
                    const TRIED: &str = "bind a VFIO device to an iommufd";
                    match errno {
                        // iommufd_device_bind claims the whole group.
                        Errno::BUSY | Errno::PERM if pci::group_blocker(address).is_some() => {
                            not_viable(TRIED, address, address.iommu_group().unwrap_or_default()).errno(errno)
                        }
                        // vfio_df_open: a character device has one owner; nothing else here can be invalid.
                        Errno::INVAL => Error::new(Kind::Busy, TRIED, "somebody else has it open")
                            .on(address)
                            .errno(errno)
                            .next("end the program that holds it (fuser names it)"),
                        errno => Error::os(TRIED, errno).on(address),
                    }
                };
                uapi::vfio::device_bind_iommufd(&device, borrow(&**iommufd)).map_err(failed)?;
                uapi::vfio::device_attach_iommufd_pt(&device, ioas.id()).map_err(failed)?;
                Ok((device, Membership::Cdev { _ioas: Arc::clone(ioas) }))
            }
            Space::Container(container) => {
                let (device, group) = container.open_device(address)?;
                Ok((device, Membership::Group { group }))
            }
        }
    }
}

/// Opens `/dev/vfio/devices/vfioN`, where N is what the device's sysfs folder `vfio-dev` names.
fn open_cdev(address: PciAddress) -> Result<OwnedFd> {
    const TRIED: &str = "open a VFIO character device";
    let folder = address.sysfs_path().join("vfio-dev");
    let name = folder
        .read_dir()
        .ok()
        .and_then(|mut entries| entries.next()?.ok())
        .ok_or_else(|| {
            Error::new(Kind::NotBoundToVfio, TRIED, format!("{} is empty", folder.display())).on(address)
        })?
        .file_name();
    let path = PathBuf::from("/dev/vfio/devices").join(name);
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| {
        let error = Error::os(TRIED, error).on(format!("{}, {address}", path.display()));
        match error.kind() {
            Kind::NotFound => {
                error.next("this kernel has no VFIO character devices (CONFIG_VFIO_DEVICE_CDEV)")
            }
            Kind::PermissionDenied => {
                error.next(format!("run as root, or give yourself {} with chown", path.display()))
            }
            _ => error,
        }
    })?;
    Ok(file.into())
}

fn iommufd_error(error: IommufdError) -> Error {
    const TRIED: &str = "make an IO address space";
    match error {
        IommufdError::OpenIommufd(error) => Error::os(TRIED, error)
            .on("/dev/iommu")
            .next("it needs CONFIG_IOMMUFD and permission to open the file"),
        IommufdError::IommuIoasAlloc(errno) => {
            Error::os(TRIED, Errno::from_raw_os_error(errno.errno())).on("/dev/iommu")
        }
        other => Error::new(Kind::Os, TRIED, other.to_string()).on("/dev/iommu"),
    }
}
