//! `Counter`: what a stretch of this thread's work costs in user space, counted and not timed.
//!
//! [`Counter::attach`] starts `benches/raw/count.c`, which single-steps this thread through each stretch that
//! [`Counter::count`] is given. A count is of this thread alone: work that is handed to another one shows as the system
//! call that wakes it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

/// The program that counts, attached to one thread.
pub struct Counter {
    program: Child,
    lines: BufReader<ChildStdout>,
}

/// What a stretch cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Instructions in user space.
    pub instructions: u64,
    pub system_calls: u64,
    /// Calls of the C library's functions that allocate, by which Rust's allocator does.
    pub allocations: u64,
}

impl Counter {
    /// Attaches to this thread for that many stretches.
    ///
    /// # Errors
    /// Where the program cannot be started, or may not trace.
    pub fn attach(program: &Path, stretches: usize) -> Result<Counter> {
        let allocating = [
            libc::malloc as *const () as usize,
            libc::calloc as *const () as usize,
            libc::realloc as *const () as usize,
            libc::posix_memalign as *const () as usize,
        ];
        let mut child = Command::new(program)
            .arg(rustix::thread::gettid().as_raw_nonzero().to_string())
            .arg(stretches.to_string())
            .args(allocating.map(|address| format!("{address:#x}")))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let lines = BufReader::new(child.stdout.take().context("it has no output")?);
        let mut counter = Counter { program: child, lines };
        let line = counter.line()?;
        if line != "ready" {
            bail!("{} begins with {line:?}", program.display());
        }
        Ok(counter)
    }

    /// Counts `stretch`.
    ///
    /// # Errors
    /// Where the program has ended.
    pub fn count<T>(&mut self, stretch: impl FnOnce() -> T) -> Result<(T, Counts)> {
        // The mark that it looks for; nothing else here asks for the parent.
        let _ = rustix::process::getppid();
        let answer = stretch();
        let _ = rustix::process::getppid();
        let line = self.line()?;
        let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        let &[instructions, system_calls, allocations] = &numbers[..] else {
            bail!("the counting program says {line:?}");
        };
        Ok((answer, Counts { instructions, system_calls, allocations }))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            bail!("the counting program ended early, and has said why");
        }
        Ok(line.trim_end().to_owned())
    }

    /// Ends it, when it has counted as many stretches as it was attached for.
    ///
    /// # Errors
    /// Where it failed.
    pub fn end(mut self) -> Result<()> {
        let status = self.program.wait()?;
        if !status.success() {
            bail!("the counting program: {status}");
        }
        Ok(())
    }
}

impl Counts {
    /// Without what `nothing` costs: the marks themselves.
    pub fn beyond(self, nothing: Counts) -> Counts {
        Counts {
            instructions: self.instructions.saturating_sub(nothing.instructions),
            system_calls: self.system_calls.saturating_sub(nothing.system_calls),
            allocations: self.allocations.saturating_sub(nothing.allocations),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marks_are_taken_off() {
        let counts = |instructions| Counts { instructions, system_calls: 5, allocations: 2 };
        let beyond = counts(100).beyond(Counts { instructions: 16, system_calls: 0, allocations: 0 });
        assert_eq!(beyond, counts(84));
    }
}
