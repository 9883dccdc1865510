//! The register map of the model GPU: what its driver in the guest sees.
//!
//! This module depends on nothing else in the package, so that a driver can share it
//! (`default-features = false`).
//!
//! # Regions
//!
//! | region | is |
//! |---|---|
//! | BAR0 | registers, 16 MiB, 32-bit, trapped: every access is a message |
//! | BAR2 | video memory (VRAM), 64-bit prefetchable, mapped: no access is seen by the model |
//! | BAR4 | plain memory, only where asked for (the `nvgrace` variant of VFIO wants one) |
//!
//! Registers are 32 bits wide and little-endian. Reads of any width and alignment work; writes
//! count only as whole aligned words (a 64-bit write is two of them, low word first). What is
//! unnamed reads zero. A device that was removed, sleeps in D3hot or is in reset reads all ones.
//!
//! # Doing work
//!
//! There are two engines, *copy* ([`COPY_ENGINE`]) and *draw* ([`DRAW_ENGINE`]), each with the
//! same block of registers. A ring of 64-byte [`Descriptor`]s lies **in VRAM**, at an offset of
//! the driver's choice, so that a driver needs no DMA mapping to give work to the device:
//!
//! 1. Write [`engine::RING_ADDRESS_LOW`], [`engine::RING_ADDRESS_HIGH`] (offset in VRAM, aligned
//!    to 64) and [`engine::RING_ENTRIES`] (a power of two, 2 to 4096).
//! 2. Write [`engine::CONTROL_ENABLE`] to [`engine::CONTROL`]. Head and tail are now zero.
//! 3. Write a descriptor into entry `tail % entries` through BAR2.
//! 4. Write `tail + 1` to [`engine::TAIL`], the doorbell. Indices run on modulo 2^32 and are not
//!    wrapped to the ring; at most `entries` descriptors may be under way.
//! 5. Wait until the fence reaches the value in the descriptor: poll the fence registers
//!    ([`engine::FENCE_LOW`] before [`engine::FENCE_HIGH`]: reading the low word latches the high
//!    one), or a fence in memory, or take the interrupt. The register is the one that counts: a
//!    fence in memory is written just before it, as eight bytes.
//!
//! A descriptor that cannot be done halts its engine ([`engine::STATUS_HALTED`]), latches
//! [`ERROR_CODE`] and [`ERROR_DETAIL`] and raises [`VECTOR_ERROR`]. Writing
//! [`engine::CONTROL_RESET`] makes the engine ready for step 1 again; writing anything to
//! [`ERROR_CODE`] clears it. For DMA, bus mastering must be on in the PCI command register.
//!
//! # What is absent
//!
//! No page tables (an address is an offset in VRAM or a DMA address as the IOMMU sees it), no
//! channels, no contexts, no ring in system memory. Engines run one descriptor at a time.

use bytemuck::{Pod, Zeroable};

/// Bytes of BAR0.
pub const BAR0_BYTES: u64 = 16 << 20;

/// Read-only: [`IDENTITY_VALUE`].
pub const IDENTITY: u32 = 0x0000;
/// What [`IDENTITY`] reads: "PVRM".
pub const IDENTITY_VALUE: u32 = u32::from_le_bytes(*b"PVRM");
/// Read-only: version of this register map, major in the upper half.
pub const MAP_VERSION: u32 = 0x0004;
/// What [`MAP_VERSION`] reads.
pub const MAP_VERSION_VALUE: u32 = 0x0001_0000;
/// Read-only: bytes of VRAM, low word. May be more than BAR2 shows.
pub const VRAM_BYTES_LOW: u32 = 0x0010;
/// Read-only: bytes of VRAM, high word.
pub const VRAM_BYTES_HIGH: u32 = 0x0014;
/// Read-only: counts the resets of the device; zero after power-on.
pub const GENERATION: u32 = 0x0018;
/// Read-only: [`STATUS_READY`], [`STATUS_ERROR`].
pub const STATUS: u32 = 0x001c;
/// The device runs.
pub const STATUS_READY: u32 = 1 << 0;
/// An error is latched in [`ERROR_CODE`].
pub const STATUS_ERROR: u32 = 1 << 1;
/// An [`ErrorCode`]; the first error stays until any value is written here.
pub const ERROR_CODE: u32 = 0x0020;
/// Read-only: what the error is about: engine in the upper 8 bits ([`ERROR_DETAIL_NO_ENGINE`] for
/// none), index of the descriptor, modulo 2^24, in the lower 24.
pub const ERROR_DETAIL: u32 = 0x0024;
/// Stands for "no engine" in the upper 8 bits of [`ERROR_DETAIL`].
pub const ERROR_DETAIL_NO_ENGINE: u32 = 0xff;
/// Causes of interrupts, one bit per vector. Write ones to clear.
pub const INTERRUPT_STATUS: u32 = 0x0030;
/// Which vectors may raise an interrupt, one bit each; zero after reset. The status bits are set
/// in any case.
pub const INTERRUPT_ENABLE: u32 = 0x0034;
/// Keeps what is written; zero after reset. For tests of the register path.
pub const SCRATCH: u32 = 0x0038;
/// The most MiB that each engine moves in a second; zero, as after reset, for as many as it can. An engine of
/// a real device leaves the CPU alone while it moves bytes; one that waits for its rate does, too.
pub const ENGINE_RATE: u32 = 0x003c;

