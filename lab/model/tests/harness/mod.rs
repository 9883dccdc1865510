//! A model under test, a client of its own making, and a driver that gives work to the engines.
//!
//! The client serves DMA messages from [`Client::memory`] while it waits for a reply, as QEMU does
//! from its main loop.

#![allow(dead_code, reason = "every test uses a part of it")]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use peervram_model::configuration::Identity;
use peervram_model::device::Device;
use peervram_model::protocol::{HEADER_BYTES, Header, command};
use peervram_model::registers::{self as map, Descriptor, engine};
use peervram_model::server::Server;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

pub const VRAM_BYTES: u64 = 32 << 20;
pub const IDENTITY: Identity = Identity {
    vendor: 0x10de,
    device: 0x2342,
    bar2_bytes: VRAM_BYTES,
    vram_bytes: VRAM_BYTES,
    bar4_bytes: 0,
    vendor_word: 1,
    is_coherent: false,
    has_cxl: false,
};
/// Where DMA messages find [`Client::memory`].
pub const MESSAGE_BASE: u64 = 0x10_0000_0000;
/// How long anything may take in a test.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A served device.
pub struct Model {
    pub device: Arc<Device>,
    pub path: PathBuf,
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Model {
    pub fn new() -> Self {
        Self::with(IDENTITY)
    }

    pub fn with(identity: Identity) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpu.sock");
        let device = Arc::new(Device::new(identity, None).unwrap());
        let server = Arc::new(Server::bind(&path).unwrap());
        let thread = {
            let (device, server) = (Arc::clone(&device), Arc::clone(&server));
            std::thread::spawn(move || server.run(&*device).unwrap())
        };
        Model { device, path, server, thread: Some(thread), _folder: folder }
    }

    pub fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn client(&self) -> Client {
        let mut client = Client::new(self.raw());
        client.version().unwrap();
        client
    }

    pub fn driver(&self) -> Driver {
        Driver::new(self.client())
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        self.server.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// What a reply brought: its payload and descriptors, or an errno.
pub type Reply = Result<(Vec<u8>, Vec<OwnedFd>), u32>;

/// A client of the model.
pub struct Client {
    pub stream: UnixStream,
    pub memory: Vec<u8>,
    /// Refuse DMA messages with this errno.
    pub refuse: Option<u32>,
    /// DMA messages that were answered.
    pub messages: usize,
    next_id: u16,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        Client { stream, memory: Vec::new(), refuse: None, messages: 0, next_id: 0 }
    }

    pub fn send(&mut self, command: u16, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u16 {
        self.next_id = self.next_id.wrapping_add(1) & 0x7fff;
        let size_bytes = (HEADER_BYTES + payload.len()) as u32;
        let header = Header { flags, ..Header::command(self.next_id, command, size_bytes) };
        let message = [bytemuck::bytes_of(&header), payload].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let slices = [IoSlice::new(&message)];
        let sent = rustix::net::sendmsg(&self.stream, &slices, &mut control, SendFlags::NOSIGNAL).unwrap();
        self.stream.write_all(&message[sent..]).unwrap();
        self.next_id
    }

    /// Takes one message off the stream.
    pub fn receive(&mut self) -> (Header, Vec<u8>, Vec<OwnedFd>) {
        let mut head = [0; HEADER_BYTES];
        let mut fds = Vec::new();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut head)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let message = rustix::net::recvmsg(&self.stream, &mut slices, &mut control, flags).unwrap();
        assert_eq!(message.bytes, HEADER_BYTES, "the model hung up");
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = ancillary {
                fds.extend(received);
            }
        }
        let header = Header::read(&head);
        let mut payload = vec![0; header.payload_bytes().unwrap()];
        self.stream.read_exact(&mut payload).unwrap();
        (header, payload, fds)
    }

