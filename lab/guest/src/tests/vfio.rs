//! The exporter on the real kernel: what opens, what exports, and what each refusal says.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, anyhow, ensure};
use peervram::backends::vfio::{Device, DmaBufSupport, Interface, IoAddressSpace};
use peervram::backends::{DmaRange, DmaRanges, Exporter, Importer, Mapping, Source, pci};
use peervram::{Direction, Kind, Outcome, Path, Trust, backends};
use peervram_lab::machine::{self, Facts};

use crate::crossing::{Crossing, VRAM, leaks_nothing, open_device, open_node, refused, scattered};
use crate::guest::Guest;
use crate::test::{Test, Verdict};

/// `VFIO_PCI_CONFIG_REGION_INDEX` of `include/uapi/linux/vfio.h`.
const VFIO_PCI_CONFIG_REGION: u32 = 7;

pub const TESTS: &[Test] = &[
    Test::new("vfio/device-opens-and-describes-itself", device_opens_and_describes_itself),
    Test::new("vfio/device-opens-twice-in-a-row", device_opens_twice_in_a_row),
    Test::new("vfio/second-owner-is-told-who-is-in-the-way", second_owner_is_told),
    Test::new("vfio/what-is-not-bound-is-told-how-to-bind", what_is_not_bound_is_told_how_to_bind),
    Test::new("vfio/crowded-group-names-who-is-in-the-way", crowded_group).on(Facts::has_crowded_group),
    Test::new("vfio/probe-tells-old-kernel-from-able-one", probe_tells_old_kernel_from_able_one),
    Test::new("vfio/old-kernel-is-named", old_kernel_is_named).on(|facts| !facts.exports_dma_bufs()),
    Test::new("vfio/one-range-and-several-export", one_range_and_several_export).on(Facts::exports_dma_bufs),
    Test::new("vfio/absent-tiny-and-foreign-regions-are-refused", wrong_regions_are_refused),
    Test::new("vfio/bar-is-read-and-written-both-ways", bar_is_read_and_written_both_ways),
    Test::new("vfio/memory-off-is-an-error-and-no-signal", memory_off_is_an_error_and_no_signal),
    Test::new("vfio/mapping-keeps-the-device-open", mapping_keeps_the_device_open),
    Test::new("vfio/a-region-that-cannot-be-mapped-takes-no-memory-of-others", refused_mappings_take_nothing)
        .on_any_topology(),
    Test::new("vfio/io-addresses-are-no-buss-by-type1", |guest| io_addresses(guest, Interface::Group)),
    Test::new("vfio/io-addresses-are-no-buss-by-iommufd", |guest| io_addresses(guest, Interface::Cdev)),
    Test::new("vfio/changes-of-the-command-register-take-turns", command_changes_take_turns)
        .on_any_topology(),
    Test::new("vfio/nobody-without-permission-gets-in", nobody_without_permission_gets_in),
    Test::new("vfio/reset-keeps-the-descriptor", reset_keeps_the_descriptor),
];

fn device_opens_and_describes_itself(guest: &Guest) -> Verdict {
    leaks_nothing(|| {
        let device = open_device(guest)?;
        let vram = device.region(VRAM)?;
        ensure!(vram.size_bytes == 256 << 20, "region {VRAM} has {} bytes", vram.size_bytes);
        ensure!(vram.flags.read && vram.flags.write && vram.flags.mmap, "its flags are {:?}", vram.flags);
        ensure!(vram.can_map(0, vram.size_bytes), "it cannot be mapped whole");
        ensure!(device.memory_enabled()?, "its memory is off after opening");
        device.check_reachable()?;
        device.close()?;
        Ok(())
    })
}

/// VFIO's driver refuses to map configuration space, and the kernel asks it after it has emptied a fixed address.
fn refused_mappings_take_nothing(guest: &Guest) -> Verdict {
    const PAGE: usize = 4096;
    let device = Arc::new(open_device(guest)?);
    let config = device.region(VFIO_PCI_CONFIG_REGION)?.file_offset_bytes;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| -> anyhow::Result<()> {
            let mut round = 0_u64;
            while !is_over.load(Ordering::Relaxed) {
                // Many at once, so that each new one lies in the highest hole that there is.
                let held: Vec<Mapping> =
                    (0..64).map(|_| Mapping::of_host_memory(PAGE)).collect::<Result<_, _>>()?;
                for (place, memory) in held.iter().enumerate() {
                    memory.write(8 * place, &(round << 8 | place as u64).to_ne_bytes())?;
                }
                for (place, memory) in held.iter().enumerate() {
                    let mut seen = [0; 8];
                    memory.read(8 * place, &mut seen)?;
                    ensure!(u64::from_ne_bytes(seen) == round << 8 | place as u64, "round {round}, {place}");
                }
                round += 1;
            }
            Ok(())
        });
        let refusals = (0..5000).try_for_each(|_| {
            let mapping = Mapping::new(Arc::clone(&device) as Arc<dyn Source>, &[(config, PAGE as u64)]);
            ensure!(mapping.is_err(), "configuration space was mapped");
            Ok(())
        });
        is_over.store(true, Ordering::Relaxed);
        other.join().map_err(|_| anyhow!("the other thread panicked"))??;
        refusals
    })
}

