//! `cargo xtask lab`: the virtual machines.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use peervram_lab::machines::{self, MACHINES};
use peervram_lab::report::{Counts, Text};
use peervram_lab::routes::Routes;
use peervram_lab::suite::{self, Extent, Outcome, Plan};
use peervram_lab::wire::Stream;
use peervram_lab::{Lab, Machine, Programs, host};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use crate::build;
use crate::referees;
use crate::terminal::{self, FAILED, Steps};
use peervram_programs::{cannot, usage};

/// How long a program in a guest may say nothing.
const SILENCE_LIMIT: Duration = Duration::from_secs(600);

/// A task of the lab.
#[derive(Subcommand)]
pub enum Task {
    /// Run tests in virtual machines
    ///
    /// Each machine that has a matching test is booted once and its tests run in order, several machines at once;
    /// each is told of when it has ended, or test by test where only one runs (`--at-once 1`). The last
    /// line is `N passed, N failed, N skipped`; the exit code is 1 if one failed and 4 if the lab
    /// cannot run on this machine.
    #[command(after_help = "Examples:
  cargo xtask lab run                       every test on every machine
  cargo xtask lab run screen                tests with \"screen\" in their name
  cargo xtask lab run --machine epyc-switch every test for one machine
  cargo xtask lab run routes --machine shapes   prediction and kernel, all shapes")]
    Run(Run),
    /// Machines, and the tests for each
    List {
        #[command(flatten)]
        choice: Choice,
    },
    /// Make the private root (QEMU, Mesa and busybox in the cache folder) and say where it is
    Root(Setup),
    /// Fetch or build kernels and say where they are
    ///
    /// The lab's own kernels are built from Debian's source, which takes about ten minutes on two
    /// cores, once; Debian's kernels are fetched.
    #[command(after_help = "Examples:
  cargo xtask lab kernel                    those of all machines
  cargo xtask lab kernel small              our own; `lockdep` watches its locks, `small-arm64` is for 64-bit Arm,
                                            `mended` maps several ranges right
  cargo xtask lab kernel linux-6.12         that of one machine")]
    Kernel {
        /// One of our own kernels (small, lockdep, small-arm64, mended), or a machine's name
        name: Option<String>,
        #[command(flatten)]
        setup: Setup,
    },
    /// Run the kernel's own tests of VFIO on the lab's devices
    ///
    /// They are built from Debian's source of the kernel in the cache folder, which takes a minute once. Each is run on a
    /// network card, a model GPU and a device that only lends. What cannot pass there is listed with the reason; the exit
    /// code is 1 if anything else fails, or if something passes that is said not to.
    Referees {
        #[command(flatten)]
        setup: Setup,
        /// What was found as JSON
        #[arg(long)]
        json: bool,
    },
    /// Run a program of this machine in a guest: its output here, its exit code ours
    #[command(after_help = "Example:
  cargo xtask lab exec --machine epyc-switch target/debug/peervram devices")]
    Exec {
        /// The machine
        #[arg(long, default_value = MACHINES[0].name)]
        machine: String,
        #[command(flatten)]
        setup: Setup,
        /// The program, here
        program: PathBuf,
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// A shell in a guest, on this terminal
    #[command(after_help = "Example:
  cargo xtask lab shell --machine skylake-switch
The machine ends with the shell; a hung one ends when the terminal is closed.")]
    Shell {
        /// The machine
        #[arg(long, default_value = MACHINES[0].name)]
        machine: String,
        #[command(flatten)]
        setup: Setup,
    },
}

/// Which tests, where.
#[derive(Args)]
pub struct Choice {
    /// Only tests whose name contains this
    #[arg(default_value = "")]
    pub filter: String,
    /// Only this machine; may be given several times. Without it every machine but those that are slow to
    /// build or boot, and what comes out the same on any topology only on the usual one; `all` is every one,
    /// `shapes` those for shapes
    #[arg(long = "machine", value_name = "NAME")]
    pub machines: Vec<String>,
}

impl Choice {
    /// Everything on machines that are named; what comes out the same anywhere only on the usual ones otherwise.
    fn plans(&self, programs: &Programs) -> Result<Vec<Plan>> {
        let extent = if self.machines.is_empty() { Extent::Usual } else { Extent::Everywhere };
        suite::plan(programs, &chosen(&self.machines)?, &self.filter, extent)
    }
}

/// How to make ready.
#[derive(Args)]
pub struct Setup {
    /// Install what is missing on this machine without asking
    #[arg(long)]
    pub yes: bool,
}

/// How many machines run side by side.
#[derive(Args)]
pub struct Pace {
    /// Run so many machines at once, as far as memory allows; without it as many as there are cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    at_once: Option<u16>,
}

impl Pace {
    /// As many as there are cores: a guest keeps one busy, and waits for much of its time.
    pub const fn usual() -> Pace {
        Pace { at_once: None }
    }

