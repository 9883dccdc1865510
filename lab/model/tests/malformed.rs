//! What a client must not say. Nothing of it crashes or stalls the model, and after all of it the
//! next message is understood.

#![cfg(feature = "device")]

mod harness;

use std::io::{Read, Write};
use std::os::fd::AsFd;

use harness::{Client, Model, memory_file, words};
use peervram_model::protocol::{Header, command};
use peervram_model::registers as map;

const EINVAL: u32 = 22;
const E2BIG: u32 = 7;
const EEXIST: u32 = 17;
const EOPNOTSUPP: u32 = 95;
const EOVERFLOW: u32 = 75;

fn is_alive(client: &mut Client) {
    assert_eq!(client.register(map::IDENTITY), map::IDENTITY_VALUE);
}

#[test]
fn nothing_goes_before_a_version_and_no_version_after_that() {
    let model = Model::new();
    let mut client = Client::new(model.raw());
    assert_eq!(client.read(0, 0, 4), Err(EINVAL));
    let major_1 = [1u16, 0].map(u16::to_ne_bytes).concat();
    assert_eq!(client.command(command::VERSION, &major_1, &[]).unwrap_err(), EOPNOTSUPP);
    assert_eq!(client.command(command::VERSION, b"\0\0\0\0{nonsense\0", &[]).unwrap_err(), EINVAL);
    assert_eq!(client.command(command::VERSION, &[b'['; 60_000], &[]).unwrap_err(), E2BIG);
    let (reply, _) = client.version().unwrap();
    assert_eq!(reply[..4], [0; 4], "QEMU 11.1 takes 0.0 only");
    assert_eq!(reply.last(), Some(&0));
    assert_eq!(client.version().unwrap_err(), EINVAL);
    is_alive(&mut client);
}

#[test]
fn every_command_with_every_short_payload_is_answered_once() {
    let model = Model::new();
    let mut client = model.client();
    for number in (0..40).chain([u16::MAX]) {
        for bytes in 0..64 {
            let _ = client.command(number, &vec![0xff; bytes], &[]);
        }
        is_alive(&mut client);
    }
}

#[test]
fn unknown_commands_are_drained_with_their_payload() {
    let model = Model::new();
    let mut client = model.client();
    for number in [0, 6, 11, 12, 14, 15, 16, 19, 999] {
        assert_eq!(client.command(number, &[0xaa; 5000], &[]).unwrap_err(), EOPNOTSUPP);
        is_alive(&mut client);
    }
}

#[test]
fn huge_counts_and_messages_are_refused() {
    let model = Model::new();
    let mut client = model.client();
    for count in [(1 << 20) + 1, u32::MAX] {
        assert_eq!(client.read(0, 0, count).unwrap_err(), E2BIG);
    }
    assert_eq!(client.read(7, 0, 1 << 20).unwrap_err(), EINVAL, "beyond the end of the region");
    assert_eq!(client.read(0, u64::MAX, 4).unwrap_err(), EINVAL);
    assert_eq!(client.read(99, 0, 4).unwrap_err(), EINVAL);
    assert_eq!(client.read(0, 0, 1 << 20).unwrap().len(), 1 << 20);
    // A message of 8 MiB is taken off the stream, and only then refused.
    assert_eq!(client.command(command::REGION_WRITE, &vec![0; 8 << 20], &[]).unwrap_err(), E2BIG);
    is_alive(&mut client);
}

#[test]
fn a_size_smaller_than_a_header_ends_the_connection_and_no_more() {
    let model = Model::new();
    for size in [0, 1, 15] {
        let mut client = model.client();
        let header = Header::command(1, command::DEVICE_RESET, size);
        client.stream.write_all(bytemuck::bytes_of(&header)).unwrap();
        let (reply, _, _) = client.receive();
        assert_eq!(reply.error, EINVAL);
        assert_eq!(client.stream.read(&mut [0; 1]).unwrap(), 0, "hung up");
    }
    is_alive(&mut model.client());
}

#[test]
fn a_client_that_vanishes_anywhere_leaves_the_model_ready() {
    let model = Model::new();
    let whole = [bytemuck::bytes_of(&Header::command(1, command::DMA_MAP, 48)), &[0; 32]].concat();
    for bytes in 0..whole.len() {
        let mut client = model.client();
        client.stream.write_all(&whole[..bytes]).unwrap();
    }
    let mut client = model.client();
    client.stream.write_all(bytemuck::bytes_of(&Header::command(1, 9, u32::MAX))).unwrap();
    drop(client);
    is_alive(&mut model.client());
}

