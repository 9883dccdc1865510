//! Export of a VFIO device's memory, and what each refusal means.
//!
//! `VFIO_DEVICE_FEATURE_DMA_BUF`, Linux 6.19 and later. The ranges were checked when they were
//! made, so an errno of the kernel (`vfio_pci_core_feature_dma_buf`) has one meaning left.

use std::ffi::CString;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::VFIO_DEVICE_FEATURE_DMA_BUF;
use vfio_bindings::bindings::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ROM_REGION_INDEX};

use super::Device;
use crate::pci::Function;
use crate::uapi::vfio as uapi;
use crate::{DmaBuf, DmaRange, DmaRanges, Error, Kind, PciAddress, Result};

const TRIED: &str = "export a dma-buf";

/// The first release that exports VFIO memory as dma-bufs.
const FIRST_RELEASE: (u32, u32) = (6, 19);

/// Whether a device's memory can become a dma-buf, as the kernel answers a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DmaBufSupport {
    /// It can.
    Supported,
    /// The kernel has no such feature: too old, or built without it.
    KernelLacksIt,
    /// The kernel has it; the VFIO driver of this device does not.
    DriverLacksIt,
}

impl Device {
    /// Asks the kernel whether this device's memory can become a dma-buf. Exports nothing.
    ///
    /// # Errors
    /// What the kernel says, if it is none of the three answers.
    pub fn dma_buf_support(&self) -> Result<DmaBufSupport> {
        match uapi::device_feature_probe_get(self, VFIO_DEVICE_FEATURE_DMA_BUF) {
            Ok(()) => Ok(DmaBufSupport::Supported),
            Err(Errno::NOTTY) => Ok(DmaBufSupport::KernelLacksIt),
            Err(Errno::OPNOTSUPP) => Ok(DmaBufSupport::DriverLacksIt),
            Err(errno) => Err(Error::os("ask for dma-buf export", errno).on(self.address())),
        }
    }

    pub(super) fn export_dma_buf(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        // The kernel looks at memory decoding only, and would make a live dma-buf of a device that
        // goes back to sleep (vfio_pci_core_feature_dma_buf).
        self.check_awake(TRIED)?;
        self.region(ranges.region_index())?;
        if matches!(ranges.region_index(), VFIO_PCI_ROM_REGION_INDEX | VFIO_PCI_CONFIG_REGION_INDEX) {
            return Err(Error::new(Kind::InvalidInput, TRIED, "only BARs can be exported").on(format!(
                "{}, region {}",
                self.address(),
                ranges.region_index()
            )));
        }
        let open_flags = (rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC).bits();
        let slices = ranges.as_slice().iter().map(|range| (range.offset_bytes, range.length_bytes));
        let fd = uapi::device_feature_dma_buf(
            self,
            VFIO_DEVICE_FEATURE_DMA_BUF,
            ranges.region_index(),
            open_flags,
            slices,
        )
        .map_err(|errno| self.explain(errno, ranges))?;
        // vfio_pci_core_feature_dma_buf gives it the sum of its ranges.
        let dma_buf = DmaBuf::of_device(fd, ranges.size_bytes(), self.address());
        // So that whoever looks at /proc/PID/fdinfo or at bufinfo can tell whose memory it is.
        if let Err(error) = dma_buf.set_name(&self.dma_buf_name) {
            tracing::debug!(%error, name = ?self.dma_buf_name, "could not name a dma-buf");
        }
        Ok(dma_buf)
    }

    /// What a device's dma-bufs are called.
    pub(super) fn name_of_dma_bufs(address: PciAddress) -> CString {
        CString::new(format!("peervram {address}")).expect("an address has no NUL")
    }

    /// Whether the driver names areas of the region, and some range is not in one of them.
    fn is_beyond_areas(&self, ranges: &DmaRanges) -> bool {
        self.region(ranges.region_index()).is_ok_and(|region| {
            let is_outside = |range: &DmaRange| !region.can_map(range.offset_bytes, range.length_bytes);
            region.sparse_areas().is_some() && ranges.as_slice().iter().any(is_outside)
        })
    }

    fn explain(&self, errno: Errno, ranges: &DmaRanges) -> Error {
        let region_index = ranges.region_index();
        let error = |kind, why: String| {
            Error::new(kind, TRIED, why).on(format!("{}, region {region_index}", self.address())).errno(errno)
        };
        match errno {
            Errno::NOTTY => explain_missing_feature(errno).on(self.address()),
            Errno::OPNOTSUPP => {
                let driver = self.address().driver().unwrap_or_else(|| "its driver".into());
                error(Kind::Unsupported, format!("{driver} does not export memory"))
                    .next("bind the device to vfio-pci itself, not to a variant without the feature")
            }
            // A variant of vfio-pci reports more than is there (nvgrace_gpu_ioctl_get_region_info), and tells
            // by the areas that can be mapped.
            Errno::INVAL if self.is_beyond_areas(ranges) => {
                error(Kind::InvalidInput, "the region has less memory behind it than it reports".into())
                    .next("stay inside the areas that the region's driver lets anybody map")
            }
            // pcim_p2pdma_provider found none; every other EINVAL was excluded by `DmaRanges`.
            Errno::INVAL => {
                let is_memory = Function::read(self.address())
                    .is_ok_and(|function| function.bar(region_index).is_some_and(|bar| bar.is_memory));
                if is_memory {
                    error(Kind::NoPeerProvider, "the kernel offers no peer-to-peer access to this BAR".into())
                        .next("it needs CONFIG_PCI_P2PDMA and a BAR that the kernel's own driver has not claimed")
                } else {
                    error(Kind::NoPeerProvider, "this BAR is I/O ports, not memory".into())
                        .next("peervram devices lists the memory BARs")
                }
            }
            Errno::NODEV => error(Kind::Gone, "the device is being removed".into()),
            errno => Error::os(TRIED, errno).on(format!("{}, region {region_index}", self.address())),
        }
    }
}

/// The release of the running kernel, as `uname -r` prints it.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Whether the running kernel is new enough to export VFIO memory as dma-bufs. Asks no device.
///
/// # Errors
/// [`Kind::KernelTooOld`].
pub fn check_kernel_exports_dma_bufs() -> Result<()> {
    let release = kernel_release();
    match release_number(&release) {
        Some(number) if number < FIRST_RELEASE => Err(Error::new(
            Kind::KernelTooOld,
            TRIED,
            format!("Linux {release} has no dma-buf export for VFIO"),
        )
        .next("boot Linux 6.19 or later")),
        _ => Ok(()),
    }
}

/// ENOTTY: tells a kernel that is too old from one that was built without the option.
fn explain_missing_feature(errno: Errno) -> Error {
    let built_without = || {
        Error::new(Kind::Unsupported, TRIED, format!("this Linux {} was built without it", kernel_release())).next(
            "the kernel needs CONFIG_VFIO_PCI_DMABUF, which CONFIG_PCI_P2PDMA and CONFIG_DMA_SHARED_BUFFER select",
        )
    };
    check_kernel_exports_dma_bufs().err().unwrap_or_else(built_without).errno(errno)
}

fn release_number(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_by_number() {
        assert!(release_number("6.12.57+deb13-amd64").unwrap() < FIRST_RELEASE);
        assert!(release_number("6.19-rc1").unwrap() >= FIRST_RELEASE);
        assert!(release_number("7.3.4+deb13-amd64").unwrap() > FIRST_RELEASE);
        assert_eq!(release_number("banana"), None);
    }
}
