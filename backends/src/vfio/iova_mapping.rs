//! `IovaMapping`: another device's memory in an IO address space, for the DMA of the devices in it.
//!
//! The two interfaces do it differently, and it matters when memory is taken back:
//!
//! - An **iommufd** maps a dma-buf (`IOMMU_IOAS_MAP_FILE`, one range only). The kernel takes the mapping
//!   away on a revoke, for good: it must be made again.
//! - A **container** (type1) maps an address of this process, behind which the BAR is mapped. The
//!   kernel does **not** take it away when the exporter is reset (seen on Linux 7.3): DMA goes on into a
//!   device that was reset. It must be freed before any revoking call, which is what
//!   [`OnRevoke::FreeBefore`] says.
//!
//! Ordinary memory of this process both map by its address, and both pin it.
//!
//! Neither asks `pci_p2pdma_map_type`: the topology forbids nothing, and promises nothing.
#![expect(unsafe_code, reason = "giving a device access to mapped memory")]

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use iommufd_bindings::{
    iommu_ioas_map, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use iommufd_ioctls::{IommuFd, IommufdError, IommufdIoas};
use rustix::io::Errno;
use vfio_ioctls::VfioError;

use super::address_space::{IoAddressSpace, Space};
use super::container::Container;
use crate::{DmaBuf, Error, Importer, Kind, Mapping, OnRevoke, Result};

const TRIED: &str = "map memory for DMA";

/// Memory at an IO virtual address, until dropped. The devices of the address space can reach it.
#[derive(Debug)]
pub struct IovaMapping {
    space: IoAddressSpace,
    iova: u64,
    length_bytes: u64,
    /// What was mapped by its address; it lives at least as long as the mapping for DMA.
    mapping: Option<Arc<Mapping>>,
}

impl IovaMapping {
    /// Its IO virtual address: what a descriptor of a device in the address space names.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.length_bytes
    }

    /// The memory of this process that was mapped by its address; none where it was a dma-buf.
    pub fn memory(&self) -> Option<&Arc<Mapping>> {
        self.mapping.as_ref()
    }

    /// Never true: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        self.length_bytes == 0
    }
}

impl Drop for IovaMapping {
    fn drop(&mut self) {
        let result = match &self.space.space {
            Space::Iommufd { ioas, .. } => ioas.unmap(self.iova, self.length_bytes).map_err(explain_iommufd),
            Space::Container(container) => {
                container.vfio().vfio_dma_unmap(self.iova, self.length_bytes as usize).map_err(explain_type1)
            }
        };
        match result {
            Ok(()) => self.space.iovas.free(self.iova, self.length_bytes),
            // The addresses stay taken: what lies behind them is not known.
            Err(error) => tracing::error!(%error, iova = self.iova, "could not unmap memory from DMA"),
        }
    }
}

impl Importer for IoAddressSpace {
    type Memory = IovaMapping;

    fn name(&self) -> String {
        format!("IO address space by {}", self.interface().name())
    }

    fn on_revoke(&self) -> OnRevoke {
        match self.space {
            Space::Iommufd { .. } => OnRevoke::Reimport,
            Space::Container(_) => OnRevoke::FreeBefore,
        }
    }

    fn governed_by_p2pdma(&self) -> bool {
        false
    }

    fn import(&self, dma_buf: &DmaBuf) -> Result<IovaMapping> {
        let Space::Iommufd { ioas, .. } = &self.space else {
            return Err(Error::new(Kind::Unsupported, TRIED, "a container maps addresses, not dma-bufs")
                .on(self.name()));
        };
        self.place(dma_buf.size_bytes(), None, |iova| map_file(ioas, dma_buf, iova))
    }

    /// A container maps any memory of this process so; an iommufd ordinary memory, and BARs by
    /// [`import`](Importer::import) only.
    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<IovaMapping> {
        let length_bytes = mapping.len() as u64;
        self.place(length_bytes, Some(Arc::clone(&mapping)), |iova| match &self.space {
            Space::Iommufd { iommufd, ioas } => map_address_in_ioas(iommufd, ioas, &mapping, iova),
            Space::Container(container) => map_address(container, &mapping, iova),
        })
    }

    /// Host memory, pinned as long as it is mapped.
    fn stage(&self, size_bytes: u64) -> Result<IovaMapping> {
        let length_bytes = usize::try_from(size_bytes)
            .map_err(|_| Error::new(Kind::InvalidInput, TRIED, "it is larger than the address space"))?;
        self.import_host_pointer(Arc::new(Mapping::of_host_memory(length_bytes)?))
    }

    fn host_memory(&self, memory: &IovaMapping) -> Option<Arc<Mapping>> {
        memory.mapping.clone()
    }

