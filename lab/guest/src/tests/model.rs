//! The model GPU itself: through peervram's VFIO device on one side, as the host has it on the other.

use anyhow::{Context, Result, ensure};
use peervram::backends::vfio::{Device, IoAddressSpace};
use peervram::backends::vulkan::checksum;
use peervram::backends::{DmaRange, DmaRanges, Exporter, Mapping};
use peervram_lab::machine::Facts;
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model::registers::{self as map, Descriptor, engine};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::crossing::{PATIENCE, VRAM};
use crate::guest::Guest;
use crate::model::{Model, REGISTERS};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("model/is-what-the-row-says", is_what_the_row_says),
    Test::of_models("model/opens-beside-another-in-one-address-space", opens_beside_another),
    Test::of_models("model/what-the-guest-writes-is-on-the-host", what_is_written_is_on_the_host),
    Test::of_models("model/is-awake-and-sleeps-when-told", is_awake_and_sleeps_when_told),
    Test::of_models("model/vram-is-exported", vram_is_exported).on(Facts::exports_dma_bufs),
    Test::of_models("model/reset-is-counted-and-clears-registers", reset_is_counted),
    Test::of_models("model/reset-may-be-slow-and-lose-vram", reset_may_be_slow_and_lose_vram),
    Test::of_models("model/reset-may-be-stuck-until-it-behaves", reset_may_be_stuck),
    Test::of_models("model/engine-copies-and-lies-when-told", engine_copies_and_lies_when_told),
    Test::of_models("model/raised-error-is-latched", raised_error_is_latched),
    Test::of_models("model/removal-reads-all-ones", removal_reads_all_ones),
];

const MIB: u64 = 1 << 20;

fn is_what_the_row_says(guest: &Guest) -> Verdict {
    for model in guest.models()? {
        // Opened it is awake. On arm64 its port may sleep else, and then its link is not read.
        let device = model.open()?;
        let function = model.function()?;
        ensure!(function.driver.as_deref() == Some("vfio-pci"), "its driver is {:?}", function.driver);
        ensure!(function.is_gpu(), "its class is {:#x}", function.class);
        let link = function.link.as_ref().context("no link")?;
        ensure!((link.width_lanes, link.speed.as_str()) == (16, "16.0 GT/s PCIe"), "its link is {link:?}");
        let bar = function.bar(VRAM).context("no BAR for VRAM")?;
        ensure!(bar.is_prefetchable && bar.size_bytes == model.vram_bytes(), "VRAM is {bar:?}");

        ensure!(
            device.region(REGISTERS)?.size_bytes == map::BAR0_BYTES,
            "the registers' BAR has another size"
        );
        let vram = device.region(VRAM)?;
        ensure!(vram.can_map(0, model.vram_bytes()), "VRAM cannot be mapped whole");
        ensure!(register(&device, map::IDENTITY)? == map::IDENTITY_VALUE, "no model GPU answers");
        ensure!(register(&device, map::MAP_VERSION)? == map::MAP_VERSION_VALUE, "another register map");
        let vram_bytes = u64::from(register(&device, map::VRAM_BYTES_HIGH)?) << 32
            | u64::from(register(&device, map::VRAM_BYTES_LOW)?);
        ensure!(vram_bytes == model.vram_bytes(), "it says that it has {vram_bytes:#x} bytes of VRAM");
    }
    Ok(())
}

fn opens_beside_another(guest: &Guest) -> Verdict {
    // Below a switch without ACS they are one group, and a group has one owner.
    let (first, second) = (guest.model(0)?, guest.model(1)?);
    ensure!(first.address() != second.address(), "both are {}", first.address());
    let interface = first.open()?.interface();
    let space = IoAddressSpace::new(interface.context("a device that was opened has no interface")?)?;
    for model in [&first, &second] {
        let device = Device::open_into(&space, model.address())?;
        set_register(&device, map::SCRATCH, u32::from(model.address().bus))?;
        let seen = register(&device, map::SCRATCH)?;
        ensure!(seen == u32::from(model.address().bus), "{} has {seen:#x}", model.address());
    }
    Ok(())
}

fn what_is_written_is_on_the_host(guest: &Guest) -> Verdict {
    let (model, other) = (guest.model(0)?, guest.model(1)?);
    let device = model.open()?;
    let vram = map_vram(&device)?;
    let bytes = pattern(4 * MIB);
    // One end, somewhere in the middle, the other end.
    for offset in [0, 77 * MIB + 12, model.vram_bytes() - 4 * MIB] {
        let others = other.host_checksum(offset, 4 * MIB)?;
        vram.write(offset as usize, &bytes)?;
        let seen = model.host_checksum(offset, 4 * MIB)?;
        ensure!(seen == checksum(&bytes), "the host has other bytes at {offset:#x}: {seen:#x}");
        ensure!(model.host_bytes(offset + 5, 40)? == bytes[5..45], "the host reads other bytes");
        ensure!(other.host_checksum(offset, 4 * MIB)? == others, "the other GPU's VRAM has changed");
        vram.write(offset as usize + 1000, &[!bytes[1000]])?;
        ensure!(model.host_checksum(offset, 4 * MIB)? != seen, "one byte makes no difference");
    }
    Ok(())
}

