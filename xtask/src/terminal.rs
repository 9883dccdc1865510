//! What tasks say on a terminal: progress, questions, exit codes.

use anyhow::{Context, Result, bail};
use peervram_lab::Progress;
use peervram_lab::host::{self, Missing};
pub use peervram_programs::FAILED;
use peervram_programs::{Ending, cannot};
use std::io::{self, BufRead, IsTerminal, Write};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often a long step speaks where there is no terminal.
const SPEAK_EVERY: Duration = Duration::from_secs(30);

/// The exit code of a task that ended with an error.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(error.downcast_ref::<Ending>().map_or(FAILED, |exit| exit.code))
}

/// Steps on standard error: a spinner with seconds on a terminal, plain lines elsewhere.
#[derive(Default)]
pub struct Steps {
    running: Mutex<Option<Step>>,
}

struct Step {
    what: String,
    over: Arc<AtomicBool>,
    parts: Arc<Mutex<String>>,
    spinner: Option<JoinHandle<()>>,
    start: Instant,
    spoke: Instant,
}

impl Progress for Steps {
    fn begin(&self, what: &str) {
        let over = Arc::new(AtomicBool::new(false));
        let parts = Arc::new(Mutex::new(String::new()));
        let spinner = if io::stderr().is_terminal() {
            let (what, over, parts) = (what.to_string(), Arc::clone(&over), Arc::clone(&parts));
            Some(thread::spawn(move || spin(&what, &over, &parts)))
        } else {
            peervram_programs::note!("{what} ...");
            None
        };
        let now = Instant::now();
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Step { what: what.into(), over, parts, spinner, start: now, spoke: now });
    }

    fn advance(&self, done: usize, about: usize) {
        let mut step = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(step) = step.as_mut() else { return };
        if step.spinner.is_some() {
            *step.parts.lock().unwrap_or_else(PoisonError::into_inner) = format!("{done} of about {about}, ");
        } else if step.spoke.elapsed() >= SPEAK_EVERY {
            step.spoke = Instant::now();
            peervram_programs::note!(
                "{}: {done} of about {about}, {} s",
                step.what,
                step.start.elapsed().as_secs()
            );
        }
    }

    fn end(&self, succeeded: bool, took: Duration) {
        let step = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(step) = step else { return };
        step.over.store(true, Ordering::Relaxed);
        let clear = match step.spinner {
            Some(spinner) => {
                spinner.thread().unpark();
                spinner.join().ok();
                "\r\x1b[K"
            }
            None => "",
        };
        let word = if succeeded { "done" } else { "failed" };
        peervram_programs::note!("{clear}{}: {word} after {:.1} s", step.what, took.as_secs_f64());
    }

    fn note(&self, text: &str) {
        peervram_programs::note!("note: {text}");
    }
}

fn spin(what: &str, over: &AtomicBool, parts: &Mutex<String>) {
    let start = Instant::now();
    for frame in ['|', '/', '-', '\\'].iter().cycle() {
        if over.load(Ordering::Relaxed) {
            return;
        }
        let parts = parts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Where nobody reads it, the work goes on.
        let seconds = start.elapsed().as_secs();
        write!(io::stderr(), "\r\x1b[K{frame} {what} ({parts}{seconds} s)").ok();
        io::stderr().flush().ok();
        thread::park_timeout(Duration::from_millis(200));
    }
}

/// Installs what is missing: says what and why, and asks unless root or told `yes`.
pub fn install(missing: &[Missing], yes: bool) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let command = host::install_command(missing);
    let line = command.join(" ");
    peervram_programs::note!("To be installed on this machine:");
    for missing in missing {
        peervram_programs::note!("  {}: {}", missing.packages.join(", "), missing.why);
    }
    if !host::has_program("apt-get") {
        bail!(cannot(
            "this machine has no apt-get: install the packages above in its own way, then try \
             again"
                .into()
        ));
    }
    if !host::is_root() && !yes {
        if !io::stdin().is_terminal() {
            bail!(cannot(format!("nobody here to ask; run `{line}` or give --yes")));
        }
        write!(io::stderr(), "Run `{line}`? [y/N] ").context("asking")?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            bail!(cannot(format!("not installed; run `{line}` yourself, then try again")));
        }
    }
    if !run_quietly(&command)? {
        // The lists may be old, or have never been fetched.
        let mut update = command.iter().take_while(|word| **word != "install").copied().collect::<Vec<_>>();
        update.push("update");
        run_quietly(&update)?;
        if !run_quietly(&command)? {
            bail!(cannot(format!("`{line}` failed; run it to see why")));
        }
    }
    Ok(())
}

fn run_quietly(command: &[&str]) -> Result<bool> {
    peervram_programs::note!("$ {}", command.join(" "));
    let output =
        Command::new(command[0]).args(&command[1..]).env("DEBIAN_FRONTEND", "noninteractive").output()?;
    if !output.status.success() {
        io::stderr().write_all(&output.stderr).ok();
    }
    Ok(output.status.success())
}
