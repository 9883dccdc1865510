//! Work in a process of its own: a driver that breaks, or a call that the kernel never ends, takes that process and no other.

use std::io::Read;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use peervram::backends::DmaBuf;
use peervram::{Error, Result};

/// More than this is not kept of what a child says.
const MOST_BYTES: u64 = 16 << 20;
/// How long a child that was killed has to go. One that sleeps in the kernel does not go.
const KILL_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks at whether a child has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A child that is over, or was given up.
#[derive(Debug)]
pub struct Ended {
    pub how: How,
    /// What it wrote to standard output, and to standard error where that was piped.
    pub output: String,
    pub errors: String,
    pub took: Duration,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// By itself, with this code.
    Exited(i32),
    /// By a signal that nobody here sent.
    Signal(i32),
    /// It took too long and was killed.
    TimedOut,
    /// It took too long, and the kernel keeps it: nothing ends it. By its number.
    Stuck(u32),
}

/// This program, to be started once more. Without /proc there is no path of it but the one that it was started by.
pub fn this_program() -> Option<Command> {
    std::env::current_exe().ok().or_else(|| std::env::args_os().next().map(Into::into)).map(Command::new)
}

/// A program that inherits a dma-buf: every {fd} in its arguments becomes the descriptor's number, and PEERVRAM_FD names it
/// too. With the descriptor, which is to be kept until the program is started.
pub fn inheriting(dma_buf: &DmaBuf, program: &str, arguments: &[String]) -> Result<(Command, OwnedFd)> {
    let inherited = dma_buf.duplicate()?;
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty())
        .map_err(|errno| Error::os("pass a dma-buf on to a program", errno))?;
    let number = inherited.as_raw_fd().to_string();
    let mut command = Command::new(program);
    command
        .args(arguments.iter().map(|argument| argument.replace("{fd}", &number)))
        .env("PEERVRAM_FD", &number);
    Ok((command, inherited))
}

/// Starts `command` without standard input, and waits for its end, no longer than `limit` and two seconds.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command, limit: Duration) -> std::io::Result<Ended> {
    let begun = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().map(keep);
    let errors = child.stderr.take().map(keep);
    let how = match end_of(&mut child, begun + limit) {
        Some(status) => how(status),
        None => {
            // It may be gone by now, which is as good.
            let _ = child.kill();
            match end_of(&mut child, Instant::now() + KILL_LIMIT) {
                Some(_) => How::TimedOut,
                None => How::Stuck(child.id()),
            }
        }
    };
    // Who is stuck holds its ends of the pipes, and so might a process that the child has left behind.
    let text = |kept: Option<Receiver<String>>| {
        kept.and_then(|kept| kept.recv_timeout(KILL_LIMIT).ok()).unwrap_or_default()
    };
    Ok(Ended { how, output: text(output), errors: text(errors), took: begun.elapsed() })
}

/// Reads all that comes, on a thread of its own, and keeps the first part.
fn keep(mut pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut kept = Vec::new();
        let _ = pipe.by_ref().take(MOST_BYTES).read_to_end(&mut kept);
        // A child that says more must not block on it.
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        let _ = sender.send(String::from_utf8_lossy(&kept).into_owned());
    });
    receiver
}

fn end_of(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(LOOK_INTERVAL),
            _ => return None,
        }
    }
}

fn how(status: ExitStatus) -> How {
    match (status.code(), status.signal()) {
        (Some(code), _) => How::Exited(code),
        (None, Some(signal)) => How::Signal(signal),
        (None, None) => How::TimedOut,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(script: &str, limit: Duration) -> Ended {
        run(Command::new("sh").args(["-c", script]).stderr(Stdio::piped()), limit).unwrap()
    }

    #[test]
    fn how_a_child_ends_is_told_with_what_it_said() {
        let limit = Duration::from_secs(20);
        let child = ended("echo out; echo err >&2; exit 3", limit);
        assert_eq!((child.how, &*child.output, &*child.errors), (How::Exited(3), "out\n", "err\n"));
        assert_eq!(ended("kill -SEGV $$", limit).how, How::Signal(11));
        assert!(run(&mut Command::new("/nonexistent"), limit).is_err());
    }

    /// What the child leaves behind has the pipe, and says nothing more: nobody waits for that.
    #[test]
    fn a_child_that_does_not_end_is_ended() {
        let begun = Instant::now();
        let child = ended("echo begun; sleep 600", Duration::from_millis(200));
        assert_eq!(child.how, How::TimedOut);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_child_that_says_too_much_is_not_kept_waiting() {
        let child = ended("head -c 20000000 /dev/zero", Duration::from_secs(20));
        assert_eq!((child.how, child.output.len()), (How::Exited(0), MOST_BYTES as usize));
    }
}
