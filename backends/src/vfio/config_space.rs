//! Configuration space of a VFIO device, as the kernel lets user space see it.
//!
//! Reads and writes go through the VFIO configuration region, never through sysfs: VFIO virtualises
//! some bits, and a write of the memory bit there is what makes it revoke the device's dma-bufs
//! (`vfio_pci_config.c`, `vfio_basic_config_write`).

use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;

use super::Device;
use crate::Result;

// include/uapi/linux/pci_regs.h
const PCI_COMMAND: u64 = 0x04;
const PCI_COMMAND_MEMORY: u16 = 1 << 1;
const PCI_COMMAND_MASTER: u16 = 1 << 2;

impl Device {
    /// Whether the device decodes memory accesses (`PCI_COMMAND_MEMORY`).
    ///
    /// # Errors
    /// What reading configuration space says: a device that fell off the bus, or one that is gone.
    pub fn memory_enabled(&self) -> Result<bool> {
        Ok(self.command()? & PCI_COMMAND_MEMORY != 0)
    }

    /// Switches memory decoding.
    ///
    /// Off revokes every dma-buf of the device and **blocks without a limit** until its importers
    /// have unmapped; touching a mapped BAR afterwards raises SIGBUS. On brings dma-bufs back with
    /// the same descriptors; imports that do not heal themselves must be made again.
    ///
    /// # Errors
    /// What writing configuration space says. The memory may be revoked all the same.
    pub fn set_memory_enabled(&self, enabled: bool) -> Result<()> {
        self.set_command(PCI_COMMAND_MEMORY, enabled)
    }

    /// Switches bus mastering: whether the device may do DMA. Off when a device is opened or reset.
    ///
    /// # Errors
    /// What writing configuration space says.
    pub fn set_bus_master(&self, enabled: bool) -> Result<()> {
        self.set_command(PCI_COMMAND_MASTER, enabled)
    }

    fn set_command(&self, bit: u16, on: bool) -> Result<()> {
        let command = self.command()?;
        let command = if on { command | bit } else { command & !bit };
        self.write(VFIO_PCI_CONFIG_REGION_INDEX, PCI_COMMAND, &command.to_le_bytes())
    }

    fn command(&self) -> Result<u16> {
        let mut command = [0; 2];
        self.read(VFIO_PCI_CONFIG_REGION_INDEX, PCI_COMMAND, &mut command)?;
        Ok(u16::from_le_bytes(command))
    }
}
