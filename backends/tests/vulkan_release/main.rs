//! Two hundred imports and releases leave nothing: no descriptor, no mapping, no memory.
//!
//! Alone in its program, because it counts what the whole process has.
#![cfg(all(feature = "vulkan", feature = "host"))]

#[path = "../vulkan/machine.rs"]
#[expect(dead_code, reason = "shared with the other tests of Vulkan")]
mod machine;

use std::fs;

use machine::{MIB, device, soon, whole};
use peervram_backends::host::HostMemory;
use peervram_backends::vulkan::{Buffer, Engine};
use peervram_backends::{Exporter, Importer, page_size_bytes};

#[test]
fn imports_and_releases_leave_nothing() {
    let Some(device) = device("imports_and_releases_leave_nothing") else { return };
    let memory = HostMemory::new(MIB).unwrap();
    let mut engine = Engine::new(&device).unwrap();
    let mut cycle = || {
        let mut work_and_release = |buffer: Buffer| {
            engine.checksum(&buffer, 0..MIB, soon()).unwrap();
            device.release(buffer).unwrap();
        };
        if device.imports_dma_bufs() {
            let dma_buf = memory.export(&whole(&memory)).unwrap();
            work_and_release(device.import(&dma_buf).unwrap());
            dma_buf.close();
        }
        if device.host_pointer_alignment_bytes().is_some() {
            let mapping = memory.map(&whole(&memory)).unwrap();
            work_and_release(device.import_host_pointer(mapping).unwrap());
        }
    };
    for _ in 0..20 {
        cycle();
    }
    let (files, mappings, resident_bytes) = held();
    for _ in 0..200 {
        cycle();
    }
    let (files_after, mappings_after, resident_after) = held();
    assert_eq!(files_after, files, "open files");
    // Malloc's arenas come and go by a few; two hundred leaks would not hide among them.
    assert!(mappings_after <= mappings + 8, "{mappings} mappings became {mappings_after}");
    let more = resident_after.saturating_sub(resident_bytes);
    assert!(more < 8 * MIB, "{more} bytes more are resident");
}

/// Open files, mappings, and resident bytes of this process.
fn held() -> (usize, usize, u64) {
    let files = fs::read_dir("/proc/self/fd").unwrap().count();
    let mappings = fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    let resident: u64 = pages.split_whitespace().nth(1).unwrap().parse().unwrap();
    (files, mappings, resident * page_size_bytes())
}