fn is_awake_and_sleeps_when_told(guest: &Guest) -> Verdict {
    const CONFIGURATION: u32 = 7;
    // Where the model has its power management control register.
    const POWER_CONTROL: u64 = 0x44;
    let model = guest.model(0)?;
    let device = model.open()?;
    let state = || -> Result<String> {
        let path = format!("/sys/bus/pci/devices/{}/power_state", model.address());
        Ok(std::fs::read_to_string(path)?.trim().to_string())
    };
    ensure!(state()? == "D0", "it is in {}", state()?);
    device.write(CONFIGURATION, POWER_CONTROL, &3_u16.to_le_bytes())?;
    let asleep = state()?;
    let read = device.read(REGISTERS, 0, &mut [0; 4]);
    device.write(CONFIGURATION, POWER_CONTROL, &0_u16.to_le_bytes())?;
    ensure!(asleep == "D3hot", "told to sleep, it is in {asleep}");
    let error = read.err().context("a device that sleeps answers")?;
    ensure!(error.raw_os_error() == Some(5), "a register of a device that sleeps is refused: {error}");
    ensure!(state()? == "D0", "told to wake, it is in {}", state()?);
    ensure!(register(&device, map::IDENTITY)? == map::IDENTITY_VALUE, "it does not answer after sleep");
    Ok(())
}

fn vram_is_exported(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let device = model.open()?;
    let whole = device.export(&DmaRanges::whole(device.region(VRAM)?)?)?;
    ensure!(whole.size_bytes() == model.vram_bytes(), "the dma-buf has {:#x} bytes", whole.size_bytes());
    let ranges = [DmaRange::new(64 * MIB, 2 * MIB), DmaRange::new(8 * MIB, 4096)];
    let two = device.export(&DmaRanges::new(device.region(VRAM)?, &ranges)?)?;
    ensure!(two.size_bytes() == 2 * MIB + 4096, "two ranges are {:#x} bytes", two.size_bytes());
    two.close();
    whole.close();
    Ok(())
}

fn reset_is_counted(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let device = model.open()?;
    map_vram(&device)?.write(0, b"kept over a reset")?;
    set_register(&device, map::SCRATCH, 7)?;
    let before = register(&device, map::GENERATION)?;
    device.reset()?;
    let after = register(&device, map::GENERATION)?;
    // The kernel may try more than one way.
    ensure!(after > before, "the device has seen no reset: generation {before}, then {after}");
    ensure!(model.status()?.generation == after, "guest and host count differently");
    ensure!(register(&device, map::SCRATCH)? == 0, "a register survived");
    ensure!(device.memory_enabled()?, "its memory is off");
    ensure!(model.host_bytes(0, 17)? == b"kept over a reset", "VRAM was lost");
    Ok(())
}

fn reset_may_be_slow_and_lose_vram(guest: &Guest) -> Verdict {
    const SLOW: Duration = Duration::from_millis(400);
    let model = guest.model(0)?;
    let device = model.open()?;
    let vram = map_vram(&device)?;
    vram.write(0, &[1; 4096])?;
    model.misbehave(Misbehaviour::SlowReset { ms: SLOW.as_millis() as u64 })?;
    model.misbehave(Misbehaviour::VramLost)?;
    let start = Instant::now();
    device.reset()?;
    ensure!(start.elapsed() >= SLOW, "the reset took {:?}", start.elapsed());
    let mut seen = [1; 4096];
    vram.read(0, &mut seen)?;
    ensure!(seen == [0; 4096], "VRAM is still there");
    Ok(())
}

fn reset_may_be_stuck(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let device = model.open()?;
    model.misbehave(Misbehaviour::StuckReset)?;
    thread::scope(|scope| {
        let reset = scope.spawn(|| device.reset());
        thread::sleep(Duration::from_secs(1));
        let returned = reset.is_finished();
        // Whatever was seen: the device has to come back, or the thread never ends.
        model.behave()?;
        let result = reset.join().map_err(|_| anyhow::anyhow!("the thread that resets panicked"))?;
        ensure!(!returned, "a reset that is stuck returned");
        Ok(result?)
    })?;
    ensure!(register(&device, map::IDENTITY)? == map::IDENTITY_VALUE, "it is not back");
    Ok(())
}

