//! Sync files of the real kernel: they fire with their fences, and say so when those failed.

use anyhow::{Result, ensure};
use peervram::backends::signal::Before;
use peervram::backends::{DmaBuf, Exporter, Signal, SyncFile};
use peervram_lab::machine::Facts;
use rustix::io::Errno;
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
