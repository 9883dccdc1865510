//! The storage of a machine: QEMU's NVMe controller with a memory buffer of its own (CMB), and as much of a driver as reading and
//! writing blocks takes.
//!
//! Its queue of commands lies in that buffer, BAR 2, which can be lent: whoever writes an entry there, by DMA too, gives it a command
//! once the [`ring`](Storage::ring) is rung. Registers and commands are those of the NVM Express Base Specification 2.0.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use peervram::backends::vfio::{Device, IoAddressSpace, IovaMapping};
use peervram::backends::{DmaRanges, Exporter, Importer, Mapping, page_size_bytes};

/// The BAR that is the memory buffer.
pub const BUFFER: u32 = 2;
/// What is read and written at once: a page, eight blocks of 512 bytes.
pub const TRANSFER_BYTES: usize = 4096;
const BLOCKS: u32 = 8;
/// An entry of the queue of commands.
pub const ENTRY_BYTES: usize = 64;
const REGISTERS: u32 = 0;

// 3.1.3: controller capabilities, configuration and status, admin queues; 3.1.4.11: the memory buffer's space.
const CONFIGURATION: usize = 0x14;
/// On, entries of 64 and 16 bytes.
const ON: u32 = 1 | 6 << 16 | 4 << 20;
const STATUS: usize = 0x1c;
const READY: u32 = 1;
const ADMIN_SIZES: usize = 0x24;
const ADMIN_COMMANDS: usize = 0x28;
const ADMIN_COMPLETIONS: usize = 0x30;
const BUFFER_SPACE: usize = 0x50;
/// Its registers and its memory are on.
const BUFFER_ON: u32 = 1 | 1 << 1;
const BUFFER_SIZE: usize = 0x3c;
/// 3.1.2: the first doorbell of each pair is of commands, the second of completions. QEMU's stride is none.
const DOORBELLS: usize = 0x1000;

/// Where the controller finds its buffer: beyond every address that is given out for DMA here.
const BUFFER_ADDRESS: u64 = 1 << 38;

/// Entries of each queue.
const ENTRIES: u32 = 16;
const LIMIT: Duration = Duration::from_secs(20);
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

// 5 and 7 (NVM Command Set): operation codes.
const CREATE_COMMANDS: u32 = 0x01;
const CREATE_COMPLETIONS: u32 = 0x05;
/// Blocks are written from memory.
pub const WRITE: u32 = 0x01;
/// Blocks are read into memory.
pub const READ: u32 = 0x02;

/// Where the queues that are in host memory lie there.
const ADMIN: usize = 0;
const ADMIN_DONE: usize = 4096;
const DONE: usize = 8192;
const MEMORY_BYTES: usize = 3 * 4096;

/// The controller, on, with one queue of commands in its buffer.
pub struct Storage {
    registers: Arc<Mapping>,
    memory: Arc<Mapping>,
    mapped: IovaMapping,
    /// How many commands each queue had: the admin's, and that in the buffer.
    given: [u32; 2],
}

