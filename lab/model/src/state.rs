//! Everything that the device decides: registers, reset, power, faults, what an engine does next.
//! Pure: time comes in as an argument, interrupts and wake-ups go out as values.
//!
//! ```text
//!             write to the reset bit                time over / taken back
//!  Running ---------------------------> Resetting --------------------------> Running
//!     |                                     |
//!     +--------------- remove --------------+--> Removed -- insert --> Running
//! ```
//! Each of these moves begins a new generation of the engines: work that was under way holds a
//! [`Ticket`] of the old one and can neither store nor complete.
//!
//! Order of calls for an engine: [`State::next`], any number of [`State::is_current`], then
//! [`State::finish`] or [`State::fail`]. Order of calls for a write to a register: the write, the
//! reply to the client, [`State::publish`]: a doorbell takes effect only after its reply, because
//! the client cannot serve the DMA messages of an engine while it waits for that.

use crate::configuration::{Configuration, Effect, Identity, Power};
use crate::engine_registers::EngineRegisters;
use crate::misbehaviour::{Faults, Misbehaviour, ReadyTime, ResetTime};
use crate::operation::EngineKind;
use crate::registers::{self as map, DESCRIPTOR_BYTES, ErrorCode};

const ENGINES: usize = 2;
const TABLE_WORDS: usize = map::VECTORS as usize * 4;

/// Time since the device was made.
pub type Now = std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// Until then; without a time: until it is taken back.
    Resetting(Option<Now>),
    Removed,
}

/// Says which work an engine is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    engine: EngineKind,
    epoch: u64,
}

/// The next piece of work of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Next {
    /// Handed back when the work is done.
    pub ticket: Ticket,
    /// Where its descriptor is in VRAM.
    pub descriptor_offset: u64,
}

/// The device's mind.
#[derive(Debug, Clone)]
pub struct State {
    vram_bytes: u64,
    configuration: Configuration,
    faults: Faults,
    phase: Phase,
    /// When the memory is ready after the last reset.
    ready_at: Now,
    generation: u32,
    error: ErrorCode,
    error_detail: u32,
    interrupt_status: u32,
    interrupt_enable: u32,
    to_raise: u32,
    scratch: u32,
    engine_rate: u32,
    engines: [EngineRegisters; ENGINES],
    msix_table: [u32; TABLE_WORDS],
}

impl State {
    /// After power-on.
    pub fn new(identity: Identity) -> Self {
        State {
            vram_bytes: identity.vram_bytes,
            configuration: Configuration::new(identity),
            faults: Faults::default(),
            phase: Phase::Running,
            ready_at: Now::ZERO,
            generation: 0,
            error: ErrorCode::None,
            error_detail: 0,
            interrupt_status: 0,
            interrupt_enable: 0,
            to_raise: 0,
            scratch: 0,
            engine_rate: 0,
            engines: Default::default(),
            msix_table: [0; TABLE_WORDS],
        }
    }

    /// What is wrong now.
    pub fn faults(&self) -> Faults {
        self.faults
    }

    /// Something more goes wrong.
    pub fn misbehave(&mut self, misbehaviour: Misbehaviour) {
        self.faults = self.faults.with(misbehaviour);
    }

    /// Nothing goes wrong any more; a reset that is stuck ends.
    pub fn behave(&mut self) {
        self.faults = Faults::default();
        self.ready_at = Now::ZERO;
        if let Phase::Resetting(_) = self.phase {
            self.phase = Phase::Running;
        }
    }

    /// Surprise removal: from now on everything reads all ones.
    pub fn remove(&mut self) {
        self.power_on_values();
        self.phase = Phase::Removed;
    }

    /// Ends a removal.
    pub fn insert(&mut self) {
        if self.phase == Phase::Removed {
            self.phase = Phase::Running;
        }
    }

    /// A reset, by function-level reset or by the client. A removed device has none.
    pub fn reset(&mut self, now: Now) {
        if self.phase == Phase::Removed {
            return;
        }
        self.power_on_values();
        self.phase = match self.faults.reset {
            ResetTime::Immediate => Phase::Running,
            ResetTime::SlowMs(ms) => Phase::Resetting(Some(now.saturating_add(Now::from_millis(ms)))),
            ResetTime::Stuck => Phase::Resetting(None),
        };
        if let ReadyTime::SlowMs(ms) = self.faults.ready {
            self.ready_at = now.saturating_add(Now::from_millis(ms));
        }
    }

    /// A reset that takes no time whatever the faults: the client has gone, and the next one finds a
    /// machine that was just switched on.
    pub fn power_cycle(&mut self) {
        self.power_on_values();
        if self.phase != Phase::Removed {
            self.phase = Phase::Running;
        }
    }

