//! Shadow memory under a mapped BAR, on the real kernel: what SIGBUS would have hit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use peervram::Kind;
use peervram::backends::vfio::{Device, Interface, IoAddressSpace, PowerState};
use peervram::backends::vulkan::checksum;
use peervram::backends::{DmaRange, DmaRanges, Exporter, Importer, Owner};
use peervram_model_driver::{ModelGpu, VRAM_BAR};

use crate::blocks;
use crate::crossing::{PATIENCE, refused};
use crate::guest::Guest;
use crate::revocable::{Revocable, SIZE_BYTES, any_lender, beginning, hot_reset, pattern};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_all("shadow/bar-is-all-ones-while-shadowed-and-back", bar_is_all_ones).on_any_topology(),
    Test::of_all("shadow/whole-bar-is-swapped", whole_bar_is_swapped).on_any_topology(),
    Test::of_all("shadow/retired-mappings-let-the-device-close", retired_mappings).on_any_topology(),
    Test::of_all("shadow/readers-live-through-revokes", readers_live_through_revokes).on_any_topology(),
    Test::of_models("shadow/driver-resumes-after-every-revoke", driver_resumes).on_any_topology(),
];

fn bar_is_all_ones(guest: &Guest) -> Verdict {
    let lent = Revocable::new(guest, Device::open(any_lender(guest)?)?)?;
    lent.device.shadow()?;
    ensure!(lent.view.is_shadowed(), "the view is not shadowed");
    lent.device.set_memory_enabled(false)?;
    lent.expect_ones()?;
    lent.expect_revoked(true)?;
    lent.expect_unreachable()?;
    // A mapping made now starts as shadow memory: touching the BAR would raise a signal.
    let late = lent.device.map(&beginning(&lent.device)?)?;
    let mut seen = [0; 8];
    late.read(4096, &mut seen)?;
    ensure!(late.is_shadowed() && seen == [0xFF; 8], "a late mapping shows {seen:?}");

    lent.device.set_memory_enabled(true)?;
    lent.device.unshadow()?;
    lent.expect_pattern()?;
    lent.expect_revoked(false)?;
    late.read(4096, &mut seen)?;
    ensure!(seen == pattern()[4096..4104], "the late mapping shows {seen:?}");
    late.write(0, &[!pattern()[0]])?;
    lent.view.read(0, &mut seen)?;
    ensure!(seen[0] == !pattern()[0], "two mappings of one BAR differ");
    Ok(())
}

fn whole_bar_is_swapped(guest: &Guest) -> Verdict {
    let device = Device::open(any_lender(guest)?)?;
    let whole = device.map(&DmaRanges::whole(device.region(VRAM_BAR)?)?)?;
    let last = whole.len() - 8;
    whole.write(last, b"the last")?;
    let mut seen = [0; 8];
    for _ in 0..10 {
        device.shadow()?;
        whole.read(last, &mut seen)?;
        ensure!(seen == [0xFF; 8], "the shadow ends with {seen:?}");
        device.unshadow()?;
        whole.read(last, &mut seen)?;
        ensure!(&seen == b"the last", "the BAR ends with {seen:?}");
    }
    Ok(())
}

fn retired_mappings(guest: &Guest) -> Verdict {
    let address = any_lender(guest)?;
    let Revocable { view, buffer, device } = Revocable::new(guest, Device::open(address)?)?;
    let Err(kept) = device.close() else { anyhow::bail!("closed under a mapping") };
    let (device, error) = kept.into_parts();
    ensure!(error.kind() == Kind::StillInUse, "{error}");
    device.retire_mappings()?;
    refused(device.unshadow(), Kind::Gone)?;
    refused(device.map(&beginning(&device)?), Kind::Gone)?;
    device.close()?;
    // The device is closed for the kernel, too: it can be opened again while the mapping and the dma-buf live on.
    let again = Revocable::new(guest, Device::open(address)?)?;
    let mut seen = [0; 8];
    view.read(0, &mut seen)?;
    ensure!(seen == [0xFF; 8], "what was retired shows {seen:?}");
    drop(buffer);
    again.expect_pattern()
}

