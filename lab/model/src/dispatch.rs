//! One command of the client to one answer, on a [`Backend`]. No socket, no thread: the server feeds
//! it messages, and so does the fuzzer.
//!
//! Order of calls: one [`Dispatcher`] for each connection, [`Dispatcher::handle`] for each command.
//! Everything but `VERSION` is refused until a version was agreed on, and `VERSION` after that.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use serde::Deserialize;

use crate::protocol::{
    DATA_BYTES_MAX, DmaMap, DmaUnmap, FDS_MAX, HEADER_BYTES, Header, IrqAction, Request, SetIrqs,
};

/// Regions of a PCI device in VFIO: six BARs, ROM, configuration space, VGA.
pub const REGIONS: u32 = 9;
/// The configuration space.
pub const CONFIGURATION_REGION: u32 = 7;
/// Interrupts of a PCI device in VFIO: INTx, MSI, MSI-X, error, request.
pub const IRQS: u32 = 5;
/// MSI-X.
pub const MSIX_IRQ: u32 = 2;

/// Fatal errors; this device has none.
const ERROR_IRQ: u32 = 3;

/// One region.
#[derive(Debug, Clone, Copy)]
pub struct Region<'a> {
    /// Zero: not there.
    pub size_bytes: u64,
    /// A file to be mapped by the client, from its start.
    pub file: Option<BorrowedFd<'a>>,
}

/// A device. Methods take `&self`: its engines run on other threads.
pub trait Backend {
    /// One of [`REGIONS`].
    fn region(&self, index: u32) -> Region<'_>;
    /// How many interrupts of a kind there are.
    fn irqs(&self, index: u32) -> u32;
    /// Fills `buffer`.
    ///
    /// # Errors
    /// The errno for the client.
    fn read(&self, region: u32, offset: u64, buffer: &mut [u8]) -> Result<(), Errno>;
    /// Takes `data`.
    ///
    /// # Errors
    /// The errno for the client.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;
    /// Memory of the client becomes reachable.
    ///
    /// # Errors
    /// The errno for the client.
    fn dma_map(&self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), Errno>;
    /// Memory of the client is no more to be touched.
    ///
    /// # Errors
    /// The errno for the client.
    fn dma_unmap(&self, unmap: DmaUnmap) -> Result<(), Errno>;
    /// Interrupts are connected or raised.
    ///
    /// # Errors
    /// The errno for the client.
    fn set_irqs(&self, set: &SetIrqs<'_>, events: Vec<OwnedFd>) -> Result<(), Errno>;
    /// Resets the device.
    fn reset(&self);
    /// The reply to the last command has been sent: what may need the client can begin.
    fn after_reply(&self);
}

#[derive(Deserialize)]
struct Proposal {
    #[serde(default)]
    capabilities: Proposed,
}

#[derive(Deserialize, Default)]
struct Proposed {
    max_data_xfer_size: Option<u64>,
}

/// The commands of one connection.
#[derive(Debug)]
pub struct Dispatcher<'a, B> {
    backend: &'a B,
    agreed_data_bytes: Option<usize>,
}

impl<'a, B: Backend> Dispatcher<'a, B> {
    /// For a new connection.
    pub fn new(backend: &'a B) -> Self {
        Dispatcher { backend, agreed_data_bytes: None }
    }

    /// The most data that the client takes in one message, once a version was agreed on.
    pub fn agreed_data_bytes(&self) -> Option<usize> {
        self.agreed_data_bytes
    }

