//! Configuration space of a VFIO device, as the kernel lets user space see it.
//!
//! Reads and writes go through the VFIO configuration region, never through sysfs: VFIO virtualises
//! some bits, and a write of the memory bit there is what makes it revoke the device's dma-bufs
//! (`vfio_pci_config.c`, `vfio_basic_config_write`).
//!
//! Every access wakes a device that sleeps in low power, and does not bring its dma-bufs back. So nothing
//! here touches one; nor an adopted device, which is another process's to wake.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;

use super::Device;
use super::capability::find_capability;
use crate::{PciAddress, Result};

// include/uapi/linux/pci_regs.h
const PCI_COMMAND: u64 = 0x04;
const PCI_COMMAND_MEMORY: u16 = 1 << 1;
const PCI_COMMAND_MASTER: u16 = 1 << 2;

const READ: &str = "read a device's configuration";

impl Device {
    /// Whether the device decodes memory accesses (`PCI_COMMAND_MEMORY`).
    ///
    /// # Errors
    /// [`Kind::MemoryDisabled`](crate::Kind::MemoryDisabled) in low power,
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) of an adopted device; else what reading configuration
    /// space says: a device that fell off the bus, or one that is gone.
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
    /// As [`Device::memory_enabled`]; else what writing configuration space says, and the memory may be
    /// revoked all the same.
    pub fn set_memory_enabled(&self, enabled: bool) -> Result<()> {
        self.set_command(PCI_COMMAND_MEMORY, enabled)
    }

    /// Switches bus mastering: whether the device may do DMA. Off when a device is opened
    /// (`vfio_pci_core_enable`). A reset through VFIO keeps it as it was (`pci_restore_state`).
    ///
    /// # Errors
    /// As [`Device::memory_enabled`].
    pub fn set_bus_master(&self, enabled: bool) -> Result<()> {
        self.set_command(PCI_COMMAND_MASTER, enabled)
    }

    fn set_command(&self, bit: u16, on: bool) -> Result<()> {
        self.change_config_word(PCI_COMMAND, |command| if on { command | bit } else { command & !bit })
    }

    /// Reads a word, and writes what `change` makes of it, while no other thread of this process does the same with
    /// this device: what it changed in between would be undone.
    ///
    /// Another process has no part in it: a device has one owner, and an adopted one's configuration is not written.
    pub(super) fn change_config_word(
        &self,
        offset_bytes: u64,
        change: impl FnOnce(u16) -> u16,
    ) -> Result<()> {
        let lock = change_lock(self.address());
        let _guard = lock.lock();
        let word = self.read_config_word(offset_bytes)?;
        self.write_config(offset_bytes, &change(word).to_le_bytes())
    }

    fn command(&self) -> Result<u16> {
        self.read_config_word(PCI_COMMAND)
    }

    /// The offset of the first capability of that kind.
    pub(super) fn capability(&self, id: u8) -> Result<Option<u8>> {
        let offset = find_capability(|offset| self.read_config_word(offset), id);
        offset.map_err(|error| error.on(self.address()))
    }

    pub(super) fn read_config_word(&self, offset_bytes: u64) -> Result<u16> {
        self.check_owned_and_awake(READ)?;
        let mut word = [0; 2];
        self.read(VFIO_PCI_CONFIG_REGION_INDEX, offset_bytes, &mut word)?;
        Ok(u16::from_le_bytes(word))
    }

    /// To change some bits of a word, use [`Device::change_config_word`].
    ///
    /// The kernel takes it apart into aligned pieces of four, two or one bytes, and acts on each
    /// (`vfio_pci_config_rw_single`): what is to be one action is to be one such piece.
    fn write_config(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        self.check_owned_and_awake("write a device's configuration")?;
        self.write(VFIO_PCI_CONFIG_REGION_INDEX, offset_bytes, bytes)
    }

    fn check_owned_and_awake(&self, tried: &'static str) -> Result<()> {
        self.check_owned(tried)?;
        self.check_awake(tried)
    }
}

/// The lock around changes of a device's configuration space. By address: a group gives out several descriptors of one
/// device. One for each, because a write that takes memory back may block.
fn change_lock(address: PciAddress) -> Arc<Mutex<()>> {
    static LOCKS: Mutex<BTreeMap<PciAddress, Weak<Mutex<()>>>> = Mutex::new(BTreeMap::new());
    let mut locks = LOCKS.lock();
    locks.retain(|_, lock| lock.strong_count() > 0);
    if let Some(lock) = locks.get(&address).and_then(Weak::upgrade) {
        return lock;
    }
    let lock = Arc::default();
    locks.insert(address, Arc::downgrade(&lock));
    lock
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_one_device_take_turns_and_of_two_do_not() {
        let address = |text: &str| text.parse().unwrap();
        let first = change_lock(address("00fe:01:00.0"));
        let held = first.lock();
        assert!(change_lock(address("00fe:01:00.0")).try_lock().is_none());
        assert!(change_lock(address("00fe:02:00.0")).try_lock().is_some());
        drop(held);
        assert!(change_lock(address("00fe:01:00.0")).try_lock().is_some());
    }
}
