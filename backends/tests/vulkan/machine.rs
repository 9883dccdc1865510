//! What this machine has: a Vulkan device for a test, or the reason why there is none, said aloud.

use std::io::Write;
use std::time::{Duration, Instant};

use peervram_backends::vulkan::{Device, Instance, Selector};
use peervram_backends::{DmaRanges, Importer, host::HostMemory};

pub const MIB: u64 = 1 << 20;

/// A device that imports.
pub fn device(test: &str) -> Option<Device> {
    let opened = Instance::open().and_then(|instance| instance.open_device(&Selector::Any));
    match opened {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("PEERVRAM_REQUIRE_VULKAN").is_some_and(|value| value == "1") => {
            panic!("PEERVRAM_REQUIRE_VULKAN is set: {error}")
        }
        Err(error) => skip(test, &error.to_string()),
    }
}

/// A device that imports dma-bufs.
pub fn dma_buf_device(test: &str) -> Option<Device> {
    let device = device(test)?;
    match device.imports_dma_bufs() {
        true => Some(device),
        false => skip(test, &format!("{} imports no dma-bufs", device.name())),
    }
}

/// A device that imports host pointers.
pub fn host_pointer_device(test: &str) -> Option<Device> {
    let device = device(test)?;
    match device.host_pointer_alignment_bytes() {
        Some(_) => Some(device),
        None => skip(test, &format!("{} imports no host pointers", device.name())),
    }
}

/// Says why `test` is skipped. Not by `eprintln`, which the test harness swallows.
pub fn skip<T>(test: &str, reason: &str) -> Option<T> {
    // In one write, so that lines of tests that run side by side stay whole.
    let _ = std::io::stderr().write_all(format!("skipped: {test}: {reason}\n").as_bytes());
    None
}

pub fn whole(memory: &HostMemory) -> DmaRanges {
    DmaRanges::whole(memory.region()).unwrap()
}

/// A deadline that only a hang misses.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Bytes that repeat at no useful distance.
pub fn noise(length_bytes: usize, mut seed: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length_bytes + 3);
    while bytes.len() < length_bytes {
        // Xorshift, Marsaglia 2003.
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        bytes.extend(seed.to_le_bytes());
    }
    bytes.truncate(length_bytes);
    bytes
}