/// Two threads that switch a bit each find it as they left it: none writes back what the other had changed.
fn command_changes_take_turns(guest: &Guest) -> Verdict {
    const ROUNDS: usize = 300;
    let device = open_device(guest)?;
    // Of the command register, as the kernel shows it to user space: memory decoding, and bus mastering.
    let is_set = |bit: u8| -> anyhow::Result<bool> {
        let mut command = [0; 2];
        device.read(VFIO_PCI_CONFIG_REGION, 4, &mut command)?;
        Ok(command[0] & 1 << bit != 0)
    };
    std::thread::scope(|scope| {
        let mastering = scope.spawn(|| {
            (0..ROUNDS).try_for_each(|round| {
                let on = round % 2 == 0;
                device.set_bus_master(on)?;
                ensure!(is_set(2)? == on, "round {round}: bus mastering is not as it was set");
                Ok(())
            })
        });
        let memory = (0..ROUNDS).try_for_each(|round| {
            let on = round % 2 == 1;
            device.set_memory_enabled(on)?;
            ensure!(is_set(1)? == on, "round {round}: memory decoding is not as it was set");
            Ok(())
        });
        mastering.join().map_err(|_| anyhow!("the other thread panicked"))??;
        memory
    })
}

/// Mappings for DMA lie where the kernel lets the IOMMU of this machine have them, and where no PCI bus answers itself.
fn io_addresses(guest: &Guest, interface: Interface) -> Verdict {
    let space = match IoAddressSpace::new(interface) {
        // Debian's kernels have no iommufd.
        Err(error) if error.kind() == Kind::NotFound => crate::skip!("{error}"),
        other => other?,
    };
    let _device = Device::open_into(&space, guest.lender()?.parse()?)?;
    let usable = space.usable_iovas()?;
    let last = usable.iter().map(|range| *range.end()).max().context("no address is usable")?;
    // Before a device is in it, or if nobody asked, it would be all addresses.
    ensure!(last < 1 << 57, "addresses up to {last:#x} are beyond any IOMMU");

    let bars = pci::Function::all()?.into_iter().flat_map(|function| function.bars);
    let bars: Vec<_> = bars
        .filter(|bar| bar.is_memory && bar.size_bytes > 0)
        .map(|bar| bar.address..=bar.address + (bar.size_bytes - 1))
        .collect();
    let iomem = std::fs::read_to_string("/proc/iomem")?;
    let windows = iomem.lines().filter(|line| line.contains("PCI Bus")).map(|line| {
        let (start, rest) = line.trim().split_once('-').context("a line without a range")?;
        let (last, _) = rest.split_once(' ').context("a line without a name")?;
        Ok(u64::from_str_radix(start, 16)?..=u64::from_str_radix(last, 16)?)
    });
    let windows: Vec<_> = windows.collect::<anyhow::Result<_>>()?;
    ensure!(!bars.is_empty() && !windows.is_empty(), "the machine has no PCI memory");
    let meets =
        |a: &RangeInclusive<u64>, b: &RangeInclusive<u64>| a.start() <= b.end() && b.start() <= a.end();
    for taken in bars.iter().chain(&windows) {
        ensure!(usable.iter().all(|range| !meets(range, taken)), "{taken:x?} is a bus's and in {usable:x?}");
    }

    let mappings = (0..3).map(|_| space.stage(4 << 20)).collect::<Result<Vec<_>, _>>()?;
    for mapping in &mappings {
        let (first, last) = (mapping.iova(), mapping.iova() + (mapping.len() - 1));
        let is_inside = |range: &RangeInclusive<u64>| range.contains(&first) && range.contains(&last);
        ensure!(usable.iter().any(is_inside), "{first:#x} to {last:#x} is not in {usable:x?}");
    }
    Ok(())
}

