//! `Ring`: one engine of the device and the descriptors that it is given.
//!
//! Order of calls: [`Ring::start`] -> [`submit`](Ring::submit) -> [`wait`](Ring::wait) -> ... ->
//! [`stop`](Ring::stop). The register map says what each step is.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::bytes_of;
use peervram::backends::Mapping;
use peervram::{Error, Kind, Result};
use peervram_model::registers::engine::{
    CONTROL, CONTROL_ENABLE, CONTROL_RESET, FENCE_HIGH, FENCE_LOW, RING_ADDRESS_HIGH, RING_ADDRESS_LOW,
    RING_ENTRIES, STATUS, STATUS_HALTED, TAIL,
};
use peervram_model::registers::{DESCRIPTOR_BYTES, Descriptor, ERROR_CODE, ERROR_DETAIL};

/// Between two looks at the fence: an access to a register costs the model a message.
const POLL_INTERVAL: Duration = Duration::from_micros(100);
/// Looks at the fence for each one at whether the engine halted, which is rare.
const LOOKS_PER_STATUS: u32 = 8;

/// Where a ring's descriptors lie.
pub(crate) struct RingMemory {
    /// The driver's view of them.
    pub view: Arc<Mapping>,
    /// Where they begin in the view, in bytes.
    pub view_offset_bytes: usize,
    /// Where they begin in VRAM, in bytes.
    pub vram_offset_bytes: u64,
    /// How many there are, a power of two.
    pub entries: u32,
}

/// An engine that takes descriptors.
pub(crate) struct Ring {
    device: String,
    registers: Arc<Mapping>,
    /// The engine's first register.
    block: u32,
    place: RingMemory,
    tail: u32,
    /// The last fence that was given out.
    fence: u64,
    /// The last one that was seen reached.
    reached: u64,
    /// Whether its ring was taken away: what it is given then is never done.
    is_stopped: bool,
}

impl Ring {
    /// Resets the engine whose registers begin at `block` and gives it an empty ring.
    pub fn start(device: String, registers: Arc<Mapping>, block: u32, place: RingMemory) -> Result<Self> {
        let mut ring =
            Self { device, registers, block, place, tail: 0, fence: 0, reached: 0, is_stopped: true };
        ring.restart()?;
        Ok(ring)
    }

    /// Gives the engine an empty ring again, as after a reset of the device. What was under way is forgotten.
    pub fn restart(&mut self) -> Result<()> {
        (self.tail, self.fence, self.reached) = (0, 0, 0);
        self.store(CONTROL, CONTROL_RESET)?;
        self.store(RING_ADDRESS_LOW, self.place.vram_offset_bytes as u32)?;
        self.store(RING_ADDRESS_HIGH, (self.place.vram_offset_bytes >> 32) as u32)?;
        self.store(RING_ENTRIES, self.place.entries)?;
        self.store(CONTROL, CONTROL_ENABLE)?;
        self.is_stopped = false;
        Ok(())
    }

    /// Gives the engine `descriptors`, each with the next fence. Blocks while the ring is full, each time
    /// at most `timeout`. The doorbell is rung once for as many as the ring holds: it costs the model a
    /// message.
    pub fn submit(&mut self, descriptors: &[Descriptor], timeout: Duration) -> Result<()> {
        if self.is_stopped {
            let why = "its memory is taken back: the engine is stopped";
            return Err(Error::new(Kind::Revoked, "give an engine work", why).on(&self.device));
        }
        let entries = u64::from(self.place.entries);
        for batch in descriptors.chunks(self.place.entries as usize) {
            // The entries of this batch are free once what lay there before is done.
            let last = self.fence + batch.len() as u64;
            if last > self.reached + entries {
                self.wait(last - entries, timeout)?;
            }
            for &descriptor in batch {
                self.fence += 1;
                let descriptor = Descriptor { fence_value: self.fence, ..descriptor };
                let entry = (self.tail % self.place.entries) as usize * DESCRIPTOR_BYTES as usize;
                self.place.view.write(self.place.view_offset_bytes + entry, bytes_of(&descriptor))?;
                self.tail = self.tail.wrapping_add(1);
            }
            self.store(TAIL, self.tail)?;
        }
        Ok(())
    }

    /// Waits until the engine has reached `fence`.
    ///
    /// # Errors
    /// [`Kind::TimedOut`], or [`Kind::Os`] with the device's own error code where the engine halted.
    pub fn wait(&mut self, fence: u64, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut look = 0_u32;
        loop {
            look = look.wrapping_add(1);
            // The low word latches the high one.
            let low = self.load(FENCE_LOW)?;
            let reached = u64::from(low) | u64::from(self.load(FENCE_HIGH)?) << 32;
            // All ones is a device that is gone, asleep or in reset.
            if reached == u64::MAX {
                let why = "its registers read all ones: it is gone, asleep or in reset";
                return Err(Error::new(Kind::Gone, "wait for an engine", why).on(&self.device));
            }
            if reached >= fence {
                self.reached = reached;
                return Ok(());
            }
            let late = Instant::now() >= deadline;
            let ask = late || look.is_multiple_of(LOOKS_PER_STATUS);
            if ask && self.load(STATUS)? & STATUS_HALTED != 0 {
                let (code, detail) = (
                    self.registers.load_u32(ERROR_CODE as usize)?,
                    self.registers.load_u32(ERROR_DETAIL as usize)?,
                );
                let why = format!("it halted with error {code} (detail {detail:#x})");
                return Err(Error::new(Kind::Os, "wait for an engine", why)
                    .on(&self.device)
                    .next("the model's registers.rs says what the code means; restart the driver to go on"));
            }
            if late {
                let why = format!(
                    "fence {fence} was not reached within {} ms; it is {reached}",
                    timeout.as_millis()
                );
                return Err(Error::new(Kind::TimedOut, "wait for an engine", why).on(&self.device));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits for everything that was submitted.
    pub fn finish(&mut self, timeout: Duration) -> Result<()> {
        self.wait(self.fence, timeout)
    }

    /// Whether its ring was taken away.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// Takes the engine's ring away; what is under way is abandoned.
    pub fn stop(&mut self) -> Result<()> {
        self.is_stopped = true;
        self.store(CONTROL, CONTROL_RESET)
    }

    fn load(&self, register: u32) -> Result<u32> {
        self.registers.load_u32((self.block + register) as usize)
    }

    fn store(&self, register: u32, value: u32) -> Result<()> {
        self.registers.store_u32((self.block + register) as usize, value)
    }
}
