//! Coherent memory: GPUs under the kernel's nvgrace driver, whose memory is memory of the machine.
//!
//! What takes it back is in [`revoke::coherent`](super::revoke).

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peervram::backends::drm::ScanOut;
use peervram::backends::vfio::{self, Interface, IoAddressSpace};
use peervram::backends::vulkan::{self, Engine, Instance, Selector, checksum};
use peervram::backends::{
    Aperture, CpuAccess, DmaRange, DmaRanges, Exporter, Mapping, RawBytes, page_size_bytes,
};
use peervram::nvgrace::{BLOCK_BYTES, DRIVER, Device, RESERVED_REGION, USABLE_REGION, Use};
use peervram::{Direction, Kind, Lender, Outcome, Path, Trust};
use peervram_lab::machine::{Architecture, Facts, Firmware, Grace};
use peervram_lab::wire::SHARE;
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model_driver::{Descriptor, ModelGpu};
use peervram_programs::bytes;
use peervram_programs::picture::Picture;
use serde_json::Value;

use crate::blocks;
use crate::crossing::{Crossing, PATIENCE, check_screen, leaks_nothing, open_node, refused};
use crate::guest::Guest;
use crate::model::Model;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    // The first: where the base is another, all below would be about the kernel's own memory.
    Test::of_grace("nvgrace/the-memory-is-where-the-firmware-says", memory_is_where_the_firmware_says),
    Test::of_grace("nvgrace/regions-are-what-they-are", regions_are_what_they_are),
    Test::of_grace("nvgrace/devices-prints-the-memory-map", devices_prints_the_memory_map),
    Test::of_grace("nvgrace/commands-lend-it-and-show-what-is-waited-for", commands_lend_it),
    Test::of_grace("nvgrace/usable-memory-crosses-pixel-by-pixel", usable_memory_crosses),
    Test::of_grace("nvgrace/reserved-memory-crosses-pixel-by-pixel", reserved_memory_crosses)
        .on(|facts| facts.has_reserved_memory()),
    Test::of_grace("nvgrace/shaders-read-and-paint-it-by-host-pointer", shaders_read_and_paint)
        .on(|facts| facts.vulkan),
    Test::of_grace("nvgrace/its-own-engine-and-the-cpu-see-one-memory", engine_and_cpu_see_one_memory),
    Test::of_grace("nvgrace/another-gpu-copies-both-ways-by-iommufd", both_ways_by_iommufd)
        .on(Facts::has_peers_by_iommufd),
    Test::of_grace("nvgrace/another-gpu-copies-both-ways-by-type1", both_ways_by_type1),
    Test::of_grace("nvgrace/another-gpu-copies-reserved-memory-both-ways", both_ways_of_reserved)
        .on(|facts| facts.has_reserved_memory()),
    Test::of_grace("nvgrace/ranges-beyond-the-memory-are-refused", ranges_beyond_are_refused),
    Test::of_grace("nvgrace/ranges-across-the-border-are-refused", ranges_across_are_refused)
        .on(|facts| facts.has_reserved_memory()),
    Test::of_grace("nvgrace/what-the-firmware-does-not-name-is-a-plain-device", unnamed_is_plain),
    Test::of_grace("nvgrace/an-id-in-no-table-is-a-plain-device", unknown_id_is_plain),
    Test::of_grace("nvgrace/under-vfio-pci-it-is-refused-with-a-next-step", under_vfio_pci_it_is_refused),
    // What the driver says of its probe.
    Test::of_grace("nvgrace/a-link-that-never-comes-up-keeps-the-driver-away", link_never_comes_up)
        .on_any_topology()
        .allowing(&["probe with driver nvgrace_gpu_vfio_pci failed"]),
];

/// The GPU that is as it should be.
pub fn grace(guest: &Guest) -> Result<(Model<'_>, Grace)> {
    of_firmware(guest, Firmware::NamesMemory)
}

fn of_firmware(guest: &Guest, firmware: Firmware) -> Result<(Model<'_>, Grace)> {
    let mut all = guest.graces()?;
    let at = all.iter().position(|(_, grace)| grace.firmware == firmware);
    Ok(all.swap_remove(at.with_context(|| format!("this machine has no GPU whose firmware {firmware:?}"))?))
}

