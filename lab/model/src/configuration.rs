//! The configuration space: built from capability values, read and written as bytes. Pure.
//!
//! What QEMU's `vfio-user-pci` makes of it (11.1): a function-level reset arrives as a write to the
//! device control register, for the model to act upon; BARs, the resizable BAR control and the
//! power state are emulated on top of what is written here; extended capabilities pass through.
//!
//! Absent: legacy interrupts, expansion ROM, error reporting (AER), and a BAR that really changes
//! its size: a region of vfio-user has one size for life. The resizable BAR capability tells the
//! sizes that the hardware could do and keeps the present one, like a firmware that locked it.

use crate::registers::{BAR0_BYTES, MSIX_PENDING, MSIX_TABLE, VECTORS};

/// Bytes of the configuration space.
pub const CONFIGURATION_BYTES: usize = 4096;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Memory, bus master, parity, SERR, interrupt disable.
const COMMAND_WRITABLE: u16 = 0x0546;
const BAR: usize = 0x10;
const POWER: usize = 0x40;
const POWER_CONTROL: usize = POWER + 4;
const EXPRESS: usize = 0x50;
const DEVICE_CONTROL: usize = EXPRESS + 8;
const MSIX: usize = 0x90;
const VENDOR_SPECIFIC: usize = 0x100;
const RESIZABLE_BAR: usize = 0x140;
const CXL: usize = 0x180;
const CXL_RANGE_SIZE_LOW: usize = CXL + 0x1c;
const CXL_MEMORY_ACTIVE: u8 = 1 << 1;

/// What tells one model from another in its configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// PCI vendor.
    pub vendor: u16,
    /// PCI device.
    pub device: u16,
    /// Bytes that BAR2 shows; a power of two.
    pub bar2_bytes: u64,
    /// Bytes of VRAM; what BAR2 could show. A power of two.
    pub vram_bytes: u64,
    /// Bytes of BAR4, a power of two, or zero for none.
    pub bar4_bytes: u64,
    /// The word in the vendor-specific capability. For `10de`, bit 0 says "no MIG bug" to the
    /// `nvgrace` variant of VFIO.
    pub vendor_word: u16,
    /// VRAM is behind no BAR: it is memory of the machine, as on a GPU that is coherent with its CPU. BAR2 is
    /// plain memory of its own then, and VRAM need not be a power of two.
    pub is_coherent: bool,
    /// Whether a CXL capability says that the memory is active.
    pub has_cxl: bool,
}

/// What a write to the configuration space asks the device to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Effect {
    /// Function-level reset.
    pub reset: bool,
}

/// Power states that the device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// On.
    D0,
    /// Asleep; only the configuration space answers.
    D3Hot,
}

/// The configuration space of one device.
#[derive(Debug, Clone)]
pub struct Configuration {
    identity: Identity,
    bytes: Box<[u8; CONFIGURATION_BYTES]>,
    writable: Box<[u8; CONFIGURATION_BYTES]>,
}

impl Configuration {
    /// As it is after power-on.
    pub fn new(identity: Identity) -> Self {
        let mut this = Configuration {
            identity,
            bytes: Box::new([0; CONFIGURATION_BYTES]),
            writable: Box::new([0; CONFIGURATION_BYTES]),
        };
        this.header();
        this.power_management();
        this.express();
        this.msix();
        this.vendor_specific();
        this.resizable_bar();
        this.cxl();
        this
    }

    /// Back to what it is after power-on.
    pub fn reset(&mut self) {
        *self = Configuration::new(self.identity);
    }

