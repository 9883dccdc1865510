//! The vfio-user wire format: bytes to typed requests, or to the errno that answers them. Pure.
//!
//! Order of calls: [`Header::read`] and [`Header::payload_bytes`] on the first 16 bytes, then, once the
//! payload has been taken off the stream, [`Request::decode`].
//!
//! Absent: migration, dirty pages, per-region file descriptors and `REGION_WRITE_MULTI`. They are
//! drained and answered `EOPNOTSUPP`; `REGION_WRITE_MULTI` is not announced, so QEMU does not send it.
//! The layouts are those of QEMU's `hw/vfio-user/protocol.h`; integers are in host order.

use bytemuck::{Pod, Zeroable};
use rustix::io::Errno;

/// Bytes of a message header.
pub const HEADER_BYTES: usize = 16;
/// The most bytes of data in one region access; announced as `max_data_xfer_size`.
pub const DATA_BYTES_MAX: u32 = 1 << 20;
/// The most bytes of one message that is looked at; longer ones are drained and refused.
pub const MESSAGE_BYTES_MAX: u32 = DATA_BYTES_MAX + 4096;
/// The most file descriptors of one message; announced as `max_msg_fds`.
pub const FDS_MAX: usize = 16;
/// The most bytes of capabilities in a version message.
pub const CAPABILITIES_BYTES_MAX: usize = 4096;

/// Commands, as numbers.
pub mod command {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const DEVICE_GET_INFO: u16 = 4;
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub const DEVICE_SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DMA_READ: u16 = 11;
    pub const DMA_WRITE: u16 = 12;
    pub const DEVICE_RESET: u16 = 13;
}

const TYPE_MASK: u32 = 0xf;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 0x10;
const FLAG_ERROR: u32 = 0x20;

/// What every message begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Header {
    /// Chosen by the sender of a command, repeated in its reply.
    pub id: u16,
    /// One of [`command`].
    pub command: u16,
    /// The size of the whole message.
    pub size_bytes: u32,
    /// Type of the message, "no reply wanted", "error".
    pub flags: u32,
    /// Errno of an error reply, positive.
    pub error: u32,
}

/// What a header announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A command of the client.
    Command,
    /// The client's reply to a command of ours.
    Reply,
    /// Neither.
    Unknown,
}

impl Header {
    /// A command of ours.
    pub fn command(id: u16, command: u16, size_bytes: u32) -> Self {
        Header { id, command, size_bytes, flags: 0, error: 0 }
    }

    /// The header of the reply to `self`, for a message of `size_bytes` in all.
    pub fn reply(&self, size_bytes: u32) -> Self {
        Header { size_bytes, flags: TYPE_REPLY, error: 0, ..*self }
    }

    /// The whole of an error reply to `self`.
    pub fn error_reply(&self, errno: Errno) -> Self {
        Header {
            size_bytes: HEADER_BYTES as u32,
            flags: TYPE_REPLY | FLAG_ERROR,
            // QEMU takes zero as success, so an errno must never be lost.
            error: errno.raw_os_error().unsigned_abs(),
            ..*self
        }
    }

    /// From the first bytes of a message.
    pub fn read(bytes: &[u8; HEADER_BYTES]) -> Self {
        bytemuck::pod_read_unaligned(bytes)
    }

    /// What comes after the header, in bytes. `None` if the size is smaller than the header: then
    /// the beginning of the next message is unknown and the stream is of no more use.
    pub fn payload_bytes(&self) -> Option<usize> {
        (self.size_bytes as usize).checked_sub(HEADER_BYTES)
    }

    /// Command or reply.
    pub fn kind(&self) -> Kind {
        match self.flags & TYPE_MASK {
            0 => Kind::Command,
            TYPE_REPLY => Kind::Reply,
            _ => Kind::Unknown,
        }
    }

    /// Whether the sender of a command does not wait for a reply.
    pub fn is_no_reply(&self) -> bool {
        self.flags & FLAG_NO_REPLY != 0
    }

    /// The errno of an error reply. Zero counts as `EIO`: the flag says that there was an error.
    pub fn errno(&self) -> Option<Errno> {
        if self.flags & FLAG_ERROR == 0 {
            return None;
        }
        Some(match i32::try_from(self.error) {
            Ok(error @ 1..=4095) => Errno::from_raw_os_error(error),
            _ => Errno::IO,
        })
    }
}

/// Access rights of a DMA window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