/// Opens it; a model is ready at once.
pub fn open(model: &Model<'_>) -> Result<Device> {
    let mut waits = 0;
    let device = Device::open(model.address(), &mut |_| waits += 1)?;
    ensure!(waits == 0, "a GPU that is ready was waited for");
    Ok(device)
}

/// Where in the GPU's memory a region begins: the reserved memory lies right behind the usable one.
fn start_bytes(device: &Device, region: u32) -> Result<u64> {
    if region == RESERVED_REGION { Ok(device.usable()?.length_bytes) } else { Ok(0) }
}

fn ranges(device: &Device, region: u32, offset_bytes: u64, length_bytes: u64) -> Result<DmaRanges> {
    Ok(DmaRanges::new(device.region(region)?, &[DmaRange::new(offset_bytes, length_bytes)])?)
}

fn view(device: &Device, region: u32, offset_bytes: u64, length_bytes: u64) -> Result<Arc<Mapping>> {
    Ok(device.map(&ranges(device, region, offset_bytes, length_bytes)?)?)
}

fn pattern(seed: u64, length_bytes: u64) -> Vec<u8> {
    (0..length_bytes).map(|i| (i * 13 + i / 253 + seed) as u8).collect()
}

/// What is written to a region's first, middle and last page is what the host has there, and nothing else is.
fn memory_is_where_the_firmware_says(guest: &Guest) -> Verdict {
    let (model, _) = grace(guest)?;
    let device = open(&model)?;
    let page = page_size_bytes();
    for memory in device.memories() {
        let index = memory.region_index;
        for offset_bytes in [0, memory.length_bytes / 2, memory.length_bytes - page] {
            let bytes = pattern(offset_bytes / page + u64::from(index), page);
            view(&device, index, offset_bytes, page)?.write(0, &bytes)?;
            let at = start_bytes(&device, index)? + offset_bytes;
            ensure!(
                model.host_bytes(at, page)? == bytes,
                "page {offset_bytes:#x} of region {index} is not what the host has at {at:#x}"
            );
        }
    }
    let between = model.host_checksum(page, device.usable()?.length_bytes / 2 - page)?;
    ensure!(between == 0, "what nobody wrote is no longer zeros: {between:08x}");
    Ok(())
}

fn regions_are_what_they_are(guest: &Guest) -> Verdict {
    const GIB: u64 = 1 << 30;
    let (model, facts) = grace(guest)?;
    let device = open(&model)?;
    let all_bytes = model.vram_bytes();
    let known = device.part().map(|part| part.device_id);
    ensure!(known == (!facts.has_cxl).then_some(facts.id.device), "it is taken for {:?}", device.part());
    ensure!(device.fall_back().is_none(), "{:?}", device.fall_back());

    let usable = device.usable()?;
    let usable_bytes =
        if facts.has_mig_bug { (all_bytes - GIB) / BLOCK_BYTES * BLOCK_BYTES } else { all_bytes };
    ensure!(usable.used_for == Use::Usable && usable.length_bytes == usable_bytes, "{usable:x?}");
    ensure!(usable.reported_bytes.is_power_of_two() && usable.reported_bytes > usable_bytes, "{usable:x?}");
    ensure!(usable.cpu_access() == CpuAccess::Cached, "{usable:x?}");
    let reserved = device.memory(RESERVED_REGION);
    ensure!(reserved.is_some() == facts.has_mig_bug, "{reserved:x?}");
    if let Some(reserved) = reserved {
        ensure!(reserved.length_bytes == all_bytes - usable_bytes, "{reserved:x?}");
        ensure!(
            reserved.length_bytes >= GIB && reserved.cpu_access() == CpuAccess::WriteCombined,
            "{reserved:x?}"
        );
        ensure!(usable.length_bytes % BLOCK_BYTES == 0, "{usable:x?}");
    }
    for memory in device.memories() {
        let index = memory.region_index;
        ensure!(device.region(index)?.size_bytes == memory.length_bytes, "region {index} is as reported");
        ensure!(device.provider_bar(index) == 0, "the provider of region {index} is another BAR's");
        ensure!(device.as_ref().region(index)?.size_bytes == memory.reported_bytes, "region {index}");
        // The driver's word for what is not there.
        let mut bytes = [0; 8];
        device.as_ref().write(index, memory.length_bytes, b"dropped.")?;
        device.as_ref().read(index, memory.length_bytes, &mut bytes)?;
        ensure!(bytes == [0xff; 8], "beyond the memory is {bytes:x?}");
    }
    ensure!(device.provider_bar(0) == 0 && device.cpu_access(0) == CpuAccess::Uncached, "region 0");
    Ok(())
}

