//! The network card of a machine: QEMU's igb, an Intel 82576, as an importer whose engine is not of this project.
//!
//! The card sends frames to itself. Sending reads memory by DMA and receiving writes memory by DMA, so a frame is a copy. The
//! driver believes the card where it says that a frame was sent, as drivers do. What the card makes of addresses that lead
//! nowhere is QEMU's: it drops the frame that it cannot read, or the bytes that it cannot write, and says that all was sent.
//!
//! ```text
//! sent        | HEADER, filler of ours |  up to 8 KiB of the source, page by page |
//! received    | filler, thrown away    |  1 KiB | 1 KiB | ... of the destination   |
//! ```
//! The filler keeps the first bytes of a frame, which the card takes for addresses and a protocol, apart from the bytes that are
//! copied. A descriptor for sending stays within a page: QEMU maps what it sends in one piece (`net_tx_pkt_add_raw_fragment_pci`),
//! and behind an IOMMU the next page may be anywhere. Registers and descriptors are those of Intel's 82576 datasheet, revision 2.87; chapters are named beside them.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use peervram::backends::vfio::{Device, IoAddressSpace, IovaMapping};
use peervram::backends::{
    DmaBuf, DmaRanges, Engine, Exporter, HostSlice, Importer, Mapping, OnRevoke, PciAddress,
};
use peervram::{Error, Kind};
use peervram_model_driver::Reached;

/// What the engine is called.
pub const ENGINE: &str = "loopback";

const TRIED: &str = "copy by a network card";
const REGISTERS: u32 = 0;

// Chapter 8: device control and status, the PHY's registers by way of MDIC, receive and transmit control.
const STATUS: usize = 0x0008;
const STATUS_LINK_UP: u32 = 1 << 1;
const PHY_CONTROL: usize = 0x0020;
/// Register 0 of PHY 1 is written: negotiate, and begin anew.
const PHY_NEGOTIATE: u32 = 1 << 26 | 1 << 21 | 1 << 12 | 1 << 9;
const RECEIVE_CONTROL: usize = 0x0100;
/// On, every address, long frames, to itself, broadcasts, and no checksum behind the frame.
const RECEIVE: u32 = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 15 | 1 << 26;
const TRANSMIT_CONTROL: usize = 0x0400;
const TRANSMIT: u32 = 1 << 1 | 1 << 3;
const LONGEST_FRAME: usize = 0x5004;

/// The registers of a queue, from its first on (8.10, 8.12).
const RECEIVE_QUEUE: usize = 0xc000;
const TRANSMIT_QUEUE: usize = 0xe000;
const QUEUE_BASE_LOW: usize = 0x00;
const QUEUE_BASE_HIGH: usize = 0x04;
const QUEUE_LENGTH: usize = 0x08;
/// Of receiving alone: buffers of 1 KiB, and the advanced descriptor with one buffer.
const QUEUE_SPLIT: usize = 0x0c;
const SPLIT: u32 = 1 | 1 << 25;
const QUEUE_HEAD: usize = 0x10;
const QUEUE_TAIL: usize = 0x18;
const QUEUE_CONTROL: usize = 0x28;
const QUEUE_ON: u32 = 1 << 25;

/// A descriptor of either kind.
const DESCRIPTOR_BYTES: usize = 16;
const ENTRIES: usize = 64;
/// One buffer of a received frame.
const BUFFER_BYTES: usize = 1024;
/// What a frame carries besides its filler.
const PAYLOAD_BYTES: usize = 8 * BUFFER_BYTES;

/// What a descriptor for sending keeps within.
const PAGE_BYTES: u64 = 4096;

// 7.2.2.3: an advanced data descriptor, whose frame gets a checksum; the last of a frame, which is to be written back.
const SEND: u32 = 1 << 29 | 3 << 20 | 1 << 25;
const SEND_LAST: u32 = 1 << 24 | 1 << 27;
/// 7.2.2.4: the card has written the descriptor back.
const DONE: u32 = 1;

/// Where the rings and the filler lie in host memory.
const RECEIVE_RING: usize = 0;
const TRANSMIT_RING: usize = RECEIVE_RING + ENTRIES * DESCRIPTOR_BYTES;
const SENT_FILLER: usize = TRANSMIT_RING + ENTRIES * DESCRIPTOR_BYTES;
const RECEIVED_FILLER: usize = SENT_FILLER + BUFFER_BYTES;
const MEMORY_BYTES: usize = RECEIVED_FILLER + BUFFER_BYTES;
/// To and from broadcast, of the protocol that IEEE 802 keeps for experiments.
const HEADER: [u8; 14] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5];

/// QEMU's link comes up half a second after it was asked for.
const LINK_LIMIT: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// The card as an importer: what it imports its engine reads and writes. Drop it before its device.
pub struct NetworkCard {
    space: IoAddressSpace,
    address: PciAddress,
    loopback: Loopback,
}