fn engine_copies_and_lies_when_told(guest: &Guest) -> Verdict {
    const BYTES: u64 = 64 << 10;
    let model = guest.model(1)?;
    let device = model.open()?;
    let vram = map_vram(&device)?;
    let bytes = pattern(BYTES);
    vram.write(0, &bytes)?;
    let copy = |fence| -> Result<Vec<u8>> {
        let mut seen = vec![0; BYTES as usize];
        run(&device, &model, &vram, Descriptor::copy(0, MIB, BYTES, fence))?;
        vram.read(MIB as usize, &mut seen)?;
        Ok(seen)
    };
    ensure!(copy(1)? == bytes, "the copy is wrong");
    ensure!(model.host_checksum(MIB, BYTES)? == checksum(&bytes), "on the host it is");
    model.misbehave(Misbehaviour::AllOnes)?;
    ensure!(copy(2)? == vec![0xff; BYTES as usize], "the copy is not all ones");
    model.behave()?;
    model.misbehave(Misbehaviour::Zeros)?;
    ensure!(copy(5)? == vec![0; BYTES as usize], "the copy is not all zeros");
    model.behave()?;
    ensure!(copy(3)? == bytes, "the copy is wrong again");
    model.misbehave(Misbehaviour::Mirror)?;
    let before: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
    vram.write(MIB as usize, &before)?;
    ensure!(copy(4)? == before, "the engine wrote where the BAR shows it");
    Ok(())
}

fn raised_error_is_latched(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let device = model.open()?;
    device.reset()?;
    ensure!(register(&device, map::STATUS)? == map::STATUS_READY, "it is not ready");
    model.raise_error()?;
    ensure!(register(&device, map::STATUS)? & map::STATUS_ERROR != 0, "its status shows no error");
    ensure!(register(&device, map::ERROR_CODE)? == map::ErrorCode::Injected as u32, "another error");
    set_register(&device, map::ERROR_CODE, 0)?;
    ensure!(register(&device, map::STATUS)? == map::STATUS_READY, "the error stays");
    Ok(())
}

fn removal_reads_all_ones(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let device = model.open()?;
    map_vram(&device)?.write(0, b"still here")?;
    model.remove()?;
    let gone = register(&device, map::IDENTITY);
    let vendor = std::fs::read(format!("/sys/bus/pci/devices/{}/config", model.address()));
    model.insert()?;
    ensure!(gone? == u32::MAX, "a device that is not there answers");
    ensure!(vendor?[..4] == [0xff; 4], "its configuration space answers");
    ensure!(register(&device, map::IDENTITY)? == map::IDENTITY_VALUE, "it is not back");
    ensure!(model.host_bytes(0, 10)? == b"still here", "VRAM was lost");
    Ok(())
}

fn register(device: &Device, offset: u32) -> Result<u32> {
    let mut value = [0; 4];
    device.read(REGISTERS, offset.into(), &mut value)?;
    Ok(u32::from_le_bytes(value))
}

fn set_register(device: &Device, offset: u32, value: u32) -> Result<()> {
    Ok(device.write(REGISTERS, offset.into(), &value.to_le_bytes())?)
}

fn map_vram(device: &Device) -> Result<Arc<Mapping>> {
    Ok(device.map(&DmaRanges::whole(device.region(VRAM)?)?)?)
}

/// Bytes that differ from place to place.
fn pattern(length_bytes: u64) -> Vec<u8> {
    (0..length_bytes).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// One descriptor by hand, in a ring of its own at the end of VRAM.
fn run(device: &Device, model: &Model, vram: &Mapping, descriptor: Descriptor) -> Result<()> {
    let ring = model.vram_bytes() - 4096;
    let set = |offset, value| set_register(device, map::COPY_ENGINE + offset, value);
    set(engine::CONTROL, engine::CONTROL_RESET)?;
    set(engine::RING_ADDRESS_LOW, ring as u32)?;
    set(engine::RING_ADDRESS_HIGH, (ring >> 32) as u32)?;
    set(engine::RING_ENTRIES, 2)?;
    set(engine::CONTROL, engine::CONTROL_ENABLE)?;
    vram.write(ring as usize, bytemuck::bytes_of(&descriptor))?;
    set(engine::TAIL, 1)?;
    let deadline = Instant::now() + PATIENCE;
    while u64::from(register(device, map::COPY_ENGINE + engine::FENCE_LOW)?) != descriptor.fence_value {
        let error = register(device, map::ERROR_CODE)?;
        ensure!(error == 0, "the engine says error {error}");
        ensure!(Instant::now() < deadline, "no fence within {} s", PATIENCE.as_secs());
    }
    Ok(())
}
