//! The model as seen by the `vfio_user` crate's client: a second reading of the protocol, by others.

#![cfg(feature = "device")]

mod harness;

use std::os::fd::AsRawFd;

use harness::{Model, VRAM_BYTES, memory_file};
use peervram_model::registers as map;
use rustix::event::EventfdFlags;
use vfio_user::Client;

#[test]
fn the_device_is_what_it_was_asked_to_be() {
    let model = Model::new();
    let mut client = Client::new(&model.path).unwrap();
    let sizes: Vec<u64> = (0..9).map(|index| client.region(index).unwrap().size).collect();
    assert_eq!(sizes, [map::BAR0_BYTES, 0, VRAM_BYTES, 0, 0, 0, 0, 4096, 0]);
    let bar2 = client.region(2).unwrap();
    assert_eq!(bar2.sparse_areas.len(), 1);
    assert_eq!(bar2.sparse_areas[0].size, VRAM_BYTES);
    let mut ids = [0; 4];
    client.region_read(7, 0, &mut ids).unwrap();
    assert_eq!(ids, [0xde, 0x10, 0x42, 0x23]);
    let counts = [0, 1, 2, 4].map(|index| client.get_irq_info(index).unwrap().count);
    assert_eq!(counts, [0, 0, 4, 0]);
}

#[test]
fn memory_behind_the_bar_is_shared_with_the_client() {
    let model = Model::new();
    let mut client = Client::new(&model.path).unwrap();
    let file = client.region(2).unwrap().file_offset.as_ref().unwrap().file().try_clone().unwrap();
    harness::poke(&file.into(), 0x1234, b"by file");
    let mut seen = [0; 7];
    client.region_read(2, 0x1234, &mut seen).unwrap();
    assert_eq!(&seen, b"by file");
    client.region_write(2, 0x1234, b"by bar!").unwrap();
    model.device.vram().read(0x1234, &mut seen).unwrap();
    assert_eq!(&seen, b"by bar!");
}

#[test]
fn registers_windows_interrupts_and_both_resets() {
    let model = Model::new();
    let mut client = Client::new(&model.path).unwrap();
    client.region_write(0, map::SCRATCH.into(), &7u32.to_le_bytes()).unwrap();
    let guest = memory_file(1 << 20);
    client.dma_map(0, 0x1000, 1 << 20, guest.as_raw_fd()).unwrap();
    assert_eq!((model.device.status().windows, model.device.status().files), (1, 1));
    client.dma_unmap(0x1000, 1 << 20).unwrap();
    assert_eq!((model.device.status().windows, model.device.status().files), (0, 0));

    let event = rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    client.set_irqs(2, 0x24, u32::from(map::VECTOR_ERROR), 1, &[event.as_raw_fd()]).unwrap();
    client.region_write(0, map::INTERRUPT_ENABLE.into(), &7u32.to_le_bytes()).unwrap();
    model.device.raise_error();
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);

    client.region_write(7, 0x59, &[0x80]).unwrap();
    let mut scratch = [1; 4];
    client.region_read(0, map::SCRATCH.into(), &mut scratch).unwrap();
    assert_eq!(scratch, [0; 4], "a function-level reset clears registers");
    client.reset().unwrap();
    assert_eq!(model.device.status().generation, 2);
}
