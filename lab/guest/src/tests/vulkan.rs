//! Vulkan reads and writes the VFIO device's VRAM, and host memory, on the real kernel.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use peervram::backends::host::HostMemory;
use peervram::backends::vulkan::{self, Device, Engine, Instance, Selector};
use peervram::backends::{Aperture, DmaRange, DmaRanges, Exporter, HostSlice, Importer, Mapping, RawBytes};
use peervram::verify::{Limits, Observer};
use peervram::{AttachOptions, Direction, Kind, Lender, Mover, Outcome, Path, Trust};
use peervram_programs::picture::Picture;

use crate::crossing::{Crossing, PATIENCE, VRAM, refused};
use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("vulkan/the-validation-layers-look-on", validation_looks_on)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/vram-is-read-and-painted", vram_is_read_and_painted)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/several-ranges-are-one-buffer", several_ranges_are_one_buffer)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/host-memory-crosses-as-dma-buf", host_memory_crosses_as_dma_buf)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/engines-move-bytes-both-ways", engines_move_bytes)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/a-cpu-is-trusted-by-the-window", trusted_by_the_window)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/memory-that-nobody-answers-for-is-staged", staged)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/a-vulkan-devices-own-memory-is-lent", own_memory_is_lent)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    // The driver seems to want memory dedicated, or to have a queue that only transfers.
    Test::new("vulkan/host-memory-crosses-dedicated", host_memory_crosses_as_dma_buf)
        .pretending("dedicated-only")
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/a-vulkan-devices-own-memory-is-lent-dedicated", own_memory_is_lent)
        .pretending("dedicated-only")
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/a-transfer-queue-is-an-engine", transfer_queue_is_an_engine)
        .pretending("transfer-queue")
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/a-vulkan-devices-own-memory-is-lent-with-a-transfer-queue", own_memory_is_lent)
        .pretending("transfer-queue")
        .on(|facts| facts.vulkan)
        .on_any_topology(),
    Test::new("vulkan/import-outlives-the-device", import_outlives_the_device)
        .on(|facts| facts.vulkan)
        .on_any_topology(),
];

/// Shaders are compiled at their first use, by a CPU that is itself emulated.
const SLOW: std::time::Duration = std::time::Duration::from_secs(50);

fn open() -> Result<Arc<Device>> {
    Ok(Arc::new(Instance::open()?.open_device(&Selector::Any)?))
}

/// The loader goes on without a layer that it does not find, and every other test would pass.
fn validation_looks_on(_: &Guest) -> Verdict {
    let _device = open()?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    ensure!(maps.contains("libVkLayer_khronos_validation"), "the validation layers are not in this process");
    Ok(())
}

fn vram_is_read_and_painted(guest: &Guest) -> Verdict {
    read_and_paint(guest, 1)
}

fn several_ranges_are_one_buffer(guest: &Guest) -> Verdict {
    read_and_paint(guest, 4)
}

fn read_and_paint(guest: &Guest, ranges: u64) -> Verdict {
    let crossing = Crossing::new(guest, ranges)?;
    let attachment = crossing.export.attach(open()?, Trust::Unverified)?;
    // Mesa's CPU driver maps dma-bufs by mmap, which a VFIO dma-buf does not have.
    ensure!(attachment.path() == Path::HostPointer, "the path is {}", attachment.path());
    let refused_paths = attachment.refused();
    let [(Path::Peer, why)] = &refused_paths[..] else {
        anyhow::bail!("refused before: {:?}", attachment.refused());
    };
    if !guest.facts().exports_dma_bufs() {
        ensure!(why.kind() == Kind::KernelTooOld, "peer was refused as {:?}: {why}", why.kind());
    }

    let layout = crossing.layout();
    let access = attachment.enter(Direction::Both)?;
    let mut engine = Engine::new(attachment.importer())?;
    let sum = engine.checksum(access.memory(), 0..layout.end_bytes(), Instant::now() + SLOW)?;
    let expected = vulkan::checksum(crossing.card.bytes());
    ensure!(sum == expected, "the shader's checksum is {sum:08x}, the CPU's {expected:08x}");

    engine.paint(access.memory(), &layout, 7, Instant::now() + SLOW)?;
    let mut painted = crossing.card.bytes().to_vec();
    vulkan::paint(&mut painted, &layout, 7)?;
    ensure!(crossing.seen()? == Picture::new(640, 480, painted)?, "the owner does not see what was painted");
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    attachment.detach()?;
    drop(engine);
    crossing.close()
}