/// Runs the command line; what it says on standard output.
fn peervram(arguments: &[&str]) -> Result<String> {
    let output =
        Command::new(format!("{SHARE}/peervram")).args(arguments).output().context("starting peervram")?;
    let (said, complaint) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "peervram {arguments:?}: {}\n{said}{complaint}", output.status);
    Ok(said.into_owned())
}

fn devices_prints_the_memory_map(guest: &Guest) -> Verdict {
    let (model, facts) = grace(guest)?;
    let memories = open(&model)?.memories().to_vec();
    let text = peervram(&["devices", "--open"])?;
    let name = if facts.has_cxl { "a GPU that is in no table" } else { "coherent with the CPU: G" };
    for line in [
        name,
        "usable, cached; 1 GiB reported, peer-to-peer as BAR 0",
        "ATS     absent",
        "EGM     this kernel",
    ] {
        ensure!(text.contains(line), "{line:?} is not in\n{text}");
    }
    let reserved = "reserved, write-combined; 2 GiB reported, peer-to-peer as BAR 0";
    ensure!(text.contains(reserved) == facts.has_mig_bug, "{text}");
    let silent = text.matches("the firmware names no memory of it").count();
    ensure!(silent == 2, "of two GPUs the firmware names no memory, {silent} say so:\n{text}");
    let closed = peervram(&["devices"])?;
    ensure!(closed.contains("--open shows it"), "it does not say how to see the memory:\n{closed}");
    let words = match guest.facts().architecture {
        Architecture::X86 => "yes: coherent memory, if the firmware names any; else BAR".to_owned(),
        Architecture::Arm64 => format!("yes: {} of coherent memory", bytes::in_words(model.vram_bytes())),
    };
    ensure!(closed.contains(&words), "{words:?} is not in\n{closed}");

    let said: Value = serde_json::from_str(&peervram(&["devices", "--open", "--json"])?)?;
    let device = said["devices"].as_array().context("no devices")?.iter();
    let device = device.clone().find(|device| device["address"] == model.address().to_string().as_str());
    let device = device.context("the GPU is not listed")?;
    let listed = device["coherent"]["memories"].as_array().context("no memories")?;
    ensure!(listed.len() == memories.len(), "{listed:?}");
    for memory in memories {
        let one =
            listed.iter().find(|one| one["region"] == memory.region_index).context("a region is missing")?;
        ensure!(one["length_bytes"] == memory.length_bytes, "{one}");
        ensure!(one["reported_bytes"] == memory.reported_bytes, "{one}");
        ensure!(one["whole_blocks"] == memory.length_bytes / BLOCK_BYTES, "{one}");
    }
    ensure!(device["lend"]["can"] == true, "{device}");
    Ok(())
}

fn commands_lend_it(guest: &Guest) -> Verdict {
    let (model, _) = grace(guest)?;
    let address = model.address().to_string();
    let length_bytes = open(&model)?.usable()?.length_bytes;
    let exported: Value = serde_json::from_str(&peervram(&["export", &address, "--json"])?)?;
    ensure!(exported["region"] == 4 && exported["size_bytes"] == length_bytes, "{exported}");
    model.misbehave(Misbehaviour::SlowReady { ms: 3000 })?;
    let said = peervram(&["reset", &address])?;
    let told = said.lines().filter(|line| line.contains("not-ready") && line.contains("of at most")).count();
    ensure!(told >= 3 && said.contains("restored"), "it says\n{said}");
    Ok(())
}

fn usable_memory_crosses(guest: &Guest) -> Verdict {
    crosses(guest, USABLE_REGION)
}

fn reserved_memory_crosses(guest: &Guest) -> Verdict {
    crosses(guest, RESERVED_REGION)
}