    fn release(&self, memory: IovaMapping) -> Result<()> {
        drop(memory);
        Ok(())
    }
}

impl IoAddressSpace {
    /// Finds room for `length_bytes` and lets `map` fill it.
    fn place(
        &self,
        length_bytes: u64,
        mapping: Option<Arc<Mapping>>,
        map: impl FnOnce(u64) -> Result<()>,
    ) -> Result<IovaMapping> {
        let usable = self.usable_iovas()?;
        let iova = self.iovas.take(length_bytes, &usable).ok_or_else(|| {
            Error::new(Kind::Busy, TRIED, "no range of IO addresses is long enough").on(self.name())
        })?;
        match map(iova) {
            Ok(()) => Ok(IovaMapping { space: self.clone(), iova, length_bytes, mapping }),
            Err(error) => {
                self.iovas.free(iova, length_bytes);
                Err(error.on(self.name()))
            }
        }
    }
}

fn map_file(ioas: &IommufdIoas, dma_buf: &DmaBuf, iova: u64) -> Result<()> {
    let fd = dma_buf.as_fd().as_raw_fd();
    ioas.map_file(fd, 0, dma_buf.size_bytes(), iova, true).map_err(explain_iommufd)
}

fn map_address(container: &Container, mapping: &Mapping, iova: u64) -> Result<()> {
    // SAFETY: the memory is device memory behind a shared mapping to which no reference is ever given
    // out, and `IovaMapping` keeps the mapping until the range is unmapped from DMA.
    unsafe { container.vfio().vfio_dma_map(iova, mapping.len(), mapping.as_ptr()) }.map_err(explain_type1)
}

fn map_address_in_ioas(iommufd: &IommuFd, ioas: &IommufdIoas, mapping: &Mapping, iova: u64) -> Result<()> {
    let map = iommu_ioas_map {
        size: size_of::<iommu_ioas_map>() as u32,
        flags: FIXED_IOVA | READABLE | WRITEABLE,
        ioas_id: ioas.id(),
        user_va: mapping.as_ptr() as u64,
        length: mapping.len() as u64,
        iova,
        ..Default::default()
    };
    iommufd.map_iommu_ioas(&map).map_err(explain_iommufd)
}

fn explain_iommufd(error: IommufdError) -> Error {
    let errno = match error {
        IommufdError::IommuIoasMap(errno)
        | IommufdError::IommuIoasMapFile(errno)
        | IommufdError::IommuIoasUnmap(errno) => Errno::from_raw_os_error(errno.errno()),
        other => return Error::new(Kind::Os, TRIED, other.to_string()),
    };
    match errno {
        // pfn_reader_user_pin: pin_user_pages takes no BAR.
        Errno::FAULT => {
            let why = "an iommufd maps ordinary memory by its address, and a BAR as a dma-buf only";
            Error::new(Kind::Unsupported, TRIED, why).errno(errno)
        }
        Errno::NOMEM => locked_too_much(errno),
        // vfio_pci_dma_buf_iommufd_map
        Errno::OPNOTSUPP => Error::new(Kind::Unsupported, TRIED, "an iommufd maps a VFIO dma-buf of one range only")
            .errno(errno)
            .next("export one range, or open the devices by group"),
        Errno::NODEV => Error::new(Kind::MemoryDisabled, TRIED, "the memory is revoked, or its device is gone")
            .errno(errno)
            .next("switch the exporter's memory on and import again"),
        Errno::INVAL => Error::new(Kind::Unsupported, TRIED, "the kernel does not map this file")
            .errno(errno)
            .next("iommufd maps VFIO dma-bufs from Linux 6.19 on; an address may also lie beyond what the IOMMU reaches"),
        errno => Error::os(TRIED, errno),
    }
}

fn explain_type1(error: VfioError) -> Error {
    let errno = match error {
        VfioError::IommuDmaMap(errno) | VfioError::IommuDmaUnmap(errno) => {
            Errno::from_raw_os_error(errno.errno())
        }
        other => return Error::new(Kind::Os, TRIED, other.to_string()),
    };
    match errno {
        Errno::FAULT => Error::new(Kind::MemoryDisabled, TRIED, "the memory cannot be reached now")
            .errno(errno)
            .next("switch the exporter's memory on and import again"),
        Errno::NOMEM => locked_too_much(errno),
        errno => Error::os(TRIED, errno),
    }
}

fn locked_too_much(errno: Errno) -> Error {
    Error::new(Kind::PermissionDenied, TRIED, "the process may not lock that much memory")
        .errno(errno)
        .next("raise RLIMIT_MEMLOCK (ulimit -l)")
}
