//! Coherent memory: GPUs under the kernel's nvgrace driver, whose memory is memory of the machine.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use peervram::backends::vulkan::checksum;
use peervram::backends::{DmaRange, DmaRanges, Exporter, Mapping, page_size_bytes};
use peervram::nvgrace::{Device, RESERVED_REGION, USABLE_REGION};
use peervram_lab::machine::{Firmware, Grace};

use crate::guest::Guest;
use crate::model::Model;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    // The first: where the base is another, all below would be about the kernel's own memory.
    Test::of_grace("nvgrace/the-memory-is-where-the-firmware-says", memory_is_where_the_firmware_says),
];

/// The GPU that is as it should be.
fn grace(guest: &Guest) -> Result<(Model<'_>, Grace)> {
    let mut all = guest.graces()?;
    let at = all.iter().position(|(_, grace)| grace.firmware == Firmware::NamesMemory);
    Ok(all.swap_remove(at.context("this machine has no GPU whose memory the firmware names")?))
}

/// Opens it; a model is ready at once.
fn open(model: &Model<'_>) -> Result<Device> {
    let mut waits = 0;
    let device = Device::open(model.address(), &mut |_| waits += 1)?;
    ensure!(waits == 0, "a GPU that is ready was waited for");
    Ok(device)
}

/// Maps `length_bytes` of a region, and says where in the GPU's memory they are.
fn view(device: &Device, region: u32, offset_bytes: u64, length_bytes: u64) -> Result<(Arc<Mapping>, u64)> {
    let ranges = DmaRanges::new(device.region(region)?, &[DmaRange::new(offset_bytes, length_bytes)])?;
    let start_bytes = match region {
        // Right behind the usable memory.
        RESERVED_REGION => device.usable()?.length_bytes,
        _ => 0,
    };
    Ok((device.map(&ranges)?, start_bytes + offset_bytes))
}

fn pattern(seed: u64, length_bytes: u64) -> Vec<u8> {
    (0..length_bytes).map(|i| (i * 13 + i / 253 + seed) as u8).collect()
}

/// What is written by a region's first and last page is what the host has there, and the other way round.
fn memory_is_where_the_firmware_says(guest: &Guest) -> Verdict {
    let (model, _) = grace(guest)?;
    let device = open(&model)?;
    let page = page_size_bytes();
    for memory in device.memories() {
        for offset_bytes in [0, memory.length_bytes / 2 / page * page, memory.length_bytes - page] {
            let (view, at) = view(&device, memory.region_index, offset_bytes, page)?;
            let bytes = pattern(offset_bytes / page + u64::from(memory.region_index), page);
            view.write(0, &bytes)?;
            ensure!(
                model.host_bytes(at, page)? == bytes,
                "page {offset_bytes:#x} of region {} is not what the host has at {at:#x}",
                memory.region_index
            );
        }
    }
    // Nothing else was written.
    let usable = device.usable()?;
    let between = model.host_checksum(page, usable.length_bytes / 2 - page)?;
    ensure!(between == 0, "what nobody wrote is no longer zeros: {between:08x}");
    let _ = (checksum(&[]), USABLE_REGION);
    Ok(())
}
