//! The agent: the host's hands in the guest.
//!
//! One loop over one queue. Orders come from the serial port, words of the running program from
//! a Unix socket; threads do nothing but put them into the queue.

use anyhow::{Context, Result};
use peervram_lab::machine::{Facts, Topology};
use peervram_lab::wire::{self, Event, Order, Verdict};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest;
use crate::holder::Hold;
use crate::kernel_log::{self, NewMessages};
use crate::program::{Happening, Program};
use crate::test::{Test, validated};
use crate::tests;
use crate::tree::Tree;
use crate::validation_log;

/// The first device of the root bus, by which the kernel knows the host bridge.
const ROOT: &str = "0000:00:00.0";

const SOCKET: &str = "/run/lab.sock";

/// Device and host answer each other asynchronously; a complaint comes a little late.
const SETTLE: Duration = Duration::from_millis(20);

/// Enough for a warning with its call trace.
const COMPLAINT_LINES: usize = 40;

struct Agent {
    port: File,
    queue: Receiver<Happening>,
    sender: Sender<Happening>,
    program: Arc<Mutex<Option<UnixStream>>>,
    log: NewMessages,
}

/// Serves the host on a serial port until that closes.
pub fn run(port: &str) -> Result<()> {
    let port = File::options()
        .read(true)
        .write(true)
        .open(port)
        .with_context(|| format!("opening the channel {port}"))?;
    let (sender, queue) = mpsc::channel();
    let agent = Agent { port, queue, sender, program: Arc::default(), log: NewMessages::from_now()? };
    agent.listen_to_programs()?;
    agent.listen_to_host()?;
    let uptime = std::fs::read_to_string("/proc/uptime")?;
    let uptime_s = uptime.split(' ').next().unwrap_or_default().parse().unwrap_or_default();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_string();
    agent.say(&Event::Ready { release, uptime_s })?;
    loop {
        match agent.queue.recv()? {
            Happening::Order(order) => agent.obey(order)?,
            // A program that is over may still be heard.
            Happening::Said(_) | Happening::Output(_) | Happening::Exited { .. } => {}
        }
    }
}

impl Agent {
    fn obey(&self, order: Order) -> Result<()> {
        match order {
            Order::Begin { facts } => {
                let error = self.begin(&facts).err().map(|error| format!("{error:#}"));
                self.say(&Event::Begun { error })
            }
            Order::Test { name } => {
                let start = Instant::now();
                let (mut verdict, seconds) =
                    self.test(&name).unwrap_or_else(|error| (failed(format!("{error:#}")), None));
                thread::sleep(SETTLE);
                self.blame(&name, &mut verdict);
                let seconds = seconds.unwrap_or_else(|| start.elapsed().as_secs_f64());
                self.say(&Event::Tested { name, verdict, seconds })
            }
            Order::Run { program, arguments, environment } => {
                let code = self.run(&program, &arguments, &environment).unwrap_or_else(|error| {
                    let line = format!("{error:#}");
                    let stream = wire::Stream::Stderr;
                    self.say(&Event::Output { stream, line }).ok();
                    127
                });
                self.say(&Event::Exited { code })
            }
            // For a program that is over already.
            Order::Input { .. }
            | Order::EndOfInput
            | Order::Screendump { .. }
            | Order::Control { .. }
            | Order::Changed { .. } => Ok(()),
        }
    }

    fn begin(&self, facts: &Facts) -> Result<()> {
        guest::remember(facts)?;
        if let Some(id) = facts.host_bridge {
            let taken = Hold::open()?.take_for(ROOT, id);
            taken.with_context(|| format!("having the kernel take {ROOT} for {id}"))?;
        }
        guest::bind_lenders(facts)?;
        if facts.has_two_vulkan_drivers() {
            guest::check_venus()?;
        }
        if facts.topology == Topology::Tree {
            let tree = Tree::find(facts)?;
            tree.take_for()?;
            tree.bind()?;
        }
        Ok(())
    }