    /// Fills `buffer` from `offset` on. What lies outside reads all ones.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) {
        for (number, byte) in buffer.iter_mut().enumerate() {
            *byte = offset.checked_add(number).and_then(|at| self.bytes.get(at)).copied().unwrap_or(0xff);
        }
    }

    /// Writes what is writable.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Effect {
        let power_before = self.bytes[POWER_CONTROL];
        let mut effect = Effect::default();
        for (number, value) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(number).filter(|at| *at < CONFIGURATION_BYTES) else { break };
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (value & mask);
            // Initiate Function Level Reset: bit 15 of device control, reads zero.
            effect.reset |= at == DEVICE_CONTROL + 1 && value & 0x80 != 0;
        }
        // D1 and D2 are not there: such a write leaves the state as it is.
        if matches!(self.bytes[POWER_CONTROL] & 3, 1 | 2) {
            self.bytes[POWER_CONTROL] = power_before;
        }
        effect
    }

    /// The power state.
    pub fn power(&self) -> Power {
        if self.bytes[POWER_CONTROL] & 3 == 3 { Power::D3Hot } else { Power::D0 }
    }

    /// Has the CXL capability tell that the memory is active, or not.
    pub fn set_memory_active(&mut self, is_active: bool) {
        if self.identity.has_cxl {
            let word = &mut self.bytes[CXL_RANGE_SIZE_LOW];
            *word = if is_active { *word | CXL_MEMORY_ACTIVE } else { *word & !CXL_MEMORY_ACTIVE };
        }
    }

    /// Whether the device may reach memory.
    pub fn is_bus_master(&self) -> bool {
        self.read_u16(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// Whether the BARs answer. QEMU sees to that itself; shown in the status only.
    pub fn is_memory_enabled(&self) -> bool {
        self.read_u16(COMMAND) & COMMAND_MEMORY != 0
    }

    fn read_u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn put<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        self.bytes[at..at + N].copy_from_slice(&value);
    }

    fn put_u16(&mut self, at: usize, value: u16) {
        self.put(at, value.to_le_bytes());
    }

    fn put_u32(&mut self, at: usize, value: u32) {
        self.put(at, value.to_le_bytes());
    }

    fn allow<const N: usize>(&mut self, at: usize, mask: [u8; N]) {
        self.writable[at..at + N].copy_from_slice(&mask);
    }

    fn header(&mut self) {
        let Identity { vendor, device, bar2_bytes, bar4_bytes, .. } = self.identity;
        self.put_u16(0x00, vendor);
        self.put_u16(0x02, device);
        self.put_u16(0x06, 1 << 4); // status: there is a list of capabilities
        self.put(0x08, [0xa1, 0x00, 0x02, 0x03]); // revision, 3D controller
        self.put_u16(0x2c, vendor);
        self.put_u16(0x2e, device);
        self.bytes[0x34] = POWER as u8;
        self.allow(COMMAND, COMMAND_WRITABLE.to_le_bytes());
        self.allow(0x0c, [0xff]); // cache line size: without meaning, but writable
        self.allow(0x3c, [0xff]); // interrupt line

        self.allow(BAR, (!(BAR0_BYTES as u32 - 1)).to_le_bytes());
        for (index, size_bytes) in [(2, bar2_bytes), (4, bar4_bytes)] {
            if size_bytes != 0 {
                self.bytes[BAR + 4 * index] = 0x0c; // 64-bit, prefetchable
                self.allow(BAR + 4 * index, (!(size_bytes - 1)).to_le_bytes());
            }
        }
    }

    fn power_management(&mut self) {
        self.put(POWER, [0x01, EXPRESS as u8]);
        self.put_u16(POWER + 2, 3); // version 1.2, neither D1 nor D2
        self.put_u16(POWER_CONTROL, 1 << 3); // no soft reset: D3hot to D0 keeps state
        self.allow(POWER_CONTROL, [3]);
    }

    fn express(&mut self) {
        const GENERATION_4: u32 = 4;
        const LANES_16: u32 = 16 << 4;
        self.put(EXPRESS, [0x10, MSIX as u8]);
        self.put_u16(EXPRESS + 2, 2); // version 2, endpoint
        self.put_u32(EXPRESS + 0x04, 1 << 28 | 1 << 15 | 1); // reset, role-based errors, payload of 256
        self.put_u16(DEVICE_CONTROL, 0x2810); // relaxed ordering, no snoop, reads of 512
        self.allow(DEVICE_CONTROL, [0xff, 0x7f]);
        self.put_u32(EXPRESS + 0x0c, GENERATION_4 | LANES_16); // link capabilities
        self.allow(EXPRESS + 0x10, [0xcb, 0x00]); // link control
        self.put_u16(EXPRESS + 0x12, (GENERATION_4 | LANES_16) as u16); // link status
        self.put_u32(EXPRESS + 0x2c, 0x1e); // link capabilities 2: 2.5, 5, 8 and 16 GT/s
        self.put_u16(EXPRESS + 0x30, GENERATION_4 as u16); // link control 2
    }

    fn msix(&mut self) {
        self.put(MSIX, [0x11, 0x00]);
        self.put_u16(MSIX + 2, VECTORS - 1);
        self.allow(MSIX + 2, 0xc000u16.to_le_bytes()); // enable, mask all
        self.put_u32(MSIX + 4, MSIX_TABLE); // in BAR0
        self.put_u32(MSIX + 8, MSIX_PENDING);
    }

    fn vendor_specific(&mut self) {
        const BYTES: u32 = 0x0c;
        const ID: u16 = 3;
        let next = (RESIZABLE_BAR as u32) << 20;
        self.put_u32(VENDOR_SPECIFIC, 0x0023 | 1 << 16 | next);
        self.put_u32(VENDOR_SPECIFIC + 4, u32::from(self.identity.vendor) | BYTES << 20);
        self.put_u16(VENDOR_SPECIFIC + 8, ID);
        self.put_u16(VENDOR_SPECIFIC + 10, self.identity.vendor_word);
    }

    fn resizable_bar(&mut self) {
        let megabytes_log2 = |bytes: u64| bytes.max(1 << 20).ilog2() - 20;
        let present = megabytes_log2(self.identity.bar2_bytes);
        let behind = if self.identity.is_coherent { 0 } else { self.identity.vram_bytes };
        let largest = megabytes_log2(behind).clamp(present, 27);
        let sizes = (present..=largest).fold(0, |sizes, size| sizes | 1 << (4 + size));
        let next = if self.identity.has_cxl { (CXL as u32) << 20 } else { 0 };
        self.put_u32(RESIZABLE_BAR, 0x0015 | 1 << 16 | next);
        self.put_u32(RESIZABLE_BAR + 4, sizes);
        self.put_u32(RESIZABLE_BAR + 8, present << 8 | 1 << 5 | 2);
    }

    /// The capability of a CXL device (CXL 4.0, 8.1.3), as far as a driver looks that waits for its memory.
    fn cxl(&mut self) {
        const VENDOR: u32 = 0x1e98;
        const BYTES: u32 = 0x3c;
        const INFO_VALID: u32 = 1 << 0;
        const SIXTEEN_SECONDS: u32 = 2 << 13;
        if self.identity.has_cxl {
            self.put_u32(CXL, 0x0023 | 1 << 16);
            self.put_u32(CXL + 4, VENDOR | BYTES << 20);
            self.put_u32(CXL_RANGE_SIZE_LOW, INFO_VALID | CXL_MEMORY_ACTIVE as u32 | SIXTEEN_SECONDS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x10de,
        device: 0x2342,
        bar2_bytes: 256 << 20,
        vram_bytes: 1 << 30,
        bar4_bytes: 0,
        vendor_word: 1,
        is_coherent: false,
        has_cxl: false,
    };

    fn u32_at(configuration: &Configuration, at: usize) -> u32 {
        let mut bytes = [0; 4];
        configuration.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn both_lists_of_capabilities_end_and_hold_what_they_should() {
        let configuration = Configuration::new(IDENTITY);
        let (mut at, mut found) = (configuration.bytes[0x34], Vec::new());
        while at != 0 {
            found.push(configuration.bytes[usize::from(at)]);
            at = configuration.bytes[usize::from(at) + 1];
        }
        assert_eq!(found, [0x01, 0x10, 0x11]);
        let (mut at, mut found) = (0x100, Vec::new());
        while at != 0 {
            let header = u32_at(&configuration, at);
            found.push(header & 0xffff);
            at = header as usize >> 20;
        }
        assert_eq!(found, [0x23, 0x15]);
    }

    #[test]
    fn the_cxl_capability_tells_what_it_is_told_to() {
        let mut configuration = Configuration::new(Identity { has_cxl: true, is_coherent: true, ..IDENTITY });
        assert_eq!(u32_at(&configuration, RESIZABLE_BAR) >> 20, CXL as u32);
        assert_eq!(u32_at(&configuration, CXL + 8), 0, "the id of the capability of a device");
        assert_eq!(u32_at(&configuration, CXL + 0x1c), 0x4003);
        configuration.set_memory_active(false);
        assert_eq!(u32_at(&configuration, CXL + 0x1c), 0x4001);
        let mut without = Configuration::new(IDENTITY);
        without.set_memory_active(true);
        assert_eq!(u32_at(&without, CXL + 0x1c), 0);
    }

    #[test]
    fn bars_tell_their_size_when_written_with_ones() {
        let mut configuration = Configuration::new(IDENTITY);
        configuration.write(0x10, &[0xff; 24]);
        assert_eq!(u32_at(&configuration, 0x10), !(16 << 20) + 1);
        assert_eq!(u32_at(&configuration, 0x14), 0);
        assert_eq!(u32_at(&configuration, 0x18), 0xf000_000c);
        assert_eq!(u32_at(&configuration, 0x1c), u32::MAX);
        assert_eq!(u32_at(&configuration, 0x20), 0);
    }

    #[test]
    fn a_reset_is_seen_whatever_the_width_of_the_write() {
        for (offset, data) in [(0x58, &[0u8, 0x80][..]), (0x59, &[0x80]), (0x58, &[0, 0x80, 0, 0])] {
            let mut configuration = Configuration::new(IDENTITY);
            assert!(configuration.write(offset, data).reset);
            assert_eq!(configuration.bytes[0x59] & 0x80, 0, "the bit reads zero");
        }
        assert!(!Configuration::new(IDENTITY).write(0x58, &[0xff, 0x7f]).reset);
    }

    #[test]
    fn sleep_states_that_are_not_there_are_not_entered() {
        let mut configuration = Configuration::new(IDENTITY);
        configuration.write(0x44, &[1]);
        assert_eq!(configuration.power(), Power::D0);
        configuration.write(0x44, &[3]);
        configuration.write(0x44, &[2]);
        assert_eq!(configuration.power(), Power::D3Hot);
        configuration.write(0x44, &[0, 0]);
        assert_eq!(configuration.power(), Power::D0);
    }

    #[test]
    fn the_resizable_bar_tells_what_could_be_and_keeps_what_is() {
        let mut configuration = Configuration::new(IDENTITY);
        configuration.write(0x148, &[0xff; 4]);
        assert_eq!(u32_at(&configuration, 0x144), 0b111 << 12);
        assert_eq!(u32_at(&configuration, 0x148), 8 << 8 | 1 << 5 | 2);
    }

    #[test]
    fn accesses_beyond_the_end_do_nothing() {
        let mut configuration = Configuration::new(IDENTITY);
        assert_eq!(configuration.write(4094, &[0xff; 8]), Effect::default());
        let mut bytes = [0; 4];
        configuration.read(usize::MAX - 1, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
    }
}
