//! What the kernel says to an importer on behalf of any function, and what a reset makes of an
//! importer that is good, slow or broken. Seen with the holder, a kernel module.

use anyhow::{Context, Result, ensure};
use peervram::Kind;
use peervram::backends::{DmaRanges, Exporter};
use peervram_lab::machine::{Facts, Iommu, PeerToPeer};
use rustix::io::Errno;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use crate::crossing::{PATIENCE, VRAM, open_device, refused, scattered};
use crate::guest::Guest;
use crate::holder::{Hold, MappedRange, Mode};
use crate::lender_process::LenderProcess;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("holder/verdict-and-addresses-follow-the-route", verdict_follows_the_route).on(has_holder),
    Test::new("holder/several-ranges-through-the-host-bridge-collide", several_ranges_collide)
        .on(|facts| facts.holder && facts.maps_one_range() && facts.iommu == Iommu::Intel),
    Test::new("holder/several-ranges-through-the-host-bridge-are-one", several_ranges_are_one).on(|facts| {
        facts.holder && facts.maps_several_ranges() && facts.peer_to_peer == PeerToPeer::ThroughHostBridge
    }),
    Test::new("holder/reset-is-seen-twice-by-a-good-importer", reset_is_seen_twice).on(can_map),
    Test::new("holder/reset-waits-for-a-slow-importer", reset_waits_for_a_slow_importer).on(can_map),
    Test::new("holder/reset-hangs-until-a-broken-importer-is-told", reset_hangs_until_told).on(can_map),
    Test::new("holder/closing-the-holder-ends-the-hang", closing_ends_the_hang).on(can_map),
    Test::new("holder/memory-off-takes-away-and-on-gives-back", memory_off_takes_away).on(can_map),
    Test::new("holder/end-of-the-lender-is-for-good", end_of_the_lender_is_for_good).on(can_map),
    Test::new("holder/nonsense-is-refused", nonsense_is_refused).on(has_holder),
];

/// Where revokes wait for importers to unmap.
const WAITING_FOR_UNMAP: &str = "vfio_pci_dma_buf_move";

const SIZE_BYTES: u64 = 1 << 20;

fn has_holder(facts: &Facts) -> bool {
    facts.holder
}

fn can_map(facts: &Facts) -> bool {
    facts.holder && facts.allows_peers()
}

fn verdict_follows_the_route(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    let route = guest.facts().peer_to_peer;
    let count = if route == PeerToPeer::BusAddress { 3 } else { 1 };
    let ranges = scattered(&device, SIZE_BYTES, count)?;
    let buffer = device.export(&ranges)?;
    let hold = Hold::open()?;
    hold.attach(&guest.virtio_gpu()?, &buffer).context("attaching, which never looks at the route")?;
    let mapped = hold.map();
    let seen = hold.state()?.ranges;

    // The addresses of the BAR itself, range by range.
    let bar = bar_address(&guest.lender()?)?;
    let on_the_bus: Vec<MappedRange> = (ranges.as_slice().iter())
        .map(|range| MappedRange { dma_address: bar + range.offset_bytes, length_bytes: range.length_bytes })
        .collect();
    match route {
        PeerToPeer::BusAddress => {
            mapped.context("mapping")?;
            ensure!(seen == on_the_bus, "below the switch it is at {seen:x?}, not at {on_the_bus:x?}");
        }
        PeerToPeer::ThroughHostBridge => {
            mapped.context("mapping")?;
            ensure!(seen.len() == 1 && seen[0].length_bytes == ranges.size_bytes(), "it is at {seen:x?}");
            let in_the_bar = bar..bar + (256 << 20);
            ensure!(!in_the_bar.contains(&seen[0].dma_address), "{seen:x?} is a bus address");
        }
        PeerToPeer::NotSupported | PeerToPeer::NoFeature => {
            ensure!(mapped == Err(Errno::INVAL), "mapping says {mapped:?}");
            ensure!(seen.is_empty(), "it is at {seen:x?}");
        }
    }
    Ok(())
}

