//! The calls that take memory back, each on the real kernel: sleep, resets, and what the kernel wants of
//! the owner unasked. What a revoke is to importers is seen elsewhere.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peervram::Kind;
use peervram::backends::vfio::{Device, Interface, IoAddressSpace, PowerState};
use peervram::backends::{Exporter, PciAddress};
use peervram_lab::machine;
use peervram_model::registers as map;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::crossing::{PATIENCE, open_device, refused};
use crate::guest::Guest;
use crate::model::{Model, REGISTERS};
use crate::revocable::{Revocable, any_lender, beginning, hot_reset, is_revoked};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("power/idle-device-sleeps-until-it-is-opened", idle_device_sleeps),
    Test::of_models("power/d3hot-hides-the-memory-and-d0-brings-it-back", d3hot_hides_the_memory),
    Test::of_models("power/low-power-sleeps-until-it-is-left", low_power_sleeps),
    Test::of_models("power/kernel-exports-from-a-device-in-low-power", kernel_exports_in_low_power)
        .on(machine::Facts::exports_dma_bufs),
    Test::new("power/lender-without-power-management-is-told-so", no_power_management),
    Test::of_models("power/flr-resets-and-keeps-the-descriptor", flr_resets),
    Test::of_models("power/hot-reset-takes-the-bus-by-either-interface", hot_reset_takes_the_bus),
    Test::new("power/hot-reset-names-who-is-not-ours", hot_reset_names_who_is_not_ours)
        .on(machine::Facts::has_crowded_group),
    Test::of_all("power/bus-master-is-kept-by-a-reset", bus_master_is_kept),
    Test::of_all("power/request-is-signalled-when-the-driver-is-unbound", request_is_signalled)
        .allowing(&["Relaying device request"]),
    Test::of_all("power/watching-again-replaces-the-eventfds", watching_again_replaces),
];

const CONFIGURATION: u32 = 7;

/// A device that nobody has open sleeps, and on arm64 the port above it, too. On x86 Linux keeps ports with hot-plug awake.
fn idle_device_sleeps(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let folder = fs::canonicalize(model.address().sysfs_path())?;
    let port = folder.parent().context("it is below no port")?.join("power/runtime_status");
    let idle = if cfg!(target_arch = "aarch64") { "suspended" } else { "active" };
    for look in ["at first", "closed"] {
        wait_for_power_state(&model, "D3hot").context(look)?;
        wait_until_file_says(&port, idle).with_context(|| format!("the port, {look}"))?;
        let device = model.open()?;
        ensure!(sysfs_power_state(model.address())? == "D0", "opened, it sleeps on");
        let status = fs::read_to_string(&port)?;
        ensure!(status.trim() == "active", "it is open, and the port is {status}");
        let mut identity = [0; 4];
        device.read(REGISTERS, map::IDENTITY.into(), &mut identity)?;
        ensure!(u32::from_le_bytes(identity) == map::IDENTITY_VALUE, "opened, it says {identity:?}");
    }
    Ok(())
}

fn d3hot_hides_the_memory(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let lent = Revocable::new(guest, model.open()?)?;
    let device = &lent.device;
    ensure!(device.power_state()? == PowerState::D0, "it is not on after opening");
    device.shadow()?;
    device.set_power_state(PowerState::D3hot)?;
    ensure!(device.power_state()? == PowerState::D3hot, "it does not sleep");
    ensure!(sysfs_power_state(model.address())? == "D3hot", "sysfs says that it does not sleep");
    ensure!(device.memory_enabled()?, "D3hot has switched memory decoding off");
    lent.expect_unreachable()?;
    lent.expect_ones()?;
    lent.expect_revoked(true)?;
    let error = refused(device.read(REGISTERS, 0, &mut [0; 4]), Kind::MemoryDisabled)?;
    ensure!(error.raw_os_error() == Some(5) && error.why().contains("D3hot"), "{error}");
    device.set_power_state(PowerState::D0)?;
    device.check_reachable()?;
    lent.expect_revoked(false)?;
    device.unshadow()?;
    lent.expect_pattern()
}

fn low_power_sleeps(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let lent = Revocable::new(guest, model.open()?)?;
    let device = &lent.device;
    device.leave_low_power()?;
    device.shadow()?;
    device.enter_low_power()?;
    wait_for_power_state(&model, "D3hot")?;
    // Asking wakes nobody.
    lent.expect_unreachable()?;
    refused(device.power_state(), Kind::MemoryDisabled)?;
    refused(device.memory_enabled(), Kind::MemoryDisabled)?;
    ensure!(sysfs_power_state(model.address())? == "D3hot", "asking woke it");
    lent.expect_ones()?;
    lent.expect_revoked(true)?;
    // Each of these would leave live dma-bufs on a device that goes back to sleep.
    for (what, result) in [
        ("reset", device.reset()),
        ("function-level reset", device.function_level_reset()),
        ("hot reset", device.hot_reset(&[])),
        ("memory on", device.set_memory_enabled(true)),
        ("D0", device.set_power_state(PowerState::D0)),
        ("export", device.export(&beginning(device)?).map(drop)),
        ("enter low power", device.enter_low_power()),
    ] {
        refused(result, Kind::MemoryDisabled).with_context(|| format!("{what} in low power"))?;
    }
    // An access wakes it for as long as it takes, and brings no dma-buf back.
    let mut identity = [0; 4];
    device.read(REGISTERS, map::IDENTITY.into(), &mut identity)?;
    ensure!(u32::from_le_bytes(identity) == map::IDENTITY_VALUE, "woken, it says {identity:?}");
    lent.expect_revoked(true)?;
    wait_for_power_state(&model, "D3hot")?;
    device.leave_low_power()?;
    ensure!(sysfs_power_state(model.address())? == "D0", "it sleeps on");
    ensure!(!device.is_in_low_power(), "it is still said to be in low power");
    device.check_reachable()?;
    lent.expect_revoked(false)?;
    device.unshadow()?;
    lent.expect_pattern()
}

