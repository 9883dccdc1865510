//! What tests of taking memory back begin with: a device, a view of its VRAM, and a dma-buf of it.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use peervram::Kind;
use peervram::backends::vfio::{Device, Interface, IoAddressSpace};
use peervram::backends::{DmaBuf, DmaRange, DmaRanges, Exporter, Importer, Mapping, PciAddress};
use peervram_lab::machine::PeerToPeer;

use crate::crossing::VRAM;
use crate::guest::Guest;
use crate::test::Skip;

/// Bytes that are mapped and exported: more than one piece of shadow memory.
pub const SIZE_BYTES: u64 = 5 << 20;

/// The machine's lender, or its first model GPU.
pub fn any_lender(guest: &Guest) -> Result<PciAddress> {
    match guest.lender() {
        Ok(address) => Ok(address.parse()?),
        Err(error) if error.is::<Skip>() => Ok(guest.model(0)?.address()),
        Err(error) => Err(error),
    }
}

/// The beginning of VRAM.
pub fn beginning(device: &Device) -> Result<DmaRanges> {
    Ok(DmaRanges::new(device.region(VRAM)?, &[DmaRange::new(0, SIZE_BYTES)])?)
}

/// Memory that is mapped and, where the kernel can, exported.
pub struct Revocable {
    /// The owner's view of it.
    pub view: Arc<Mapping>,
    /// None where the kernel exports no dma-bufs.
    pub buffer: Option<DmaBuf>,
    /// Last: the others go before it.
    pub device: Device,
}

impl Revocable {
    /// Maps and exports the beginning of the device's VRAM, with a pattern in it.
    pub fn new(guest: &Guest, device: Device) -> Result<Revocable> {
        let ranges = beginning(&device)?;
        let view = device.map(&ranges)?;
        view.write(0, &pattern())?;
        let exports = guest.facts().exports_dma_bufs();
        let buffer = exports.then(|| device.export(&ranges)).transpose()?;
        Ok(Revocable { view, buffer, device })
    }

    /// Expects the view to be shadow memory, which nobody sees what is written to.
    pub fn expect_ones(&self) -> Result<()> {
        let mut seen = vec![0; SIZE_BYTES as usize];
        self.view.read(0, &mut seen)?;
        let wrong = seen.iter().position(|&byte| byte != 0xFF);
        ensure!(wrong.is_none(), "the view is not all ones from {wrong:?} on");
        self.view.write(SIZE_BYTES as usize - 8, b"nowhere.")?;
        Ok(())
    }

    /// Expects the pattern in the view and through the descriptor.
    pub fn expect_pattern(&self) -> Result<()> {
        let mut seen = vec![0; SIZE_BYTES as usize];
        self.view.read(0, &mut seen)?;
        ensure!(seen == pattern(), "the view has another content");
        self.device.read(VRAM, 0, &mut seen)?;
        ensure!(seen == pattern(), "the device has another content");
        Ok(())
    }

    /// Expects the dma-buf to be revoked, or not.
    pub fn expect_revoked(&self, expected: bool) -> Result<()> {
        match self.buffer.as_ref().map(is_revoked).transpose()?.flatten() {
            Some(seen) => {
                ensure!(seen == expected, "the dma-buf's being revoked is {seen}");
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Expects that the device says of itself that its memory cannot be reached, and a read with it.
    pub fn expect_unreachable(&self) -> Result<()> {
        let error = self.device.check_reachable().err().context("its memory can be reached")?;
        ensure!(error.kind() == Kind::MemoryDisabled && error.next_step().is_some(), "{error}");
        Ok(())
    }
}

/// Whether the kernel refuses to attach to a dma-buf because it is revoked; none where there is no importer
/// to ask.
pub fn is_revoked(buffer: &DmaBuf) -> Result<Option<bool>> {
    let space = match IoAddressSpace::new(Interface::Cdev) {
        Err(error) if error.kind() == Kind::NotFound => return Ok(None),
        other => other?,
    };
    match space.import(buffer) {
        Ok(memory) => {
            space.release(memory)?;
            Ok(Some(false))
        }
        Err(error) if error.kind() == Kind::MemoryDisabled => Ok(Some(true)),
        Err(error) => Err(error.into()),
    }
}

/// A hot reset. Behind a root port of the lab's it fails after it was done: QEMU's root ports, whose hot
/// plug is ACPI's, never say that their link is up, and the kernel waits for that
/// (`pci_bridge_wait_for_secondary_bus`) where a device has power management.
pub fn hot_reset(guest: &Guest, device: &Device, others: &[&Device]) -> Result<()> {
    match device.hot_reset(others) {
        Err(error) if guest.facts().peer_to_peer != PeerToPeer::BusAddress => {
            ensure!(error.raw_os_error() == Some(25) && error.kind() == Kind::TimedOut, "{error}");
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Bytes that differ from place to place.
pub fn pattern() -> Vec<u8> {
    (0..SIZE_BYTES).map(|i| (i * 7 + i / 251) as u8).collect()
}