/// MSI-X vector of the copy engine.
pub const VECTOR_COPY: u16 = 0;
/// MSI-X vector of the draw engine.
pub const VECTOR_DRAW: u16 = 1;
/// MSI-X vector of errors.
pub const VECTOR_ERROR: u16 = 2;
/// Number of MSI-X vectors (the last one is spare).
pub const VECTORS: u16 = 4;

/// First register of the copy engine.
pub const COPY_ENGINE: u32 = 0x1000;
/// First register of the draw engine.
pub const DRAW_ENGINE: u32 = 0x1100;
/// Bytes of one engine's block of registers.
pub const ENGINE_BYTES: u32 = 0x100;

/// Registers of one engine, relative to [`COPY_ENGINE`] or [`DRAW_ENGINE`].
pub mod engine {
    /// Offset of the ring in VRAM, low word. Ignored while the engine is enabled.
    pub const RING_ADDRESS_LOW: u32 = 0x00;
    /// Offset of the ring in VRAM, high word. Ignored while the engine is enabled.
    pub const RING_ADDRESS_HIGH: u32 = 0x04;
    /// Entries of the ring. Ignored while the engine is enabled.
    pub const RING_ENTRIES: u32 = 0x08;
    /// [`CONTROL_ENABLE`], [`CONTROL_RESET`].
    pub const CONTROL: u32 = 0x0c;
    /// Index after the last descriptor; writing it starts work.
    pub const TAIL: u32 = 0x10;
    /// Read-only: index of the descriptor that is next or under way.
    pub const HEAD: u32 = 0x14;
    /// Read-only: value of the last fence, low word.
    pub const FENCE_LOW: u32 = 0x18;
    /// Read-only: high word that belongs to the last read of [`FENCE_LOW`].
    pub const FENCE_HIGH: u32 = 0x1c;
    /// Read-only: [`STATUS_BUSY`], [`STATUS_HALTED`].
    pub const STATUS: u32 = 0x20;

    /// The engine takes work. Clearing it abandons the descriptor under way.
    pub const CONTROL_ENABLE: u32 = 1 << 0;
    /// Sets the whole block back to what it is after a reset. Reads zero.
    pub const CONTROL_RESET: u32 = 1 << 1;
    /// Descriptors are waiting or under way.
    pub const STATUS_BUSY: u32 = 1 << 0;
    /// An error stopped the engine.
    pub const STATUS_HALTED: u32 = 1 << 1;
}

/// Where the MSI-X table lies in BAR0.
pub const MSIX_TABLE: u32 = 0x00b9_0000;
/// Where the MSI-X pending bits lie in BAR0.
pub const MSIX_PENDING: u32 = 0x00ba_0000;
/// Read-only: the two registers that `nvgrace_gpu_vfio_pci` polls, of the link and of the memory's training.
pub const READINESS: [u32; 2] = [0x1498, 0x0002_00bc];
/// What [`READINESS`] reads, unless the device was told to take its time.
pub const READINESS_VALUE: u32 = 0xff;
/// What it reads meanwhile.
pub const READINESS_NOT_YET: u32 = 0x01;

/// Values of [`ERROR_CODE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// No error.
    None = 0,
    /// The ring does not fit: alignment, entries or place in VRAM, or too many descriptors.
    Ring = 1,
    /// Unknown operation, flag or parameter, or an operation of the other engine.
    Descriptor = 2,
    /// A range of VRAM that is not there.
    VramRange = 3,
    /// A DMA address that is not mapped, or not for this direction.
    DmaFault = 4,
    /// DMA with bus mastering off.
    BusMasterOff = 5,
    /// An error that was asked for over the control socket.
    Injected = 6,
    /// The model could not reach its own memory.
    Internal = 7,
}

