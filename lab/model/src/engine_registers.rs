//! The registers of one engine: ring, indices, fence. Pure.
//!
//! ```text
//!           enable, ring good                error
//!  Idle ----------------------> Enabled ------------> Halted
//!   |  <---------------------- disable                  |  ^
//!   |  <----------------------- reset ------------------+  |
//!   +------------------- enable, ring bad -----------------+
//! ```
//! Every way into and out of *Enabled*, but for a plain disable, begins a new epoch.
//!
//! Absent: who does the work, and what an error is: see [`crate::state`].

use crate::registers::{DESCRIPTOR_BYTES, RING_ENTRIES_MAX, engine};

/// One engine's registers.
#[derive(Debug, Clone, Default)]
pub(crate) struct EngineRegisters {
    pub(crate) ring_address: u64,
    pub(crate) ring_entries: u32,
    pub(crate) enabled: bool,
    pub(crate) halted: bool,
    pub(crate) tail: u32,
    /// A doorbell that was rung and has not taken effect yet.
    pub(crate) rung: Option<u32>,
    pub(crate) head: u32,
    pub(crate) fence: u64,
    /// Upper half that belongs to the last read of the lower one.
    fence_high: u32,
    pub(crate) epoch: u64,
}

impl EngineRegisters {
    /// As after power-on, in a new epoch.
    pub(crate) fn reset(&mut self) {
        *self = EngineRegisters { epoch: self.epoch.wrapping_add(1), ..EngineRegisters::default() };
    }

    /// Reads the register at `at` in the block.
    pub(crate) fn read(&mut self, at: u32) -> u32 {
        match at {
            engine::RING_ADDRESS_LOW => self.ring_address as u32,
            engine::RING_ADDRESS_HIGH => (self.ring_address >> 32) as u32,
            engine::RING_ENTRIES => self.ring_entries,
            engine::CONTROL if self.enabled => engine::CONTROL_ENABLE,
            engine::TAIL => self.rung.unwrap_or(self.tail),
            engine::HEAD => self.head,
            engine::FENCE_LOW => {
                self.fence_high = (self.fence >> 32) as u32;
                self.fence as u32
            }
            engine::FENCE_HIGH => self.fence_high,
            engine::STATUS => {
                let is_busy = self.enabled && self.head != self.rung.unwrap_or(self.tail);
                let busy = if is_busy { engine::STATUS_BUSY } else { 0 };
                let halted = if self.halted { engine::STATUS_HALTED } else { 0 };
                busy | halted
            }
            _ => 0,
        }
    }

    /// Writes the register at `at` in the block. `false`: the engine was to be enabled with a ring
    /// that does not fit; the caller halts it.
    pub(crate) fn write(&mut self, at: u32, value: u32, vram_bytes: u64) -> bool {
        match at {
            engine::RING_ADDRESS_LOW if !self.enabled => {
                self.ring_address = self.ring_address & !0xffff_ffff | u64::from(value);
            }
            engine::RING_ADDRESS_HIGH if !self.enabled => {
                self.ring_address = self.ring_address & 0xffff_ffff | u64::from(value) << 32;
            }
            engine::RING_ENTRIES if !self.enabled => self.ring_entries = value,
            engine::CONTROL if value & engine::CONTROL_RESET != 0 => self.reset(),
            engine::CONTROL if value & engine::CONTROL_ENABLE == 0 => {
                self.enabled = false;
                self.rung = None;
            }
            engine::CONTROL if !self.enabled && !self.halted => {
                (self.head, self.tail, self.rung) = (0, 0, None);
                self.epoch = self.epoch.wrapping_add(1);
                self.enabled = self.is_ring_good(vram_bytes);
                return self.enabled;
            }
            engine::TAIL => self.rung = Some(value),
            _ => {}
        }
        true
    }

    fn is_ring_good(&self, vram_bytes: u64) -> bool {
        let bytes = u64::from(self.ring_entries) * DESCRIPTOR_BYTES;
        (2..=RING_ENTRIES_MAX).contains(&self.ring_entries)
            && self.ring_entries.is_power_of_two()
            && self.ring_address.is_multiple_of(DESCRIPTOR_BYTES)
            && self.ring_address.checked_add(bytes).is_some_and(|end| end <= vram_bytes)
    }
}