    pub fn command(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Reply {
        let id = self.send(command, 0, payload, fds);
        self.wait_for(id)
    }

    pub fn wait_for(&mut self, id: u16) -> Reply {
        loop {
            let (header, payload, fds) = self.receive();
            if header.flags & 0xf == 0 {
                self.serve_dma(&header, &payload);
                continue;
            }
            assert_eq!(header.id, id, "replies come in order");
            return match header.errno() {
                None => Ok((payload, fds)),
                Some(errno) => Err(errno.raw_os_error() as u32),
            };
        }
    }

    fn serve_dma(&mut self, header: &Header, payload: &[u8]) {
        self.messages += 1;
        let address = u64::from_ne_bytes(payload[..8].try_into().unwrap());
        let count = u64::from_ne_bytes(payload[8..16].try_into().unwrap()) as usize;
        assert!(count <= 64 << 10, "a message of {count} bytes");
        let range = address.checked_sub(MESSAGE_BASE).map(|start| start as usize..start as usize + count);
        let range = range.filter(|range| range.end <= self.memory.len() && self.refuse.is_none());
        let Some(range) = range else {
            let errno = rustix::io::Errno::from_raw_os_error(self.refuse.unwrap_or(14) as i32);
            return self.stream.write_all(bytemuck::bytes_of(&header.error_reply(errno))).unwrap();
        };
        let mut reply = payload[..16].to_vec();
        match header.command {
            command::DMA_READ => reply.extend_from_slice(&self.memory[range]),
            command::DMA_WRITE => self.memory[range].copy_from_slice(&payload[16..]),
            other => panic!("the model sent command {other}"),
        }
        let head = header.reply((HEADER_BYTES + reply.len()) as u32);
        self.stream.write_all(&[bytemuck::bytes_of(&head), &reply].concat()).unwrap();
    }

    pub fn version(&mut self) -> Reply {
        let mut payload = vec![0; 4];
        payload
            .extend_from_slice(b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576}}\0");
        self.command(command::VERSION, &payload, &[])
    }

    pub fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let payload = [&offset.to_ne_bytes()[..], &words(&[region, count])].concat();
        let (reply, _) = self.command(command::REGION_READ, &payload, &[])?;
        assert_eq!(reply[..16], payload);
        Ok(reply[16..].to_vec())
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), u32> {
        let payload = [&offset.to_ne_bytes()[..], &words(&[region, data.len() as u32]), data].concat();
        self.command(command::REGION_WRITE, &payload, &[]).map(|_| ())
    }

    pub fn register(&mut self, at: u32) -> u32 {
        u32::from_le_bytes(self.read(0, at.into(), 4).unwrap().try_into().unwrap())
    }

    pub fn set_register(&mut self, at: u32, value: u32) {
        self.write(0, at.into(), &value.to_le_bytes()).unwrap();
    }

    pub fn configuration(&mut self, at: u64) -> u32 {
        u32::from_le_bytes(self.read(7, at, 4).unwrap().try_into().unwrap())
    }

    /// Function-level reset, as QEMU passes it on.
    pub fn reset(&mut self) {
        self.write(7, 0x58, &0xa810u16.to_le_bytes()).unwrap();
    }

    pub fn map(
        &mut self,
        address: u64,
        size: u64,
        offset: u64,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(), u32> {
        self.map_as(3, address, size, offset, file)
    }

    pub fn map_as(
        &mut self,
        rights: u32,
        address: u64,
        size: u64,
        offset: u64,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(), u32> {
        let payload = [words(&[32, rights]), [offset, address, size].map(u64::to_ne_bytes).concat()].concat();
        let fds: Vec<_> = file.into_iter().collect();
        self.command(command::DMA_MAP, &payload, &fds).map(|_| ())
    }

    pub fn unmap(&mut self, address: u64, size: u64) -> Result<(), u32> {
        let payload = [words(&[24, 0]), [address, size].map(u64::to_ne_bytes).concat()].concat();
        self.command(command::DMA_UNMAP, &payload, &[]).map(|_| ())
    }

    /// Memory that the model reaches by messages, at [`MESSAGE_BASE`].
    pub fn map_messages(&mut self, size: usize) {
        self.memory = vec![0; size];
        self.map(MESSAGE_BASE, size as u64, 0, None).unwrap();
    }

    pub fn set_irqs(&mut self, flags: u32, start: u32, count: u32, fds: &[BorrowedFd<'_>]) -> Reply {
        self.command(command::DEVICE_SET_IRQS, &words(&[20, flags, 2, start, count]), fds)
    }

    /// The file behind BAR2.
    pub fn vram(&mut self) -> OwnedFd {
        let payload = [words(&[64, 0, 2, 0]), vec![0; 16]].concat();
        let (_, mut fds) = self.command(command::DEVICE_GET_REGION_INFO, &payload, &[]).unwrap();
        fds.pop().expect("a descriptor for BAR2")
    }
}

/// Native words as bytes.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A file for guest memory.
pub fn memory_file(size: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, size).unwrap();
    file
}

pub fn peek(file: &OwnedFd, offset: u64, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    peervram_model::vram::read_exact_at(file.as_fd(), offset, &mut buffer).unwrap();
    buffer
}

pub fn poke(file: &OwnedFd, offset: u64, data: &[u8]) {
    peervram_model::vram::write_all_at(file.as_fd(), offset, data).unwrap();
}

/// Bytes that differ from place to place.
pub fn pattern(bytes: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 24) as u8
        })
        .collect()
}