/// `DMA_MAP`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaMap {
    /// Rights of the device.
    pub access: Access,
    /// Where the window begins in the file, if a file comes with it.
    pub offset: u64,
    /// First DMA address.
    pub address: u64,
    /// Length; not zero, and `address + (size_bytes - 1)` does not overflow.
    pub size_bytes: u64,
}

/// `DMA_UNMAP`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DmaUnmap {
    /// Everything.
    All,
    /// What lies in `first..=last`.
    Range {
        /// First DMA address.
        first: u64,
        /// Last DMA address.
        last: u64,
    },
}

/// What is to be done with interrupts by `DEVICE_SET_IRQS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqAction<'a> {
    /// Use the event file descriptors of the message; none stands for `count` times "nothing".
    Connect,
    /// Raise all of the range; with a count of zero: disconnect all of the index.
    Raise,
    /// Raise those with a non-zero byte.
    RaiseSome(&'a [u8]),
}

/// `DEVICE_SET_IRQS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// Which kind of interrupt.
    pub index: u32,
    /// First of the range.
    pub start: u32,
    /// Length of the range.
    pub count: u32,
    /// What to do.
    pub action: IrqAction<'a>,
}

/// A command of the client, checked as far as it can be without knowing the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// Agree on a version.
    Version {
        /// Proposed by the client.
        major: u16,
        /// JSON, without the terminating zero.
        capabilities: &'a [u8],
    },
    /// Make memory of the client reachable.
    DmaMap(DmaMap),
    /// Take it back.
    DmaUnmap(DmaUnmap),
    /// Number of regions and interrupts.
    DeviceInfo,
    /// One region.
    RegionInfo {
        /// How much the client can take, without the header.
        argsz: u32,
        /// Which.
        index: u32,
    },
    /// One kind of interrupt.
    IrqInfo {
        /// Which.
        index: u32,
    },
    /// Interrupts.
    SetIrqs(SetIrqs<'a>),
    /// Read from a region.
    RegionRead {
        /// Which.
        region: u32,
        /// Where.
        offset: u64,
        /// How much; at most [`DATA_BYTES_MAX`].
        count: u32,
    },
    /// Write to a region.
    RegionWrite {
        /// Which.
        region: u32,
        /// Where.
        offset: u64,
        /// What.
        data: &'a [u8],
    },
    /// Reset.
    Reset,
}

/// Takes fixed-size values off the front of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<T: Pod>(&mut self) -> Result<T, Errno> {
        let (front, rest) = self.0.split_at_checked(size_of::<T>()).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytemuck::pod_read_unaligned(front))
    }

    fn end(&self) -> Result<(), Errno> {
        if self.0.is_empty() { Ok(()) } else { Err(Errno::INVAL) }
    }
}

impl<'a> Request<'a> {
    /// The request in the payload of a command that came with `fds` file descriptors.
    ///
    /// # Errors
    /// `EINVAL` for what is too short, too long or contradicts itself, `E2BIG` for a count beyond
    /// the limits, `EOPNOTSUPP` for a command that this device does not know.
    pub fn decode(command: u16, payload: &'a [u8], fds: usize) -> Result<Self, Errno> {
        let fds_allowed = match command {
            command::DMA_MAP => 1,
            command::DEVICE_SET_IRQS => FDS_MAX,
            _ => 0,
        };
        let mut fields = Fields(payload);
        let request = match command {
            command::VERSION => Self::version(&mut fields)?,
            command::DMA_MAP => Self::dma_map(&mut fields)?,
            command::DMA_UNMAP => Self::dma_unmap(&mut fields)?,
            command::DEVICE_GET_INFO => {
                let [_argsz, _flags, _regions, _irqs]: [u32; 4] = fields.take()?;
                fields.end()?;
                Request::DeviceInfo
            }
            command::DEVICE_GET_REGION_INFO => {
                let [argsz, _flags, index, _cap_offset]: [u32; 4] = fields.take()?;
                let _size_and_offset: [u64; 2] = fields.take()?;
                if argsz < 32 {
                    return Err(Errno::INVAL);
                }
                // What follows is room for capabilities.
                Request::RegionInfo { argsz, index }
            }
            command::DEVICE_GET_IRQ_INFO => {
                let [_argsz, _flags, index, _count]: [u32; 4] = fields.take()?;
                fields.end()?;
                Request::IrqInfo { index }
            }
            command::DEVICE_SET_IRQS => Self::set_irqs(&mut fields, fds)?,
            command::REGION_READ | command::REGION_WRITE => Self::region(command, &mut fields)?,
            command::DEVICE_RESET => {
                fields.end()?;
                Request::Reset
            }
            _ => return Err(Errno::OPNOTSUPP),
        };
        if fds > fds_allowed { Err(Errno::INVAL) } else { Ok(request) }
    }

