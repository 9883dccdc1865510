//! Every misbehaviour, asked for over the control socket and seen by a driver.

#![cfg(feature = "device")]

mod harness;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::{Driver, Model, PATIENCE, memory_file, pattern, peek, poke};
use peervram_model::control;
use peervram_model::registers::{self as map, Descriptor, ErrorCode, flags};
use serde_json::Value;

const COPY: usize = 0;
const BYTES: usize = 200_000;
const GUEST: u64 = 0x4000_0000;

struct Bench {
    // Before the model: it must let go of the socket first.
    driver: Driver,
    control: BufReader<UnixStream>,
    guest: std::os::fd::OwnedFd,
    data: Vec<u8>,
    model: Model,
    fence: u64,
}

impl Bench {
    fn new() -> Self {
        let model = Model::new();
        let mut driver = model.driver();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let device = Arc::clone(&model.device);
        std::thread::spawn(move || control::serve(&theirs, &device));
        let guest = memory_file(1 << 20);
        driver.client.map(GUEST, 1 << 20, 0, Some(guest.as_fd())).unwrap();
        let data = pattern(BYTES, 7);
        poke(&driver.vram, 0, &data);
        Bench { driver, control: BufReader::new(ours), guest, data, model, fence: 0 }
    }

    fn order(&mut self, line: &str) -> Value {
        writeln!(self.control.get_mut(), "{line}").unwrap();
        let mut answer = String::new();
        self.control.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    fn misbehave(&mut self, what: &str) {
        let answer = self.order(&format!("{{\"do\":\"misbehave\",\"what\":\"{what}\"}}"));
        assert_eq!(answer["ok"], true, "{answer}");
    }

    fn behave(&mut self) {
        assert_eq!(self.order("{\"do\":\"behave\"}")["ok"], true);
    }

    fn next_fence(&mut self) -> u64 {
        self.fence += 1;
        self.fence
    }

    /// Copies within VRAM and tells what arrived.
    fn copy(&mut self) -> Vec<u8> {
        let fence = self.next_fence();
        self.driver.run(COPY, Descriptor::copy(0, 1 << 20, BYTES as u64, fence));
        peek(&self.driver.vram, 1 << 20, BYTES)
    }

    fn copy_out(&mut self) -> Vec<u8> {
        let fence = self.next_fence();
        self.driver
            .run(COPY, Descriptor::copy(0, GUEST, BYTES as u64, fence).with_flags(flags::DESTINATION_DMA));
        peek(&self.guest, 0, BYTES)
    }

    fn copy_in(&mut self) -> Vec<u8> {
        let fence = self.next_fence();
        let copy = Descriptor::copy(GUEST, 2 << 20, BYTES as u64, fence).with_flags(flags::SOURCE_DMA);
        self.driver.run(COPY, copy);
        peek(&self.driver.vram, 2 << 20, BYTES)
    }
}

#[test]
fn all_ones_and_zeros() {
    let mut bench = Bench::new();
    bench.misbehave("all-ones");
    assert_eq!(bench.copy(), vec![0xff; BYTES]);
    bench.misbehave("zeros");
    assert_eq!(bench.copy_out(), vec![0; BYTES]);
    bench.behave();
    assert_eq!(bench.copy(), bench.data);
}

#[test]
fn a_bad_page_is_zeros_and_no_more() {
    let mut bench = Bench::new();
    // Not where a piece of a copy begins.
    let (begin, end) = (8192, 8192 + 4096);
    assert_eq!(
        bench.order(&format!(r#"{{"do":"misbehave","what":"bad-page","offset_bytes":{begin}}}"#))["ok"],
        true
    );
    let mut expected = bench.data.clone();
    assert!(expected[begin..end].iter().any(|&byte| byte != 0));
    expected[begin..end].fill(0);
    assert_eq!(bench.copy(), expected);
    assert_eq!(bench.copy_out(), expected);
    bench.behave();
    assert_eq!(bench.copy(), bench.data);
}

#[test]
fn a_private_mirror() {
    let mut bench = Bench::new();
    assert_eq!(bench.copy(), bench.data);
    bench.misbehave("mirror");
    let fence = bench.next_fence();
    bench.driver.run(COPY, Descriptor::fill(0x5555_5555, 1 << 20, BYTES as u64, fence));
    assert_eq!(
        peek(&bench.driver.vram, 1 << 20, BYTES),
        bench.data,
        "the BAR does not show what the engine wrote"
    );
    let fence = bench.next_fence();
    let out = Descriptor::copy(1 << 20, GUEST, 16, fence).with_flags(flags::DESTINATION_DMA);
    bench.driver.run(COPY, out);
    assert_eq!(peek(&bench.guest, 0, 16), [0x55; 16], "the engine does see it");
    bench.behave();
    assert_eq!(bench.copy_out(), bench.data);
}

#[test]
fn one_direction_dead() {
    let mut bench = Bench::new();
    bench.misbehave("dead-writes");
    assert_eq!(bench.copy_out(), vec![0; BYTES], "writes do not arrive");
    poke(&bench.guest, 0, &bench.data);
    assert_eq!(bench.copy_in(), bench.data, "reads do");
    bench.behave();
    bench.misbehave("dead-reads");
    poke(&bench.guest, 0, &pattern(BYTES, 8));
    assert_eq!(bench.copy_in(), bench.data, "reads bring nothing: what was there stays");
    assert_eq!(bench.copy_out(), bench.data, "writes arrive");
}

#[test]
fn a_stuck_fence() {
    let mut bench = Bench::new();
    bench.misbehave("stuck-fence");
    let fence = bench.next_fence();
    bench.driver.submit(COPY, &Descriptor::copy(0, 1 << 20, BYTES as u64, fence).with_fence_at(0x80_0000));
    let deadline = Instant::now() + PATIENCE;
    while peek(&bench.driver.vram, 1 << 20, BYTES) != bench.data {
        assert!(Instant::now() < deadline, "the work is done");
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.driver.fence(COPY), 0, "and not told");
    assert_eq!(peek(&bench.driver.vram, 0x80_0000, 8), [0; 8]);
    assert_eq!(bench.driver.status(COPY), map::engine::STATUS_BUSY);
    bench.behave();
    bench.driver.wait(COPY, fence);
    assert_eq!(peek(&bench.driver.vram, 0x80_0000, 8), fence.to_le_bytes());
}

#[test]
fn a_reset_gets_an_engine_with_a_stuck_fence_out() {
    let mut bench = Bench::new();
    bench.misbehave("stuck-fence");
    bench.driver.submit(COPY, &Descriptor::nothing(1).with_fence_at(0x80_0000));
    bench.driver.client.reset();
    bench.behave();
    bench.driver.start();
    assert_eq!(bench.copy(), bench.data);
    assert_eq!(peek(&bench.driver.vram, 0x80_0000, 8), [0; 8], "work of before the reset is never told");
}

#[test]
fn a_slow_and_a_stuck_reset() {
    let mut bench = Bench::new();
    assert_eq!(bench.order(r#"{"do":"misbehave","what":"slow-reset","ms":3000}"#)["ok"], true);
    let start = Instant::now();
    bench.driver.client.reset();
    assert_eq!(bench.driver.client.configuration(0), u32::MAX, "the write itself waited");
    assert_eq!(bench.driver.client.register(map::IDENTITY), u32::MAX);
    while bench.driver.client.configuration(0) == u32::MAX {
        assert!(start.elapsed() < PATIENCE);
    }
    assert!(start.elapsed() >= Duration::from_millis(3000));
    assert_eq!(bench.driver.client.register(map::GENERATION), 1);

    bench.misbehave("stuck-reset");
    bench.driver.client.reset();
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(bench.driver.client.configuration(0), u32::MAX);
    bench.behave();
    assert_eq!(bench.driver.client.configuration(0), 0x2342_10de);
    bench.driver.start();
    assert_eq!(bench.copy(), bench.data, "VRAM was kept");
}

#[test]
fn vram_lost_over_reset() {
    let mut bench = Bench::new();
    bench.driver.client.reset();
    assert_eq!(peek(&bench.driver.vram, 0, BYTES), bench.data, "kept");
    bench.misbehave("vram-lost");
    bench.driver.client.reset();
    assert_eq!(peek(&bench.driver.vram, 0, BYTES), vec![0; BYTES], "lost");
}

#[test]
fn surprise_removal() {
    let mut bench = Bench::new();
    assert_eq!(bench.order("{\"do\":\"remove\"}")["status"]["present"], false);
    assert_eq!(bench.driver.client.configuration(0), u32::MAX);
    assert_eq!(bench.driver.client.register(map::STATUS), u32::MAX);
    assert_eq!(bench.driver.client.read(2, 0, 4).unwrap(), [0xff; 4]);
    bench.driver.client.set_register(map::SCRATCH, 1);
    bench.driver.client.reset();
    assert_eq!(bench.driver.client.configuration(0), u32::MAX, "a reset does not bring it back");
    bench.order("{\"do\":\"insert\"}");
    bench.driver.start();
    assert_eq!(bench.copy(), bench.data);
}

#[test]
fn a_raised_error() {
    let mut bench = Bench::new();
    bench.order("{\"do\":\"raise-error\"}");
    assert_eq!(bench.driver.client.register(map::STATUS), map::STATUS_READY | map::STATUS_ERROR);
    assert_eq!(bench.driver.client.register(map::ERROR_CODE), ErrorCode::Injected as u32);
    assert_eq!(bench.driver.client.register(map::ERROR_DETAIL), map::ERROR_DETAIL_NO_ENGINE << 24);
    assert_eq!(bench.driver.client.register(map::INTERRUPT_STATUS), 1 << map::VECTOR_ERROR);
}

#[test]
fn vram_is_looked_at_from_behind() {
    let mut bench = Bench::new();
    let read = r#"{"do":"read","offset_bytes":3,"length_bytes":5}"#;
    let hex: String = bench.data[3..8].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(bench.order(read)["hex"], hex);
    // Whatever the device says of itself.
    bench.order(r#"{"do":"remove"}"#);
    assert_eq!(bench.order(read)["hex"], hex);
    poke(&bench.driver.vram, 0, &[1, 0, 0, 0, 2, 0, 0, 0]);
    let sum = bench.order(r#"{"do":"checksum","offset_bytes":0,"length_bytes":8}"#);
    assert_eq!(sum["checksum"], 7, "{sum}");
    for wrong in [
        r#"{"do":"read","offset_bytes":0,"length_bytes":4097}"#,
        r#"{"do":"read","offset_bytes":18446744073709551615,"length_bytes":2}"#,
        r#"{"do":"checksum","offset_bytes":0,"length_bytes":18446744073709551615}"#,
        r#"{"do":"checksum","offset_bytes":-1,"length_bytes":1}"#,
    ] {
        assert_eq!(bench.order(wrong)["ok"], false, "{wrong}");
    }
}

#[test]
fn nonsense_is_answered_with_what_would_have_been_right() {
    let mut bench = Bench::new();
    let answer = bench.order(r#"{"do":"misbehave","what":"explode"}"#);
    assert_eq!(answer["ok"], false);
    assert!(answer["error"].as_str().unwrap().contains("all-ones"), "{answer}");
    assert_eq!(bench.order("[")["ok"], false);
    let answer = bench.order("{\"do\":\"status\"}");
    assert_eq!(answer["status"]["windows"], 1, "{answer}");
    let long = "x".repeat(5000);
    assert_eq!(bench.order(&long)["ok"], false);
    assert_eq!(bench.model.device.status().generation, 0);
}
