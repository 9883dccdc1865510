//! A booted machine: what it can be asked to do.
//!
//! Every wait has a limit, and a guest that died is told from one that is silent. Dropping a
//! `Vm` ends its QEMU and removes its folder.

pub mod change;
pub mod driver;
pub mod link;
pub(crate) mod model;
pub(crate) mod qemu;
mod qmp;
pub mod validation;
pub mod wire;

pub use qemu::Clock;

use anyhow::{Context, Result, anyhow, bail};
use peervram_model::request::{Answer, Request};
use std::collections::BTreeMap;
use std::fs;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::folder::Folder;
use crate::lab::share;
use crate::machine::Facts;
use crate::vm::change::Change;
use crate::vm::model::Model;
use crate::vm::qemu::Qemu;
use crate::vm::wire::{Cell, Event, Order, Stream, Verdict};
use peervram_programs::picture::Picture;

/// From QEMU's start to the agent's first word. Ten times what a quiet host needs.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// The agent ends a test that takes longer than [`wire::TEST_LIMIT`], or lets one that was asked for by name go on while it
/// is heard of; if neither comes, the guest hangs.
const AGENT_LIMIT: Duration = wire::TEST_LIMIT.saturating_add(Duration::from_secs(30));

/// A machine with its agent up.
pub struct Vm {
    // Fields drop in this order: QEMU ends before its devices, and both before the folder that they use.
    qemu: Qemu,
    models: Vec<Model>,
    channel: UnixStream,
    events: Receiver<Event>,
    folder: Folder,
    pictures: u32,
    cells: Vec<Cell>,
    release: String,
    boot: Duration,
    measures: bool,
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code; 128 and the signal's number if it was killed.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Vm {
    /// Waits for the agent and tells it where it is.
    pub(crate) fn begin(
        qemu: Qemu,
        models: Vec<Model>,
        channel: UnixStream,
        folder: Folder,
        facts: Facts,
    ) -> Result<Vm> {
        let start = Instant::now();
        let (sender, events) = mpsc::channel();
        let mut reader = BufReader::new(channel.try_clone()?);
        std::thread::spawn(move || {
            while let Ok(Some(event)) = wire::receive(&mut reader) {
                if sender.send(event).is_err() {
                    break;
                }
            }
        });
        let mut vm = Vm {
            qemu,
            models,
            channel,
            events,
            folder,
            pictures: 0,
            cells: Vec::new(),
            release: String::new(),
            boot: Duration::ZERO,
            measures: false,
        };
        vm.first_words(facts)
            .map_err(|error| error.context(format!("its last words were:\n{}", vm.qemu.last_words(25))))?;
        vm.boot = start.elapsed();
        Ok(vm)
    }

    fn first_words(&mut self, facts: Facts) -> Result<()> {
        match self.next(BOOT_LIMIT)? {
            Event::Ready { release, .. } => self.release = release,
            other => bail!("the agent begins with {other:?}"),
        }
        self.order(&Order::Begin { facts })?;
        match self.next(AGENT_LIMIT)? {
            Event::Begun { error: None } => Ok(()),
            Event::Begun { error: Some(error) } => bail!("preparing the machine: {error}"),
            other => bail!("the agent answers {other:?} to Begin"),
        }
    }

    /// The running kernel's release.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// How long it took from QEMU's start until the agent was ready.
    pub fn boot_time(&self) -> Duration {
        self.boot
    }

    /// What its tests have said for tables, in order.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// The last lines of its console.
    pub fn last_words(&self, lines: usize) -> String {
        self.qemu.last_words(lines)
    }

    /// From now on programs are measured, so that the validation layers do not look on.
    pub fn measures(&mut self) {
        self.measures = true;
    }

    /// Runs one test of the guest program: its verdict and its seconds. Model GPUs behave when it
    /// begins. An error means that the machine is lost.
    pub fn test(&mut self, name: &str) -> Result<(Verdict, f64)> {
        for model in &mut self.models {
            model.ask(&Request::Behave)?;
            model.ask(&Request::Insert)?;
        }
        self.order(&Order::Test { name: name.into() })?;
        loop {
            match self.next(AGENT_LIMIT)? {
                Event::Tested { name: tested, verdict, seconds } if tested == name => {
                    self.models.iter_mut().try_for_each(Model::check_alive)?;
                    return Ok((verdict, seconds));
                }
                Event::Screendump => self.answer_screendump()?,
                Event::Control { device, request } => self.answer_control(device, &request)?,
                Event::Change(change) => self.answer_change(change)?,
                Event::Cell(cell) => self.cells.push(cell),
                other => bail!("the agent says {other:?} during the test {name}"),
            }
        }
    }

