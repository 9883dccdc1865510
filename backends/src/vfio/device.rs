//! `Device`: a VFIO device that this process owns, or has adopted.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ROM_REGION_INDEX, vfio_device_info,
};

use super::address_space::{Interface, IoAddressSpace, Membership};
use super::live_mappings::LiveMappings;
use super::power::Power;
use crate::uapi::vfio as uapi;
use crate::{
    DmaBuf, DmaRanges, Error, Exporter, Interrupts, Kind, Mapping, NotClosed, PciAddress, Region, Result, pci,
};

/// A VFIO device, opened by this process and closed with this value; or one that another process owns
/// ([`Device::adopt`]).
///
/// The kernel closes the device when the last descriptor *and the last BAR mapping* are gone, and
/// then revokes its dma-bufs for good. [`Device::close`] refuses while a mapping is alive, so that
/// "closed" means closed; [`Exporter::retire_mappings`] makes mappings let go.
#[derive(Debug)]
pub struct Device {
    pub(super) open: Arc<Open>,
    address: PciAddress,
    regions: Box<[Region]>,
    pub(super) can_reset: bool,
    mappings: LiveMappings,
    pub(super) power: Power,
    /// Spelt once: that takes longer than telling the kernel.
    pub(super) dma_buf_name: CString,
}

/// What a mapping keeps alive. The descriptor goes before the group or address space it is in.
pub(super) struct Open {
    pub(super) fd: OwnedFd,
    /// None where another process opened it.
    pub(super) membership: Option<Membership>,
    /// The address space that it was opened into.
    pub(super) space: Option<IoAddressSpace>,
}

impl AsFd for Open {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.fd.fmt(f)
    }
}

impl Device {
    /// Opens `address` into an IO address space of its own, by the character device where the
    /// kernel has one, else by its group.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] and [`Kind::NotFound`] for the address, [`Kind::NotBoundToVfio`],
    /// [`Kind::GroupNotViable`], [`Kind::PermissionDenied`], [`Kind::Busy`]. Nothing stays open.
    pub fn open(address: PciAddress) -> Result<Self> {
        check_bound(address)?;
        let by_cdev = IoAddressSpace::new(Interface::Cdev).and_then(|space| Self::open_into(&space, address));
        let cdev_error = match by_cdev {
            Ok(device) => return Ok(device),
            Err(error) => error,
        };
        let by_group =
            IoAddressSpace::new(Interface::Group).and_then(|space| Self::open_into(&space, address));
        by_group.map_err(|group_error| {
            // Where the kernel has the newer interface and it failed, that failure is the answer.
            if cdev_error.kind() == Kind::NotFound { group_error } else { cdev_error }
        })
    }

