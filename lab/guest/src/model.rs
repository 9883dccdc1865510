//! A model GPU as a test sees it: where it is in the guest, and the way to its other side, where it
//! can be told to go wrong and its memory is seen as the host has it.
//!
//! A test need not tidy up: before each one, the lab makes every model GPU behave and be there.

use anyhow::{Context, Result, ensure};
use peervram::backends::pci::Function;
use peervram::backends::{PciAddress, vfio};
use peervram_lab::machine::Device;
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model::request::{Findings, READ_BYTES_MAX, Request, Status};

use crate::guest::Guest;

/// The BAR that is registers.
pub const REGISTERS: u32 = 0;

/// A model GPU of this machine.
#[derive(Debug)]
pub struct Model<'guest> {
    guest: &'guest Guest,
    device: usize,
    address: PciAddress,
    vram_bytes: u64,
}

impl<'guest> Model<'guest> {
    /// The one that is the row's device of that number.
    pub fn new(guest: &'guest Guest, device: usize) -> Result<Model<'guest>> {
        let vram_mib = match guest.facts().devices.get(device) {
            Some(Device::ModelGpu { vram_mib, .. }) => vram_mib,
            Some(Device::Grace(grace)) => &grace.memory_mib,
            _ => anyhow::bail!("device {device} of this machine is no model GPU"),
        };
        let address = guest.address_of(device)?.parse()?;
        Ok(Model { guest, device, address, vram_bytes: u64::from(*vram_mib) << 20 })
    }

    /// Its PCI address; bound to vfio-pci, or to the variant of it that is its own.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// What sysfs says of it: ids, BARs, link.
    pub fn function(&self) -> Result<Function> {
        Ok(Function::read(self.address)?)
    }

    /// Bytes of its VRAM. BAR 2 shows all of them, unless they are memory of the machine.
    pub fn vram_bytes(&self) -> u64 {
        self.vram_bytes
    }

    /// Opens it in an address space of its own.
    pub fn open(&self) -> Result<vfio::Device> {
        Ok(vfio::Device::open(self.address)?)
    }

    /// Makes the model misbehave in one more way, until `behave` or the end of the test.
    pub fn misbehave(&self, how: Misbehaviour) -> Result<()> {
        self.ask(Request::Misbehave(how)).map(drop)
    }

    /// Takes all misbehaviour back, and ends a reset that is stuck.
    pub fn behave(&self) -> Result<()> {
        self.ask(Request::Behave).map(drop)
    }

    /// Surprise removal: whatever is asked of it is answered with all ones. Mapped VRAM stays.
    pub fn remove(&self) -> Result<()> {
        self.ask(Request::Remove).map(drop)
    }

    /// Ends a removal.
    pub fn insert(&self) -> Result<()> {
        self.ask(Request::Insert).map(drop)
    }

    /// Has it latch an error and raise its interrupt.
    pub fn raise_error(&self) -> Result<()> {
        self.ask(Request::RaiseError).map(drop)
    }

    /// What the host knows of it.
    pub fn status(&self) -> Result<Status> {
        Ok(self.ask(Request::Status)?.status)
    }

    /// Bytes of VRAM, at most [`READ_BYTES_MAX`], as the host has them.
    pub fn host_bytes(&self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<u8>> {
        ensure!(length_bytes <= READ_BYTES_MAX, "{length_bytes} bytes are too many; ask for a checksum");
        let findings = self.ask(Request::Read { offset_bytes, length_bytes })?;
        findings.bytes().context("the model answers a read without bytes")
    }

    /// The checksum of a range of VRAM as the host has it: that of
    /// [`peervram::backends::vulkan::checksum`].
    pub fn host_checksum(&self, offset_bytes: u64, length_bytes: u64) -> Result<u32> {
        let findings = self.ask(Request::Checksum { offset_bytes, length_bytes })?;
        findings.checksum.context("the model answers without a checksum")
    }

    fn ask(&self, request: Request) -> Result<Findings> {
        self.guest.link()?.control(self.device, request)
    }
}
