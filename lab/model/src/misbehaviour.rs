//! What can go wrong on request, and what is going wrong now. Pure.
//!
//! Everything here happens on the engine's side or in the registers: a BAR that is mapped into the
//! guest cannot lie. Faults add up; [`Faults::default`] is a device that behaves. Descriptors are
//! fetched and fences written honestly in any case, so that a lying data path can be told from a dead
//! engine.

use serde::{Deserialize, Serialize};

/// One way to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Misbehaviour {
    /// Whatever the engine loads is all ones: a fast, wrong copy.
    AllOnes,
    /// Whatever the engine loads is zeros.
    Zeros,
    /// The engine's VRAM is other memory than what the BAR shows.
    Mirror,
    /// Whatever the engine loads from one page of VRAM is zeros: memory that is broken in one place.
    BadPage {
        /// Where the page begins.
        offset_bytes: u64,
    },
    /// Loads from DMA addresses bring nothing: the destination keeps what it had. No error.
    DeadReads,
    /// Stores to DMA addresses are lost. No error.
    DeadWrites,
    /// What goes wrong with loads and stores does so at DMA addresses of other devices only: the way between
    /// peers is bad, and that to host memory is not. A private mirror and a stuck fence are what they were.
    PeersOnly,
    /// Work is done, but no fence, index or interrupt tells. It is made up for afterwards.
    StuckFence,
    /// A reset takes this long; until then the device answers all ones.
    SlowReset {
        /// How long.
        #[serde(default = "slow_reset_ms")]
        ms: u64,
    },
    /// A reset does not end (until this is taken back).
    StuckReset,
    /// VRAM is zeros after a reset. Otherwise it is kept.
    VramLost,
    /// After a reset the device says for so long that its memory is not ready.
    SlowReady {
        /// How long.
        #[serde(default = "slow_reset_ms")]
        ms: u64,
    },
    /// The device says that its memory is not ready, and goes on saying it.
    StuckReady,
}

fn slow_reset_ms() -> u64 {
    1500
}

/// How long a reset takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetTime {
    /// No time.
    #[default]
    Immediate,
    /// This many milliseconds.
    SlowMs(u64),
    /// No end.
    Stuck,
}

/// How long it takes until the device says that its memory is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReadyTime {
    /// No time.
    #[default]
    Immediate,
    /// This many milliseconds, from a reset on.
    SlowMs(u64),
    /// The memory never gets ready.
    Stuck,
}

/// What the engine finds where it loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loads {
    /// What is there.
    #[default]
    Honest,
    /// Ones.
    AllOnes,
    /// Zeros.
    Zeros,
}

/// All that is wrong now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Faults {
    /// What loads bring.
    pub loads: Loads,
    /// The engine works on a private mirror of VRAM.
    pub mirror: bool,
    /// Where a page of VRAM begins that loads bring zeros of.
    #[serde(default)]
    pub bad_page: Option<u64>,
    /// Loads from DMA addresses are dead.
    pub dead_reads: bool,
    /// Stores to DMA addresses are dead.
    pub dead_writes: bool,
    /// Loads and stores go wrong at addresses of other devices only.
    pub peers_only: bool,
    /// Completion is never told.
    pub stuck_fence: bool,
    /// How long a reset takes.
    pub reset: ResetTime,
    /// VRAM does not survive a reset.
    pub vram_lost: bool,
    /// How long the memory takes to get ready.
    #[serde(default)]
    pub ready: ReadyTime,
}

impl Faults {
    /// What of it concerns loads and stores at a place that is, or is not, another device's.
    pub fn at(mut self, is_peer: bool) -> Self {
        if self.peers_only && !is_peer {
            (self.loads, self.dead_reads, self.dead_writes) = (Loads::Honest, false, false);
        }
        self
    }

    /// The same with one more.
    pub fn with(mut self, misbehaviour: Misbehaviour) -> Self {
        match misbehaviour {
            Misbehaviour::AllOnes => self.loads = Loads::AllOnes,
            Misbehaviour::Zeros => self.loads = Loads::Zeros,
            Misbehaviour::Mirror => self.mirror = true,
            Misbehaviour::BadPage { offset_bytes } => self.bad_page = Some(offset_bytes),
            Misbehaviour::DeadReads => self.dead_reads = true,
            Misbehaviour::DeadWrites => self.dead_writes = true,
            Misbehaviour::PeersOnly => self.peers_only = true,
            Misbehaviour::StuckFence => self.stuck_fence = true,
            Misbehaviour::SlowReset { ms } => self.reset = ResetTime::SlowMs(ms),
            Misbehaviour::StuckReset => self.reset = ResetTime::Stuck,
            Misbehaviour::VramLost => self.vram_lost = true,
            Misbehaviour::SlowReady { ms } => self.ready = ReadyTime::SlowMs(ms),
            Misbehaviour::StuckReady => self.ready = ReadyTime::Stuck,
        }
        self
    }
}