    /// Opens `address` into `space`.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_into(space: &IoAddressSpace, address: PciAddress) -> Result<Self> {
        check_bound(address)?;
        let (fd, membership) = space.open_device(address)?;
        let failed = |errno: Errno| Error::os("describe a VFIO device", errno).on(address);
        let info = uapi::device_get_info(&fd).map_err(failed)?;
        let open = Open { fd, membership: Some(membership), space: Some(space.clone()) };
        Self::describe(open, address, &info, 0..info.num_regions)
    }

    /// Asks for the regions of those indices.
    pub(super) fn describe(
        open: Open,
        address: PciAddress,
        info: &vfio_device_info,
        indices: impl Iterator<Item = u32>,
    ) -> Result<Self> {
        let failed = |errno: Errno| Error::os("describe a VFIO device", errno).on(address);
        let mut regions = Vec::new();
        for index in indices {
            match uapi::device_get_region_info(&open, index) {
                Ok(bytes) => regions.push(Region::parse(&bytes).map_err(|error| error.on(address))?),
                // vfio-pci answers EINVAL for the VGA region of a device that has none.
                Err(Errno::INVAL) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        regions.retain(Region::is_present);
        let device = Self {
            open: Arc::new(open),
            address,
            regions: regions.into(),
            can_reset: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            mappings: LiveMappings::default(),
            power: Power::default(),
            dma_buf_name: Self::name_of_dma_bufs(address),
        };
        let interface = device.interface().map_or("adoption", Interface::name);
        tracing::debug!(%address, interface, regions = device.regions.len(), "opened");
        Ok(device)
    }

    /// Its PCI address.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// How this process opened it; none where another one did ([`Device::adopt`]).
    pub fn interface(&self) -> Option<Interface> {
        self.open.membership.as_ref().map(Membership::interface)
    }

    /// The address space that its DMA is translated by; none where another process opened it.
    pub fn address_space(&self) -> Option<&IoAddressSpace> {
        self.open.space.as_ref()
    }

    /// The region at `index`, with the meaning of a PCI BAR below 6.
    ///
    /// # Errors
    /// [`Kind::NotFound`] names the BARs that there are.
    pub fn region(&self, index: u32) -> Result<&Region> {
        self.regions.iter().find(|region| region.index == index).ok_or_else(|| {
            let bars: Vec<String> = (self.regions.iter())
                .filter(|region| region.index < VFIO_PCI_ROM_REGION_INDEX)
                .map(|region| region.index.to_string())
                .collect();
            Error::new(Kind::NotFound, "find a region", format!("the device has no region {index}"))
                .on(self.address)
                .next(format!("its BARs are {}", bars.join(", ")))
        })
    }

    /// Reads from a region through the device's descriptor. Reports what a mapped access would
    /// turn into SIGBUS.
    ///
    /// # Errors
    /// [`Kind::MemoryDisabled`] while memory decoding is off; [`Kind::Os`] otherwise.
    pub fn read(&self, region_index: u32, offset_bytes: u64, into: &mut [u8]) -> Result<()> {
        let start = self.file_offset(region_index, offset_bytes, into.len())?;
        let mut done = 0;
        while done < into.len() {
            match rustix::io::pread(self, &mut into[done..], start + done as u64) {
                Ok(0) => return Err(self.transfer_error(region_index, Errno::IO)),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.transfer_error(region_index, errno)),
            }
        }
        Ok(())
    }

    /// Writes to a region through the device's descriptor. As [`Device::read`].
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn write(&self, region_index: u32, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        let start = self.file_offset(region_index, offset_bytes, bytes.len())?;
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(self, &bytes[done..], start + done as u64) {
                Ok(0) => return Err(self.transfer_error(region_index, Errno::IO)),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.transfer_error(region_index, errno)),
            }
        }
        Ok(())
    }

    /// Closes the device, so that another process can open it.
    ///
    /// # Errors
    /// [`Kind::StillInUse`] while a mapping of a BAR is alive and not [retired](Exporter::retire_mappings), with the
    /// device given back: the kernel would keep it open (seen on Linux 7.3).
    pub fn close(self) -> Result<(), NotClosed<Self>> {
        let mappings = Arc::strong_count(&self.open) - 1;
        if mappings == 0 {
            return Ok(());
        }
        let error = Error::new(
            Kind::StillInUse,
            "close a VFIO device",
            format!("{mappings} mapping(s) of its memory are alive and keep it open"),
        )
        .on(self.address)
        .next("detach importers by host pointer, and drop the mappings or retire them first");
        Err(NotClosed::new(self, error))
    }

    fn file_offset(&self, region_index: u32, offset_bytes: u64, length_bytes: usize) -> Result<u64> {
        let region = self.region(region_index)?;
        match offset_bytes.checked_add(length_bytes as u64) {
            Some(end) if end <= region.size_bytes => Ok(region.file_offset_bytes + offset_bytes),
            _ => Err(Error::new(
                Kind::InvalidInput,
                "access a region",
                format!(
                    "{offset_bytes:#x} + {length_bytes:#x} is beyond the {:#x} bytes of region {region_index}",
                    region.size_bytes
                ),
            )
            .on(self.address)),
        }
    }

    fn transfer_error(&self, region_index: u32, errno: Errno) -> Error {
        const TRIED: &str = "access a region";
        // vfio_pci_core_do_io_rw gives EIO while memory is off.
        let is_bar = region_index < VFIO_PCI_CONFIG_REGION_INDEX;
        if errno == Errno::IO && is_bar {
            if self.is_adopted() {
                let why = "its owner has switched its memory off, or it sleeps";
                return self.memory_disabled(TRIED, why, "ask the owner to bring it back").errno(errno);
            }
            if let Err(error) = self.check_decoding(TRIED)
                && error.kind() == Kind::MemoryDisabled
            {
                return error.errno(errno);
            }
        }
        Error::os(TRIED, errno).on(format!("{}, region {region_index}", self.address))
    }

    /// Fails where memory decoding is off or the device sleeps in D3hot, as the kernel decides it
    /// (`__vfio_pci_memory_enabled`).
    fn check_decoding(&self, tried: &'static str) -> Result<()> {
        if !self.memory_enabled()? {
            let next = "switch it on first: a reset, or the owner, turned it off";
            return Err(self.memory_disabled(tried, "the device's memory decoding is off", next));
        }
        self.check_not_d3hot(tried)
    }

    pub(super) fn memory_disabled(
        &self,
        tried: &'static str,
        why: &'static str,
        next: &'static str,
    ) -> Error {
        Error::new(Kind::MemoryDisabled, tried, why).on(self.address).next(next)
    }
}