/// A fault of Linux 7.3 and not of an importer: `dma_buf_phys_vec_to_sgt` puts each range at the same
/// IO address. VT-d's driver refuses the second. Virtio's asks its device without listening for the
/// answer, and the importer gets addresses with nothing behind them, which an importer without an engine cannot
/// tell from right ones; so this is for VT-d. When it fails, a kernel has mended it: the next test is what is so then.
fn several_ranges_collide(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    let buffer = device.export(&scattered(&device, SIZE_BYTES, 2)?)?;
    let hold = Hold::open()?;
    hold.attach(&guest.virtio_gpu()?, &buffer).context("attaching")?;
    let mapped = hold.map();
    ensure!(mapped == Err(Errno::ADDRINUSE), "mapping says {mapped:?}");
    Ok(())
}

/// On a mended kernel: ranges are in one stretch of IO addresses, down to ranges of a page, and each mapping gives its addresses back.
/// Whether the bytes arrive an importer with an engine tells: `drm/picture-crosses-in-several-ranges`.
fn several_ranges_are_one(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    let hold = Hold::open()?;
    for count in [2, 7, 256] {
        let ranges = scattered(&device, SIZE_BYTES, count)?;
        let buffer = device.export(&ranges)?;
        hold.attach(&guest.virtio_gpu()?, &buffer).context("attaching")?;
        for _ in 0..3 {
            hold.map().with_context(|| format!("mapping {count} ranges"))?;
            let seen = hold.state()?.ranges;
            ensure!(
                seen.len() == 1 && seen[0].length_bytes == ranges.size_bytes(),
                "{count} are at {seen:x?}"
            );
            hold.unmap().with_context(|| format!("unmapping {count} ranges"))?;
        }
        hold.release().context("detaching")?;
    }
    Ok(())
}

fn reset_is_seen_twice(guest: &Guest) -> Verdict {
    let (mut lender, hold) = mapped_hold(guest, Mode::Now)?;
    lender.begin_reset()?;
    lender.end_reset()?;
    let state = hold.state()?;
    ensure!(!state.mapped, "still mapped after the reset");
    // Once when it is taken away, once when it is given back.
    ensure!(state.invalidations == 2, "{} invalidations", state.invalidations);
    hold.map().context("mapping the same attachment again")?;
    Ok(())
}

fn reset_waits_for_a_slow_importer(guest: &Guest) -> Verdict {
    let delay = Duration::from_millis(700);
    let (mut lender, hold) = mapped_hold(guest, Mode::Late(delay))?;
    lender.begin_reset()?;
    let took = lender.end_reset()?;
    // The kernel counts in ticks of a few milliseconds. How much later a busy machine is says nothing.
    let least = delay - Duration::from_millis(20);
    ensure!(took >= least, "the reset took {took:?}; the importer was {delay:?} late");
    ensure!(!hold.state()?.mapped, "still mapped after the reset");
    Ok(())
}

fn reset_hangs_until_told(guest: &Guest) -> Verdict {
    let (mut lender, hold) = mapped_hold(guest, Mode::UntilTold)?;
    lender.begin_reset()?;
    wait_until("the reset hangs", || lender.hangs_in(WAITING_FOR_UNMAP))?;
    ensure!(hold.state()?.mapped, "nobody told it to unmap");

    lender.kill()?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(lender.ended()?.is_none(), "killed in the middle of a reset");
    ensure!(lender.hangs_in(WAITING_FOR_UNMAP)?, "no longer in {WAITING_FOR_UNMAP}");

    hold.unmap()?;
    wait_until("the killed process ends", || Ok(lender.ended()?.is_some()))?;
    let status = lender.ended()?.context("it has ended")?;
    ensure!(status.signal() == Some(9), "it ended with {status}");
    Ok(())
}

fn closing_ends_the_hang(guest: &Guest) -> Verdict {
    let (mut lender, hold) = mapped_hold(guest, Mode::UntilTold)?;
    lender.begin_reset()?;
    wait_until("the reset hangs", || lender.hangs_in(WAITING_FOR_UNMAP))?;
    drop(hold);
    lender.end_reset()?;
    Ok(())
}