fn readers_live_through_revokes(guest: &Guest) -> Verdict {
    let lent = Revocable::new(guest, Device::open(any_lender(guest)?)?)?;
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let read = || -> Result<()> {
        let (expected, mut seen) = (pattern(), vec![0; 4096]);
        for page in (0..SIZE_BYTES as usize / 4096).cycle().step_by(13) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let range = page * 4096..(page + 1) * 4096;
            lent.view.read(range.start, &mut seen)?;
            // Word by word it is the one or the other: the swap may fall between two.
            let is_torn = |(seen, expected): (&[u8], &[u8])| seen != expected && seen != [0xFF; 8];
            let torn = seen.chunks(8).zip(expected[range].chunks(8)).any(is_torn);
            ensure!(!torn, "page {page} is neither memory nor shadow");
            rounds.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let readers = [scope.spawn(read), scope.spawn(read)];
        let revoke = || -> Result<()> {
            for round in 0..20 {
                let before = rounds.load(Ordering::Relaxed);
                lent.device.shadow()?;
                match round % 4 {
                    0 => lent.device.reset()?,
                    _ => {
                        lent.device.set_memory_enabled(false)?;
                        lent.device.set_memory_enabled(true)?;
                    }
                }
                lent.device.unshadow()?;
                // Wait until readers were at work before and after this round.
                while rounds.load(Ordering::Relaxed) < before + 2 && !readers.iter().all(|r| r.is_finished())
                {
                    thread::yield_now();
                }
            }
            Ok(())
        };
        let revoked = revoke();
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
        }
        revoked
    })?;
    lent.expect_pattern()
}

/// The driver is told to quiesce and to resume, and nothing else. Its engine then reaches the other GPU by
/// DMA: that it may is kept by the kernel over every kind of revoke.
fn driver_resumes(guest: &Guest) -> Verdict {
    let (model, other_model) = (guest.model(0)?, guest.model(1)?);
    let space = IoAddressSpace::new(Interface::Group)?;
    let device = Device::open_into(&space, model.address())?;
    // Below a switch without ACS both are in one group, which has one owner.
    let other = Device::open_into(&space, other_model.address())?;
    let ranges = DmaRanges::new(other.region(VRAM_BAR)?, &[DmaRange::new(0, 1 << 20)])?;
    let target = space.import_host_pointer(other.map(&ranges)?)?;
    let driver = Arc::new(ModelGpu::new(&device)?);
    let lent = beginning(&device)?;

    type Revoke = fn(&Guest, &Device) -> Result<()>;
    let revokes: [(&str, Revoke); 6] = [
        ("a reset", |_, device| Ok(device.reset()?)),
        ("memory off", |_, device| {
            device.set_memory_enabled(false)?;
            Ok(device.set_memory_enabled(true)?)
        }),
        ("D3hot", |_, device| {
            device.set_power_state(PowerState::D3hot)?;
            Ok(device.set_power_state(PowerState::D0)?)
        }),
        ("low power", |_, device| {
            device.enter_low_power()?;
            thread::sleep(Duration::from_millis(200));
            Ok(device.leave_low_power()?)
        }),
        ("a function-level reset", |_, device| Ok(device.function_level_reset()?)),
        ("a hot reset", |guest, device| hot_reset(guest, device, &[])),
    ];
    for (seed, (name, revoke)) in (1..).zip(revokes) {
        let work = || -> Result<()> {
            driver.quiesce(&lent)?;
            device.shadow()?;
            revoke(guest, &device)?;
            device.unshadow()?;
            driver.resume(&lent)?;
            blocks::fill(&driver, seed, 0, 1 << 20, 0)?;
            driver.write_dma(0, target.iova(), 1 << 20, PATIENCE)?;
            let seen = other_model.host_checksum(0, 1 << 20)?;
            ensure!(seen == checksum(&blocks::bytes(seed, 0, 1 << 20)), "the other GPU has other bytes");
            Ok(())
        };
        work().with_context(|| format!("after {name}"))?;
    }
    Ok(())
}
