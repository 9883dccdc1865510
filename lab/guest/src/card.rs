//! The card of a machine, and as much of a driver as lending its memory takes. It is QEMU's NVMe
//! controller; its persistent memory region, BAR 4, stands for VRAM.
//!
//! ```text
//! guest.card -> open -> CardDriver::start -> lend BAR 4 -> resume after each revoke
//! ```
//! Nothing of NVMe is used but that region's registers. A BAR is not VRAM: until they enable the region,
//! the BAR reads zeros and drops what is written. QEMU keeps it enabled over resets and sleep, and over
//! the end of whoever opened the device; only a device that was plugged in anew has it off.

use anyhow::Result;
use peervram::backends::{DmaRange, DmaRanges, Exporter, Mapping, Owner, PciAddress, page_size_bytes, vfio};
use peervram::{Error, Kind};
use std::sync::Arc;

/// The BAR with the registers.
pub const REGISTERS: u32 = 0;
/// The BAR that is memory once it is enabled.
pub const MEMORY: u32 = 4;

// NVM Express Base Specification 2.0, 3.1.4: PMRCAP, PMRCTL, PMRSTS. All zeros: there is no region.
const CAPABILITIES: usize = 0xe00;
const CONTROL: usize = 0xe04;
const CONTROL_ENABLE: u32 = 1 << 0;
const STATUS: usize = 0xe08;
const STATUS_NOT_READY: u32 = 1 << 8;

/// The card of this machine.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    address: PciAddress,
    size_bytes: u64,
}

impl Card {
    /// The one at that address, with that much memory.
    pub fn new(address: PciAddress, size_bytes: u64) -> Card {
        Card { address, size_bytes }
    }

    /// Its PCI address; bound to vfio-pci.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// Bytes of its memory; BAR 4 shows all of them.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Opens it in an address space of its own.
    pub fn open(&self) -> Result<vfio::Device> {
        Ok(vfio::Device::open(self.address)?)
    }
}

/// The card's driver: it answers for the memory, whose enabling is all that it drives. Keeps its device
/// open; drop it before the device is closed.
pub struct CardDriver {
    device: PciAddress,
    registers: Arc<Mapping>,
}

impl CardDriver {
    /// Takes `device` over and enables its memory.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where it has no such memory; [`Kind::Os`] where that does not get ready; else
    /// what mapping its registers says.
    pub fn start(device: &vfio::Device) -> peervram::Result<CardDriver> {
        let page = DmaRange::new(0, page_size_bytes());
        let registers = device.map(&DmaRanges::new(device.region(REGISTERS)?, &[page])?)?;
        let driver = CardDriver { device: device.address(), registers };
        if driver.registers.load_u32(CAPABILITIES)? == 0 {
            let why = "it has no persistent memory region";
            return Err(Error::new(Kind::Unsupported, "enable a card's memory", why).on(driver.device));
        }
        driver.enable()?;
        Ok(driver)
    }

    /// Enables the memory, which keeps what it held.
    ///
    /// # Errors
    /// [`Kind::Os`] where it does not get ready.
    pub fn enable(&self) -> peervram::Result<()> {
        self.registers.store_u32(CONTROL, CONTROL_ENABLE)?;
        // QEMU needs no time for it.
        if self.is_enabled()? {
            return Ok(());
        }
        let status = self.registers.load_u32(STATUS)?;
        let why = format!("its memory does not get ready; the status is {status:#x}");
        Err(Error::new(Kind::Os, "enable a card's memory", why).on(self.device))
    }

    /// Has the BAR show nothing, whoever uses it.
    ///
    /// # Errors
    /// None but a register outside the mapping.
    pub fn disable(&self) -> peervram::Result<()> {
        self.registers.store_u32(CONTROL, 0)
    }

    /// Whether the BAR shows the memory.
    ///
    /// # Errors
    /// As [`CardDriver::disable`].
    pub fn is_enabled(&self) -> peervram::Result<bool> {
        Ok(self.registers.load_u32(CONTROL)? & CONTROL_ENABLE != 0
            && self.registers.load_u32(STATUS)? & STATUS_NOT_READY == 0)
    }
}

/// The card caches nothing and has no engine.
impl Owner for CardDriver {
    fn name(&self) -> &str {
        "card driver"
    }

    fn flush(&self, _: &DmaRanges) -> peervram::Result<()> {
        Ok(())
    }

    fn invalidate(&self, _: &DmaRanges) -> peervram::Result<()> {
        Ok(())
    }

    fn quiesce(&self, _: &DmaRanges) -> peervram::Result<()> {
        Ok(())
    }

    /// Content is not the card's to restore.
    fn resume(&self, _: &DmaRanges) -> peervram::Result<()> {
        self.enable()
    }
}