impl NetworkCard {
    /// Takes over `device`, which was opened into `space`, and has it send to itself.
    ///
    /// # Errors
    /// Its link does not come up; else what mapping its registers says.
    pub fn new(space: &IoAddressSpace, device: &Device) -> Result<Self> {
        let loopback = Loopback::start(space, device)?;
        Ok(Self { space: space.clone(), address: device.address(), loopback })
    }

    /// From now on its engine looks for imported memory `bytes` further on: a driver with a fault.
    pub fn misaim(&self, bytes: u64) {
        self.loopback.misaim.store(bytes, Ordering::Relaxed);
    }
}

/// The engine.
struct Loopback {
    name: String,
    registers: Arc<Mapping>,
    /// Rings and filler, and where the card finds them.
    memory: Arc<Mapping>,
    mapped: IovaMapping,
    reached: Reached,
    misaim: AtomicU64,
    /// The next free descriptor of the rings for receiving and sending.
    tails: Mutex<[usize; 2]>,
}

impl Loopback {
    fn start(space: &IoAddressSpace, device: &Device) -> Result<Self> {
        let registers = device.map(&DmaRanges::whole(device.region(REGISTERS)?)?)?;
        device.set_bus_master(true)?;
        let page_bytes = peervram::backends::page_size_bytes() as usize;
        let memory = Arc::new(Mapping::of_host_memory(MEMORY_BYTES.next_multiple_of(page_bytes))?);
        let mapped = space.import_host_pointer(Arc::clone(&memory))?;
        memory.write(SENT_FILLER, &HEADER)?;

        registers.store_u32(PHY_CONTROL, PHY_NEGOTIATE)?;
        let deadline = Instant::now() + LINK_LIMIT;
        while registers.load_u32(STATUS)? & STATUS_LINK_UP == 0 {
            anyhow::ensure!(Instant::now() < deadline, "the link of {} does not come up", device.address());
            thread::sleep(LOOK_INTERVAL);
        }
        for (queue, ring) in [(RECEIVE_QUEUE, RECEIVE_RING), (TRANSMIT_QUEUE, TRANSMIT_RING)] {
            let base = mapped.iova() + ring as u64;
            registers.store_u32(queue + QUEUE_BASE_LOW, base as u32)?;
            registers.store_u32(queue + QUEUE_BASE_HIGH, (base >> 32) as u32)?;
            registers.store_u32(queue + QUEUE_LENGTH, (ENTRIES * DESCRIPTOR_BYTES) as u32)?;
            registers.store_u32(queue + QUEUE_HEAD, 0)?;
            registers.store_u32(queue + QUEUE_TAIL, 0)?;
            registers.store_u32(queue + QUEUE_CONTROL, QUEUE_ON)?;
        }
        registers.store_u32(RECEIVE_QUEUE + QUEUE_SPLIT, SPLIT)?;
        registers.store_u32(LONGEST_FRAME, (BUFFER_BYTES + PAYLOAD_BYTES + 4) as u32)?;
        registers.store_u32(RECEIVE_CONTROL, RECEIVE)?;
        registers.store_u32(TRANSMIT_CONTROL, TRANSMIT)?;
        Ok(Self {
            name: device.address().to_string(),
            registers,
            memory,
            mapped,
            reached: Reached::new(Some(space.clone())),
            misaim: AtomicU64::new(0),
            tails: Mutex::new([0; 2]),
        })
    }

    /// Where the engine looks for an offset in imported memory.
    fn aim(&self, memory: &IovaMapping, offset_bytes: u64, length_bytes: u64) -> peervram::Result<u64> {
        if offset_bytes.checked_add(length_bytes).is_none_or(|end| end > memory.len()) {
            let why =
                format!("{length_bytes:#x} bytes from {offset_bytes:#x} on are not in {:#x}", memory.len());
            return Err(Error::new(Kind::InvalidInput, TRIED, why).on(&self.name));
        }
        Ok(memory.iova() + offset_bytes + self.misaim.load(Ordering::Relaxed))
    }

    /// Copies between two DMA addresses, frame by frame.
    fn copy(&self, from: u64, to: u64, length_bytes: u64, deadline: Instant) -> peervram::Result<()> {
        let mut tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done_bytes = 0;
        while done_bytes < length_bytes {
            let frame_bytes = (length_bytes - done_bytes).min(PAYLOAD_BYTES as u64);
            self.send(&mut tails, from + done_bytes, to + done_bytes, frame_bytes as usize, deadline)?;
            done_bytes += frame_bytes;
        }
        Ok(())
    }