#[test]
fn messages_in_many_pieces_are_whole_messages() {
    let model = Model::new();
    let mut client = model.client();
    let payload = [&u64::from(map::IDENTITY).to_ne_bytes()[..], &words(&[0, 4])].concat();
    let message = [bytemuck::bytes_of(&Header::command(77, command::REGION_READ, 32)), &payload].concat();
    for byte in &message {
        client.stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(client.wait_for(77).unwrap().0[16..], map::IDENTITY_VALUE.to_le_bytes());
    // And many messages in one piece.
    client.stream.write_all(&message.repeat(50)).unwrap();
    for _ in 0..50 {
        client.wait_for(77).unwrap();
    }
}

#[test]
fn short_and_long_messages_in_one_piece_keep_their_descriptors() {
    let model = Model::new();
    let mut client = model.client();
    let files: Vec<_> = (0..8).map(|_| memory_file(4096)).collect();
    let mut ids = Vec::new();
    for (number, file) in (0u64..).zip(&files) {
        // A reset is a header and nothing else: what the model reads for it reaches into the next.
        ids.push(client.send(command::DEVICE_RESET, 0, &[], &[]));
        let map = [words(&[32, 3]), [0, number << 20, 4096].map(u64::to_ne_bytes).concat()].concat();
        ids.push(client.send(command::DMA_MAP, 0, &map, &[file.as_fd()]));
        ids.push(client.send(command::DEVICE_RESET, 0, &[], &[]));
        ids.push(client.send(
            command::DMA_MAP,
            0,
            &[words(&[32, 3]), [0, number << 20 | 1 << 40, 4096].map(u64::to_ne_bytes).concat()].concat(),
            &[],
        ));
    }
    for id in ids {
        client.wait_for(id).unwrap();
    }
    let status = model.device.status();
    assert_eq!((status.windows, status.files), (16, 8), "every second window has a file of its own");
}

#[test]
fn no_reply_means_none_even_for_an_error() {
    let model = Model::new();
    let mut client = model.client();
    client.send(command::DMA_MAP, 0x10, &[1; 3], &[]);
    client.send(999, 0x10, &[1; 3000], &[]);
    let write = [&u64::from(map::SCRATCH).to_ne_bytes()[..], &words(&[0, 4, 42])].concat();
    client.send(command::REGION_WRITE, 0x10, &write, &[]);
    assert_eq!(client.register(map::SCRATCH), 42);
}

#[test]
fn replies_nobody_asked_for_and_unknown_types_do_no_harm() {
    let model = Model::new();
    let mut client = model.client();
    client.send(command::DMA_READ, 1, &[0; 100], &[]);
    client.send(command::DMA_READ, 0x21, &[], &[]);
    let id = client.send(command::REGION_READ, 7, &[0; 100], &[]);
    assert_eq!(client.wait_for(id).unwrap_err(), EINVAL);
    is_alive(&mut client);
}

#[test]
fn descriptors_in_the_wrong_number_are_refused_and_closed() {
    let model = Model::new();
    let mut client = model.client();
    let file = memory_file(4096);
    let two = [file.as_fd(), file.as_fd()];
    let map = [words(&[32, 3]), [0u64, 0x1000, 4096].map(u64::to_ne_bytes).concat()].concat();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    assert_eq!(client.command(command::DMA_MAP, &map, &two).unwrap_err(), EINVAL);
    assert_eq!(client.command(command::DEVICE_RESET, &[], &two).unwrap_err(), EINVAL);
    let read = [&0u64.to_ne_bytes()[..], &words(&[0, 4])].concat();
    assert_eq!(client.command(command::REGION_READ, &read, &two[..1]).unwrap_err(), EINVAL);
    for (count, fds) in [(3, 2), (1, 2), (4, 5)] {
        let fds = vec![file.as_fd(); fds];
        assert_eq!(client.set_irqs(0x24, 0, count, &fds).unwrap_err(), EINVAL);
    }
    let many = vec![file.as_fd(); 20];
    assert!(client.command(command::DEVICE_SET_IRQS, &words(&[20, 0x24, 2, 0, 20]), &many).is_err());
    // Other tests of this process open descriptors of their own: allow for those, not for a leak.
    for _ in 0..200 {
        let _ = client.command(command::DEVICE_RESET, &[], &two);
    }
    assert!(open() < before + 200, "descriptors of refused messages are closed");
    is_alive(&mut client);
}

#[test]
fn windows_that_overlap_overflow_or_lead_nowhere_are_refused() {
    let model = Model::new();
    let mut client = model.client();
    let file = memory_file(8192);
    client.map(0x1000, 0x1000, 0, Some(file.as_fd())).unwrap();
    assert_eq!(client.map(0x1fff, 0x1000, 0, None).unwrap_err(), EEXIST);
    assert_eq!(client.map(u64::MAX, 2, 0, None).unwrap_err(), EOVERFLOW);
    assert_eq!(client.map(0x8000, 0x1000, u64::MAX, None).unwrap_err(), EOVERFLOW);
    assert_eq!(client.map(0x8000, 0, 0, None).unwrap_err(), EINVAL);
    assert_eq!(client.map(0x8000, 0x1000, 0x1001, Some(file.as_fd())).unwrap_err(), EINVAL, "past the file");
    assert_eq!(client.map_as(7, 0x8000, 0x1000, 0, None).unwrap_err(), EINVAL, "unknown flag");
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert_eq!(client.map(0x8000, 0x1000, 0, Some(pipe.as_fd())).unwrap_err(), EINVAL, "not a file");
    assert_eq!(client.unmap(0x1800, 0x100).unwrap_err(), EINVAL, "cuts through a window");
    client.unmap(0x4_0000_0000, 0x4_0000_0000).unwrap();
    client.unmap(0, 0x10_0000).unwrap();
    client.map(u64::MAX - 0xfff, 0x1000, 0, None).unwrap();
    let all = [words(&[24, 2]), vec![0; 16]].concat();
    client.command(command::DMA_UNMAP, &all, &[]).unwrap();
    assert_eq!(model.device.status().windows, 0);
}

#[test]
fn interrupts_outside_their_range_are_refused_and_odd_ones_are_not() {
    let model = Model::new();
    let mut client = model.client();
    for (flags, start, count) in [(0x24, 4, 1), (0x24, u32::MAX, 1), (0x24, 0, 5), (0x24, 0, 0), (0x21, 3, 2)]
    {
        assert!(client.set_irqs(flags, start, count, &[]).is_err(), "{flags:#x} {start}+{count}");
    }
    for flags in [0, 0x20, 0x27, 0x0c, 0x14, 0x3f] {
        assert!(client.set_irqs(flags, 0, 1, &[]).is_err(), "{flags:#x}");
    }
    let raise_some = [words(&[24, 0x22, 2, 0, 4]), vec![1, 0, 1, 0]].concat();
    client.command(command::DEVICE_SET_IRQS, &raise_some, &[]).unwrap();
    // QEMU tears down interrupts that were never there.
    client.command(command::DEVICE_SET_IRQS, &words(&[20, 0x21, 0, 0, 0]), &[]).unwrap();
    // A descriptor that cannot be written is no reason to stall.
    let file = std::fs::File::open("/dev/null").unwrap();
    client.set_irqs(0x24, 0, 1, &[file.as_fd()]).unwrap();
    client.set_irqs(0x21, 0, 1, &[]).unwrap();
    is_alive(&mut client);
}

#[test]
fn a_file_cut_short_under_its_window_is_a_fault_of_the_engine_only() {
    use harness::Driver;
    use peervram_model::registers::{Descriptor, ErrorCode, flags};
    let model = Model::new();
    let mut driver = Driver::new(model.client());
    let file = memory_file(1 << 20);
    driver.client.map(0, 1 << 20, 0, Some(file.as_fd())).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    let copy = Descriptor::copy(0x8000, 0, 4096, 1).with_flags(flags::SOURCE_DMA);
    assert_eq!(driver.fail(0, copy), ErrorCode::DmaFault as u32);
    let vram = &driver.vram;
    assert!(rustix::fs::ftruncate(vram, 0).is_err(), "VRAM itself is sealed");
}
