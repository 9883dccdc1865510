//! Both paths carry bytes both ways.

use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::host::HostMemory;
use peervram_backends::vulkan::{self, Buffer, Device, Engine, ImportOptions};
use peervram_backends::{DmaRange, DmaRanges, Exporter, ImageLayout, Importer, Kind, Mapping, OnRevoke};

use crate::machine::{MIB, device, dma_buf_device, host_pointer_device, noise, skip, soon, whole};
use crate::pretended::pretends;

fn contents(mapping: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; mapping.len()];
    mapping.read(0, &mut bytes).unwrap();
    bytes
}

/// What every import must do, whichever way the memory came: the device sees the exporter's bytes,
/// and the exporter sees the device's.
pub(crate) fn crosses(device: &Device, buffer: Buffer, exporter_view: &Mapping) {
    let mut engine = Engine::new(device).unwrap();
    let bytes = noise(exporter_view.len(), 1);
    exporter_view.write(0, &bytes).unwrap();
    let all = 0..buffer.size_bytes();
    assert_eq!(engine.checksum(&buffer, all, soon()).unwrap(), vulkan::checksum(&bytes));
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
    for parameter in [0, 0x12F, 0x2FF, 0x333] {
        vulkan::paint(&mut expected, &picture, parameter).unwrap();
        engine.paint(&buffer, &picture, parameter, soon()).unwrap();
        assert!(contents(exporter_view) == expected, "the exporter reads what the device painted");
    }

    let beyond = engine.checksum(&buffer, 0..buffer.size_bytes() + 4, soon()).unwrap_err();
    assert_eq!(beyond.kind(), Kind::InvalidInput);
    let beyond = engine.read_back(&buffer, u64::MAX, &mut [0; 2], soon()).unwrap_err();
    assert_eq!(beyond.kind(), Kind::InvalidInput);
    device.release(buffer).unwrap();
}

#[test]
fn a_dma_buf_crosses_to_the_device_and_back() {
    let Some(device) = dma_buf_device("a_dma_buf_crosses_to_the_device_and_back") else { return };
    let memory = HostMemory::new(8 * MIB).unwrap();
    let dma_buf = memory.export(&whole(&memory)).unwrap();
    let buffer = device.import(&dma_buf).unwrap();
    assert_eq!(buffer.size_bytes(), 8 * MIB);
    assert!(!buffer.is_host_pointer());
    dma_buf.close();
    crosses(&device, buffer, &memory.map(&whole(&memory)).unwrap());
}

#[test]
fn a_dedicated_import_of_a_part_is_as_good() {
    let Some(device) = dma_buf_device("a_dedicated_import_of_a_part_is_as_good") else { return };
    let memory = HostMemory::new(8 * MIB).unwrap();
    let dma_buf = memory.export(&whole(&memory)).unwrap();
    let options = ImportOptions { dedicated: true, size_bytes: Some(6 * MIB), ..Default::default() };
    let buffer = device.import_dma_buf(&dma_buf, &options).unwrap();
    let part = DmaRanges::new(memory.region(), &[DmaRange::new(0, 6 * MIB)]).unwrap();
    crosses(&device, buffer, &memory.map(&part).unwrap());
}

#[test]
fn a_host_pointer_crosses_to_the_device_and_back() {
    let Some(device) = host_pointer_device("a_host_pointer_crosses_to_the_device_and_back") else { return };
    let memory = HostMemory::new(8 * MIB).unwrap();
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

/// Longer than the 128 MiB that a shader of lavapipe sees at once, so that parts are put together.
#[test]
fn large_buffers_are_worked_through_in_parts() {
    let Some(device) = host_pointer_device("large_buffers_are_worked_through_in_parts") else { return };
    let memory = HostMemory::new(144 * MIB).unwrap();
    let view = memory.map(&whole(&memory)).unwrap();
    let buffer = device.import_host_pointer(view.clone()).unwrap();
    let patch = noise(65536, 3);
    let words = patch.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word));
    let sum_of_words = words.fold(0, u32::wrapping_add);
    let mut expected = 0_u32;
    // At the start, across the boundary, and at the end; zeros elsewhere add nothing.
    for at in [0, 128 * MIB as usize - 32768, 144 * MIB as usize - 65536] {
        view.write(at, &patch).unwrap();
        // Moving words by n positions adds 2 n times their plain sum.
        let moved = (at as u32 / 4).wrapping_mul(2).wrapping_mul(sum_of_words);
        expected = expected.wrapping_add(vulkan::checksum(&patch)).wrapping_add(moved);
    }
    let mut engine = Engine::new(&device).unwrap();
    assert_eq!(engine.checksum(&buffer, 0..buffer.size_bytes(), soon()).unwrap(), expected);
}