fn host_memory_crosses_as_dma_buf(_: &Guest) -> Verdict {
    let memory = HostMemory::new(1 << 20)?;
    let ranges = DmaRanges::whole(memory.region())?;
    let view = memory.map(&ranges)?;
    let pattern: Vec<u8> = (0..1 << 20).map(|i: u32| (i ^ i >> 9) as u8).collect();
    view.write(0, &pattern)?;
    let lender = Lender::new(memory);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let attachment = export.attach(open()?, Trust::Unverified)?;
    ensure!(attachment.path() == Path::Peer, "the path is {}: {:?}", attachment.path(), attachment.refused());
    let access = attachment.enter(Direction::Read)?;
    let mut engine = Engine::new(attachment.importer())?;
    let sum = engine.checksum(access.memory(), 0..1 << 20, Instant::now() + SLOW)?;
    ensure!(sum == vulkan::checksum(&pattern), "the checksums differ");
    Ok(())
}

/// Both directions, with the time that an emulated CPU takes to compile shaders under the validation layers.
fn patiently_verified() -> AttachOptions {
    let mut limits = Limits::default();
    (limits.copy_timeout, limits.quick_timeout) = (SLOW, SLOW);
    AttachOptions::new(Trust::Verified(Direction::Both)).with_limits(limits)
}

/// Lent by one device to another as a dma-buf, and believed because the lender's own engine looked.
fn own_memory_is_lent(_: &Guest) -> Verdict {
    const SIZE_BYTES: u64 = 4 << 20;
    let memory = open()?.allocate_exportable(SIZE_BYTES)?;
    let (whole, owner) = (DmaRanges::whole(memory.region())?, memory.owner());
    let lender = Lender::new(memory);
    let export = lender.export(Aperture::owned(whole, owner))?;
    let attachment = export.attach(open()?, patiently_verified())?;
    ensure!(attachment.path() == Path::Peer, "refused: {:?}", attachment.refused());
    let certificate = attachment.certificate().context("it is trusted for nothing")?;
    // Each engine in each direction.
    let tests = 2 * attachment.importer().engines().len();
    ensure!(
        certificate.passed()
            && certificate.tests.len() == tests
            && certificate.tests.iter().all(|test| test.observer == Observer::OwnerEngine),
        "its certificate is {certificate:?}"
    );
    let mut lenders = Engine::new(lender.device().buffer().device())?;
    let mut importers = Engine::new(attachment.importer())?;
    let bytes: Vec<u8> = (0..SIZE_BYTES).map(|at| ((at * 31) >> 3) as u8).collect();
    lenders.upload(lender.device().buffer(), 0, &bytes, Instant::now() + SLOW)?;
    let access = attachment.enter(Direction::Read)?;
    let seen = importers.checksum(access.memory(), 0..SIZE_BYTES, Instant::now() + SLOW)?;
    ensure!(seen == vulkan::checksum(&bytes), "the importer sees {seen:08x}");
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    Ok(())
}

/// Verified by each of its engines on memory that is handed over from outside, while two families share the buffer.
fn transfer_queue_is_an_engine(_: &Guest) -> Verdict {
    let memory = HostMemory::new(4 << 20)?;
    let ranges = DmaRanges::whole(memory.region())?;
    let lender = Lender::new(memory);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let attachment = export.attach(open()?, patiently_verified())?;
    ensure!(attachment.path() == Path::Peer, "the path is {}: {:?}", attachment.path(), attachment.refused());
    let certificate = attachment.certificate().context("it is trusted for nothing")?;
    let engines: BTreeSet<&str> = certificate.tests.iter().map(|test| test.engine.as_str()).collect();
    let expected = BTreeSet::from(["compute shader", "copy commands", "transfer queue"]);
    ensure!(engines == expected && certificate.passed(), "its certificate is {certificate:?}");
    Ok(())
}

/// An import by host pointer is not in the way of closing: shadow memory takes the BAR's place.
fn import_outlives_the_device(guest: &Guest) -> Verdict {
    let Crossing { view, export, lender, .. } = Crossing::new(guest, 1)?;
    let attachment = export.attach(open()?, Trust::Unverified)?;
    lender.close(PATIENCE)?;
    refused(attachment.enter(Direction::Read), Kind::Gone)?;
    let mut seen = [0; 4];
    view.read(0, &mut seen)?;
    ensure!(seen == [0xFF; 4], "what is left of the mapping shows {seen:x?}");
    // The device is really closed: it can be opened again.
    crate::crossing::open_device(guest)?;
    attachment.detach()?;
    refused(export.attach(open()?, Trust::Unverified), Kind::Gone)?;
    Ok(())
}