/// Fails with what to do where `address` is absent or has another driver.
fn check_bound(address: PciAddress) -> Result<()> {
    const TRIED: &str = "open a VFIO device";
    let folder = address.sysfs_path();
    if !folder.exists() {
        return Err(Error::new(Kind::NotFound, TRIED, "there is no such PCI function")
            .on(address)
            .next("peervram devices, or lspci -D, lists what there is"));
    }
    let driver = address.driver();
    let is_vfio = |driver: &str| pci::is_vfio_driver(driver) || folder.join("vfio-dev").exists();
    if driver.as_deref().is_some_and(is_vfio) {
        return Ok(());
    }
    let why = match driver {
        Some(driver) => format!("it is bound to the driver {driver}"),
        None => "it is bound to no driver".to_owned(),
    };
    // No command that takes a driver away: the root disk's controller may be at that address. `peervram bind` looks.
    Err(Error::new(Kind::NotBoundToVfio, TRIED, why).on(address).next(format!(
        "sudo peervram bind {address} binds it, unless it has nothing to lend or something of the machine hangs on it"
    )))
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.open.fd.as_fd()
    }
}

impl AsRef<Device> for Device {
    fn as_ref(&self) -> &Device {
        self
    }
}

impl Exporter for Device {
    fn name(&self) -> String {
        self.address.to_string()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        Some(self.address)
    }

    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        self.export_dma_buf(ranges)
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        let region = self.region(ranges.region_index())?;
        let unmappable =
            ranges.as_slice().iter().find(|range| !region.can_map(range.offset_bytes, range.length_bytes));
        if let Some(range) = unmappable {
            return Err(Error::new(
                Kind::Unsupported,
                "map a BAR",
                format!(
                    "the driver lets nobody map {:#x} bytes at {:#x}",
                    range.length_bytes, range.offset_bytes
                ),
            )
            .on(format!("{}, region {}", self.address, region.index)));
        }
        let pieces: Vec<(u64, u64)> = (ranges.as_slice().iter())
            .map(|range| (region.file_offset_bytes + range.offset_bytes, range.length_bytes))
            .collect();
        self.mappings.make(|| Mapping::new(Arc::clone(&self.open) as _, &pieces)).map_err(|error| {
            let place = format!("{}, region {}", self.address, region.index);
            error.on(place)
        })
    }

    /// Of an adopted device it says yes: reading its configuration would wake it, or end the low-power
    /// state that its owner chose.
    fn check_reachable(&self) -> Result<()> {
        const TRIED: &str = "use a device's memory";
        if self.is_adopted() {
            return Ok(());
        }
        self.check_awake(TRIED)?;
        self.check_decoding(TRIED)
    }

    fn shadow(&self) -> Result<()> {
        self.mappings.shadow().map_err(|error| error.on(self.address))
    }

    fn unshadow(&self) -> Result<()> {
        self.mappings.unshadow().map_err(|error| error.on(self.address))
    }

    fn retire_mappings(&self) -> Result<()> {
        self.mappings.retire().map_err(|error| error.on(self.address))
    }

    fn close_device(&self) -> Result<()> {
        self.close_in_place()
    }

    fn interrupts(&self) -> Result<Interrupts> {
        // An adopted one tells its owner.
        if self.is_adopted() { Ok(Interrupts::default()) } else { self.watch_interrupts() }
    }
}
