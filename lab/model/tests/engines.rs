//! The engines, driven as a guest's driver would drive them.

#![cfg(feature = "device")]

mod harness;

use std::os::fd::AsFd;
use std::time::Instant;

use harness::{Driver, MESSAGE_BASE, Model, VRAM_BYTES, memory_file, pattern, peek, poke};
use peervram_model::registers::{self as map, Descriptor, ErrorCode, flags, operation};
use rustix::event::EventfdFlags;

const COPY: usize = 0;
const DRAW: usize = 1;

#[test]
fn bytes_move_within_vram_and_overlaps_are_kept_whole() {
    let model = Model::new();
    let mut driver = model.driver();
    let data = pattern(300_000, 1);
    poke(&driver.vram, 0, &data);
    driver.run(COPY, Descriptor::copy(0, 1_000_001, 300_000, 1));
    assert_eq!(peek(&driver.vram, 1_000_001, 300_000), data);
    driver.run(COPY, Descriptor::copy(0, 100_000, 300_000, 2));
    assert_eq!(peek(&driver.vram, 100_000, 300_000), data, "up");
    driver.run(COPY, Descriptor::copy(100_000, 0, 300_000, 3));
    assert_eq!(peek(&driver.vram, 0, 300_000), data, "down");
    driver.run(COPY, Descriptor::fill(0x4433_2211, 5, 7, 4));
    assert_eq!(peek(&driver.vram, 5, 8)[..7], [0x11, 0x22, 0x33, 0x44, 0x11, 0x22, 0x33]);
    driver.run(COPY, Descriptor::copy(0, 0, 0, u64::MAX));
}

#[test]
fn bytes_move_both_ways_through_a_file_across_many_windows() {
    let model = Model::new();
    let mut driver = model.driver();
    let guest = memory_file(4 << 20);
    // Pages backwards: neighbours in DMA space are not neighbours in the file.
    let pages = 256u64;
    for page in 0..pages {
        let offset = (pages - 1 - page) * 4096;
        driver.client.map(0x8000_0000 + page * 4096, 4096, offset, Some(guest.as_fd())).unwrap();
    }
    let status = model.device.status();
    assert_eq!((status.windows, status.files), (256, 1), "one file, however many windows");
    let data = pattern(1 << 20, 2);
    poke(&driver.vram, 0, &data);
    driver.run(COPY, Descriptor::copy(0, 0x8000_0000, 1 << 20, 1).with_flags(flags::DESTINATION_DMA));
    assert_eq!(peek(&guest, 255 * 4096, 4096), data[..4096]);
    assert_eq!(peek(&guest, 0, 4096), data[255 * 4096..]);
    driver.run(COPY, Descriptor::copy(0x8000_0000, 2 << 20, 1 << 20, 2).with_flags(flags::SOURCE_DMA));
    assert_eq!(peek(&driver.vram, 2 << 20, 1 << 20), data);
    driver.client.unmap(0x8000_0000, 1 << 20).unwrap();
    let again = Descriptor::copy(0x8000_0000, 0, 4, 3).with_flags(flags::SOURCE_DMA);
    assert_eq!(driver.fail(COPY, again), ErrorCode::DmaFault as u32, "unmapped is unmapped");
}

#[test]
fn bytes_move_both_ways_by_messages() {
    let model = Model::new();
    let mut driver = model.driver();
    driver.client.map_messages(1 << 20);
    let data = pattern(500_001, 3);
    poke(&driver.vram, 0, &data);
    driver.run(COPY, Descriptor::copy(0, MESSAGE_BASE + 3, 500_001, 1).with_flags(flags::DESTINATION_DMA));
    assert_eq!(driver.client.memory[3..500_004], data);
    driver.run(COPY, Descriptor::copy(MESSAGE_BASE + 3, 1 << 20, 500_001, 2).with_flags(flags::SOURCE_DMA));
    assert_eq!(peek(&driver.vram, 1 << 20, 500_001), data);
    assert_eq!(driver.client.messages, 16);
    for fence in 3..203 {
        // The assertion is in `submit`: never a message before the reply to the doorbell.
        driver.run(COPY, Descriptor::copy(MESSAGE_BASE, 0, 64, fence).with_flags(flags::SOURCE_DMA));
    }
}

#[test]
fn a_client_that_refuses_a_message_is_a_fault_and_the_engine_recovers() {
    let model = Model::new();
    let mut driver = model.driver();
    driver.client.map_messages(4096);
    driver.client.refuse = Some(19);
    let read = Descriptor::copy(MESSAGE_BASE, 0, 64, 1).with_flags(flags::SOURCE_DMA);
    assert_eq!(driver.fail(COPY, read), ErrorCode::DmaFault as u32);
    driver.client.refuse = None;
    driver.start();
    driver.run(COPY, read);
}

