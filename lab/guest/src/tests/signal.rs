//! Sync files of the real kernel: they fire with their fences, and say so when those failed.

use anyhow::{Result, ensure};
use peervram::backends::host::{Backing, HostMemory};
use peervram::backends::signal::Before;
use peervram::backends::{
    DmaBuf, DmaRange, DmaRanges, Exporter, Mapping, Signal, Source, SyncFile, page_size_bytes,
};
use peervram_lab::machine::Facts;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::crossing::{PATIENCE, open_device, scattered};
use crate::guest::Guest;
use crate::sw_sync::{Timeline, Work, leave};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_all("signal/sync-file-fires-when-the-timeline-advances", fires_when_it_advances)
        .on(has_sw_sync)
        .on_any_topology(),
    Test::of_all("signal/sync-file-with-an-error-is-an-error", error_is_an_error)
        .on(has_sw_sync)
        .on_any_topology(),
    Test::new("signal/fences-in-a-dma-buf-come-before-its-next-use", fences_in_a_dma_buf)
        .on(|facts| has_sw_sync(facts) && facts.exports_dma_bufs())
        .on_any_topology(),
    Test::of_all("signal/cpu-access-to-a-dma-buf-waits-for-its-fences", cpu_access_waits)
        .on(has_sw_sync)
        .on_any_topology(),
    Test::new("signal/idle-dma-buf-has-fired", idle_dma_buf).on(Facts::exports_dma_bufs).on_any_topology(),
];

const NOW: Duration = Duration::ZERO;

/// Debian's kernels have no software timeline; ours have, and the holder.
fn has_sw_sync(facts: &Facts) -> bool {
    facts.holder
}

fn fires_when_it_advances(_guest: &Guest) -> Verdict {
    let timeline = Timeline::open()?;
    let signal = SyncFile::from_fd(timeline.fence(2)?)?;
    ensure!(!signal.wait(NOW)?, "it has fired at once");
    let (start, pause) = (Instant::now(), Duration::from_millis(30));
    ensure!(!signal.wait(pause)?, "it has fired while nothing advanced");
    ensure!(start.elapsed() >= pause, "it waited {:?} of {pause:?}", start.elapsed());
    timeline.advance(1)?;
    ensure!(!signal.wait(NOW)?, "it has fired too early");
    let fired = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| signal.wait(PATIENCE));
        std::thread::sleep(pause);
        timeline.advance(1)?;
        let fired = waiting.join().map_err(|_| anyhow::anyhow!("the waiting thread panicked"))?;
        anyhow::Ok(fired?)
    })?;
    ensure!(fired, "it has not fired in {PATIENCE:?}");
    ensure!(signal.wait(NOW)? && signal.wait(Duration::MAX)?, "it does not stay so");
    Ok(())
}

fn error_is_an_error(_guest: &Guest) -> Verdict {
    let timeline = Timeline::open()?;
    let signal = SyncFile::from_fd(timeline.fence(1)?)?;
    // Fires the fence with ENOENT, as a driver does that gives its work up.
    drop(timeline);
    for timeout in [PATIENCE, NOW] {
        let Err(error) = signal.wait(timeout) else {
            anyhow::bail!("a fence that failed is taken for one that fired");
        };
        ensure!(error.raw_os_error() == Some(Errno::NOENT.raw_os_error()), "{error}");
    }
    Ok(())
}

fn fences_in_a_dma_buf(guest: &Guest) -> Verdict {
    let buffer = exported(guest)?;
    for (work, reading_waits) in [(Work::Reads, false), (Work::Writes, true)] {
        let timeline = Timeline::open()?;
        leave(timeline.fence(1)?, &buffer, work)?;
        let before = |use_: Before| SyncFile::of_dma_buf(&buffer, use_);
        let (reading, writing) = (before(Before::Reading)?, before(Before::Writing)?);
        ensure!(reading.wait(NOW)? != reading_waits, "before reading, with work that {work:?}");
        ensure!(!writing.wait(NOW)?, "before writing, with work that {work:?}");
        timeline.advance(1)?;
        ensure!(reading.wait(PATIENCE)? && writing.wait(PATIENCE)?, "not fired after the work that {work:?}");
    }
    Ok(())
}

/// The CPU reads a mapped dma-buf when a device has written to it, as its fence says, and not before.
fn cpu_access_waits(_guest: &Guest) -> Verdict {
    let size_bytes = page_size_bytes();
    let memory = HostMemory::with_backing(size_bytes, Backing::Udmabuf)?;
    let ranges = DmaRanges::new(memory.region(), &[DmaRange::new(0, size_bytes)])?;
    // One dma-buf: each export is another one, with fences of its own.
    let buffer = Arc::new(memory.export(&ranges)?);
    let source: Arc<dyn Source> = Arc::<DmaBuf>::clone(&buffer);
    let mapping = Mapping::new(source, &[(0, size_bytes)])?;
    mapping.write(0, b"before")?;
    for work in [Work::Writes, Work::Reads] {
        let timeline = Timeline::open()?;
        leave(timeline.fence(1)?, &buffer, work)?;
        let is_over = AtomicBool::new(false);
        let pause = Duration::from_millis(100);
        std::thread::scope(|scope| -> Verdict {
            let access = scope.spawn(|| -> Result<bool> {
                let mut seen = [0; 6];
                match work {
                    Work::Writes => mapping.read(0, &mut seen)?,
                    Work::Reads => mapping.write(0, b"after")?,
                }
                Ok(is_over.load(Ordering::SeqCst))
            });
            std::thread::sleep(pause);
            is_over.store(true, Ordering::SeqCst);
            timeline.advance(1)?;
            let waited = access.join().map_err(|_| anyhow::anyhow!("the CPU's thread panicked"))??;
            ensure!(waited, "the CPU did not wait for work that {work:?}");
            Ok(())
        })?;
    }
    let mut seen = [0; 5];
    mapping.read(0, &mut seen)?;
    ensure!(&seen == b"after", "{seen:?}");
    Ok(())
}

fn idle_dma_buf(guest: &Guest) -> Verdict {
    let buffer = exported(guest)?;
    for before in [Before::Reading, Before::Writing] {
        ensure!(SyncFile::of_dma_buf(&buffer, before)?.wait(NOW)?, "nobody works on it");
    }
    Ok(())
}

/// A dma-buf of the lender's memory, which outlives the open device.
fn exported(guest: &Guest) -> Result<DmaBuf> {
    let device = open_device(guest)?;
    Ok(device.export(&scattered(&device, 4096, 1)?)?)
}
