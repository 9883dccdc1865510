//! Host memory imported into a real Vulkan driver, by both paths.
//!
//! Runs on whatever `libvulkan.so.1` finds; Mesa's lavapipe is enough (from version 25 on it takes
//! a memfd for a dma-buf, before that host pointers only). Without a loader, a device, or the
//! extension that a test is about, the test skips aloud; `PEERVRAM_REQUIRE_VULKAN=1` makes a
//! missing device a failure.
#![cfg(all(feature = "vulkan", feature = "host"))]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::host::HostMemory;
use peervram_backends::vulkan::{self, BufferUsage, Device, Engine, ImportOptions, Selector};
use peervram_backends::{
    DmaBuf, DmaRange, DmaRanges, Exporter, ImageLayout, Importer, Kind, Mapping, OnRevoke, page_size_bytes,
};

const MIB: u64 = 1 << 20;

/// A device that imports, or the reason why the test `name` is skipped, said aloud.
fn device(name: &str) -> Option<Device> {
    let opened = vulkan::Instance::open().and_then(|instance| instance.open_device(&Selector::Any));
    match opened {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("PEERVRAM_REQUIRE_VULKAN").is_some_and(|value| value == "1") => {
            panic!("PEERVRAM_REQUIRE_VULKAN is set: {error}")
        }
        Err(error) => skip(name, &error.to_string()),
    }
}

fn skip<T>(name: &str, reason: &str) -> Option<T> {
    eprintln!("skipped: {name}: {reason}");
    None
}

/// A device that imports dma-bufs.
fn dma_buf_device(name: &str) -> Option<Device> {
    let device = device(name)?;
    match device.description().can_import_dma_buf {
        true => Some(device),
        false => skip(name, &format!("{} imports no dma-bufs", device.name())),
    }
}

/// A device that imports host pointers.
fn host_pointer_device(name: &str) -> Option<Device> {
    let device = device(name)?;
    match device.description().host_pointer_alignment_bytes {
        Some(_) => Some(device),
        None => skip(name, &format!("{} imports no host pointers", device.name())),
    }
}

