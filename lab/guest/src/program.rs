//! A child process of the agent, everything about it turned into happenings on one queue.

use anyhow::{Context, Result};
use peervram_lab::wire::{Event, Order, Stream};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};

/// What the agent waits for.
pub enum Happening {
    /// The host wants something.
    Order(Order),
    /// A program said something over the agent's socket.
    Said(Event),
    /// The program wrote a line.
    Output(Event),
    /// A program is over, and all that it wrote has been heard.
    Exited {
        /// Which; one that was given up may end late.
        id: u32,
        /// Its exit code; 128 and the signal's number if it was killed.
        code: i32,
    },
}

/// A program that runs.
pub struct Program {
    id: u32,
    input: Option<ChildStdin>,
}

impl Program {
    /// Starts it. With `piped`, its output comes as happenings; without, it goes to the console.
    pub fn start(mut command: Command, piped: bool, queue: &Sender<Happening>) -> Result<Program> {
        if piped {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        } else {
            command.stdin(Stdio::null());
        }
        let mut child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        let input = child.stdin.take();
        let id = child.id();
        let mut listeners = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            listeners.push(listen(stdout, Stream::Stdout, queue.clone()));
        }
        if let Some(stderr) = child.stderr.take() {
            listeners.push(listen(stderr, Stream::Stderr, queue.clone()));
        }
        let queue = queue.clone();
        thread::spawn(move || {
            let code = wait(&mut child);
            for listener in listeners {
                listener.join().ok();
            }
            queue.send(Happening::Exited { id, code }).ok();
        });
        Ok(Program { id, input })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// A line for its standard input; lost if it does not read.
    pub fn input(&mut self, line: &str) {
        if let Some(input) = &mut self.input {
            writeln!(input, "{line}").ok();
        }
    }

    /// The end of its standard input.
    pub fn end_input(&mut self) {
        self.input = None;
    }

    /// Kills it; says where in the kernel it was.
    pub fn kill(&self) -> String {
        let place = |file| std::fs::read_to_string(format!("/proc/{}/{file}", self.id));
        let waiting = place("wchan").unwrap_or_default();
        let stack = place("stack").unwrap_or_default();
        if let Some(id) = rustix::process::Pid::from_raw(self.id.cast_signed()) {
            rustix::process::kill_process(id, rustix::process::Signal::KILL).ok();
        }
        format!("it was waiting in {waiting}\n{stack}")
    }
}

fn wait(child: &mut Child) -> i32 {
    match child.wait() {
        Ok(status) => status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1),
        Err(_) => 1,
    }
}

fn listen(output: impl Read + Send + 'static, stream: Stream, queue: Sender<Happening>) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_string();
            queue.send(Happening::Output(Event::Output { stream, line: text })).ok();
            line.clear();
        }
    })
}