fn crosses(guest: &Guest, region: u32) -> Verdict {
    let (model, _) = grace(guest)?;
    leaks_nothing(|| {
        let device = open(&model)?;
        let at = start_bytes(&device, region)?;
        let crossing = Crossing::lend(device, region, 1, Arc::new(RawBytes))?;
        let attachment = crossing.export.attach(open_node(guest)?, Trust::Unverified)?;
        ensure!(attachment.path() == Path::Peer, "the path is {}", attachment.path());
        let access = attachment.enter(Direction::Read)?;
        let scan_out = ScanOut::start(access.memory(), crossing.layout())?;
        check_screen(&guest.screendump()?, &crossing.card)?;
        drop(scan_out);
        ensure!(access.finish() == Outcome::Ok, "the access is torn");
        let bytes = crossing.card.bytes();
        let sum = model.host_checksum(at, bytes.len() as u64)?;
        ensure!(sum == checksum(bytes), "the host has other bytes than the screen: {sum:08x}");
        attachment.detach()?;
        crossing.close()
    })
}

fn shaders_read_and_paint(guest: &Guest) -> Verdict {
    // Shaders are compiled at their first use, by a CPU that is itself emulated.
    const SLOW: Duration = Duration::from_secs(50);
    let (model, _) = grace(guest)?;
    let crossing = Crossing::lend(open(&model)?, USABLE_REGION, 1, Arc::new(RawBytes))?;
    let vulkan = Arc::new(Instance::open()?.open_device(&Selector::Any)?);
    let attachment = crossing.export.attach(vulkan, Trust::Unverified)?;
    ensure!(attachment.path() == Path::HostPointer, "the path is {}", attachment.path());
    let layout = crossing.layout();
    let access = attachment.enter(Direction::Both)?;
    let mut engine = Engine::new(attachment.importer())?;
    let sum = engine.checksum(access.memory(), 0..layout.end_bytes(), Instant::now() + SLOW)?;
    ensure!(sum == checksum(crossing.card.bytes()), "the shader sees other bytes: {sum:08x}");

    engine.paint(access.memory(), &layout, 7, Instant::now() + SLOW)?;
    let mut painted = crossing.card.bytes().to_vec();
    vulkan::paint(&mut painted, &layout, 7)?;
    let sum = model.host_checksum(0, painted.len() as u64)?;
    ensure!(sum == checksum(&painted), "the host has other bytes than were painted: {sum:08x}");
    ensure!(crossing.seen()? == Picture::new(640, 480, painted)?, "the owner does not see what was painted");
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    attachment.detach()?;
    drop(engine);
    crossing.close()
}

/// The GPU's rings lie in region 4, too.
fn engine_and_cpu_see_one_memory(guest: &Guest) -> Verdict {
    const SIZE_BYTES: u64 = 1 << 20;
    let (model, _) = grace(guest)?;
    let device = open(&model)?;
    let engine = ModelGpu::with_memory(device.as_ref(), device.region(USABLE_REGION)?)?;
    let [filled, written, copied] = [32, 48, 64].map(|mib| mib << 20);
    blocks::fill(&engine, 1, 0, SIZE_BYTES, filled)?;
    let mut seen = vec![0; SIZE_BYTES as usize];
    view(&device, USABLE_REGION, filled, SIZE_BYTES)?.read(0, &mut seen)?;
    ensure!(seen == blocks::bytes(1, 0, SIZE_BYTES), "the CPU sees other bytes");
    let bytes = pattern(3, SIZE_BYTES);
    view(&device, USABLE_REGION, written, SIZE_BYTES)?.write(0, &bytes)?;
    engine.copy(Descriptor::copy(written, copied, SIZE_BYTES, 0), PATIENCE)?;
    let sum = model.host_checksum(copied, SIZE_BYTES)?;
    ensure!(sum == checksum(&bytes), "the engine has copied other bytes: {sum:08x}");
    Ok(())
}

fn both_ways_by_iommufd(guest: &Guest) -> Verdict {
    both_ways(guest, Interface::Cdev, USABLE_REGION)
}

fn both_ways_by_type1(guest: &Guest) -> Verdict {
    both_ways(guest, Interface::Group, USABLE_REGION)
}

