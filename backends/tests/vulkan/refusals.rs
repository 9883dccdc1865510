//! What cannot be imported is refused in words, and nothing is lost or left behind.

use std::os::fd::OwnedFd;

use peervram_backends::host::HostMemory;
use peervram_backends::vulkan::{BufferUsage, Engine, ImportOptions, Instance, Selector};
use peervram_backends::{DmaBuf, Exporter, Importer, Kind};

use crate::machine::{MIB, device, dma_buf_device, host_pointer_device, soon, whole};

#[test]
fn what_cannot_be_mapped_is_refused_and_stays_the_callers() {
    const TEST: &str = "what_cannot_be_mapped_is_refused_and_stays_the_callers";
    let Some(device) = dma_buf_device(TEST) else { return };

    let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
    assert!(DmaBuf::from_fd(pipe).is_err(), "a pipe has no size");

    // A file with a size that nobody can map for writing: as a VFIO dma-buf is to a CPU.
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(MIB).unwrap();
    let garbage = DmaBuf::from_fd(OwnedFd::from(std::fs::File::open(file.path()).unwrap())).unwrap();
    let before = descriptors_of(&garbage);
    for _ in 0..50 {
        let error = device.import(&garbage).unwrap_err();
        assert!(matches!(error.kind(), Kind::ImporterCannot | Kind::Vulkan), "{error}");
        assert_eq!(error.device(), Some(device.name().as_str()));
    }
    assert_eq!(descriptors_of(&garbage), before, "a refused import leaves no descriptor");
    assert_eq!(rustix::fs::fstat(&garbage).unwrap().st_size as u64, MIB, "nor closes the caller's");
}

#[test]
fn buffers_larger_than_their_memory_are_refused() {
    let Some(device) = device("buffers_larger_than_their_memory_are_refused") else { return };
    let memory = HostMemory::new(MIB).unwrap();
    for size_bytes in [0, MIB + 1, u64::MAX] {
        let options = ImportOptions { size_bytes: Some(size_bytes), ..Default::default() };
        if device.imports_dma_bufs() {
            let dma_buf = memory.export(&whole(&memory)).unwrap();
            let error = device.import_dma_buf(&dma_buf, &options).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{error}");
        }
        if device.host_pointer_alignment_bytes().is_some() {
            let mapping = memory.map(&whole(&memory)).unwrap();
            let error = device.import_mapping(mapping, &options).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{error}");
        }
    }
}

#[test]
fn an_engine_refuses_buffers_that_are_not_for_it() {
    const TEST: &str = "an_engine_refuses_buffers_that_are_not_for_it";
    let Some(device) = host_pointer_device(TEST) else { return };
    let memory = HostMemory::new(MIB).unwrap();
    let mapping = memory.map(&whole(&memory)).unwrap();
    let options = ImportOptions { usage: BufferUsage::TRANSFER_DST, ..Default::default() };
    let buffer = device.import_mapping(mapping, &options).unwrap();
    let mut engine = Engine::new(&device).unwrap();
    assert_eq!(engine.checksum(&buffer, 0..4, soon()).unwrap_err().kind(), Kind::InvalidInput);
    engine.upload(&buffer, 0, &[1], soon()).unwrap();

    let Some(other) = host_pointer_device(TEST) else { return };
    let error = Engine::new(&other).unwrap().upload(&buffer, 0, &[1], soon()).unwrap_err();
    assert!(error.to_string().contains("another Vulkan device"), "{error}");
}

#[test]
fn an_unknown_device_is_an_error_that_lists_the_others() {
    let Some(device) = device("an_unknown_device_is_an_error_that_lists_the_others") else { return };
    let instance = Instance::open().unwrap();
    let error = instance.open_device(&Selector::Name("no such device".into())).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains(&device.description().name), "{error}");
}

/// How many descriptors of this process are of the same file.
fn descriptors_of(file: &DmaBuf) -> usize {
    let wanted = rustix::fs::fstat(file).unwrap();
    let same = |path| {
        rustix::fs::stat(path).is_ok_and(|status: rustix::fs::Stat| {
            (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino)
        })
    };
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    descriptors.filter(|entry| same(entry.as_ref().unwrap().path())).count()
}
