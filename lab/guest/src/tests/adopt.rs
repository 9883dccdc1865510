//! Adopted devices: what one process may do with a device that another one owns.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use peervram::Kind;
use peervram::backends::vfio::{Device, PowerState};
use peervram::backends::{Exporter, PciAddress};
use peervram_lab::machine::Facts;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::crossing::{VRAM, leaks_nothing, refused};
use crate::guest::Guest;
use crate::revocable::{Revocable, SIZE_BYTES, any_lender, beginning, is_revoked, pattern};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_all("adopt/memory-is-mapped-and-read", memory_is_mapped_and_read).on_any_topology(),
    Test::of_all("adopt/memory-is-exported-and-follows-the-owner", memory_is_exported)
        .on(Facts::exports_dma_bufs)
        .on_any_topology(),
    Test::of_all("adopt/nothing-can-be-changed", nothing_can_be_changed).on_any_topology(),
    Test::of_all("adopt/the-descriptor-must-be-the-devices", the_descriptor_must_be_the_devices)
        .on_any_topology(),
    Test::of_all("adopt/keeps-the-device-open-after-its-owner", keeps_the_device_open).on_any_topology(),
    Test::of_all("adopt/dma-bufs-bear-the-devices-name", dma_bufs_bear_a_name)
        .on(Facts::exports_dma_bufs)
        .on_any_topology(),
];

/// A descriptor of the owner's, as one process takes it from another.
fn taken(owner: &Device) -> Result<OwnedFd> {
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, owner.as_fd().as_raw_fd(), PidfdGetfdFlags::empty())?)
}

fn adopt(owner: &Device) -> Result<Device> {
    Ok(Device::adopt(taken(owner)?, owner.address())?)
}

fn memory_is_mapped_and_read(guest: &Guest) -> Verdict {
    leaks_nothing(|| {
        let owned = Revocable::new(guest, Device::open(any_lender(guest)?)?)?;
        ensure!(!owned.device.is_adopted() && owned.device.interface().is_some(), "who opened it owns it");
        let adopted = adopt(&owned.device)?;
        ensure!(
            adopted.is_adopted() && adopted.interface().is_none(),
            "an adopted device says it was opened"
        );
        let bars = |device: &Device| -> Vec<(u32, u64)> {
            let bars = device.regions().iter().filter(|region| region.index < 6);
            bars.map(|region| (region.index, region.size_bytes)).collect()
        };
        ensure!(bars(&adopted) == bars(&owned.device), "it has other BARs");
        let view = adopted.map(&beginning(&adopted)?)?;
        let mut seen = vec![0; SIZE_BYTES as usize];
        view.read(0, &mut seen)?;
        ensure!(seen == pattern(), "its view has another content");
        adopted.write(VRAM, 0, b"by the guest of the owner")?;
        owned.view.read(0, &mut seen[..25])?;
        ensure!(&seen[..25] == b"by the guest of the owner", "the owner does not see it");

        // Only this process's own mappings are swapped; what the owner does is noticed by a read only.
        adopted.shadow()?;
        ensure!(view.is_shadowed() && !owned.view.is_shadowed(), "the wrong view is shadowed");
        owned.device.set_memory_enabled(false)?;
        let error = refused(adopted.read(VRAM, 0, &mut [0; 4]), Kind::MemoryDisabled)?;
        ensure!(error.to_string().contains("owner"), "{error}");
        adopted.check_reachable()?;
        owned.device.set_memory_enabled(true)?;
        adopted.unshadow()?;
        view.read(25, &mut seen[25..50])?;
        ensure!(seen[25..50] == pattern()[25..50], "its view is another after the owner's revoke");
        drop(view);
        adopted.close()?;
        Ok(())
    })
}

fn memory_is_exported(guest: &Guest) -> Verdict {
    let owner = Device::open(any_lender(guest)?)?;
    let adopted = adopt(&owner)?;
    let buffer = adopted.export(&beginning(&adopted)?)?;
    ensure!(buffer.size_bytes() == SIZE_BYTES, "it has {} bytes", buffer.size_bytes());
    let Some(revoked) = is_revoked(&buffer)? else { crate::skip!("no iommufd to import it") };
    ensure!(!revoked, "it is born revoked");
    owner.set_memory_enabled(false)?;
    let off = is_revoked(&buffer);
    owner.set_memory_enabled(true)?;
    ensure!(off? == Some(true), "the owner's revoke does not reach it");
    ensure!(is_revoked(&buffer)? == Some(false), "it did not come back");
    buffer.close();
    Ok(())
}