fn whole(memory: &HostMemory) -> DmaRanges {
    DmaRanges::whole(memory.region()).unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Bytes that repeat at no useful distance.
fn noise(length_bytes: usize, mut seed: u32) -> Vec<u8> {
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

fn contents(mapping: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; mapping.len()];
    mapping.read(0, &mut bytes).unwrap();
    bytes
}

/// What every import must do, whichever way the memory came: the device sees the exporter's bytes,
/// and the exporter sees the device's.
fn crosses(device: &Device, buffer: vulkan::Buffer, exporter_view: &Mapping) {
    let mut engine = Engine::new(device).unwrap();
    let bytes = noise(exporter_view.len(), 1);
    exporter_view.write(0, &bytes).unwrap();
    let all = 0..buffer.size_bytes();
    assert_eq!(engine.checksum(&buffer, all.clone(), soon()).unwrap(), vulkan::checksum(&bytes));
    let odd = 4092..buffer.size_bytes() - 8;
    let expected = vulkan::checksum(&bytes[odd.start as usize..odd.end as usize]);
    assert_eq!(engine.checksum(&buffer, odd, soon()).unwrap(), expected, "a part, off every alignment");
    assert_eq!(engine.checksum(&buffer, 8..8, soon()).unwrap(), 0);

    let mut back = vec![0; bytes.len() - 1];
    engine.read_back(&buffer, 1, &mut back, soon()).unwrap();
    assert!(back == bytes[1..], "the device reads what the exporter wrote");

    let mut expected = bytes;
    let patch = noise(5 * MIB as usize + 3, 2);
    expected[7..7 + patch.len()].copy_from_slice(&patch);
    engine.upload(&buffer, 7, &patch, soon()).unwrap();
    assert!(contents(exporter_view) == expected, "the exporter reads what the device copied");

    let picture = ImageLayout { offset_bytes: 4100, width: 641, height: 359, stride_bytes: 641 * 4 + 12 };
    vulkan::paint(&mut expected, &picture, 0x1_2F).unwrap();
    engine.paint(&buffer, &picture, 0x1_2F, soon()).unwrap();
    assert!(contents(exporter_view) == expected, "the exporter reads what the device painted");

    let beyond = engine.checksum(&buffer, 0..buffer.size_bytes() + 4, soon()).unwrap_err();
    assert_eq!(beyond.kind(), Kind::InvalidInput);
    let beyond = engine.read_back(&buffer, u64::MAX, &mut [0; 2], soon()).unwrap_err();
    assert_eq!(beyond.kind(), Kind::InvalidInput);
    device.release(buffer).unwrap();
}

#[test]
fn a_dma_buf_crosses_to_the_device_and_back() {
    let Some(device) = dma_buf_device("a_dma_buf_crosses_to_the_device_and_back") else { return };
    let memory = HostMemory::new(16 * MIB).unwrap();
    let dma_buf = memory.export(&whole(&memory)).unwrap();
    let buffer = device.import(&dma_buf).unwrap();
    assert_eq!(buffer.size_bytes(), 16 * MIB);
    assert!(!buffer.is_host_pointer());
    dma_buf.close();
    crosses(&device, buffer, &memory.map(&whole(&memory)).unwrap());
}

#[test]
fn a_host_pointer_crosses_to_the_device_and_back() {
    let Some(device) = host_pointer_device("a_host_pointer_crosses_to_the_device_and_back") else { return };
    let memory = HostMemory::new(16 * MIB).unwrap();
    let buffer = device.import_host_pointer(memory.map(&whole(&memory)).unwrap()).unwrap();
    assert!(buffer.is_host_pointer());
    crosses(&device, buffer, &memory.map(&whole(&memory)).unwrap());
}

#[test]
fn several_ranges_are_one_buffer_by_host_pointer() {
    let Some(device) = host_pointer_device("several_ranges_are_one_buffer_by_host_pointer") else { return };
    let memory = HostMemory::new(8 * MIB).unwrap();
    let parts = [DmaRange::new(5 * MIB, 3 * MIB), DmaRange::new(MIB, 3 * MIB)];
    let parts = DmaRanges::new(memory.region(), &parts).unwrap();
    let view = memory.map(&parts).unwrap();
    crosses(&device, device.import_host_pointer(view.clone()).unwrap(), &view);
}

#[test]
fn a_dedicated_import_of_a_part_is_as_good() {
    let Some(device) = dma_buf_device("a_dedicated_import_of_a_part_is_as_good") else { return };
    let memory = HostMemory::new(16 * MIB).unwrap();
    let dma_buf = memory.export(&whole(&memory)).unwrap();
    let options = ImportOptions { dedicated: true, size_bytes: Some(8 * MIB), ..Default::default() };
    let buffer = device.import_dma_buf(&dma_buf, &options).unwrap();
    let half = DmaRanges::new(memory.region(), &[DmaRange::new(0, 8 * MIB)]).unwrap();
    crosses(&device, buffer, &memory.map(&half).unwrap());
}

/// A buffer larger than one part of a checksum or copy, so that parts are put together.
#[test]
fn large_buffers_are_worked_through_in_parts() {
    const NAME: &str = "large_buffers_are_worked_through_in_parts";
    let Some(device) = host_pointer_device(NAME) else { return };
    let memory = HostMemory::new(192 * MIB).unwrap();
    let view = memory.map(&whole(&memory)).unwrap();
    let bytes = noise(view.len(), 3);
    view.write(0, &bytes).unwrap();
    let buffer = device.import_host_pointer(view).unwrap();
    let mut engine = Engine::new(&device).unwrap();
    let sum = engine.checksum(&buffer, 0..buffer.size_bytes(), soon()).unwrap();
    assert_eq!(sum, vulkan::checksum(&bytes));
}

#[test]
fn releasing_frees_everything() {
    let Some(device) = device("releasing_frees_everything") else { return };
    let memory = HostMemory::new(MIB).unwrap();
    let dma_buf = memory.export(&whole(&memory)).unwrap();
    let cycle = |count: u32| {
        for _ in 0..count {
            if device.description().can_import_dma_buf {
                device.release(device.import(&dma_buf).unwrap()).unwrap();
            }
            if device.description().host_pointer_alignment_bytes.is_some() {
                let mapping = memory.map(&whole(&memory)).unwrap();
                drop(device.import_host_pointer(mapping).unwrap());
            }
        }
    };
    cycle(20);
    let (maps_before, resident_before) = (mappings(), resident_bytes());
    cycle(200);
    // Other tests of this program run beside this one, so files are counted by what they are.
    assert!(fds_of(&dma_buf) <= 4, "{} descriptors of the buffer are open", fds_of(&dma_buf));
    let more = resident_bytes().saturating_sub(resident_before);
    assert!(mappings_of_memory(&dma_buf) <= 1, "mappings of the buffer are left ({maps_before} before)");
    // 200 leaked imports would be 200 MiB of address space; resident memory is noisy.
    assert!(more < 600 * MIB, "{more} bytes more are resident");
}

#[test]
fn what_cannot_be_imported_is_refused_and_stays_the_callers() {
    const NAME: &str = "what_cannot_be_imported_is_refused_and_stays_the_callers";
    let Some(device) = dma_buf_device(NAME) else { return };

    let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
    assert!(DmaBuf::from_fd(pipe).is_err(), "a pipe has no size");

    // A file with a size that nobody can map for writing: as a VFIO dma-buf to a CPU.
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(MIB).unwrap();
    let garbage = DmaBuf::from_fd(OwnedFd::from(std::fs::File::open(file.path()).unwrap())).unwrap();
    let before = fds_of(&garbage);
    for _ in 0..50 {
        let error = device.import(&garbage).unwrap_err();
        assert!(matches!(error.kind(), Kind::ImporterCannot | Kind::Vulkan), "{error}");
        assert_eq!(error.device(), Some(device.name().as_str()));
    }
    assert_eq!(fds_of(&garbage), before, "a refused import leaves no descriptor");
    assert_eq!(rustix::fs::fstat(&garbage).unwrap().st_size as u64, MIB, "and closes none of the caller's");
}

#[test]
fn buffers_larger_than_their_memory_are_refused() {
    let Some(device) = device("buffers_larger_than_their_memory_are_refused") else { return };
    let memory = HostMemory::new(MIB).unwrap();
    for size_bytes in [0, MIB + 1, u64::MAX] {
        let options = ImportOptions { size_bytes: Some(size_bytes), ..Default::default() };
        if device.description().can_import_dma_buf {
            let dma_buf = memory.export(&whole(&memory)).unwrap();
            let error = device.import_dma_buf(&dma_buf, &options).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{error}");
        }
        if device.description().host_pointer_alignment_bytes.is_some() {
            let mapping = memory.map(&whole(&memory)).unwrap();
            let error = device.import_mapping(mapping, &options).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{error}");
        }
    }
}

#[test]
fn a_device_without_dma_bufs_names_the_extension() {
    const NAME: &str = "a_device_without_dma_bufs_names_the_extension";
    let Some(device) = device(NAME) else { return };
    if device.description().can_import_dma_buf {
        return skip(NAME, &format!("{} imports dma-bufs", device.name())).unwrap_or_default();
    }
    let memory = HostMemory::new(MIB).unwrap();
    let error = device.import(&memory.export(&whole(&memory)).unwrap()).unwrap_err();
    assert_eq!(error.kind(), Kind::VulkanMissing, "{error}");
    assert!(error.to_string().contains("VK_EXT_external_memory_dma_buf"), "{error}");
    let lacks = &device.description().missing_extensions;
    assert!(lacks.iter().any(|extension| extension.name == c"VK_EXT_external_memory_dma_buf"));
}

#[test]
fn an_engine_refuses_buffers_that_are_not_for_it() {
    const NAME: &str = "an_engine_refuses_buffers_that_are_not_for_it";
    let Some(device) = host_pointer_device(NAME) else { return };
    let memory = HostMemory::new(MIB).unwrap();
    let mapping = memory.map(&whole(&memory)).unwrap();
    let options = ImportOptions { usage: BufferUsage::TRANSFER_DST, ..Default::default() };
    let buffer = device.import_mapping(mapping, &options).unwrap();
    let mut engine = Engine::new(&device).unwrap();
    let error = engine.checksum(&buffer, 0..4, soon()).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidInput);
    engine.upload(&buffer, 0, &[1], soon()).unwrap();

    let Some(other) = host_pointer_device(NAME) else { return };
    let error = Engine::new(&other).unwrap().upload(&buffer, 0, &[1], soon()).unwrap_err();
    assert!(error.to_string().contains("another Vulkan device"), "{error}");
}