    fn power_on_values(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.configuration.reset();
        self.error = ErrorCode::None;
        self.error_detail = 0;
        self.interrupt_status = 0;
        self.interrupt_enable = 0;
        self.to_raise = 0;
        self.scratch = 0;
        self.engine_rate = 0;
        self.msix_table = [0; TABLE_WORDS];
        self.engines.iter_mut().for_each(EngineRegisters::reset);
    }

    /// Counts resets and removals.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Whether the configuration space answers.
    pub fn is_present(&self, now: Now) -> bool {
        match self.phase {
            Phase::Running => true,
            Phase::Resetting(until) => until.is_some_and(|until| now >= until),
            Phase::Removed => false,
        }
    }

    /// Whether registers answer and engines run.
    pub fn is_awake(&self, now: Now) -> bool {
        self.is_present(now) && self.configuration.power() == Power::D0
    }

    /// Whether the device may reach memory.
    pub fn is_bus_master(&self) -> bool {
        self.configuration.is_bus_master()
    }

    /// Whether the device says that its memory is ready.
    pub fn is_ready(&self, now: Now) -> bool {
        self.faults.ready != ReadyTime::Stuck && now >= self.ready_at
    }

    /// Reads the configuration space.
    pub fn read_configuration(&mut self, now: Now, offset: usize, buffer: &mut [u8]) {
        if self.is_present(now) {
            self.configuration.set_memory_active(self.is_ready(now));
            self.configuration.read(offset, buffer);
        } else {
            buffer.fill(0xff);
        }
    }

    /// Writes the configuration space. The caller carries out the effect.
    pub fn write_configuration(&mut self, now: Now, offset: usize, data: &[u8]) -> Effect {
        if self.is_present(now) { self.configuration.write(offset, data) } else { Effect::default() }
    }

    /// Reads registers, at any width and alignment.
    pub fn read_registers(&mut self, now: Now, offset: u32, buffer: &mut [u8]) {
        if !self.is_awake(now) {
            buffer.fill(0xff);
            return;
        }
        let mut at = offset;
        let mut left = buffer;
        while !left.is_empty() {
            let skip = (at % 4) as usize;
            let word = self.register(now, at - skip as u32).to_le_bytes();
            let bytes = left.len().min(4 - skip);
            left[..bytes].copy_from_slice(&word[skip..skip + bytes]);
            left = &mut left[bytes..];
            at = at.wrapping_add(bytes as u32);
        }
    }

    /// Writes registers: the whole aligned words in `data`; the rest is dropped.
    pub fn write_registers(&mut self, now: Now, offset: u32, data: &[u8]) {
        if !self.is_awake(now) || !offset.is_multiple_of(4) {
            return;
        }
        for (number, word) in data.chunks_exact(4).enumerate() {
            if let Ok(word) = word.try_into() {
                self.set_register(offset.wrapping_add(number as u32 * 4), u32::from_le_bytes(word));
            }
        }
    }

    /// Whether a doorbell waits for [`State::publish`].
    pub fn has_rung(&self) -> bool {
        self.engines.iter().any(|engine| engine.rung.is_some())
    }

    /// Doorbells that were rung take effect. Says whether there were any.
    pub fn publish(&mut self) -> bool {
        let mut any = false;
        for kind in [EngineKind::Copy, EngineKind::Draw] {
            let engine = &mut self.engines[kind as usize];
            let Some(tail) = engine.rung.take() else { continue };
            if !engine.enabled {
                continue;
            }
            if tail.wrapping_sub(engine.head) > engine.ring_entries {
                self.stop(kind, ErrorCode::Ring);
            } else {
                engine.tail = tail;
                any = true;
            }
        }
        any
    }

    /// Vectors to raise now, one bit each.
    pub fn take_interrupts(&mut self) -> u32 {
        std::mem::take(&mut self.to_raise)
    }

    /// What an engine should do, if anything.
    pub fn next(&self, kind: EngineKind, now: Now) -> Option<Next> {
        let engine = &self.engines[kind as usize];
        if !engine.enabled || engine.head == engine.tail || !self.is_awake(now) {
            return None;
        }
        let entry = u64::from(engine.head & (engine.ring_entries - 1));
        let descriptor_offset = engine.ring_address + entry * DESCRIPTOR_BYTES;
        Some(Next { ticket: Ticket { engine: kind, epoch: engine.epoch }, descriptor_offset })
    }

    /// Whether the work behind a ticket is still wanted.
    pub fn is_current(&self, ticket: Ticket) -> bool {
        let engine = &self.engines[ticket.engine as usize];
        engine.enabled && engine.epoch == ticket.epoch
    }