fn both_ways_of_reserved(guest: &Guest) -> Verdict {
    both_ways(guest, interface_of_peers(guest), RESERVED_REGION)
}

/// By which another GPU reaches the memory on this machine.
pub fn interface_of_peers(guest: &Guest) -> Interface {
    if guest.facts().has_peers_by_iommufd() { Interface::Cdev } else { Interface::Group }
}

/// The engine of a second GPU writes into the memory and reads it back to another place of its own.
fn both_ways(guest: &Guest, interface: Interface, region: u32) -> Verdict {
    const SIZE_BYTES: u64 = 64 << 20;
    let (model, other_model) = (grace(guest)?.0, guest.model(0)?);
    let space = IoAddressSpace::new(Interface::Cdev)?;
    let device = Device::open_into(&space, model.address(), &mut |_| ())?;
    // Not at its beginning, and not at a multiple of its own size.
    let offset_bytes = 16 << 20;
    let at = start_bytes(&device, region)? + offset_bytes;
    let lent = ranges(&device, region, offset_bytes, SIZE_BYTES)?;
    let view = device.map(&lent)?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(lent, Arc::new(RawBytes)))?;

    let space = IoAddressSpace::new(interface)?;
    let other_device = vfio::Device::open_into(&space, other_model.address())?;
    let other = ModelGpu::new(&other_device)?;
    let attachment = export.attach(Arc::new(space), Trust::Unverified)?;
    blocks::fill(&other, 2, 0, SIZE_BYTES, 0)?;
    let access = attachment.enter(Direction::Both)?;
    other.write_dma(0, access.memory().iova(), SIZE_BYTES, PATIENCE)?;
    other.read_dma(access.memory().iova(), 2 * SIZE_BYTES, SIZE_BYTES, PATIENCE)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");

    let expected = checksum(&blocks::bytes(2, 0, SIZE_BYTES));
    let mut seen = vec![0; SIZE_BYTES as usize];
    view.read(0, &mut seen)?;
    let sums = [
        ("the lender's region", checksum(&seen)),
        ("the host, of the lender", model.host_checksum(at, SIZE_BYTES)?),
        ("the host, of what came back", other_model.host_checksum(2 * SIZE_BYTES, SIZE_BYTES)?),
    ];
    for (who, sum) in sums {
        ensure!(sum == expected, "{who} has {sum:08x}, not {expected:08x}");
    }
    Ok(())
}

fn ranges_beyond_are_refused(guest: &Guest) -> Verdict {
    let (model, _) = grace(guest)?;
    let device = open(&model)?;
    let page = page_size_bytes();
    for memory in device.memories() {
        let (index, end) = (memory.region_index, memory.length_bytes);
        let beyond = [DmaRange::new(end, page)];
        let refusal =
            DmaRanges::new(device.region(index)?, &beyond).err().context("a range beyond it is one")?;
        ensure!(refusal.kind() == Kind::InvalidInput && refusal.next_step().is_some(), "{refusal}");
        // Inside what the driver reports, so only who knows the family can refuse it in words.
        let reported = DmaRanges::new(device.as_ref().region(index)?, &beyond)?;
        for refusal in [
            refused(device.export(&reported), Kind::InvalidInput)?,
            refused(device.map(&reported), Kind::InvalidInput)?,
        ] {
            ensure!(refusal.why().contains("ends beyond the memory"), "{refusal}");
        }
        // A plain `vfio::Device` does not know where the memory ends; its error has the kernel's errno and no wrong reason.
        let refusal = refused(device.as_ref().export(&reported), Kind::InvalidInput)?;
        ensure!(refusal.raw_os_error() == Some(22), "{refusal}");
        device.export(&ranges(&device, index, end - page, page)?)?;
    }
    Ok(())
}

fn ranges_across_are_refused(guest: &Guest) -> Verdict {
    let (model, _) = grace(guest)?;
    let device = open(&model)?;
    let (page, end) = (page_size_bytes(), device.usable()?.length_bytes);
    let across = [DmaRange::new(end - page, 2 * page)];
    let across = DmaRanges::new(device.as_ref().region(USABLE_REGION)?, &across)?;
    let refusal = refused(device.export(&across), Kind::InvalidInput)?;
    ensure!(refusal.why().contains("what follows is reserved, in region 2"), "{refusal}");
    refused(device.map(&across), Kind::InvalidInput)?;
    refused(device.as_ref().export(&across), Kind::InvalidInput)?;
    Ok(())
}

