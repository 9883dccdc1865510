//! What a kernel that watches itself has found, from its boot to the last test.

use anyhow::{Context, ensure};
use std::fs;

use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_all("lockdep/locks-were-never-at-fault", locks_were_never_at_fault).on(|facts| facts.lockdep),
    Test::of_all("lockdep/dma-mappings-were-never-at-fault", dma_mappings_were_never_at_fault)
        .on(|facts| facts.lockdep),
];

/// The first complaint turns lockdep off, and it stays off.
fn locks_were_never_at_fault(_guest: &Guest) -> Verdict {
    let file = "/proc/lockdep_stats";
    let text = fs::read_to_string(file).context(file)?;
    let line = text.lines().find(|line| line.trim_start().starts_with("debug_locks:"));
    let state = line.with_context(|| format!("{file} has no line debug_locks"))?;
    ensure!(state.ends_with(" 1"), "lockdep is off, so it has complained: {state:?}");
    Ok(())
}

fn dma_mappings_were_never_at_fault(_guest: &Guest) -> Verdict {
    for (name, expected) in [("error_count", "0"), ("disabled", "N")] {
        let file = format!("/sys/kernel/debug/dma-api/{name}");
        let text = fs::read_to_string(&file).with_context(|| file.clone())?;
        ensure!(text.trim() == expected, "{file} is {}", text.trim());
    }
    Ok(())
}