fn memory_off_takes_away(guest: &Guest) -> Verdict {
    let device = open_device(guest)?;
    let buffer = device.export(&DmaRanges::whole(device.region(VRAM)?)?)?;
    let function = guest.virtio_gpu()?;
    let hold = Hold::open()?;
    hold.attach(&function, &buffer)?;
    hold.map()?;

    device.set_memory_enabled(false)?;
    let taken = hold.state()?;
    let mapping = hold.map();
    let late_comer = Hold::open()?.attach(&function, &buffer);
    device.set_memory_enabled(true)?;
    ensure!(!taken.mapped, "still mapped with the memory off");
    ensure!(mapping == Err(Errno::NODEV), "mapping what was taken away says {mapping:?}");
    ensure!(late_comer == Err(Errno::NODEV), "attaching to it says {late_comer:?}");

    hold.map().context("mapping after the memory is on again")?;
    Ok(())
}

fn end_of_the_lender_is_for_good(guest: &Guest) -> Verdict {
    let (lender, hold) = mapped_hold(guest, Mode::Now)?;
    drop(lender);
    ensure!(!hold.state()?.mapped, "still mapped after the lender's end");
    let mapping = hold.map();
    ensure!(mapping == Err(Errno::NODEV), "mapping says {mapping:?}");
    // It holds the dma-buf, not the device.
    open_device(guest)?;
    Ok(())
}

fn nonsense_is_refused(guest: &Guest) -> Verdict {
    let hold = Hold::open()?;
    for command in [
        "",
        "attach",
        "attach 0000:00:00.0",
        "mode",
        "mode late",
        "mode late 1000000000",
        "take 0000:00:00.0",
        "dance",
    ] {
        let answer = hold.tell(command);
        ensure!(answer == Err(Errno::INVAL), "{command:?} says {answer:?}");
    }
    let long = hold.tell(&"x".repeat(65));
    ensure!(long == Err(Errno::TOOBIG), "a long command says {long:?}");
    let early = (hold.map(), hold.unmap(), hold.release());
    ensure!(early == (Err(Errno::NOTCONN), Err(Errno::NOTCONN), Err(Errno::NOTCONN)), "{early:?}");

    let function = guest.virtio_gpu()?;
    let device = open_device(guest)?;
    let buffer = device.export(&scattered(&device, SIZE_BYTES, 1)?)?;
    let nowhere = hold.attach("0000:7f:1f.7", &buffer);
    ensure!(nowhere == Err(Errno::NXIO), "a function that is not there says {nowhere:?}");
    let file = hold.attach(&function, &fs::File::open("/proc/self/exe")?);
    ensure!(file == Err(Errno::INVAL), "a file that is no dma-buf says {file:?}");
    let closed = hold.tell(&format!("attach {function} 1000"));
    ensure!(closed == Err(Errno::BADF), "a closed descriptor says {closed:?}");
    hold.attach(&function, &buffer).context("attaching after all that")?;
    let second = hold.attach(&function, &buffer);
    ensure!(second == Err(Errno::BUSY), "a second attachment says {second:?}");
    hold.release()?;
    ensure!(hold.state()?.invalidations == 0, "something is left of it");
    Ok(())
}

/// A lender in a process of its own, and its memory mapped by a hold of that kind.
fn mapped_hold(guest: &Guest, mode: Mode) -> Result<(LenderProcess, Hold)> {
    // Said here, where it is a skip's reason, and not by the child.
    refuse_what_cannot_reset(guest)?;
    let (lender, buffer) = LenderProcess::start(&guest.lender()?, SIZE_BYTES, 1)?;
    let hold = Hold::open()?;
    hold.set_mode(mode)?;
    hold.attach(&guest.virtio_gpu()?, &buffer).context("attaching")?;
    hold.map().context("mapping")?;
    buffer.close();
    Ok((lender, hold))
}

fn refuse_what_cannot_reset(guest: &Guest) -> Result<()> {
    let device = open_device(guest)?;
    if let Err(error) = device.reset() {
        let error = refused::<()>(Err(error), Kind::Unsupported)?;
        crate::skip!("{error}");
    }
    Ok(())
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "not so after {} s: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Where a function's VRAM BAR is on the bus, as sysfs says: a line "start end flags" for each.
fn bar_address(function: &str) -> Result<u64> {
    let file = format!("/sys/bus/pci/devices/{function}/resource");
    let text = fs::read_to_string(&file).with_context(|| file.clone())?;
    let line = text.lines().nth(VRAM as usize).with_context(|| format!("{file} is short"))?;
    let start = line.split(' ').next().and_then(|word| word.strip_prefix("0x"));
    u64::from_str_radix(start.with_context(|| format!("{file}: {line:?}"))?, 16).context(file)
}
