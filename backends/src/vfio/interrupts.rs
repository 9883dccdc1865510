//! The interrupts by which the kernel tells the owner of a device that it failed, or is wanted back.
//!
//! Absent on purpose: the device's own interrupts (INTx, MSI, MSI-X). They are its driver's.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX};

use super::Device;
use crate::uapi::vfio as uapi;
use crate::{Error, Interrupts, Result};

const TRIED: &str = "watch a VFIO device";

impl Device {
    /// Has the kernel signal errors and requests, until the device is closed. A second call makes new
    /// eventfds, and the earlier ones are signalled no more.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) of an adopted device: it would take its owner's
    /// eventfds away. Else what the kernel says.
    pub fn watch_interrupts(&self) -> Result<Interrupts> {
        self.check_owned(TRIED)?;
        Ok(Interrupts {
            error: self.watch_interrupt(VFIO_PCI_ERR_IRQ_INDEX)?,
            request: self.watch_interrupt(VFIO_PCI_REQ_IRQ_INDEX)?,
        })
    }

    fn watch_interrupt(&self, index: u32) -> Result<Option<OwnedFd>> {
        let failed = |errno: Errno| Error::os(TRIED, errno).on(self.address());
        match uapi::device_get_irq_count(self, index) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            // Kernels before 7.3 have no error interrupt for a device without PCIe.
            Err(Errno::INVAL) => return Ok(None),
            Err(errno) => return Err(failed(errno)),
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        uapi::device_set_irq_eventfd(self, index, event.as_fd()).map_err(failed)?;
        Ok(Some(event))
    }
}