    /// How long an engine takes for that many bytes at least.
    pub fn least_time(&self, bytes: u64) -> Now {
        match self.engine_rate {
            0 => Now::ZERO,
            mib => Now::from_nanos(bytes.saturating_mul(1_000_000_000) / (u64::from(mib) << 20)),
        }
    }

    /// Whether completion may be told now.
    pub fn may_finish(&self) -> bool {
        !self.faults.stuck_fence
    }

    /// Work is done.
    pub fn finish(&mut self, ticket: Ticket, fence_value: u64, interrupt: bool) {
        if !self.is_current(ticket) {
            return;
        }
        let engine = &mut self.engines[ticket.engine as usize];
        engine.fence = fence_value;
        engine.head = engine.head.wrapping_add(1);
        if interrupt {
            self.interrupt(match ticket.engine {
                EngineKind::Copy => map::VECTOR_COPY,
                EngineKind::Draw => map::VECTOR_DRAW,
            });
        }
    }

    /// Work cannot be done: the engine halts.
    pub fn fail(&mut self, ticket: Ticket, error: ErrorCode) {
        if self.is_current(ticket) {
            self.stop(ticket.engine, error);
        }
    }

    /// An error without an engine, on request.
    pub fn inject_error(&mut self) {
        self.latch(ErrorCode::Injected, map::ERROR_DETAIL_NO_ENGINE << 24);
    }

    fn stop(&mut self, kind: EngineKind, error: ErrorCode) {
        let engine = &mut self.engines[kind as usize];
        engine.enabled = false;
        engine.halted = true;
        engine.epoch = engine.epoch.wrapping_add(1);
        let detail = (kind as u32) << 24 | engine.head & 0x00ff_ffff;
        self.latch(error, detail);
    }

    fn latch(&mut self, error: ErrorCode, detail: u32) {
        if self.error == ErrorCode::None {
            self.error = error;
            self.error_detail = detail;
        }
        self.interrupt(map::VECTOR_ERROR);
    }

    fn interrupt(&mut self, vector: u16) {
        let bit = 1 << vector;
        self.interrupt_status |= bit;
        self.to_raise |= bit & self.interrupt_enable;
    }

    fn register(&mut self, now: Now, at: u32) -> u32 {
        if let Some((kind, at)) = engine_register(at) {
            return self.engines[kind as usize].read(at);
        }
        if let Some(word) = table_word(at) {
            return self.msix_table[word];
        }
        match at {
            map::IDENTITY => map::IDENTITY_VALUE,
            map::MAP_VERSION => map::MAP_VERSION_VALUE,
            map::VRAM_BYTES_LOW => self.vram_bytes as u32,
            map::VRAM_BYTES_HIGH => (self.vram_bytes >> 32) as u32,
            map::GENERATION => self.generation,
            map::STATUS if self.error == ErrorCode::None => map::STATUS_READY,
            map::STATUS => map::STATUS_READY | map::STATUS_ERROR,
            map::ERROR_CODE => self.error as u32,
            map::ERROR_DETAIL => self.error_detail,
            map::INTERRUPT_STATUS => self.interrupt_status,
            map::INTERRUPT_ENABLE => self.interrupt_enable,
            map::SCRATCH => self.scratch,
            map::ENGINE_RATE => self.engine_rate,
            at if map::READINESS.contains(&at) => match self.is_ready(now) {
                true => map::READINESS_VALUE,
                false => map::READINESS_NOT_YET,
            },
            _ => 0,
        }
    }

    fn set_register(&mut self, at: u32, value: u32) {
        if let Some((kind, at)) = engine_register(at) {
            if !self.engines[kind as usize].write(at, value, self.vram_bytes) {
                self.stop(kind, ErrorCode::Ring);
            }
        } else if let Some(word) = table_word(at) {
            self.msix_table[word] = value;
        } else {
            match at {
                map::ERROR_CODE => {
                    self.error = ErrorCode::None;
                    self.error_detail = 0;
                }
                map::INTERRUPT_STATUS => self.interrupt_status &= !value,
                map::INTERRUPT_ENABLE => self.interrupt_enable = value & ((1 << map::VECTORS) - 1),
                map::SCRATCH => self.scratch = value,
                map::ENGINE_RATE => self.engine_rate = value,
                _ => {}
            }
        }
    }
}

fn engine_register(at: u32) -> Option<(EngineKind, u32)> {
    [(map::COPY_ENGINE, EngineKind::Copy), (map::DRAW_ENGINE, EngineKind::Draw)]
        .into_iter()
        .find(|(start, _)| (*start..start + map::ENGINE_BYTES).contains(&at))
        .map(|(start, kind)| (kind, at - start))
}

fn table_word(at: u32) -> Option<usize> {
    let word = at.checked_sub(map::MSIX_TABLE)? as usize / 4;
    (word < TABLE_WORDS).then_some(word)
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