    /// Carries out a command and leaves the whole reply in `reply`, which may come with a descriptor.
    pub fn handle(
        &mut self,
        header: &Header,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        reply: &mut Vec<u8>,
    ) -> Option<BorrowedFd<'a>> {
        reply.clear();
        reply.resize(HEADER_BYTES, 0);
        let result = Request::decode(header.command, payload, fds.len())
            .and_then(|request| self.carry_out(&request, fds, reply))
            // A reply is never longer than the largest data; the sum was checked by decode.
            .and_then(|fd| Ok((u32::try_from(reply.len()).map_err(|_| Errno::TOOBIG)?, fd)));
        match result {
            Ok((size_bytes, fd)) => {
                reply[..HEADER_BYTES].copy_from_slice(bytemuck::bytes_of(&header.reply(size_bytes)));
                fd
            }
            Err(errno) => {
                tracing::debug!(command = header.command, %errno, "refused");
                reply.truncate(HEADER_BYTES);
                reply.copy_from_slice(bytemuck::bytes_of(&header.error_reply(errno)));
                None
            }
        }
    }

    fn carry_out(
        &mut self,
        request: &Request<'_>,
        mut fds: Vec<OwnedFd>,
        reply: &mut Vec<u8>,
    ) -> Result<Option<BorrowedFd<'a>>, Errno> {
        let is_version = matches!(request, Request::Version { .. });
        if is_version == self.agreed_data_bytes.is_some() {
            return Err(Errno::INVAL);
        }
        match *request {
            Request::Version { major, capabilities } => self.version(major, capabilities, reply)?,
            Request::DmaMap(map) => self.backend.dma_map(&map, fds.pop())?,
            Request::DmaUnmap(unmap) => {
                self.backend.dma_unmap(unmap)?;
                // The reply repeats the request.
                let (first, size) = match unmap {
                    DmaUnmap::All => (0, 0),
                    DmaUnmap::Range { first, last } => (first, (last - first).wrapping_add(1)),
                };
                put_u32s(reply, [24, u32::from(unmap == DmaUnmap::All) * 2]);
                put_u64s(reply, [first, size]);
            }
            Request::DeviceInfo => {
                const RESET: u32 = 1 << 0;
                const PCI: u32 = 1 << 1;
                put_u32s(reply, [16, RESET | PCI, REGIONS, IRQS]);
            }
            Request::RegionInfo { argsz, index } => return self.region_info(argsz, index, reply),
            Request::IrqInfo { index } => {
                const EVENTFD: u32 = 1 << 0;
                // QEMU warns of an error interrupt that is there zero times, and not of an errno.
                if index >= IRQS || index == ERROR_IRQ {
                    return Err(Errno::INVAL);
                }
                let count = self.backend.irqs(index);
                put_u32s(reply, [16, if count == 0 { 0 } else { EVENTFD }, index, count]);
            }
            Request::SetIrqs(set) => self.set_irqs(&set, fds)?,
            Request::RegionRead { region, offset, count } => {
                self.check_access(region, offset, count)?;
                put_u64s(reply, [offset]);
                put_u32s(reply, [region, count]);
                let data = reply.len();
                reply.resize(data + count as usize, 0);
                self.backend.read(region, offset, &mut reply[data..])?;
            }
            Request::RegionWrite { region, offset, data } => {
                let count = u32::try_from(data.len()).map_err(|_| Errno::TOOBIG)?;
                self.check_access(region, offset, count)?;
                self.backend.write(region, offset, data)?;
                put_u64s(reply, [offset]);
                put_u32s(reply, [region, count]);
            }
            Request::Reset => self.backend.reset(),
        }
        Ok(None)
    }

    fn version(&mut self, major: u16, capabilities: &[u8], reply: &mut Vec<u8>) -> Result<(), Errno> {
        if major != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let proposed = if capabilities.is_empty() {
            Proposed::default()
        } else {
            serde_json::from_slice::<Proposal>(capabilities).map_err(|_| Errno::INVAL)?.capabilities
        };
        let data_bytes =
            proposed.max_data_xfer_size.unwrap_or(DATA_BYTES_MAX.into()).min(DATA_BYTES_MAX.into());
        self.agreed_data_bytes = Some(usize::try_from(data_bytes).map_err(|_| Errno::INVAL)?);
        // QEMU 11.1 proposes 0.0 and takes nothing newer for an answer.
        reply.extend_from_slice(&[0; 4]);
        let answer = serde_json::json!({ "capabilities": {
            "max_msg_fds": FDS_MAX,
            "max_data_xfer_size": DATA_BYTES_MAX,
        }});
        reply.extend_from_slice(answer.to_string().as_bytes());
        reply.push(0);
        Ok(())
    }

    fn region_info(
        &self,
        argsz: u32,
        index: u32,
        reply: &mut Vec<u8>,
    ) -> Result<Option<BorrowedFd<'a>>, Errno> {
        const READ_WRITE: u32 = 3;
        const MMAP: u32 = 4;
        const CAPABILITIES: u32 = 8;
        const INFO_BYTES: u32 = 32;
        const SPARSE_BYTES: u32 = 32;
        if index >= REGIONS {
            return Err(Errno::INVAL);
        }
        let backend = self.backend;
        let Region { size_bytes, file } = backend.region(index);
        let flags = if size_bytes == 0 { 0 } else { READ_WRITE };
        if file.is_none() {
            put_u32s(reply, [INFO_BYTES, flags, index, 0]);
            put_u64s(reply, [size_bytes, 0]);
            return Ok(None);
        }
        // A client that has no room for the capability asks again, with room.
        put_u32s(reply, [INFO_BYTES + SPARSE_BYTES, flags | MMAP | CAPABILITIES, index, INFO_BYTES]);
        put_u64s(reply, [size_bytes, 0]);
        if argsz < INFO_BYTES + SPARSE_BYTES {
            return Ok(None);
        }
        // VFIO_REGION_INFO_CAP_SPARSE_MMAP, version 1, the last; one area that covers all. Without it
        // QEMU does not take the descriptor.
        put_u32s(reply, [1 | 1 << 16, 0, 1, 0]);
        put_u64s(reply, [0, size_bytes]);
        Ok(file)
    }

    fn set_irqs(&self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let end = set.start.checked_add(set.count).ok_or(Errno::INVAL)?;
        if set.index >= IRQS || end > self.backend.irqs(set.index) {
            return Err(Errno::INVAL);
        }
        if set.action == IrqAction::Connect && set.count == 0 {
            return Err(Errno::INVAL);
        }
        self.backend.set_irqs(set, fds)
    }

    fn check_access(&self, region: u32, offset: u64, count: u32) -> Result<(), Errno> {
        if region >= REGIONS {
            return Err(Errno::INVAL);
        }
        match offset.checked_add(count.into()) {
            Some(end) if end <= self.backend.region(region).size_bytes => Ok(()),
            _ => Err(Errno::INVAL),
        }
    }
}

fn put_u32s<const N: usize>(reply: &mut Vec<u8>, values: [u32; N]) {
    reply.extend_from_slice(bytemuck::cast_slice(&values));
}

fn put_u64s<const N: usize>(reply: &mut Vec<u8>, values: [u64; N]) {
    reply.extend_from_slice(bytemuck::cast_slice(&values));
}