#[test]
fn work_that_misses_its_deadline_keeps_its_buffer() {
    const TEST: &str = "work_that_misses_its_deadline_keeps_its_buffer";
    let Some(device) = host_pointer_device(TEST) else { return };
    let memory = HostMemory::new(128 * MIB).unwrap();
    let buffer = device.import_host_pointer(memory.map(&whole(&memory)).unwrap()).unwrap();
    let mut engine = Engine::new(&device).unwrap();
    let all = 0..buffer.size_bytes();
    let sum = engine.checksum(&buffer, all.clone(), soon()).unwrap();
    // A deadline in the past: submitted, and not waited for.
    match engine.checksum(&buffer, all, Instant::now()) {
        Ok(again) => {
            assert_eq!(again, sum);
            skip(TEST, "the device was faster than a deadline in the past").unwrap_or_default()
        }
        Err(error) => {
            assert_eq!(error.kind(), Kind::TimedOut, "{error}");
            let in_use = device.release(buffer).unwrap_err();
            assert_eq!(in_use.kind(), Kind::StillInUse, "{in_use}");
        }
    }
}

#[test]
fn a_cpu_is_treated_as_one() {
    const TEST: &str = "a_cpu_is_treated_as_one";
    let Some(device) = device(TEST) else { return };
    if !device.description().is_cpu {
        return skip(TEST, &format!("{} is no CPU", device.name())).unwrap_or_default();
    }
    assert_eq!(device.on_revoke(), OnRevoke::Reimport);
    assert!(!device.governed_by_p2pdma());
}

#[test]
fn a_devices_engines_copy_between_two_buffers_of_its_own() {
    let Some(device) = host_pointer_device("a_devices_engines_copy_between_two_buffers_of_its_own") else {
        return;
    };
    let (from, to) = (HostMemory::new(8 * MIB).unwrap(), HostMemory::new(8 * MIB).unwrap());
    let (source, target) = (from.map(&whole(&from)).unwrap(), to.map(&whole(&to)).unwrap());
    let bytes = noise(source.len(), 4);
    source.write(0, &bytes).unwrap();
    let (there, here) = (
        device.import_host_pointer(Arc::clone(&source)).unwrap(),
        device.import_host_pointer(Arc::clone(&target)).unwrap(),
    );
    let engines = device.engines();
    let names: Vec<_> = engines.iter().map(|engine| engine.name()).collect();
    let known = ["transfer queue", "copy commands", "compute shader"];
    assert_eq!(names, known[usize::from(!pretends("transfer-queue"))..]);
    for engine in engines {
        target.write(0, &vec![0; target.len()]).unwrap();
        let worked = engine.copy((&there, 4100), (&here, 8), 3 * MIB, soon()).unwrap();
        // Every driver has a clock that the tests run on.
        assert!(worked.is_some_and(|worked| worked < Duration::from_secs(60)), "{worked:?}");
        let mut expected = vec![0; target.len()];
        expected[8..][..3 * MIB as usize].copy_from_slice(&bytes[4100..][..3 * MIB as usize]);
        assert!(contents(&target) == expected, "{}", engine.name());

        let refused =
            |from, to, length| engine.copy((&there, from), (&here, to), length, soon()).unwrap_err();
        for (from, to, length) in [(0, 8 * MIB, 4), (u64::MAX, 0, 4), (0, 0, 9 * MIB), (0, 0, 0)] {
            assert_eq!(refused(from, to, length).kind(), Kind::InvalidInput);
        }
        let overlaps = engine.copy((&there, 0), (&there, 4), 8, soon()).unwrap_err();
        assert_eq!(overlaps.kind(), Kind::InvalidInput);
    }
}