/// Neither where the firmware is silent nor where it says that there are no bytes, as of a link that is down.
fn unnamed_is_plain(guest: &Guest) -> Verdict {
    for firmware in [Firmware::NamesNone, Firmware::NamesNoBytes] {
        let (model, _) = of_firmware(guest, firmware)?;
        let device = open(&model)?;
        ensure!(device.memories().is_empty(), "{firmware:?}: {:x?}", device.memories());
        let why = device.fall_back().context("no word on why")?;
        ensure!(why.contains("nvidia,gpu-mem-size") && why.contains("C2C link"), "{why}");
        let error = refused(device.usable(), Kind::NotFound)?;
        ensure!(error.next_step().is_some(), "{error}");
        lends_its_bars(&model, device)?;
    }
    Ok(())
}

fn unknown_id_is_plain(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let address = model.address().to_string();
    guest.bind(&address, DRIVER)?;
    let result = (|| {
        let device = open(&model)?;
        ensure!(device.part().is_none() && device.fall_back().is_some(), "{:?}", device.part());
        ensure!(device.memories().is_empty(), "{:x?}", device.memories());
        ensure!(
            device.region(RESERVED_REGION)?.size_bytes == model.vram_bytes(),
            "its BAR 2 has another size"
        );
        lends_its_bars(&model, device)
    })();
    guest.bind(&address, "vfio-pci")?;
    result
}

/// As a device under vfio-pci does.
fn lends_its_bars(model: &Model<'_>, device: Device) -> Result<()> {
    let bar = RESERVED_REGION;
    let function = model.function()?;
    let size_bytes = function.bar(bar).context("it has no BAR 2")?.size_bytes;
    ensure!(device.region(bar)?.size_bytes == size_bytes, "region 2 is not BAR 2");
    ensure!(device.cpu_access(bar) == CpuAccess::Uncached && device.provider_bar(bar) == bar, "BAR 2");
    let view = view(&device, bar, 0, 4096)?;
    view.write(0, b"plain")?;
    let lender = Lender::new(device);
    let all = DmaRanges::whole(lender.device().region(bar)?)?;
    let export = lender.export(Aperture::owned(all, Arc::new(RawBytes)))?;
    ensure!(export.dma_buf().is_ok_and(|buffer| buffer.size_bytes() == size_bytes), "no dma-buf of BAR 2");
    Ok(())
}

fn under_vfio_pci_it_is_refused(guest: &Guest) -> Verdict {
    let (model, _) = of_firmware(guest, Firmware::NamesNone)?;
    let address = model.address().to_string();
    guest.bind(&address, "vfio-pci")?;
    let result = refused(Device::open(model.address(), &mut |_| ()), Kind::Unsupported);
    guest.bind(&address, DRIVER)?;
    let error = result?;
    ensure!(error.next_step().is_some_and(|next| next.contains(DRIVER)), "{error}");
    Ok(())
}

/// The driver waits when it is bound, and gives the GPU up with the reason in the kernel's log.
fn link_never_comes_up(guest: &Guest) -> Verdict {
    let (model, _) = of_firmware(guest, Firmware::NamesNone)?;
    let address = model.address();
    fs::write(address.sysfs_path().join("driver/unbind"), address.to_string())?;
    model.misbehave(Misbehaviour::StuckReady)?;
    let begin = Instant::now();
    let bound = guest.bind(&address.to_string(), DRIVER);
    let took = begin.elapsed().as_secs();
    let error = Device::open(address, &mut |_| ());
    model.behave()?;
    guest.bind(&address.to_string(), DRIVER)?;
    let limit = if guest.facts().has_cxl() { 16 } else { 30 };
    ensure!(bound.is_err() && took >= limit, "bound after {took} s: {bound:?}");
    let error = refused(error, Kind::NotBoundToVfio)?;
    ensure!(error.next_step().is_some(), "{error}");
    open(&model).map(drop)
}
