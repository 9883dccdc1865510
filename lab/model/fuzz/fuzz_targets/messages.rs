//! Sequences of messages to the decoder, the dispatcher and the device behind it.
//!
//! An input is one byte (bit 0: agree on a version first) and then messages, each as: number of file
//! descriptors (modulo 4), command, length of the payload (little-endian, two bytes), payload.
//! There is no socket and no engine's thread; everything else is as it is served.

#![no_main]

use std::os::fd::OwnedFd;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use peervram_model::configuration::Identity;
use peervram_model::device::Device;
use peervram_model::dispatch::{Backend, Dispatcher};
use peervram_model::protocol::{DATA_BYTES_MAX, HEADER_BYTES, Header, command};
use peervram_model::server::Served;
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;

static DEVICE: LazyLock<Device> = LazyLock::new(|| {
    let identity = Identity {
        vendor: 0x10de,
        device: 0x2342,
        bar2_bytes: 16 << 20,
        vram_bytes: 16 << 20,
        bar4_bytes: 1 << 20,
        vendor_word: 1,
    is_coherent: false,
    has_cxl: false,
    };
    Device::without_engines(identity, None).unwrap()
});

static MEMORY: LazyLock<OwnedFd> = LazyLock::new(|| {
    let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 1 << 20).unwrap();
    file
});

static EVENT: LazyLock<OwnedFd> = LazyLock::new(|| rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap());

fn message<'a>(dispatcher: &mut Dispatcher<'a, Device>, number: u8, payload: &[u8], fds: usize, reply: &mut Vec<u8>) {
    let size_bytes = (HEADER_BYTES + payload.len()) as u32;
    let header = Header::command(1, number.into(), size_bytes);
    let file = if header.command == command::DEVICE_SET_IRQS { &EVENT } else { &MEMORY };
    let fds = (0..fds).map(|_| rustix::io::fcntl_dupfd_cloexec(&**file, 0).unwrap()).collect();
    dispatcher.handle(&header, payload, fds, reply);
    DEVICE.after_reply();

    // What always holds of a reply: its size is its own, and an error has an errno and no payload.
    let head = Header::read(reply[..HEADER_BYTES].try_into().unwrap());
    assert_eq!(head.size_bytes as usize, reply.len());
    assert_eq!((head.id, head.command), (1, header.command));
    match head.flags {
        0x01 => assert_eq!(head.error, 0),
        0x21 => assert!(head.error != 0 && reply.len() == HEADER_BYTES),
        other => panic!("flags {other:#x}"),
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, mut rest)) = data.split_first() else { return };
    let mut dispatcher = Dispatcher::new(&*DEVICE);
    let mut reply = Vec::new();
    if first & 1 == 1 {
        message(&mut dispatcher, 1, &[0; 4], 0, &mut reply);
    }
    while let [fds, number, low, high, tail @ ..] = rest {
        let bytes = usize::from(u16::from_le_bytes([*low, *high])).min(tail.len());
        let (payload, tail) = tail.split_at(bytes);
        rest = tail;
        let mut payload = payload.to_vec();
        // Reads of a megabyte are legal and slow; one page will do.
        if u16::from(*number) == command::REGION_READ
            && let Some(count) = payload.get_mut(12..16)
        {
            let asked = u32::from_le_bytes(count.try_into().unwrap());
            if asked <= DATA_BYTES_MAX {
                count.copy_from_slice(&(asked & 0xfff).to_le_bytes());
            }
        }
        message(&mut dispatcher, *number, &payload, usize::from(fds % 4), &mut reply);
    }
    DEVICE.disconnected();
});