/// Why the library refuses to: seen through a second hold of the device, which knows nothing of its sleep.
fn kernel_exports_in_low_power(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let lent = Revocable::new(guest, model.open()?)?;
    lent.device.shadow()?;
    lent.device.enter_low_power()?;
    wait_for_power_state(&model, "D3hot")?;
    let second = Device::adopt(rustix::io::fcntl_dupfd_cloexec(&lent.device, 3)?, model.address())?;
    let buffer = second.export(&beginning(&second)?)?;
    wait_for_power_state(&model, "D3hot")?;
    lent.expect_revoked(true)?;
    match is_revoked(&buffer)? {
        None => crate::skip!("no iommufd to ask whether a dma-buf is revoked"),
        Some(revoked) => ensure!(!revoked, "the kernel looks at low power now: the refusal can go"),
    }
    buffer.close();
    lent.device.leave_low_power()?;
    Ok(())
}

fn no_power_management(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    for (what, result) in [
        ("power state", device.power_state().map(drop)),
        ("D3hot", device.set_power_state(PowerState::D3hot)),
        ("function-level reset", device.function_level_reset()),
    ] {
        let error = refused(result, Kind::Unsupported).context(what)?;
        ensure!(error.next_step().is_some(), "{error}");
    }
    device.check_reachable()?;
    // Low power is the kernel's, and any device has it; what cannot sleep stays on.
    let lent = Revocable::new(guest, device)?;
    lent.device.shadow()?;
    lent.device.enter_low_power()?;
    lent.expect_unreachable()?;
    lent.expect_revoked(true)?;
    lent.expect_ones()?;
    lent.device.leave_low_power()?;
    lent.device.unshadow()?;
    lent.expect_revoked(false)?;
    lent.expect_pattern()
}

fn flr_resets(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    let lent = Revocable::new(guest, model.open()?)?;
    let before = model.status()?.generation;
    lent.device.shadow()?;
    lent.device.function_level_reset()?;
    lent.device.unshadow()?;
    let after = model.status()?.generation;
    ensure!(after > before, "the device has seen no reset: generation {before}, then {after}");
    lent.device.check_reachable()?;
    lent.expect_revoked(false)?;
    lent.expect_pattern()
}

fn hot_reset_takes_the_bus(guest: &Guest) -> Verdict {
    let model = guest.model(0)?;
    for interface in [Interface::Cdev, Interface::Group] {
        let space = match IoAddressSpace::new(interface) {
            // Debian's kernels have no iommufd.
            Err(error) if error.kind() == Kind::NotFound => continue,
            other => other?,
        };
        let lent = Revocable::new(guest, Device::open_into(&space, model.address())?)?;
        let other = Device::open_into(&space, guest.model(1)?.address())?;
        let set = lent.device.reset_set()?;
        ensure!(set == [model.address()], "a hot reset would touch {set:?}");
        for others in [&[][..], &[&other]] {
            let before = model.status()?.generation;
            lent.device.shadow()?;
            hot_reset(guest, &lent.device, others)?;
            lent.device.unshadow()?;
            let after = model.status()?.generation;
            ensure!(after > before, "{interface:?}: generation {before}, then {after}: no reset was seen");
            lent.device.check_reachable()?;
            lent.expect_revoked(false)?;
            lent.expect_pattern()?;
        }
    }
    Ok(())
}

fn hot_reset_names_who_is_not_ours(guest: &Guest) -> Verdict {
    let is_crowded = |device: &machine::Device| *device == machine::Device::CrowdedGroup;
    let device = guest.facts().devices.iter().position(is_crowded).context("this machine has none")?;
    let address = guest.address_of(device)?;
    let neighbour = format!("{}.1", address.trim_end_matches(".0"));
    guest.bind(&address, "vfio-pci")?;
    // Without a driver it leaves the group to us, and nobody vouches for it on the bus.
    fs::write(format!("/sys/bus/pci/devices/{neighbour}/driver/unbind"), &neighbour)?;
    let result = names_who_is_not_ours(address.parse()?, neighbour.parse()?);
    guest.bind(&neighbour, "virtio-pci")?;
    result
}