fn device_opens_twice_in_a_row(guest: &Guest) -> Verdict {
    for _ in 0..2 {
        open_device(guest)?.close()?;
    }
    Ok(())
}

fn second_owner_is_told(guest: &Guest) -> Verdict {
    let _first = open_device(guest)?;
    leaks_nothing(|| {
        let error = refused(Device::open(guest.lender()?.parse()?), Kind::Busy)?;
        ensure!(error.next_step().is_some(), "no next step: {error}");
        Ok(())
    })
}

fn what_is_not_bound_is_told_how_to_bind(guest: &Guest) -> Verdict {
    let gpu = guest.virtio_gpu()?;
    leaks_nothing(|| {
        let error = refused(Device::open(gpu.parse()?), Kind::NotBoundToVfio)?;
        let text = error.to_string();
        ensure!(text.contains("virtio-pci") && text.contains(&format!("peervram bind {gpu}")), "{text}");
        refused(Device::open("0000:7f:1f.7".parse()?), Kind::NotFound)?;
        Ok(())
    })
}

fn crowded_group(guest: &Guest) -> Verdict {
    let is_crowded = |device: &machine::Device| *device == machine::Device::CrowdedGroup;
    let device = guest.facts().devices.iter().position(is_crowded).context("this machine has none")?;
    let address = guest.address_of(device)?;
    guest.bind(&address, "vfio-pci")?;
    let neighbour = format!("{}.1", address.trim_end_matches(".0"));
    leaks_nothing(|| {
        let error = refused(Device::open(address.parse()?), Kind::GroupNotViable)?;
        let text = error.to_string();
        ensure!(text.contains(&neighbour) && text.contains("virtio-pci"), "{text}");
        Ok(())
    })
}

fn probe_tells_old_kernel_from_able_one(guest: &Guest) -> Verdict {
    let expected = if guest.facts().exports_dma_bufs() {
        DmaBufSupport::Supported
    } else {
        DmaBufSupport::KernelLacksIt
    };
    let seen = open_device(guest)?.dma_buf_support()?;
    ensure!(seen == expected, "the probe says {seen:?}");
    Ok(())
}

fn old_kernel_is_named(guest: &Guest) -> Verdict {
    leaks_nothing(|| {
        let device = open_device(guest)?;
        let ranges = DmaRanges::whole(device.region(VRAM)?)?;
        let error = refused(device.export(&ranges), Kind::KernelTooOld)?;
        let text = error.to_string();
        ensure!(text.contains("6.12") && text.contains("6.19"), "{text}");
        Ok(())
    })
}

fn one_range_and_several_export(guest: &Guest) -> Verdict {
    leaks_nothing(|| {
        let device = open_device(guest)?;
        let whole = device.export(&DmaRanges::whole(device.region(VRAM)?)?)?;
        ensure!(whole.size_bytes() == 256 << 20, "the whole is {} bytes", whole.size_bytes());
        let several = device.export(&scattered(&device, 5 << 20, 7)?)?;
        ensure!(several.size_bytes() >= 5 << 20, "seven ranges are {} bytes", several.size_bytes());
        ensure!(whole.inode()? != several.inode()?, "two exports are one dma-buf");
        several.close();
        whole.close();
        Ok(())
    })
}

fn wrong_regions_are_refused(guest: &Guest) -> Verdict {
    leaks_nothing(|| {
        let device = open_device(guest)?;
        refused(device.region(4), Kind::NotFound)?;
        // QEMU's ivshmem has 256 bytes of registers in BAR 0: smaller than a page.
        let tiny = device.region(0)?;
        ensure!(tiny.size_bytes == 256, "BAR 0 has {} bytes", tiny.size_bytes);
        ensure!(
            DmaRanges::whole(tiny).is_err_and(|error| error.kind() == Kind::InvalidInput),
            "256 bytes pass"
        );
        // Configuration space is a region too, of at least 256 bytes; a page of a larger one is no BAR.
        let mut configuration = device.region(7)?.clone();
        configuration.size_bytes = 4096;
        let ranges = DmaRanges::new(&configuration, &[DmaRange::new(0, 4096)])?;
        refused(device.export(&ranges), Kind::InvalidInput)?;
        Ok(())
    })
}