/// By copy commands and by the shader, out of a buffer that was imported and into it.
fn engines_move_bytes(_: &Guest) -> Verdict {
    const SIZE: usize = 256 << 10;
    let device = open()?;
    let engines = device.engines();
    let names: Vec<&str> = engines.iter().map(|engine| engine.name()).collect();
    ensure!(names == ["copy commands", "compute shader"], "its engines are {names:?}");
    let memory = device.stage(SIZE as u64)?;
    let behind = device.host_memory(&memory).context("a CPU has memory of its own")?;
    let host = Arc::new(Mapping::of_host_memory(SIZE)?);
    let mut seen = vec![0; SIZE];
    for (engine, seed) in engines.into_iter().zip(1_usize..) {
        let bytes: Vec<u8> = (0..SIZE).map(|i| ((i * seed) ^ (i >> 9)) as u8).collect();
        let deadline = || Instant::now() + SLOW;
        behind.write(0, &bytes)?;
        // Not from the start: a shader binds from further in front.
        engine.read(&memory, 4100, &HostSlice::new(Arc::clone(&host), 8, 70_000)?, deadline())?;
        host.read(0, &mut seen)?;
        ensure!(seen[8..70_008] == bytes[4100..74_100], "{} reads other bytes", engine.name());
        engine.write(&memory, 100_000, &HostSlice::new(Arc::clone(&host), 8, 70_000)?, deadline())?;
        behind.read(0, &mut seen)?;
        ensure!(seen[100_000..170_000] == bytes[4100..74_100], "{} writes other bytes", engine.name());
        let is_elsewhere = seen[..100_000] != bytes[..100_000] || seen[170_000..] != bytes[170_000..];
        ensure!(!is_elsewhere, "{} writes elsewhere", engine.name());
        let beyond = HostSlice::new(Arc::clone(&host), 0, SIZE)?;
        refused(engine.read(&memory, 4, &beyond, deadline()), Kind::InvalidInput)?;
    }
    device.release(memory)?;
    Ok(())
}

fn trusted_by_the_window(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let attachment = crossing.export.attach(open()?, Trust::Verified(Direction::Both))?;
    ensure!(attachment.path() == Path::HostPointer, "refused: {:?}", attachment.refused());
    let certificate = attachment.certificate().context("it is trusted for nothing")?;
    // Both engines, both ways.
    ensure!(certificate.tests.len() == 4 && certificate.passed(), "its certificate is {certificate:?}");
    ensure!(crossing.seen()? == crossing.card, "what was there is not put back");
    attachment.detach()?;
    crossing.close()
}

fn staged(guest: &Guest) -> Verdict {
    let device = crate::crossing::open_device(guest)?;
    let ranges = DmaRanges::new(device.region(VRAM)?, &[DmaRange::new(0, 3 << 20)])?;
    let view = device.map(&ranges)?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::unowned(ranges))?;
    let attachment = export.attach(open()?, Trust::Verified(Direction::Both))?;
    let how = attachment.staging();
    ensure!(
        how.as_ref().is_some_and(|how| how.pull == Mover::Cpu && how.in_host_memory),
        "by {}: {how:?}, {:?}",
        attachment.path(),
        attachment.refused()
    );
    // More than one slice of a copy, none of which is like another.
    let bytes: Vec<u8> = (0..3 << 20).map(|at: u32| (at ^ at >> 8 ^ at >> 16) as u8).collect();
    view.write(0, &bytes)?;
    let access = attachment.enter(Direction::Both)?;
    let mut engine = Engine::new(attachment.importer())?;
    let mut seen = vec![0; 3 << 20];
    engine.read_back(access.memory(), 0, &mut seen, Instant::now() + SLOW)?;
    ensure!(seen == bytes, "Vulkan sees other bytes");
    let written: Vec<u8> = bytes[1 << 20..][..4096].iter().map(|byte| !byte).collect();
    engine.upload(access.memory(), 1 << 20, &written, Instant::now() + SLOW)?;
    view.read(0, &mut seen)?;
    ensure!(seen == bytes, "it is copied back too early");
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    view.read(0, &mut seen)?;
    let mut right = bytes;
    right[1 << 20..][..4096].copy_from_slice(&written);
    ensure!(seen == right, "what Vulkan wrote is not there, or something else is");
    Ok(())
}