    /// Sends one frame, and waits until the card says that it was sent. What it sends to itself has been received by then.
    fn send(
        &self,
        [received, sent]: &mut [usize; 2],
        from: u64,
        to: u64,
        payload_bytes: usize,
        deadline: Instant,
    ) -> peervram::Result<()> {
        let filler = self.mapped.iova();
        self.put(RECEIVE_RING, received, filler + RECEIVED_FILLER as u64, [0, 0])?;
        for buffer in 0..payload_bytes.div_ceil(BUFFER_BYTES) {
            self.put(RECEIVE_RING, received, to + (buffer * BUFFER_BYTES) as u64, [0, 0])?;
        }
        let all_bytes = ((BUFFER_BYTES + payload_bytes) << 14) as u32;
        self.put(TRANSMIT_RING, sent, filler + SENT_FILLER as u64, [SEND | BUFFER_BYTES as u32, all_bytes])?;
        let (mut at, end) = (from, from + payload_bytes as u64);
        let mut last = *sent;
        while at < end {
            let piece_end = end.min((at / PAGE_BYTES + 1) * PAGE_BYTES);
            let is_last = if piece_end == end { SEND_LAST } else { 0 };
            last = *sent;
            self.put(TRANSMIT_RING, sent, at, [SEND | is_last | (piece_end - at) as u32, all_bytes])?;
            at = piece_end;
        }

        // The card may look at descriptors once the tails are written.
        fence(Ordering::Release);
        self.registers.store_u32(RECEIVE_QUEUE + QUEUE_TAIL, *received as u32)?;
        self.registers.store_u32(TRANSMIT_QUEUE + QUEUE_TAIL, *sent as u32)?;
        let status = TRANSMIT_RING + last * DESCRIPTOR_BYTES + 12;
        while self.memory.load_u32(status)? & DONE == 0 {
            if Instant::now() >= deadline {
                let why = "the card does not say that it has sent a frame";
                return Err(Error::new(Kind::TimedOut, TRIED, why).on(&self.name));
            }
            thread::yield_now();
        }
        fence(Ordering::Acquire);
        // A frame that was dropped has taken no buffer.
        *received = self.registers.load_u32(RECEIVE_QUEUE + QUEUE_HEAD)? as usize % ENTRIES;
        Ok(())
    }

    /// Writes the next descriptor of a ring.
    fn put(&self, ring: usize, next: &mut usize, address: u64, words: [u32; 2]) -> peervram::Result<()> {
        let mut descriptor = [0; DESCRIPTOR_BYTES];
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&words[0].to_le_bytes());
        descriptor[12..].copy_from_slice(&words[1].to_le_bytes());
        self.memory.write(ring + *next * DESCRIPTOR_BYTES, &descriptor)?;
        *next = (*next + 1) % ENTRIES;
        Ok(())
    }
}

impl Engine<IovaMapping> for Loopback {
    fn name(&self) -> &str {
        ENGINE
    }

    fn read(
        &self,
        memory: &IovaMapping,
        offset_bytes: u64,
        host: &HostSlice,
        deadline: Instant,
    ) -> peervram::Result<()> {
        let length_bytes = host.length_bytes() as u64;
        let from = self.aim(memory, offset_bytes, length_bytes)?;
        let (to, _mapped) = self.reached.address_of(host)?;
        self.copy(from, to, length_bytes, deadline)
    }

    fn write(
        &self,
        memory: &IovaMapping,
        offset_bytes: u64,
        host: &HostSlice,
        deadline: Instant,
    ) -> peervram::Result<()> {
        let length_bytes = host.length_bytes() as u64;
        let to = self.aim(memory, offset_bytes, length_bytes)?;
        let (from, _mapped) = self.reached.address_of(host)?;
        self.copy(from, to, length_bytes, deadline)
    }
}

impl Importer for NetworkCard {
    type Memory = IovaMapping;

    fn name(&self) -> String {
        format!("network card at {} by {}", self.address, self.space.interface().name())
    }

    fn pci_address(&self) -> Option<PciAddress> {
        Some(self.address)
    }

    fn on_revoke(&self) -> OnRevoke {
        self.space.on_revoke()
    }

    fn governed_by_p2pdma(&self) -> bool {
        self.space.governed_by_p2pdma()
    }

    fn import(&self, dma_buf: &DmaBuf) -> peervram::Result<IovaMapping> {
        self.space.import(dma_buf)
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> peervram::Result<IovaMapping> {
        self.space.import_host_pointer(mapping)
    }

    fn stage(&self, size_bytes: u64) -> peervram::Result<IovaMapping> {
        self.space.stage(size_bytes)
    }

    fn host_memory(&self, memory: &IovaMapping) -> Option<Arc<Mapping>> {
        self.space.host_memory(memory)
    }

    fn engines(&self) -> Vec<&dyn Engine<IovaMapping>> {
        vec![&self.loopback]
    }

    fn release(&self, memory: IovaMapping) -> peervram::Result<()> {
        self.space.release(memory)
    }
}