fn bar_is_read_and_written_both_ways(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    let ranges = scattered(&device, 64 << 10, 3)?;
    let mapping = device.map(&ranges)?;
    let pattern: Vec<u8> = (0..mapping.len()).map(|i| (i * 7 + i / 251) as u8).collect();
    mapping.write(0, &pattern)?;
    // The same bytes through the descriptor, range by range.
    let mut at = 0;
    for range in ranges.as_slice() {
        let mut bytes = vec![0; range.length_bytes as usize];
        device.read(VRAM, range.offset_bytes, &mut bytes)?;
        ensure!(bytes == pattern[at..at + bytes.len()], "the range at {:#x} differs", range.offset_bytes);
        at += bytes.len();
    }
    device.write(VRAM, ranges.as_slice()[0].offset_bytes, b"written by the descriptor")?;
    let mut seen = [0; 25];
    mapping.read(0, &mut seen)?;
    ensure!(&seen == b"written by the descriptor", "the mapping shows {seen:?}");
    ensure!(
        device
            .read(VRAM, (256 << 20) - 4, &mut [0; 8])
            .is_err_and(|error| error.kind() == Kind::InvalidInput),
        "a read beyond the end worked"
    );
    Ok(())
}

fn memory_off_is_an_error_and_no_signal(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    let mapping = device.map(&DmaRanges::new(device.region(VRAM)?, &[DmaRange::new(0, 4096)])?)?;
    mapping.write(0, &[1, 2, 3, 4])?;
    // As a lender has it: what is mapped is shadow memory before the memory goes, or the first touch would be SIGBUS.
    device.shadow()?;
    device.set_memory_enabled(false)?;
    let read = refused(device.read(VRAM, 0, &mut [0; 4]), Kind::MemoryDisabled);
    let reachable = refused(device.check_reachable(), Kind::MemoryDisabled);
    let mut through_mapping = [0; 4];
    let touched = mapping.read(0, &mut through_mapping).and_then(|()| mapping.write(0, &[5, 6, 7, 8]));
    device.set_memory_enabled(true)?;
    device.unshadow()?;
    ensure!(read?.raw_os_error() == Some(5), "the errno is not EIO");
    reachable?;
    touched?;
    ensure!(through_mapping == [0xFF; 4], "with the memory off the mapping shows {through_mapping:?}");
    device.check_reachable()?;
    let mut seen = [0; 4];
    device.read(VRAM, 0, &mut seen)?;
    ensure!(seen == [1, 2, 3, 4], "the memory was lost: {seen:?}");
    mapping.read(0, &mut seen)?;
    ensure!(seen == [1, 2, 3, 4], "the mapping shows something else afterwards: {seen:?}");
    Ok(())
}

fn mapping_keeps_the_device_open(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    let mapping = device.map(&scattered(&device, 4096, 1)?)?;
    let Err(kept) = device.close() else { anyhow::bail!("closed under a mapping") };
    let (device, error) = kept.into_parts();
    ensure!(error.kind() == Kind::StillInUse, "{error}");
    drop(mapping);
    device.close()?;
    open_device(guest)?;
    Ok(())
}

fn nobody_without_permission_gets_in(guest: &Guest) -> Verdict {
    let address = guest.lender()?.parse()?;
    // This test is a process of its own, so it can give its privileges away.
    let nobody = rustix::process::Uid::from_raw(65534);
    rustix::thread::set_thread_uid(nobody)?;
    leaks_nothing(|| {
        let error = refused(Device::open(address), Kind::PermissionDenied)?;
        ensure!(error.next_step().is_some(), "no next step: {error}");
        Ok(())
    })
}

fn reset_keeps_the_descriptor(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let before = crossing.export.dma_buf().map(backends::DmaBuf::inode);
    match crossing.lender.reset(crate::crossing::PATIENCE) {
        Err(error) if error.kind() == Kind::Unsupported => crate::skip!("{error}"),
        other => other?,
    }
    if let Ok(inode) = before {
        let after = crossing.export.dma_buf().map_err(Clone::clone)?.inode()?;
        ensure!(inode? == after, "the dma-buf is another one");
    }
    ensure!(crossing.export.generation() == 1, "the generation is {}", crossing.export.generation());
    // The same descriptor is good for an import after the reset; what it shows is `drm/import-again-after-reset`.
    if guest.facts().allows_peers() {
        let attachment = crossing.export.attach(open_node(guest)?, Trust::Unverified)?;
        ensure!(attachment.path() == Path::Peer, "the path is {}", attachment.path());
        let outcome = attachment.enter(Direction::Read)?.finish();
        ensure!(outcome == Outcome::Ok, "the access is torn");
        attachment.detach()?;
    }
    crossing.close()
}