    /// Runs a test in a child: its verdict and, if it came so far, its own measure of its time.
    fn test(&self, name: &str) -> Result<(Verdict, Option<f64>)> {
        let mut command = Command::new("/proc/self/exe");
        command.args(["test", name]).env(wire::SOCKET_VARIABLE, SOCKET);
        validation_log::begin()?;
        let test = tests::all().find(|test| test.name == name);
        command.envs(test.map(Test::environment).transpose()?.unwrap_or_default());
        // Certificates of one test are not for the next: devices go wrong between them, unseen.
        command.env("XDG_STATE_HOME", format!("/tmp/state/{name}"));
        let program = Program::start(command, false, &self.sender)?;
        let limit = test.map_or(wire::TEST_LIMIT, Test::limit);
        let deadline = Instant::now() + limit;
        let mut heard = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.queue.recv_timeout(left) {
                Ok(Happening::Said(Event::Tested { name: tested, verdict, seconds })) => {
                    if tested == name {
                        heard = Some((verdict, Some(seconds)));
                    }
                }
                Ok(Happening::Said(event)) => self.say(&event)?,
                Ok(Happening::Order(order)) => self.pass_on(&order)?,
                Ok(Happening::Exited { id, code }) if id == program.id() => {
                    // The socket's thread may be a little behind the child's end.
                    if heard.is_none() {
                        heard = self.last_word()?;
                    }
                    return Ok(heard.unwrap_or_else(|| (died(code), None)));
                }
                Ok(Happening::Output(_) | Happening::Exited { .. }) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let place = program.kill();
                    let limit = limit.as_secs();
                    return Ok((failed(format!("not over after {limit} s; {place}")), None));
                }
                Err(RecvTimeoutError::Disconnected) => unreachable!("the agent holds a sender"),
            }
        }
    }

    /// The verdict of a child that has ended; what it had said before is passed on.
    fn last_word(&self) -> Result<Option<(Verdict, Option<f64>)>> {
        while let Ok(happening) = self.queue.recv_timeout(Duration::from_millis(200)) {
            match happening {
                Happening::Said(Event::Tested { verdict, seconds, .. }) => {
                    return Ok(Some((verdict, Some(seconds))));
                }
                Happening::Said(event @ Event::Cell(_)) => self.say(&event)?,
                _ => {}
            }
        }
        Ok(None)
    }

    /// A passed test that made the kernel complain has not passed.
    fn blame(&self, name: &str, verdict: &mut Verdict) {
        let Some(test) = tests::all().find(|test| test.name == name) else { return };
        if let Some(said) = validation_log::messages() {
            *verdict = failed(with(verdict, &said));
        }
        let messages = match self.log.read() {
            Ok(messages) => messages,
            Err(error) => {
                *verdict = failed(format!("{error:#}"));
                return;
            }
        };
        let complains = |message: &&String| kernel_log::is_complaint(message) && !test.allows(message);
        if !messages.iter().any(|message| complains(&message)) {
            return;
        }
        let first = messages.iter().position(|message| complains(&message)).unwrap_or(0);
        let said = &messages[first.saturating_sub(3)..];
        let said = said[..said.len().min(COMPLAINT_LINES)].join("\n");
        *verdict = failed(with(verdict, &format!("the kernel complains:\n{said}")));
    }

    fn run(
        &self,
        program: &str,
        arguments: &[String],
        environment: &BTreeMap<String, String>,
    ) -> Result<i32> {
        let mut command = Command::new(program);
        validation_log::begin()?;
        command.args(arguments).env(wire::SOCKET_VARIABLE, SOCKET).envs(validated()).envs(environment);
        let mut program = Program::start(command, true, &self.sender)?;
        loop {
            match self.queue.recv()? {
                Happening::Order(Order::Input { line }) => program.input(&line),
                Happening::Order(Order::EndOfInput) => program.end_input(),
                Happening::Order(order) => self.pass_on(&order)?,
                Happening::Said(event) | Happening::Output(event) => self.say(&event)?,
                Happening::Exited { id, code } if id == program.id() => return self.judge(code),
                Happening::Exited { .. } => {}
            }
        }
    }

    /// The exit code of a program that is over. One whose calls of Vulkan were wrong has failed, and so has its parent.
    fn judge(&self, code: i32) -> Result<i32> {
        let Some(said) = validation_log::messages() else { return Ok(code) };
        for line in said.lines() {
            self.say(&Event::Output { stream: wire::Stream::Stderr, line: line.into() })?;
        }
        Ok(if code == 0 { 1 } else { code })
    }

    fn say(&self, event: &Event) -> Result<()> {
        wire::send(&self.port, event).context("talking to the host")
    }

    /// The host's answer to what the program asked.
    fn pass_on(&self, order: &Order) -> Result<()> {
        let program = self.program.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = &*program {
            // The program may have ended; then nobody waits for the answer.
            wire::send(program, order).ok();
        }
        Ok(())
    }

    fn listen_to_host(&self) -> Result<()> {
        let mut port = BufReader::new(self.port.try_clone()?);
        let queue = self.sender.clone();
        thread::spawn(move || {
            while let Ok(Some(order)) = wire::receive(&mut port) {
                queue.send(Happening::Order(order)).ok();
            }
        });
        Ok(())
    }

    fn listen_to_programs(&self) -> Result<()> {
        let listener = UnixListener::bind(SOCKET).context(SOCKET)?;
        let queue = self.sender.clone();
        let program = Arc::clone(&self.program);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Ok(reader) = stream.try_clone() else { continue };
                *program.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
                let queue = queue.clone();
                thread::spawn(move || {
                    let mut reader = BufReader::new(reader);
                    while let Ok(Some(event)) = wire::receive(&mut reader) {
                        queue.send(Happening::Said(event)).ok();
                    }
                });
            }
        });
        Ok(())
    }
}

/// The reason of `verdict`, with `said` added.
fn with(verdict: &Verdict, said: &str) -> String {
    match verdict {
        Verdict::Passed => said.into(),
        Verdict::Failed { reason } | Verdict::Skipped { reason } => format!("{reason}\n{said}"),
    }
}

fn failed(reason: String) -> Verdict {
    Verdict::Failed { reason }
}

fn died(code: i32) -> Verdict {
    failed(match code {
        135 => "killed by SIGBUS: it touched memory that was taken away".into(),
        133 => "killed by SIGTRAP: the validation layers ended it".into(),
        129.. => format!("killed by signal {}", code - 128),
        _ => format!("ended with code {code} and without a verdict"),
    })
}