#[test]
fn fences_go_to_memory_and_interrupts_to_event_descriptors() {
    let model = Model::new();
    let mut driver = model.driver();
    let guest = memory_file(4096);
    driver.client.map(0x1000, 4096, 0, Some(guest.as_fd())).unwrap();
    let events: Vec<_> = (0..4).map(|_| rustix::event::eventfd(0, EventfdFlags::empty()).unwrap()).collect();
    let borrowed: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    driver.client.set_irqs(0x24, 0, 4, &borrowed).unwrap();
    let mut count = [0; 8];

    driver
        .submit(COPY, &Descriptor::nothing(0x1_2345_6789).with_fence_at(0x800).with_flags(flags::INTERRUPT));
    rustix::io::read(&events[usize::from(map::VECTOR_COPY)], &mut count).unwrap();
    assert_eq!(peek(&driver.vram, 0x800, 8), 0x1_2345_6789u64.to_le_bytes());
    assert_eq!(driver.fence(COPY), 0x1_2345_6789);
    let fence_by_dma =
        Descriptor::nothing(9).with_fence_at(0x1ff8).with_flags(flags::FENCE_DMA | flags::INTERRUPT);
    driver.submit(DRAW, &fence_by_dma);
    rustix::io::read(&events[usize::from(map::VECTOR_DRAW)], &mut count).unwrap();
    assert_eq!(peek(&guest, 0xff8, 8), 9u64.to_le_bytes());
    assert_eq!(driver.client.register(map::INTERRUPT_STATUS), 3);

    driver.fail(COPY, Descriptor { operation: 77, ..Descriptor::default() });
    rustix::io::read(&events[usize::from(map::VECTOR_ERROR)], &mut count).unwrap();
    // Raised by the client itself, then disconnected as QEMU does it.
    driver.client.set_irqs(0x21, 3, 1, &[]).unwrap();
    rustix::io::read(&events[3], &mut count).unwrap();
    driver.client.set_irqs(0x24, 3, 1, &[]).unwrap();
    driver.client.set_irqs(0x21, 0, 0, &[]).unwrap();
}

#[test]
fn frames_are_drawn_with_their_stride_and_nothing_beside() {
    let model = Model::new();
    let mut driver = model.driver();
    let (width, height) = (64u32, 48u32);
    let mut frame = Descriptor::draw(operation::DRAW_GRADIENT, 4096, width, height, 1, 1);
    frame.parameters[2] = 512;
    driver.run(DRAW, frame);
    let first = peek(&driver.vram, 4096, 512 * 48);
    assert!(first[256..512].iter().all(|byte| *byte == 0), "beside the picture nothing is drawn");
    frame.parameters[3] = 2;
    frame.fence_value = 2;
    driver.run(DRAW, frame);
    assert_ne!(first, peek(&driver.vram, 4096, 512 * 48), "the picture moves");
    driver.run(DRAW, Descriptor::draw(operation::DRAW_TRIANGLE, 4096, width, height, 3, 3));
    let too_large = Descriptor::draw(operation::DRAW_TRIANGLE, VRAM_BYTES - 4096, width, height, 3, 4);
    assert_eq!(driver.fail(DRAW, too_large), ErrorCode::VramRange as u32);
}

#[test]
fn without_bus_mastering_there_is_no_dma() {
    let model = Model::new();
    let mut driver = model.driver();
    driver.client.map_messages(4096);
    driver.client.write(7, 4, &2u16.to_le_bytes()).unwrap();
    let read = Descriptor::copy(MESSAGE_BASE, 0, 64, 1).with_flags(flags::SOURCE_DMA);
    assert_eq!(driver.fail(COPY, read), ErrorCode::BusMasterOff as u32);
    assert_eq!(driver.client.messages, 0);
}

#[test]
fn a_sleeping_device_works_on_when_it_wakes() {
    let model = Model::new();
    let mut driver = model.driver();
    driver.client.write(7, 0x44, &[3]).unwrap();
    assert_eq!(driver.client.register(map::IDENTITY), u32::MAX);
    driver.client.write(7, 0x44, &[0]).unwrap();
    driver.run(COPY, Descriptor::nothing(5));
}

#[test]
fn a_client_that_dies_under_a_running_engine_leaves_the_model_ready() {
    let model = Model::new();
    let mut driver = model.driver();
    driver.client.map_messages(1 << 20);
    driver.submit(COPY, &Descriptor::copy(MESSAGE_BASE, 0, 1 << 20, 1).with_flags(flags::SOURCE_DMA));
    // The engine waits for an answer that will not come.
    drop(driver);
    let mut driver = model.driver();
    let start = Instant::now();
    driver.run(COPY, Descriptor::nothing(1));
    assert!(start.elapsed().as_secs() < 3, "the engine did not wait for the dead");
}

#[test]
fn two_rings_full_of_work_come_out_in_order() {
    let model = Model::new();
    let mut driver: Driver = model.driver();
    for round in 0..20u64 {
        for step in 1..=8u64 {
            let fence = round * 8 + step;
            driver.submit(COPY, &Descriptor::fill(fence as u32, 0x1000 + step * 4, 4, fence));
            driver.submit(DRAW, &Descriptor::nothing(fence));
        }
        driver.wait(COPY, round * 8 + 8);
        driver.wait(DRAW, round * 8 + 8);
    }
    assert_eq!(peek(&driver.vram, 0x1004, 4), 153u32.to_le_bytes());
}