#[test]
fn work_that_misses_its_deadline_keeps_its_buffer() {
    const NAME: &str = "work_that_misses_its_deadline_keeps_its_buffer";
    let Some(device) = host_pointer_device(NAME) else { return };
    let memory = HostMemory::new(64 * MIB).unwrap();
    let buffer = device.import_host_pointer(memory.map(&whole(&memory)).unwrap()).unwrap();
    let mut engine = Engine::new(&device).unwrap();
    let sum = engine.checksum(&buffer, 0..buffer.size_bytes(), soon()).unwrap();
    // A deadline in the past: submitted, not waited for. A fast device may still make it.
    match engine.checksum(&buffer, 0..buffer.size_bytes(), Instant::now()) {
        Ok(again) => assert_eq!(again, sum),
        Err(error) => {
            assert_eq!(error.kind(), Kind::TimedOut, "{error}");
            let in_use = device.release(buffer).unwrap_err();
            assert_eq!(in_use.kind(), Kind::StillInUse, "{in_use}");
            drop(engine);
        }
    }
}

#[test]
fn a_cpu_is_treated_as_one() {
    const NAME: &str = "a_cpu_is_treated_as_one";
    let Some(device) = device(NAME) else { return };
    if !device.description().is_cpu {
        return skip(NAME, &format!("{} is no CPU", device.name())).unwrap_or_default();
    }
    assert_eq!(device.on_revoke(), OnRevoke::Reimport);
    assert!(!device.governed_by_p2pdma());
    assert!(device.description().host_pointer_alignment_bytes.unwrap_or(1) <= page_size_bytes());
}

#[test]
fn an_unknown_device_is_an_error_that_lists_the_others() {
    const NAME: &str = "an_unknown_device_is_an_error_that_lists_the_others";
    let Some(device) = device(NAME) else { return };
    let instance = vulkan::Instance::open().unwrap();
    let error = instance.open_device(&Selector::Name("no such device".into())).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains(&device.description().name), "{error}");
}

/// How many descriptors of this process are of the same file.
fn fds_of(file: impl AsFd) -> usize {
    let this = std::fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())).unwrap();
    let inode = rustix::fs::fstat(&file).unwrap().st_ino;
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    descriptors
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let same =
                std::fs::read_link(&path).ok()? == this && rustix::fs::stat(&path).ok()?.st_ino == inode;
            same.then_some(())
        })
        .count()
}

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

/// How many mappings of this process are of the same file.
fn mappings_of_memory(file: impl AsFd) -> usize {
    let inode = rustix::fs::fstat(&file).unwrap().st_ino.to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(inode.as_str())).count()
}

fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * page_size_bytes()
}

#[expect(dead_code, reason = "a mapping is what keeps a host pointer alive; it must be shareable")]
fn mappings_are_shared(mapping: Arc<Mapping>) -> impl Send + Sync {
    mapping
}