    fn version(fields: &mut Fields<'a>) -> Result<Self, Errno> {
        let [major, _minor]: [u16; 2] = fields.take()?;
        if fields.0.len() > CAPABILITIES_BYTES_MAX {
            return Err(Errno::TOOBIG);
        }
        let end = fields.0.iter().position(|byte| *byte == 0).unwrap_or(fields.0.len());
        Ok(Request::Version { major, capabilities: &fields.0[..end] })
    }

    fn dma_map(fields: &mut Fields<'a>) -> Result<Self, Errno> {
        let [_argsz, flags]: [u32; 2] = fields.take()?;
        let [offset, address, size_bytes]: [u64; 3] = fields.take()?;
        fields.end()?;
        // VFIO_DMA_MAP_FLAG_READ and _WRITE; what else there is changes the meaning of the rest.
        if flags & !3 != 0 || size_bytes == 0 {
            return Err(Errno::INVAL);
        }
        address.checked_add(size_bytes - 1).ok_or(Errno::OVERFLOW)?;
        offset.checked_add(size_bytes).ok_or(Errno::OVERFLOW)?;
        let access = Access { read: flags & 1 != 0, write: flags & 2 != 0 };
        Ok(Request::DmaMap(DmaMap { access, offset, address, size_bytes }))
    }

    fn dma_unmap(fields: &mut Fields<'a>) -> Result<Self, Errno> {
        let [_argsz, flags]: [u32; 2] = fields.take()?;
        let [first, size_bytes]: [u64; 2] = fields.take()?;
        fields.end()?;
        match flags {
            // VFIO_DMA_UNMAP_FLAG_ALL
            2 if first == 0 && size_bytes == 0 => Ok(Request::DmaUnmap(DmaUnmap::All)),
            0 if size_bytes != 0 => {
                let last = first.checked_add(size_bytes - 1).ok_or(Errno::OVERFLOW)?;
                Ok(Request::DmaUnmap(DmaUnmap::Range { first, last }))
            }
            // A dirty bitmap was asked for, or nonsense.
            _ => Err(Errno::INVAL),
        }
    }

    fn set_irqs(fields: &mut Fields<'a>, fds: usize) -> Result<Self, Errno> {
        const DATA: u32 = 0x7;
        const DATA_NONE: u32 = 1;
        const DATA_BOOL: u32 = 2;
        const DATA_EVENTFD: u32 = 4;
        const ACTION_TRIGGER: u32 = 0x20;
        let [_argsz, flags, index, start, count]: [u32; 5] = fields.take()?;
        start.checked_add(count).ok_or(Errno::OVERFLOW)?;
        // Nothing here can be masked: see the flags in the answer to DEVICE_GET_IRQ_INFO.
        if flags & !DATA != ACTION_TRIGGER {
            return Err(Errno::INVAL);
        }
        let action = match flags & DATA {
            DATA_NONE if fds == 0 => IrqAction::Raise,
            DATA_BOOL if fds == 0 && fields.0.len() == count as usize => {
                IrqAction::RaiseSome(std::mem::take(&mut fields.0))
            }
            DATA_EVENTFD if fds == 0 || fds == count as usize => {
                // The descriptors travel beside the message; a client may repeat their numbers.
                if fields.0.len() == count as usize * size_of::<i32>() {
                    fields.0 = &[];
                }
                IrqAction::Connect
            }
            _ => return Err(Errno::INVAL),
        };
        fields.end()?;
        Ok(Request::SetIrqs(SetIrqs { index, start, count, action }))
    }

    fn region(command: u16, fields: &mut Fields<'a>) -> Result<Self, Errno> {
        let offset: u64 = fields.take()?;
        let [region, count]: [u32; 2] = fields.take()?;
        if count > DATA_BYTES_MAX {
            return Err(Errno::TOOBIG);
        }
        if command == command::REGION_READ {
            fields.end()?;
            return Ok(Request::RegionRead { region, offset, count });
        }
        if fields.0.len() != count as usize {
            return Err(Errno::INVAL);
        }
        Ok(Request::RegionWrite { region, offset, data: fields.0 })
    }
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
