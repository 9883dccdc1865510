//! What happens to devices from outside: taken out, put in, and errors of the port above them. None of it
//! asks the lender first.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use peervram::backends::{DmaRange, DmaRanges, Exporter, vfio};
use peervram_lab::change::Severity;

use crate::card::{CardDriver, MEMORY};
use crate::crossing::PATIENCE;
use crate::guest::Guest;
use crate::holder::Hold;
use crate::kernel_log::NewMessages;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_revoke("slots/port-error-reaches-the-device", port_error_reaches_the_device),
    Test::of_revoke("slots/fatal-port-error-leaves-memory-off", fatal_port_error_leaves_memory_off),
    Test::of_revoke("slots/what-is-taken-out-waits-for-its-user", taking_out_waits_for_the_user),
];

/// What a lender and one of its importers look like after an error of the port.
fn after_port_error(guest: &Guest, severity: Severity, row: &str) -> Result<(vfio::Device, CardDriver)> {
    let log = NewMessages::from_now()?;
    let card = guest.card()?;
    let device = card.open()?;
    let driver = CardDriver::start(&device)?;
    device.write(MEMORY, 0, WORDS)?;
    let buffer = device.export(&DmaRanges::new(device.region(MEMORY)?, &[DmaRange::new(0, 4096)])?)?;
    let hold = Hold::open()?;
    hold.attach(&guest.virtio_gpu()?, &buffer)?;
    hold.map()?;

    guest.slot_of(&card.address().to_string())?.port_error(severity)?;
    wait_for(&log, "device recovery successful")?;
    let state = hold.state()?;
    ensure!(state.mapped && state.invalidations == 0, "the importer was told: {state:?}");
    guest.cell("port error", row, "importers", "not told")?;
    let memory = if device.memory_enabled()? { "on" } else { "off until it is switched on" };
    guest.cell("port error", row, "memory", memory)?;
    Ok((device, driver))
}

const WORDS: &[u8; 14] = b"here all along";

fn port_error_reaches_the_device(guest: &Guest) -> Verdict {
    let (device, _driver) = after_port_error(guest, Severity::NonFatal, "non-fatal")?;
    ensure!(device.memory_enabled()?, "its memory is off");
    let mut seen = [0; WORDS.len()];
    device.read(MEMORY, 0, &mut seen)?;
    ensure!(&seen == WORDS, "its memory holds {seen:?}");
    Ok(())
}

/// The kernel resets the link behind VFIO's back: nothing is revoked, and neither the descriptor nor a
/// mapping says that the BAR is off. (It reads zeros in QEMU; hardware gives all ones.) Switching memory on
/// has VFIO see it and restore the BARs: `vfio_basic_config_write`.
fn fatal_port_error_leaves_memory_off(guest: &Guest) -> Verdict {
    let (device, driver) = after_port_error(guest, Severity::Fatal, "fatal")?;
    let ranges = DmaRanges::new(device.region(MEMORY)?, &[DmaRange::new(0, 4096)])?;
    let view = device.map(&ranges)?;
    ensure!(!device.memory_enabled()?, "its memory is on");
    let mut seen = [0; WORDS.len()];
    device.read(MEMORY, 0, &mut seen)?;
    ensure!(&seen != WORDS, "memory that is off holds what was written");
    view.read(0, &mut seen)?;
    ensure!(&seen != WORDS, "memory that is off shows what was written");
    device.set_memory_enabled(true)?;
    driver.enable()?;
    view.read(0, &mut seen)?;
    ensure!(&seen == WORDS, "on again, it holds {seen:?}");
    Ok(())
}

/// All slots at once: the kernel gives each five seconds to be thought better of.
fn taking_out_waits_for_the_user(guest: &Guest) -> Verdict {
    let log = NewMessages::from_now()?;
    let card = guest.card()?;
    let device = card.open()?;
    let driver = CardDriver::start(&device)?;
    device.write(MEMORY, 0, b"in use")?;
    let others = [guest.lender()?, guest.twins()?[0].to_string()];
    let others = others.iter().map(|address| guest.slot_of(address)).collect::<Result<Vec<_>>>()?;
    let slot = guest.slot_of(&card.address().to_string())?;
    for slot in others.iter().chain([&slot]) {
        slot.unplug()?;
    }
    // The kernel asks the device's user, if it listens, and takes nothing away.
    wait_for(&log, "blocked until released by user")?;
    ensure!(slot.functions()? == [card.address()], "it is not in its slot");
    let mut seen = [0; 6];
    device.read(MEMORY, 0, &mut seen)?;
    ensure!(&seen == b"in use", "its memory is {seen:?}");
    drop((driver, device));
    // Not before: the kernel takes one device out at a time (pci_lock_rescan_remove), so whose user does not
    // let go keeps all the others in.
    for slot in others.iter().chain([&slot]) {
        slot.wait_until_empty(PATIENCE)?;
    }

    for slot in others.iter().chain([&slot]) {
        slot.plug()?;
    }
    vfio::Device::open(guest.lender()?.parse()?)?;
    vfio::Device::open(guest.twins()?[1])?;
    let device = guest.card()?.open()?;
    device.write(MEMORY, 0, b"too soon")?;
    let _driver = CardDriver::start(&device)?;
    device.read(MEMORY, 0, &mut seen)?;
    ensure!(seen == [0; 6], "what is new holds {seen:?}");
    Ok(())
}

/// Waits until the kernel has said something.
fn wait_for(log: &NewMessages, words: &str) -> Result<()> {
    let start = Instant::now();
    let mut said = Vec::new();
    while !said.iter().any(|message: &String| message.contains(words)) {
        ensure!(start.elapsed() < PATIENCE, "the kernel never says {words:?}, but {said:#?}");
        thread::sleep(Duration::from_millis(20));
        said.extend(log.read()?);
    }
    Ok(())
}
