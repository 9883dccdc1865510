//! The lenders of the machine for revokes: what each can be told to do, and what stays of its memory then.

use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use peervram::backends::drm::ScanOut;
use peervram::backends::{DmaRange, DmaRanges, Exporter, Owner, PciAddress, RawBytes, vfio};
use peervram::{Direction, Kind, Trust};

use crate::card::{CardDriver, MEMORY};
use crate::crossing::{Crossing, VRAM, check_screen, leaks_nothing, open_node};
use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_revoke("lenders/card-shows-nothing-until-it-is-enabled", card_shows_nothing_until_enabled),
    Test::of_revoke("lenders/card-lends-a-picture", card_lends_a_picture),
    Test::of_revoke("lenders/twins-are-one-group-and-lend-both", twins_are_one_group),
    Test::of_revoke("lenders/each-is-reset-and-sleeps-in-its-way", each_is_reset_in_its_way),
];

const CONFIGURATION: u32 = 7;

fn card_shows_nothing_until_enabled(guest: &Guest) -> Verdict {
    let card = guest.card()?;
    leaks_nothing(|| {
        let device = card.open()?;
        let memory = device.region(MEMORY)?;
        ensure!(memory.size_bytes == card.size_bytes(), "region {MEMORY} has {} bytes", memory.size_bytes);
        let ranges = DmaRanges::new(memory, &[DmaRange::new(1 << 20, 4096)])?;
        let view = device.map(&ranges)?;
        let driver = CardDriver::start(&device)?;
        let seen = || -> Result<[u8; 8]> {
            let mut bytes = [0xaa; 8];
            view.read(0, &mut bytes)?;
            Ok(bytes)
        };
        view.write(0, b"kept now")?;
        driver.disable()?;
        ensure!(!driver.is_enabled()? && seen()? == [0; 8], "disabled, it shows {:?}", seen()?);
        view.write(0, b"lost now")?;
        driver.resume(&ranges)?;
        ensure!(driver.is_enabled()? && &seen()? == b"kept now", "enabled again, it shows {:?}", seen()?);
        drop((view, driver));
        device.close()?;
        Ok(())
    })
}

fn card_lends_a_picture(guest: &Guest) -> Verdict {
    let device = guest.card()?.open()?;
    let driver = Arc::new(CardDriver::start(&device)?);
    cross(guest, Crossing::lend(device, MEMORY, 1, driver)?)
}

fn twins_are_one_group(guest: &Guest) -> Verdict {
    let twins = guest.twins()?;
    let [first, second] = &twins;
    ensure!(first.iommu_group() == second.iommu_group(), "{twins:?} are in two groups");
    ensure!(
        (first.bus, first.device, first.function, second.function) == (second.bus, second.device, 0, 1),
        "{first} and {second} share no slot"
    );
    for twin in twins {
        // One after the other: a group has one owner.
        cross(guest, Crossing::lend(vfio::Device::open(twin)?, VRAM, 1, Arc::new(RawBytes))?)?;
    }
    Ok(())
}

fn cross(guest: &Guest, crossing: Crossing) -> Verdict {
    let attachment = crossing.export.attach(open_node(guest)?, Trust::Unverified)?;
    let access = attachment.enter(Direction::Read)?;
    let scan_out = ScanOut::start(access.memory(), crossing.layout())?;
    check_screen(&guest.screendump()?, &crossing.card)?;
    drop(scan_out);
    access.finish().check()?;
    attachment.detach()?;
    crossing.close()
}

/// The table is what the tests of revokes may count on.
fn each_is_reset_in_its_way(guest: &Guest) -> Verdict {
    let [twin, _] = guest.twins()?;
    let card = guest.card()?;
    // The card's driver is dropped at once; the region that it enabled stays enabled.
    CardDriver::start(&card.open()?)?;
    let expected = [
        ("shared memory", guest.lender()?.parse()?, VRAM, "bus", "works", "never"),
        ("twin", twin, VRAM, "bus", "refused", "never"),
        ("card", card.address(), MEMORY, "flr bus", "works", "D3hot"),
        ("model GPU", guest.model(0)?.address(), VRAM, "flr bus", "works", "D3hot"),
    ];
    for (name, address, memory, methods, reset, sleep) in expected {
        let device = vfio::Device::open(address)?;
        device.write(memory, 4096, b"over a reset")?;
        let seen_reset = match device.reset() {
            Ok(()) => "works",
            Err(error) if error.kind() == Kind::Unsupported => "refused",
            Err(error) => return Err(error.into()),
        };
        let seen_sleep = sleeps(&device)?;
        let mut bytes = [0; 12];
        device.read(memory, 4096, &mut bytes)?;
        let content = if &bytes == b"over a reset" { "kept" } else { "lost" };
        let seen_methods = of_sysfs(address, "reset_method")?;
        let seen = [
            ("kernel's resets", seen_methods.as_str(), methods),
            ("VFIO's reset", seen_reset, reset),
            ("sleeps", seen_sleep, sleep),
            ("content then", content, "kept"),
        ];
        for (what, seen, expected) in seen {
            guest.cell("lender", name, what, seen)?;
            ensure!(seen == expected, "{name}, {what}: {seen}, not {expected}");
        }
    }
    Ok(())
}

/// Puts a device to sleep and wakes it: how deep it slept. While it sleeps, its memory must not answer.
fn sleeps(device: &vfio::Device) -> Result<&'static str> {
    let Some(capability) = power_management(device)? else { return Ok("never") };
    let set = |state: u16| device.write(CONFIGURATION, capability + 4, &state.to_le_bytes());
    set(3)?;
    let state = of_sysfs(device.address(), "power_state");
    let read = device.read(0, 0, &mut [0; 4]);
    set(0)?;
    ensure!(state? == "D3hot", "told to sleep, it does not");
    ensure!(read.is_err_and(|error| error.raw_os_error() == Some(5)), "asleep, it answers");
    ensure!(of_sysfs(device.address(), "power_state")? == "D0", "told to wake, it does not");
    Ok("D3hot")
}

/// Where a device has its power management capability (PCI_CAP_ID_PM).
fn power_management(device: &vfio::Device) -> Result<Option<u64>> {
    let mut at = [0x34];
    loop {
        device.read(CONFIGURATION, at[0].into(), &mut at)?;
        let mut header = [0; 2];
        if at == [0] {
            return Ok(None);
        }
        device.read(CONFIGURATION, at[0].into(), &mut header)?;
        if header[0] == 1 {
            return Ok(Some(at[0].into()));
        }
        at[0] += 1;
    }
}

fn of_sysfs(address: PciAddress, file: &str) -> Result<String> {
    let path = format!("{}/{file}", address.sysfs_path().display());
    Ok(fs::read_to_string(&path).context(path)?.trim().to_string())
}