    fn machines(&self) -> usize {
        let cores = || thread::available_parallelism().map_or(1, NonZero::get);
        self.at_once.map_or_else(cores, usize::from)
    }
}

/// `cargo xtask lab run`.
#[derive(Args)]
pub struct Run {
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    setup: Setup,
    #[command(flatten)]
    pace: Pace,
    /// The outcome as JSON on standard output, at the end
    #[arg(long)]
    json: bool,
}

impl Run {
    /// The machines and tests that are meant.
    pub fn plans(&self, lab: &Lab) -> Result<Vec<Plan>> {
        self.choice.plans(lab.programs())
    }
}

/// Does a task of the lab.
pub fn run(task: Task) -> Result<ExitCode> {
    let steps = Steps::default();
    match task {
        Task::Run(arguments) => return run_tests(&arguments, &steps),
        Task::List { choice } => list(&choice)?,
        Task::Root(setup) => peervram_programs::say!("{}", open(&setup, &steps)?.root().display()),
        Task::Kernel { name, setup } => {
            let machines = with_kernel(name)?;
            check_architecture()?;
            terminal::install(&host::missing(), setup.yes)?;
            for (machine, kernel) in peervram_lab::kernels(&machines, &steps).map_err(lab_cannot)? {
                peervram_programs::say!(
                    "{}: Linux {}, {}",
                    machine.name,
                    kernel.release,
                    kernel.image.display()
                );
            }
        }
        Task::Referees { setup, json } => return referees::run(&open(&setup, &steps)?, json),
        Task::Exec { machine, setup, program, arguments } => {
            let machines = chosen(&[machine])?;
            let lab = open(&setup, &steps)?;
            return execute(&lab, machines[0], &program, &arguments);
        }
        Task::Shell { machine, setup } => {
            let machines = chosen(&[machine])?;
            open(&setup, &steps)?.shell(machines[0], &[])?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A lab that is ready: what is missing is installed, the private root is there.
pub fn open<'a>(setup: &Setup, steps: &'a Steps) -> Result<Lab<'a>> {
    check_architecture()?;
    let programs = build::lab_programs()?;
    terminal::install(&host::missing(), setup.yes)?;
    let lab = Lab::open(programs, steps).map_err(lab_cannot)?;
    let gbm = build::with_gbm(lab.root(), "peervram-lab-gbm", "peervram-lab-gbm")?;
    Ok(lab.with_program(gbm))
}

fn check_architecture() -> Result<()> {
    if cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Ok(());
    }
    let reason = "the lab needs an x86-64 Linux machine".into();
    bail!(cannot(reason))
}

fn lab_cannot(error: anyhow::Error) -> anyhow::Error {
    let reason = format!("the lab cannot run here: {error:#}");
    cannot(reason).into()
}

/// Runs the plans and writes what came of each to `out`, reasons and counts at the end.
pub fn run_plans(lab: &Lab, plans: &[Plan], pace: &Pace, out: impl io::Write) -> Result<Vec<Outcome>> {
    let mut text = Text::new(out);
    let outcomes = suite::run_all(lab, plans, pace.machines(), &mut text).map_err(lab_cannot)?;
    text.finish()?;
    Ok(outcomes)
}

fn run_tests(arguments: &Run, steps: &Steps) -> Result<ExitCode> {
    let machines = chosen(&arguments.choice.machines)?;
    let lab = open(&arguments.setup, steps)?;
    let plans = arguments.plans(&lab)?;
    if plans.is_empty() {
        let reason = format!(
            "no test matches {:?} on {}; `cargo xtask lab list` shows them",
            arguments.choice.filter,
            machines.iter().map(|machine| machine.name).collect::<Vec<_>>().join(", ")
        );
        bail!(usage(reason));
    }
    let out: Box<dyn io::Write> =
        if arguments.json { Box::new(io::stderr()) } else { Box::new(peervram_programs::output()) };
    let outcomes = run_plans(&lab, &plans, &arguments.pace, out)?;
    let counts = Counts::of(&outcomes);
    if arguments.json {
        let routes = Routes::of(outcomes.iter().flat_map(|outcome| &outcome.cells))?;
        peervram_programs::say!("{}", json!({ "machines": outcomes, "counts": counts, "routes": routes }));
    }
    Ok(ExitCode::from(if counts.failed > 0 { FAILED } else { 0 }))
}

fn execute(lab: &Lab, machine: &Machine, program: &Path, arguments: &[String]) -> Result<ExitCode> {
    let mut vm = lab.boot(machine)?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let exit = vm.run_watched(program, &arguments, &BTreeMap::new(), SILENCE_LIMIT, |_, stream, line| {
        match stream {
            Stream::Stdout => peervram_programs::say!("{line}"),
            Stream::Stderr => peervram_programs::note!("{line}"),
        }
        Ok(())
    })?;
    Ok(ExitCode::from(u8::try_from(exit.code).unwrap_or(FAILED)))
}

fn list(choice: &Choice) -> Result<()> {
    let programs = build::lab_programs()?;
    let mut out = peervram_programs::output();
    for plan in choice.plans(&programs)? {
        writeln!(out, "{}: {}", plan.machine.name, plan.machine.about)?;
        for test in plan.tests {
            writeln!(out, "  {test}")?;
        }
    }
    Ok(())
}

/// The machines with that kernel; the one of that name; all of them if none is named.
fn with_kernel(name: Option<String>) -> Result<Vec<&'static Machine>> {
    let Some(name) = name else { return chosen(&[]) };
    let own = machines::all().find(|machine| machine.kernel.own_name() == Some(&name));
    own.map_or_else(|| chosen(&[name]), |machine| Ok(vec![machine]))
}

/// The machines of those names; all everyday ones if none is named, every one for "all", those for shapes for
/// "shapes".
fn chosen(names: &[String]) -> Result<Vec<&'static Machine>> {
    match names {
        [] => return Ok(machines::everyday().collect()),
        [all] if all == "all" => return Ok(machines::all().collect()),
        [shapes] if shapes == "shapes" => return Ok(machines::shapes::MACHINES.iter().collect()),
        _ => {}
    }
    names.iter().map(|name| named(name)).collect()
}

/// The machine of that name.
pub fn named(name: &str) -> Result<&'static Machine> {
    machines::named(name).ok_or_else(|| {
        let all = machines::all().map(|machine| machine.name).collect::<Vec<_>>();
        let reason = format!("no machine {name:?}; there are {}", all.join(", "));
        usage(reason).into()
    })
}