    /// Runs a program of the host in the guest. It finds its own files in the guest's
    /// [`wire::SHARE`] ([`Vm::share`]) and the lab through [`crate::vm::link`].
    pub fn run(&mut self, program: &Path, arguments: &[&str]) -> Result<Exit> {
        self.run_watched(program, arguments, &BTreeMap::new(), Duration::from_secs(300), |_, _, _| Ok(()))
    }

    /// The same with an environment, a limit on its silence, and a look at each line as it
    /// comes; the looker may dump the screen or write to the program's input.
    pub fn run_watched(
        &mut self,
        program: &Path,
        arguments: &[&str],
        environment: &BTreeMap<String, String>,
        silence_limit: Duration,
        mut watch: impl FnMut(&mut Vm, Stream, &str) -> Result<()>,
    ) -> Result<Exit> {
        let program = self.share(program)?;
        let mut environment = environment.clone();
        if self.measures {
            environment.insert(validation::LAYERS.into(), String::new());
        }
        let arguments = arguments.iter().map(ToString::to_string).collect();
        self.order(&Order::Run { program, arguments, environment })?;
        let (mut stdout, mut stderr) = (String::new(), String::new());
        loop {
            match self.next(silence_limit)? {
                Event::Output { stream, line } => {
                    watch(self, stream, &line)?;
                    let text = match stream {
                        Stream::Stdout => &mut stdout,
                        Stream::Stderr => &mut stderr,
                    };
                    text.push_str(&line);
                    text.push('\n');
                }
                Event::Exited { code } => return Ok(Exit { code, stdout, stderr }),
                Event::Screendump => self.answer_screendump()?,
                Event::Control { device, request } => self.answer_control(device, &request)?,
                Event::Change(change) => self.answer_change(change)?,
                Event::Cell(cell) => self.cells.push(cell),
                other => bail!("the agent says {other:?} while a program runs"),
            }
        }
    }

    /// A line for the standard input of the program that runs.
    pub fn input(&mut self, line: &str) -> Result<()> {
        self.order(&Order::Input { line: line.into() })
    }

    /// Copies a file of the host where the guest sees it; gives its path there.
    pub fn share(&mut self, file: &Path) -> Result<String> {
        share(self.folder.path(), file)
    }

    /// The host's side of the folder that the guest sees as [`wire::SHARE`].
    pub fn shared_folder(&self) -> std::path::PathBuf {
        self.folder.path().join("share")
    }

    /// What the virtio GPU shows now.
    pub fn screendump(&mut self) -> Result<Picture> {
        let name = self.dump()?;
        let file = self.shared_folder().join(name);
        let bytes = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        fs::remove_file(&file).ok();
        Ok(Picture::of_ppm(&bytes)?)
    }

    fn dump(&mut self) -> Result<String> {
        self.pictures += 1;
        let name = format!("screen-{}.ppm", self.pictures);
        self.qemu.screendump(&name)?;
        Ok(name)
    }

    fn answer_screendump(&mut self) -> Result<()> {
        let picture = match self.dump() {
            Ok(name) => Ok(format!("{}/{name}", wire::SHARE)),
            Err(error) => Err(format!("{error:#}")),
        };
        self.order(&Order::Screendump { picture })
    }

    /// Asks the model GPU that is the row's device of that number.
    pub fn control(&mut self, device: usize, request: &Request) -> Result<Answer> {
        let model = self.models.iter_mut().find(|model| model.index() == device);
        model.with_context(|| format!("device {device} of this machine is no model GPU"))?.ask(request)
    }

    fn answer_control(&mut self, device: usize, request: &Request) -> Result<()> {
        let answer = self.control(device, request).map_err(|error| format!("{error:#}"));
        self.order(&Order::Control { answer })
    }

    /// Takes a device out, puts one in, or has its port report an error.
    pub fn change(&mut self, change: Change) -> Result<()> {
        self.qemu.change(change)
    }

    fn answer_change(&mut self, change: Change) -> Result<()> {
        let result = self.change(change).map_err(|error| format!("{error:#}"));
        self.order(&Order::Changed { result })
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        wire::send(&self.channel, order).context("the guest died: its channel is closed")
    }

    fn next(&mut self, limit: Duration) -> Result<Event> {
        self.events.recv_timeout(limit).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                anyhow!("the guest hangs: nothing heard for {} s", limit.as_secs())
            }
            RecvTimeoutError::Disconnected => anyhow!("the guest died"),
        })
    }
}
