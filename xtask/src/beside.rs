//! Making the lab's root and kernels beside the lint and the compilation: on a machine with nothing in its cache the
//! small kernel takes ten minutes of two cores, which nobody should wait for twice.

use anyhow::{Context, Result};
use peervram_lab::Progress;
use rustix::process::{Pid, Signal, kill_process_group};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::book::PROJECT;

/// How often the child is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// `cargo xtask lab kernel`, as a process of the lowest priority. Dropping it ends that, with the compilers that it
/// started.
pub struct Kernels {
    child: Child,
    log: PathBuf,
}

impl Kernels {
    /// Starts it. None where it cannot be started; then kernels are made when they are wanted.
    pub fn begin() -> Option<Self> {
        let started = Self::start();
        if let Err(error) = &started {
            peervram_programs::note!("note: the lab's kernels are not made beside the lint: {error:#}");
        }
        started.ok()
    }

    fn start() -> Result<Self> {
        let log = PathBuf::from(PROJECT).join("target/lab-kernels.log");
        let output = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let errors = output.try_clone().context("the log's second descriptor")?;
        let program = std::env::current_exe().context("finding this program")?;
        let child = Command::new("nice")
            .args(["-n", "19"])
            .arg(program)
            .args(["lab", "kernel", "--yes"])
            .current_dir(PROJECT)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .context("starting nice")?;
        Ok(Self { child, log })
    }

    /// Waits until they are made. Where that failed, whoever wants a kernel next makes it, and says why it cannot.
    pub fn wait(mut self, progress: &dyn Progress) {
        let is_over = |child: &mut Child| !matches!(child.try_wait(), Ok(None));
        if is_over(&mut self.child) {
            return;
        }
        let begun = Instant::now();
        progress.begin(&format!("waiting for the lab's kernels ({} says how far)", self.log.display()));
        while !is_over(&mut self.child) {
            if let Some((done, about)) = self.steps() {
                progress.advance(done, about);
            }
            thread::sleep(LOOK_EVERY);
        }
        let is_made = matches!(self.child.try_wait(), Ok(Some(status)) if status.success());
        progress.end(is_made, begun.elapsed());
    }

    /// How far the last line of the log says that it is: "...: 242 of about 2100, 123 s".
    fn steps(&self) -> Option<(usize, usize)> {
        steps_in(fs::read_to_string(&self.log).ok()?.lines().last()?)
    }
}

fn steps_in(line: &str) -> Option<(usize, usize)> {
    let (before, after) = line.split_once(" of about ")?;
    let done = before.rsplit(' ').next()?.parse().ok()?;
    let about = after.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    Some((done, about))
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // A cache entry that is half made is made again.
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            kill_process_group(group, Signal::TERM).ok();
        }
        self.child.wait().ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_progress_is_read() {
        let line = "building the small kernel (about ten minutes on two cores): 242 of about 2100, 123 s";
        assert_eq!(steps_in(line), Some((242, 2100)));
        assert_eq!(steps_in("making the private root ..."), None);
    }
}