impl Storage {
    /// Takes over `device`, which was opened into `space`.
    ///
    /// # Errors
    /// It has no buffer, or does not get ready; else what mapping its registers says.
    pub fn start(space: &IoAddressSpace, device: &Device) -> Result<Storage> {
        let registers = device.map(&DmaRanges::whole(device.region(REGISTERS)?)?)?;
        device.set_bus_master(true)?;
        let length_bytes = MEMORY_BYTES.next_multiple_of(page_size_bytes() as usize);
        let memory = Arc::new(Mapping::of_host_memory(length_bytes)?);
        let mapped = space.import_host_pointer(Arc::clone(&memory))?;
        let mut storage = Storage { registers, memory, mapped, given: [0; 2] };

        // The low half switches it on.
        storage.registers.store_u32(BUFFER_SPACE + 4, (BUFFER_ADDRESS >> 32) as u32)?;
        storage.registers.store_u32(BUFFER_SPACE, BUFFER_ADDRESS as u32 | BUFFER_ON)?;
        ensure!(storage.registers.load_u32(BUFFER_SIZE)? != 0, "{} has no memory buffer", device.address());

        storage.registers.store_u32(ADMIN_SIZES, (ENTRIES - 1) << 16 | (ENTRIES - 1))?;
        for (register, place) in [(ADMIN_COMMANDS, ADMIN), (ADMIN_COMPLETIONS, ADMIN_DONE)] {
            let address = storage.mapped.iova() + place as u64;
            storage.registers.store_u32(register, address as u32)?;
            storage.registers.store_u32(register + 4, (address >> 32) as u32)?;
        }
        storage.registers.store_u32(CONFIGURATION, ON)?;
        let deadline = Instant::now() + LIMIT;
        while storage.registers.load_u32(STATUS)? & READY == 0 {
            ensure!(Instant::now() < deadline, "{} does not get ready", device.address());
            thread::sleep(LOOK_INTERVAL);
        }
        let sizes = (ENTRIES - 1) << 16 | 1;
        let done = storage.mapped.iova() + DONE as u64;
        storage
            .admin(&entry(CREATE_COMPLETIONS, 0, done, [sizes, 1, 0]))
            .context("a queue of completions")?;
        storage
            .admin(&entry(CREATE_COMMANDS, 0, BUFFER_ADDRESS, [sizes, 1 << 16 | 1, 0]))
            .context("a queue in the buffer")?;
        Ok(storage)
    }

    /// Gives the admin queue a command, and waits for it.
    fn admin(&mut self, command: &[u8; ENTRY_BYTES]) -> Result<()> {
        let place = (self.given[0] % ENTRIES) as usize * ENTRY_BYTES;
        self.memory.write(ADMIN + place, command)?;
        self.go(0, ADMIN_DONE)
    }

    /// Where in the buffer the next command's entry belongs, in bytes.
    pub fn next_entry_bytes(&self) -> u64 {
        u64::from(self.given[1] % ENTRIES) * ENTRY_BYTES as u64
    }

    /// Has the controller take the next command out of its buffer, and waits until it is done.
    ///
    /// # Errors
    /// The command's status, or none after some time.
    pub fn ring(&mut self) -> Result<()> {
        self.go(1, DONE)
    }

    fn go(&mut self, queue: usize, completions: usize) -> Result<()> {
        let number = self.given[queue];
        self.given[queue] += 1;
        fence(Ordering::Release);
        self.registers.store_u32(DOORBELLS + 8 * queue, self.given[queue] % ENTRIES)?;
        // Its phase turns with each time around.
        let phase = u32::from((number / ENTRIES).is_multiple_of(2));
        let status = completions + (number % ENTRIES) as usize * 16 + 12;
        let deadline = Instant::now() + LIMIT;
        let said = loop {
            let said = self.memory.load_u32(status)?;
            if said >> 16 & 1 == phase {
                break said >> 17;
            }
            ensure!(
                Instant::now() < deadline,
                "the controller does not complete command {number} of queue {queue}"
            );
            thread::sleep(LOOK_INTERVAL);
        };
        fence(Ordering::Acquire);
        self.registers.store_u32(DOORBELLS + 8 * queue + 4, self.given[queue] % ENTRIES)?;
        if said != 0 {
            bail!("the controller refuses command {number} of queue {queue} with status {said:#x}");
        }
        Ok(())
    }
}

/// The entry of a transfer of [`TRANSFER_BYTES`] between memory at a DMA address, within a page, and blocks from `first_block` on.
pub fn transfer(operation: u32, address: u64, first_block: u32) -> [u8; ENTRY_BYTES] {
    entry(operation, 1, address, [first_block, 0, BLOCKS - 1])
}

/// 4.1: operation, namespace, the first pointer to memory, and the command's own words.
fn entry(operation: u32, namespace: u32, address: u64, words: [u32; 3]) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    let mut put =
        |word: usize, value: u32| entry[4 * word..4 * word + 4].copy_from_slice(&value.to_le_bytes());
    put(0, operation);
    put(1, namespace);
    put(6, address as u32);
    put(7, (address >> 32) as u32);
    for (number, word) in words.into_iter().enumerate() {
        put(10 + number, word);
    }
    entry
}