/// Gives work to the engines.
pub struct Driver {
    pub client: Client,
    pub vram: OwnedFd,
    tails: [u32; 2],
}

const BLOCKS: [u32; 2] = [map::COPY_ENGINE, map::DRAW_ENGINE];
const RING_ENTRIES: u32 = 16;

impl Driver {
    pub fn new(mut client: Client) -> Self {
        let vram = client.vram();
        let mut driver = Driver { client, vram, tails: [0; 2] };
        driver.start();
        driver
    }

    /// Bus mastering on, interrupts enabled, both rings at the end of VRAM.
    pub fn start(&mut self) {
        self.client.write(7, 4, &6u16.to_le_bytes()).unwrap();
        self.client.set_register(map::INTERRUPT_ENABLE, 7);
        for (number, block) in BLOCKS.into_iter().enumerate() {
            self.client.set_register(block + engine::CONTROL, engine::CONTROL_RESET);
            self.client.set_register(block + engine::RING_ADDRESS_LOW, Self::ring(number) as u32);
            self.client.set_register(block + engine::RING_ENTRIES, RING_ENTRIES);
            self.client.set_register(block + engine::CONTROL, engine::CONTROL_ENABLE);
        }
        self.tails = [0; 2];
    }

    pub fn ring(number: usize) -> u64 {
        VRAM_BYTES - 4096 * (number as u64 + 1)
    }

    /// Rings the doorbell, and asserts that no DMA message came before its reply.
    pub fn submit(&mut self, number: usize, descriptor: &Descriptor) {
        let entry = u64::from(self.tails[number] % RING_ENTRIES);
        poke(&self.vram, Self::ring(number) + entry * 64, bytemuck::bytes_of(descriptor));
        self.tails[number] += 1;
        let before = self.client.messages;
        self.client.set_register(BLOCKS[number] + engine::TAIL, self.tails[number]);
        assert_eq!(self.client.messages, before, "DMA before the reply to the doorbell");
    }

    pub fn fence(&mut self, number: usize) -> u64 {
        let low = self.client.register(BLOCKS[number] + engine::FENCE_LOW);
        let high = self.client.register(BLOCKS[number] + engine::FENCE_HIGH);
        u64::from(high) << 32 | u64::from(low)
    }

    pub fn status(&mut self, number: usize) -> u32 {
        self.client.register(BLOCKS[number] + engine::STATUS)
    }

    pub fn wait(&mut self, number: usize, fence: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.fence(number) != fence {
            let code = self.client.register(map::ERROR_CODE);
            assert_eq!(code, 0, "the engine says error {code}");
            assert!(Instant::now() < deadline, "no fence");
        }
    }

    pub fn run(&mut self, number: usize, descriptor: Descriptor) {
        self.submit(number, &descriptor);
        self.wait(number, descriptor.fence_value);
    }

    /// Runs what must fail and says how.
    pub fn fail(&mut self, number: usize, descriptor: Descriptor) -> u32 {
        self.submit(number, &descriptor);
        let deadline = Instant::now() + PATIENCE;
        while self.status(number) & engine::STATUS_HALTED == 0 {
            assert!(Instant::now() < deadline, "no error");
        }
        let code = self.client.register(map::ERROR_CODE);
        self.client.set_register(map::ERROR_CODE, 0);
        code
    }
}