fn names_who_is_not_ours(address: PciAddress, neighbour: PciAddress) -> Verdict {
    for interface in [Interface::Cdev, Interface::Group] {
        let space = match IoAddressSpace::new(interface) {
            Err(error) if error.kind() == Kind::NotFound => continue,
            other => other?,
        };
        let device = Device::open_into(&space, address)?;
        let set = device.reset_set()?;
        ensure!(set == [address, neighbour], "a hot reset would touch {set:?}");
        let error = refused(device.hot_reset(&[]), Kind::GroupNotViable)?;
        ensure!(error.raw_os_error() == Some(22), "{error}");
        let text = error.to_string();
        ensure!(text.contains(&neighbour.to_string()) && text.contains("vfio-pci"), "{text}");
        ensure!(device.memory_enabled()?, "a reset that was refused has switched memory off");
    }
    Ok(())
}

fn bus_master_is_kept(guest: &Guest) -> Verdict {
    let device = Device::open(any_lender(guest)?)?;
    ensure!(!is_bus_master(&device)?, "it may do DMA before anybody said so");
    device.set_bus_master(true)?;
    match device.reset() {
        Err(error) if error.kind() == Kind::Unsupported => crate::skip!("{error}"),
        other => other?,
    }
    ensure!(is_bus_master(&device)?, "a reset took bus mastering away");
    Ok(())
}

fn is_bus_master(device: &Device) -> Result<bool> {
    let mut command = [0; 2];
    device.read(CONFIGURATION, 4, &mut command)?;
    Ok(command[0] & 1 << 2 != 0)
}

fn request_is_signalled(guest: &Guest) -> Verdict {
    let address = any_lender(guest)?;
    let device = Device::open(address)?;
    let interrupts = device.watch_interrupts()?;
    let request = interrupts.request.context("the kernel does not ask for devices back")?;
    if guest.lender().is_err() {
        ensure!(interrupts.error.is_some(), "a PCIe device cannot tell of errors");
    }
    ensure!(count(&request)? == 0, "it is wanted back already");
    let unbinding = thread::spawn(move || {
        fs::write(format!("/sys/bus/pci/devices/{address}/driver/unbind"), address.to_string())
    });
    let asked = wait_for(&request);
    let waits = !unbinding.is_finished();
    // Whatever was seen: the unbinding waits for this, and the driver is to be bound again.
    drop(device);
    let unbound = unbinding.join().map_err(|_| anyhow::anyhow!("the thread that unbinds panicked"))?;
    guest.bind(&address.to_string(), "vfio-pci")?;
    unbound?;
    asked?;
    ensure!(waits, "the driver was unbound under an open device");
    Device::open(address)?.close()?;
    Ok(())
}

fn watching_again_replaces(guest: &Guest) -> Verdict {
    let address = any_lender(guest)?;
    let device = Device::open(address)?;
    let first = device.watch_interrupts()?.request.context("no request eventfd")?;
    let second = device.watch_interrupts()?.request.context("no request eventfd")?;
    // Dropping one that the kernel still holds is no harm.
    drop(device.watch_interrupts()?);
    let third = device.watch_interrupts()?.request.context("no request eventfd")?;
    let unbinding = thread::spawn(move || {
        fs::write(format!("/sys/bus/pci/devices/{address}/driver/unbind"), address.to_string())
    });
    let asked = wait_for(&third);
    drop(device);
    let unbound = unbinding.join().map_err(|_| anyhow::anyhow!("the thread that unbinds panicked"))?;
    guest.bind(&address.to_string(), "vfio-pci")?;
    unbound?;
    asked?;
    ensure!(count(&first)? == 0 && count(&second)? == 0, "an eventfd that was replaced was signalled");
    Ok(())
}

/// How often an eventfd was signalled since the last look.
fn count(eventfd: &OwnedFd) -> Result<u64> {
    let mut count = [0; 8];
    match rustix::io::read(eventfd, &mut count) {
        Ok(_) => Ok(u64::from_ne_bytes(count)),
        Err(Errno::AGAIN) => Ok(0),
        Err(errno) => Err(errno.into()),
    }
}

fn wait_for(eventfd: &OwnedFd) -> Result<()> {
    let timeout = rustix::event::Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(eventfd, PollFlags::IN)], Some(&timeout))?;
    ensure!(ready == 1 && count(eventfd)? > 0, "not signalled within {} s", PATIENCE.as_secs());
    Ok(())
}

fn sysfs_power_state(address: PciAddress) -> Result<String> {
    let text = fs::read_to_string(address.sysfs_path().join("power_state"))?;
    Ok(text.trim().to_owned())
}

/// Runtime power management acts when the call that let it is over.
fn wait_for_power_state(model: &Model<'_>, wanted: &str) -> Result<()> {
    wait_until_file_says(&model.address().sysfs_path().join("power_state"), wanted)
}

fn wait_until_file_says(file: &Path, wanted: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = fs::read_to_string(file)?;
        let seen = seen.trim();
        if seen == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "it is in {seen}, not in {wanted}");
        thread::sleep(Duration::from_millis(10));
    }
}
