//! A Vulkan device's own memory, lent to another Vulkan device.

use std::sync::Arc;

use peervram_backends::vulkan::{Device, Engine, checksum};
use peervram_backends::{CpuAccess, DmaRange, DmaRanges, Exporter, HostSlice, Importer, Kind, Mapping};

use crate::crossing::crosses;
use crate::machine::{MIB, device, noise, skip, soon};

/// A device that exports dma-bufs, and imports them.
fn exporting_device(test: &str) -> Option<Device> {
    let device = device(test)?;
    match device.description().can_export_dma_buf && device.imports_dma_bufs() {
        true => Some(device),
        false => skip(test, &format!("{} exports no dma-bufs", device.name())),
    }
}

#[test]
fn a_vulkan_devices_memory_is_lent_as_a_dma_buf() {
    const TEST: &str = "a_vulkan_devices_memory_is_lent_as_a_dma_buf";
    let (Some(lender), Some(importer)) = (exporting_device(TEST), device(TEST)) else { return };
    let memory = lender.allocate_exportable(8 * MIB).unwrap();
    let whole = DmaRanges::whole(memory.region()).unwrap();
    let dma_buf = memory.export(&whole).unwrap();
    let buffer = importer.import(&dma_buf).unwrap();
    dma_buf.close();
    let view = memory.map(&whole).unwrap();
    crosses(&importer, buffer, &view);
    assert_eq!(memory.cpu_access(0), CpuAccess::Cached);
    // And it is the lender's own memory: its own buffer shows the same bytes.
    let mut bytes = vec![0; view.len()];
    view.read(0, &mut bytes).unwrap();
    let seen = Engine::new(&lender).unwrap().checksum(memory.buffer(), 0..8 * MIB, soon()).unwrap();
    assert_eq!(seen, checksum(&bytes));
}

#[test]
fn its_owner_moves_bytes_by_the_devices_own_engine() {
    let Some(lender) = exporting_device("its_owner_moves_bytes_by_the_devices_own_engine") else { return };
    let memory = lender.allocate_exportable(4 * MIB).unwrap();
    // In an order of its own, as an aperture may have it.
    let ranges = [DmaRange::new(3 * MIB, MIB), DmaRange::new(MIB, MIB)];
    let ranges = DmaRanges::new(memory.region(), &ranges).unwrap();
    let host = Arc::new(Mapping::of_host_memory(MIB as usize).unwrap());
    let bytes = noise(MIB as usize, 5);
    host.write(0, &bytes).unwrap();
    let owner = memory.owner();
    let engine = owner.engine().expect("a device that we opened has engines");
    let slice = HostSlice::new(Arc::clone(&host), 0, MIB as usize).unwrap();
    engine.write(&ranges, MIB / 2, &slice, soon()).unwrap();
    let view = memory.map(&ranges).unwrap();
    let mut seen = vec![0; bytes.len()];
    view.read(MIB as usize / 2, &mut seen).unwrap();
    assert!(seen == bytes, "the pieces are where the ranges say");
    host.write(0, &vec![0; bytes.len()]).unwrap();
    engine.read(&ranges, MIB / 2, &slice, soon()).unwrap();
    host.read(0, &mut seen).unwrap();
    assert!(seen == bytes, "and are read from there");
    assert_eq!(engine.read(&ranges, 3 * MIB / 2, &slice, soon()).unwrap_err().kind(), Kind::InvalidInput);
}

#[test]
fn what_cannot_be_lent_of_it_is_refused() {
    let Some(lender) = exporting_device("what_cannot_be_lent_of_it_is_refused") else { return };
    for size_bytes in [0, 1, MIB + 1] {
        let error = lender.allocate_exportable(size_bytes).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidInput, "{size_bytes}");
    }
    let (memory, larger) =
        (lender.allocate_exportable(MIB).unwrap(), lender.allocate_exportable(2 * MIB).unwrap());
    let part = DmaRanges::new(memory.region(), &[DmaRange::new(0, MIB / 2)]).unwrap();
    assert_eq!(memory.export(&part).unwrap_err().kind(), Kind::Unsupported);
    let foreign = DmaRanges::whole(larger.region()).unwrap();
    assert_eq!(memory.export(&foreign).unwrap_err().kind(), Kind::InvalidInput);
    assert_eq!(memory.map(&foreign).unwrap_err().kind(), Kind::InvalidInput);
}

#[test]
fn two_devices_of_one_driver_share_memory_by_its_own_handle() {
    const TEST: &str = "two_devices_of_one_driver_share_memory_by_its_own_handle";
    let (Some(one), Some(other)) = (device(TEST), device(TEST)) else { return };
    let memory = match one.allocate_opaque(4 * MIB) {
        Ok(memory) => memory,
        Err(error) if error.kind() == Kind::Unsupported => {
            skip(TEST, &error.to_string()).unwrap_or(());
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let imported = other.import_opaque(memory.export().unwrap()).unwrap();
    assert_eq!(imported.size_bytes(), 4 * MIB);
    let bytes = noise(4 * MIB as usize, 9);
    let (mut of_one, mut of_other) = (Engine::new(&one).unwrap(), Engine::new(&other).unwrap());
    of_one.upload(memory.buffer(), 0, &bytes, soon()).unwrap();
    assert_eq!(of_other.checksum(&imported, 0..4 * MIB, soon()).unwrap(), checksum(&bytes));
    let mut seen = vec![0; bytes.len()];
    of_other.upload(&imported, 4, &bytes[..100], soon()).unwrap();
    of_one.read_back(memory.buffer(), 0, &mut seen, soon()).unwrap();
    assert!(seen[4..104] == bytes[..100] && seen[104..] == bytes[104..]);
    // The memory lives as long as either of them.
    drop(memory);
    of_other.read_back(&imported, 0, &mut seen, soon()).unwrap();
    assert!(seen[104..] == bytes[104..]);
}