fn nothing_can_be_changed(guest: &Guest) -> Verdict {
    let owner = Device::open(any_lender(guest)?)?;
    let adopted = adopt(&owner)?;
    let events = owner.watch_interrupts()?;
    for (what, result) in [
        ("reset", adopted.reset()),
        ("function-level reset", adopted.function_level_reset()),
        ("reset set", adopted.reset_set().map(drop)),
        ("hot reset", adopted.hot_reset(&[&owner])),
        ("memory off", adopted.set_memory_enabled(false)),
        ("memory", adopted.memory_enabled().map(drop)),
        ("bus master", adopted.set_bus_master(true)),
        ("D3hot", adopted.set_power_state(PowerState::D3hot)),
        ("power state", adopted.power_state().map(drop)),
        ("enter low power", adopted.enter_low_power()),
        ("leave low power", adopted.leave_low_power()),
        ("interrupts", adopted.watch_interrupts().map(drop)),
    ] {
        let error = refused(result, Kind::Unsupported).with_context(|| what.to_owned())?;
        let text = error.to_string();
        ensure!(text.contains("its owner is another process") && text.contains("ask the owner"), "{text}");
    }
    // Configuration space is not even among its regions.
    refused(adopted.read(7, 0, &mut [0; 2]), Kind::NotFound)?;
    refused(adopted.write(7, 4, &[0; 2]), Kind::NotFound)?;
    ensure!(owner.memory_enabled()?, "its memory is off");
    drop(events);
    Ok(())
}

fn the_descriptor_must_be_the_devices(guest: &Guest) -> Verdict {
    let address = any_lender(guest)?;
    leaks_nothing(|| {
        let owner = Device::open(address)?;
        let other = PciAddress { bus: 0x7F, ..address };
        let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{}", owner.as_fd().as_raw_fd()))?;
        let result = Device::adopt(taken(&owner)?, other);
        if fdinfo.contains("vfio-device-syspath") {
            let error = refused(result, Kind::InvalidInput)?;
            ensure!(error.to_string().contains(&address.to_string()), "{error}");
        } else {
            // An older kernel cannot tell; the caller's word is taken.
            ensure!(result?.is_adopted(), "it is owned");
        }
        drop(owner);
        refused(Device::adopt(fs::File::open("/dev/null")?.into(), address), Kind::InvalidInput)?;
        // A character device that nobody has bound to an iommufd is of no use yet.
        let mut devices = address.sysfs_path().join("vfio-dev").read_dir()?;
        let name = devices.next().context("vfio-dev is empty")??.file_name();
        let path = PathBuf::from("/dev/vfio/devices").join(name);
        if path.exists() {
            let unbound = OpenOptions::new().read(true).write(true).open(&path)?;
            let error = refused(Device::adopt(unbound.into(), address), Kind::InvalidInput)?;
            ensure!(error.raw_os_error() == Some(22), "{error}");
        }
        Ok(())
    })
}

fn keeps_the_device_open(guest: &Guest) -> Verdict {
    let address = any_lender(guest)?;
    let owner = Device::open(address)?;
    let adopted = adopt(&owner)?;
    drop(owner);
    adopted.read(VRAM, 0, &mut [0; 4])?;
    refused(Device::open(address), Kind::Busy)?;
    let view = adopted.map(&beginning(&adopted)?)?;
    adopted.retire_mappings()?;
    adopted.close()?;
    Device::open(address)?.close()?;
    drop(view);
    Ok(())
}

fn dma_bufs_bear_a_name(guest: &Guest) -> Verdict {
    let owner = Device::open(any_lender(guest)?)?;
    let adopted = adopt(&owner)?;
    let expected = format!("name:\tpeervram {}", owner.address());
    for device in [&owner, &adopted] {
        let buffer = device.export(&beginning(device)?)?;
        let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{}", buffer.as_fd().as_raw_fd()))?;
        ensure!(fdinfo.lines().any(|line| line == expected), "fdinfo says {fdinfo:?}");
    }
    Ok(())
}