/// Operations of a [`Descriptor`].
pub mod operation {
    /// Only the fence. Either engine.
    pub const NOTHING: u32 = 0;
    /// Copy `length_bytes` from `source` to `destination`. Copy engine.
    pub const COPY: u32 = 1;
    /// Repeat the 32-bit pattern `parameters[0]` over `length_bytes`. Copy engine. The pattern
    /// starts anew at `destination`; the length need not be a multiple of four.
    pub const FILL: u32 = 2;
    /// Draw a moving gradient with the frame's number in digits. Draw engine.
    pub const DRAW_GRADIENT: u32 = 3;
    /// Draw a turning shaded triangle. Draw engine.
    pub const DRAW_TRIANGLE: u32 = 4;
}

/// Flags of a [`Descriptor`].
pub mod flags {
    /// Raise the engine's interrupt on completion.
    pub const INTERRUPT: u32 = 1 << 0;
    /// Write `fence_value` to `fence_address`, too.
    pub const FENCE_IN_MEMORY: u32 = 1 << 1;
    /// `source` is a DMA address, not an offset in VRAM.
    pub const SOURCE_DMA: u32 = 1 << 2;
    /// `destination` is a DMA address, not an offset in VRAM.
    pub const DESTINATION_DMA: u32 = 1 << 3;
    /// `fence_address` is a DMA address, not an offset in VRAM.
    pub const FENCE_DMA: u32 = 1 << 4;
    /// All that are known.
    pub const ALL: u32 = (1 << 5) - 1;
}

/// Bytes of a [`Descriptor`].
pub const DESCRIPTOR_BYTES: u64 = 64;
/// The most entries that a ring may have.
pub const RING_ENTRIES_MAX: u32 = 4096;
/// The widest and highest frame that can be drawn, in pixels.
pub const FRAME_PIXELS_MAX: u32 = 16384;

/// One piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Descriptor {
    /// One of [`operation`].
    pub operation: u32,
    /// Of [`flags`].
    pub flags: u32,
    /// Where bytes come from.
    pub source: u64,
    /// Where bytes go.
    pub destination: u64,
    /// How many; zero is allowed and moves nothing. Must be zero for drawing.
    pub length_bytes: u64,
    /// Where the fence goes, aligned to eight bytes, with [`flags::FENCE_IN_MEMORY`].
    pub fence_address: u64,
    /// What the fence registers (and the fence in memory) become on completion.
    pub fence_value: u64,
    /// Fill: the pattern. Draw: width and height in pixels, stride in bytes, number of the frame.
    /// Pixels are XRGB8888: blue in the lowest byte. What an operation does not use must be zero.
    pub parameters: [u32; 4],
}

impl Descriptor {
    /// A fence and nothing else.
    pub fn nothing(fence_value: u64) -> Self {
        Descriptor { fence_value, ..Self::default() }
    }

    /// A copy within VRAM; add flags for DMA addresses.
    pub fn copy(source: u64, destination: u64, length_bytes: u64, fence_value: u64) -> Self {
        Descriptor {
            operation: operation::COPY,
            source,
            destination,
            length_bytes,
            fence_value,
            ..Self::default()
        }
    }

    /// A fill of VRAM; add flags for a DMA address.
    pub fn fill(pattern: u32, destination: u64, length_bytes: u64, fence_value: u64) -> Self {
        Descriptor {
            operation: operation::FILL,
            destination,
            length_bytes,
            fence_value,
            parameters: [pattern, 0, 0, 0],
            ..Self::default()
        }
    }

    /// A frame (`operation` is [`operation::DRAW_GRADIENT`] or [`operation::DRAW_TRIANGLE`]) with
    /// the stride `4 * width`.
    pub fn draw(
        operation: u32,
        destination: u64,
        width: u32,
        height: u32,
        frame: u32,
        fence_value: u64,
    ) -> Self {
        Descriptor {
            operation,
            destination,
            fence_value,
            parameters: [width, height, width.saturating_mul(4), frame],
            ..Self::default()
        }
    }

    /// The same picture, with its rows so far apart.
    pub fn with_stride(self, stride_bytes: u32) -> Self {
        let [width, height, _, frame] = self.parameters;
        Descriptor { parameters: [width, height, stride_bytes, frame], ..self }
    }

    /// The same with more flags.
    pub fn with_flags(mut self, flags: u32) -> Self {
        self.flags |= flags;
        self
    }

    /// The same with a fence in memory, at an offset in VRAM (or a DMA address with
    /// [`flags::FENCE_DMA`]).
    pub fn with_fence_at(mut self, fence_address: u64) -> Self {
        self.flags |= flags::FENCE_IN_MEMORY;
        self.fence_address = fence_address;
        self
    }
}

const _: () = assert!(size_of::<Descriptor>() as u64 == DESCRIPTOR_BYTES);
