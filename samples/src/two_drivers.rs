//! One memory under two Vulkan drivers in one process: one allocates it and exports it as a dma-buf, the other one
//! imports it. Each works on it by compute, the other one looks by compute, and the CPU says what must be there.
//!
//! ```text
//! two_drivers
//! ```
//! Every driver lends to every other one. Where the importer takes the dma-buf, both have the same bytes; where it
//! refuses, peervram copies them to and fro, and says so. Ends with 4 where this machine has less than two drivers,
//! or where none exports memory.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a sample prints as a program of its reader's would"
)]

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use peervram::backends::vulkan::{Device, Engine, Instance, PhysicalDevice, Selector, checksum, paint};
use peervram::backends::{Aperture, DmaRanges, ImageLayout, page_size_bytes};
use peervram::{Direction, Lender, Outcome, Path, Trust};
use peervram_programs::picture::Picture;

const CANNOT_RUN_HERE: u8 = 4;

fn main() -> Result<ExitCode> {
    let instance = match Instance::open() {
        Ok(instance) => instance,
        Err(error) if error.kind().cannot_run_here() => return Ok(cannot_run_here(&error.to_string())),
        Err(error) => return Err(error.into()),
    };
    // One device of each driver.
    let mut drivers: Vec<PhysicalDevice> = instance.physical_devices()?;
    drivers.sort_by_key(|device| device.driver_id);
    drivers.dedup_by_key(|device| device.driver_id);
    let names: Vec<&str> = drivers.iter().map(|device| device.driver_name.as_str()).collect();
    if names.len() < 2 {
        return Ok(cannot_run_here(&format!("it takes two Vulkan drivers, and there is {names:?}")));
    }

    let mut shared = Vec::new();
    let mut exports = false;
    for lender in drivers.iter().filter(|device| device.can_export_dma_buf) {
        exports = true;
        for importer in drivers.iter().filter(|device| device.driver_id != lender.driver_id) {
            if cross(&instance, lender, importer)? == Path::Peer {
                shared.push(format!("{} and {}", lender.driver_name, importer.driver_name));
            }
        }
    }
    if !exports {
        return Ok(cannot_run_here(&format!(
            "of the drivers {names:?} none exports its memory as a dma-buf"
        )));
    }
    match &shared[..] {
        [] => println!("Bytes arrived everywhere, but no two drivers had one memory."),
        shared => println!("One memory under two drivers: {}.", shared.join(", ")),
    }
    Ok(ExitCode::SUCCESS)
}

fn cannot_run_here(why: &str) -> ExitCode {
    eprintln!("two_drivers cannot run here: {why}");
    ExitCode::from(CANNOT_RUN_HERE)
}

/// One driver's memory, used by both in turns. By which path it was.
fn cross(instance: &Instance, lender: &PhysicalDevice, importer: &PhysicalDevice) -> Result<Path> {
    let (own_driver, other_driver) = (&lender.driver_name, &importer.driver_name);
    let open = |name: &String| -> Result<Device> { Ok(instance.open_device(&Selector::Name(name.clone()))?) };
    let (own_device, other_device) = (open(own_driver)?, Arc::new(open(other_driver)?));

    // Memory that the one driver allocates, lent to the other one.
    let card = Picture::test_card(640, 480);
    let layout = ImageLayout::packed(card.width(), card.height());
    let picture = 0..layout.end_bytes();
    let memory = own_device.allocate_exportable(picture.end.next_multiple_of(page_size_bytes()))?;
    let (whole, owner) = (DmaRanges::whole(memory.region())?, memory.owner());
    let lent = Lender::new(memory);
    let export = lent.export(Aperture::owned(whole, owner))?;
    // Untested, because all that follows is a test.
    let attachment = export.attach(other_device, Trust::Unverified)?;
    let path = attachment.path();
    println!("{own_driver} lends to {other_driver}, which has the bytes by {path}");
    for (path, why) in attachment.refused() {
        println!("    not by {path}: {}", why.headline());
    }

    let own = lent.device().buffer();
    let mut here = Engine::new(own.device())?;
    let mut there = Engine::new(attachment.importer())?;
    let mut expected = card.bytes().to_vec();
    let seen_by = |who: &str, did: &str, seen: u32, expected: &[u8]| -> Result<()> {
        let right = checksum(expected);
        ensure!(seen == right, "{did}: {who} sees {seen:08x}, and the CPU computes {right:08x}");
        println!("    {did}: {who} sees {seen:08x}, as the CPU computes");
        Ok(())
    };

    here.upload(own, 0, &expected, soon())?;
    let access = attachment.enter(Direction::Both)?;
    let seen = there.checksum(access.memory(), picture.clone(), soon())?;
    seen_by(other_driver, &format!("{own_driver} copies a picture into it"), seen, &expected)?;

    there.paint(access.memory(), &layout, 1, soon())?;
    // The end of an access is where bytes go back, if they had to be copied.
    ensure!(access.finish() == Outcome::Ok, "what {other_driver} painted did not come back");
    paint(&mut expected, &layout, 1)?;
    let seen = here.checksum(own, picture.clone(), soon())?;
    seen_by(own_driver, &format!("{other_driver} paints over it"), seen, &expected)?;

    here.paint(own, &layout, 2, soon())?;
    paint(&mut expected, &layout, 2)?;
    let access = attachment.enter(Direction::Read)?;
    let seen = there.checksum(access.memory(), picture, soon())?;
    seen_by(other_driver, &format!("{own_driver} paints over it again"), seen, &expected)?;

    let mut bytes = vec![0; expected.len()];
    there.read_back(access.memory(), 0, &mut bytes, soon())?;
    ensure!(bytes == expected, "{other_driver} copies other bytes out than the CPU has painted");
    println!("    {other_driver} copies it out: each of {} bytes as the CPU has painted them", bytes.len());
    ensure!(access.finish() == Outcome::Ok, "the memory was taken back");
    attachment.detach()?;
    Ok(path)
}

/// A shader is compiled at its first use, here by a CPU that may be emulated.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}
