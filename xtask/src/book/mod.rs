//! `cargo xtask book`: every command that the README and the pages of `docs/` show, run.
//!
//! What belongs on a machine with devices runs in a guest, line by line as it is shown, in a machine of the lab that
//! has what the page is about; commands of this program are read by its own command line, and their tests looked up;
//! filters of `cargo test` must find a test; the program on the page for beginners is [built and run](tutorial) as a
//! beginner would; examples in Rust are compiled, or are quotations of code that is. What is none of these, and not on
//! the list of what cannot run here, fails.

mod examples;
mod promises;
mod shown;
mod tutorial;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser};
use peervram_lab::report::Counts;
use peervram_lab::{Lab, Vm, machines};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::build::{self, cargo};
use crate::in_guest::Devices;
use crate::lab::{self, Setup};
use crate::terminal::{FAILED, Steps};
use crate::{Arguments as CommandLine, Task};
use shown::{Shown, commands};

/// The project's folder.
pub const PROJECT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The longest that a command of a page is between two lines.
const SILENCE_LIMIT: Duration = Duration::from_secs(180);

/// What runs in a guest: the first word, without `sudo`.
const IN_A_GUEST: &[&str] = &["echo", "peer-copy", "peervram", "setpci"];

/// The page about GPUs with coherent memory, the machine that has one, and what the page calls it.
const GRACE: (&str, &str, &str) = ("docs/nvgrace.md", "small-gh200", "0009:01:00.0");

/// What pages have in the place of something of the reader's, and what stands there when it is run.
const PLACEHOLDERS: &[(&str, &str)] = &[
    ("COMMAND", "true"),
    ("FILE", "record.json"),
    ("FOLDER", "pages"),
    ("PROGRAM", "true"),
    ("SHELL", "bash"),
];

/// What peer-copy does without copying; it refuses to be told sizes then.
const NOT_MEASURING: &[&str] = &["--list", "--check", "--show", "--schema"];
/// What peer-copy is told beyond its page, which names no sizes: copies up to 1 GiB take emulated CPUs minutes.
const SMALL: &str = " --sizes 4K,64K";
/// What a trial is told beyond its page: nobody is at a terminal to be asked.
const UNASKED: &str = " --yes";

/// What serves until it is ended, as long as its clients come after it.
const SERVES: [&str; 2] = ["peervram", "serve"];
const CLIENTS: [&str; 3] = ["borrow", "operate", "status"];

/// What cannot run here: the beginning of a command, and why.
const CANNOT: &[(&str, &str)] = &[
    (
        "modprobe",
        "the lab's kernels have no folder of modules; their drivers are built in, or loaded at boot",
    ),
    ("cargo run --package peervram-model -- ctl", "it is for a machine that runs beside it, in `lab shell`"),
    ("cargo install", "it would put a program into the folder of whoever runs the book"),
    (
        "cargo build --release --target-dir target/count",
        "it counts instructions with valgrind, which is not asked for",
    ),
    ("valgrind", "valgrind is not asked for"),
];

/// Run every command that the README and docs/ show
///
/// Each runs as it stands on its page, in a virtual machine where it is about devices. The last line is
/// `N passed, N failed, N skipped`.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask book             all of it
  cargo xtask book routes.md   of one page")]
pub struct Arguments {
    /// Only pages whose name contains this
    #[arg(default_value = "")]
    page: String,
    #[command(flatten)]
    setup: Setup,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let steps = Steps::default();
    let lab = lab::open(&arguments.setup, &steps)?;
    let counts = run_pages(&lab, &arguments.page)?;
    peervram_programs::say!("\n{counts}");
    Ok(ExitCode::from(if counts.failed > 0 { FAILED } else { 0 }))
}

/// Runs the commands of the pages whose name contains `part`.
pub fn run_pages(lab: &Lab, part: &str) -> Result<Counts> {
    let mut all = Vec::new();
    for (page, text) in pages()?.into_iter().filter(|(page, _)| page.contains(part)) {
        if page == tutorial::PAGE {
            all.push((page.clone(), HowRun::Tutorial(tutorial::split(&text)?.0)));
        }
        all.extend(shown(&page, &text)?.into_iter().map(|shown| (page.clone(), HowRun::of(shown))));
    }
    let mut counts = Counts::default();
    let mut guests: BTreeMap<&str, Guest> = BTreeMap::new();
    for (page, what) in &all {
        let start = Instant::now();
        let (name, result) = match what {
            HowRun::Tutorial(tutorial) => (format!("{page}: a buffer of one's own"), tutorial.run()),
            HowRun::Guest(shown) => {
                let name = if shown.page == GRACE.0 { GRACE.1 } else { machines::MACHINES[0].name };
                (shown.name(), in_guest(lab, &mut guests, name, shown))
            }
            HowRun::Task(shown) => (shown.name(), reads(lab, shown)),
            HowRun::Tests(shown) => (shown.name(), finds_tests(shown)),
            HowRun::Here(shown) => (shown.name(), runs_here(shown)),
            HowRun::Cannot(shown, why) => {
                peervram_programs::say!("  skipped  {}: {why}", shown.name());
                counts.skipped += 1;
                continue;
            }
            HowRun::Nobodys(shown) => (shown.name(), Err(anyhow::anyhow!("nobody knows how to run it"))),
        };
        match result {
            Ok(()) => {
                peervram_programs::say!("  ok       {name}  {:.1} s", start.elapsed().as_secs_f32());
                counts.passed += 1;
            }
            Err(error) => {
                peervram_programs::say!("  FAILED   {name}: {error:#}");
                counts.failed += 1;
            }
        }
    }
    Ok(counts)
}

/// The pages, by their name from the project's folder on.
fn pages() -> Result<Vec<(String, String)>> {
    let project = Path::new(PROJECT);
    let mut names: Vec<String> = vec!["CONTRIBUTING.md".into(), "README.md".into()];
    for entry in fs::read_dir(project.join("docs")).context("reading docs/")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.ends_with(".md").then(|| format!("docs/{name}")));
    }
    names.sort();
    let read = |name: String| {
        let text = fs::read_to_string(project.join(&name)).with_context(|| format!("reading {name}"))?;
        Ok((name, text))
    };
    names.into_iter().map(read).collect()
}

/// The commands of a page, but for those of the tutorial, and but for where the reader goes.
fn shown(page: &str, text: &str) -> Result<Vec<Shown>> {
    let mut shown = match page {
        tutorial::PAGE => commands(page, &tutorial::split(text)?.1),
        _ => commands(page, text),
    };
    shown.retain(|shown| !shown.command.starts_with("cd "));
    Ok(shown)
}

/// How a command is run.
enum HowRun {
    /// The page for beginners.
    Tutorial(tutorial::Tutorial),
    Guest(Shown),
    /// A task of this program.
    Task(Shown),
    /// `cargo test` with a filter.
    Tests(Shown),
    /// Of cargo's, and quick.
    Here(Shown),
    Cannot(Shown, &'static str),
    Nobodys(Shown),
}

impl HowRun {
    fn of(shown: Shown) -> HowRun {
        let words = shown.words().join(" ");
        if let Some((_, why)) = CANNOT.iter().find(|(begins, _)| words.starts_with(begins)) {
            return HowRun::Cannot(shown, why);
        }
        match words.split(' ').take(2).collect::<Vec<_>>()[..] {
            ["cargo", "xtask"] => HowRun::Task(shown),
            ["cargo", "test"] => HowRun::Tests(shown),
            ["cargo", "build" | "run" | "bench"] => HowRun::Here(shown),
            [first, ..] if IN_A_GUEST.contains(&first) => HowRun::Guest(shown),
            _ => HowRun::Nobodys(shown),
        }
    }
}

impl Shown {
    fn name(&self) -> String {
        format!("{}:{}  {}", self.page, self.line, self.command)
    }

    /// The command with `devices` and things of one's own in the place of what the page has there.
    fn on(&self, devices: &Devices) -> Result<String> {
        let mut command = self.command.replace(GRACE.2, &devices.lender);
        if command.contains("/dev/dri/card0") {
            let node = devices.node.as_deref().context("this machine has no GPU with a DRM node")?;
            command = command.replace("/dev/dri/card0", node);
        }
        let own = |word: &str| match PLACEHOLDERS.iter().find(|(placeholder, _)| *placeholder == word) {
            Some((_, own)) => (*own).to_owned(),
            None => word.to_owned(),
        };
        let mut command = command.split(' ').map(own).collect::<Vec<_>>().join(" ");
        let measures = !NOT_MEASURING.iter().any(|option| command.contains(option));
        if self.words()[0] == "peer-copy" && measures && !command.contains("--sizes") {
            command += SMALL;
        }
        if command.contains("peervram trial ") && !command.contains("--yes") {
            command += UNASKED;
        }
        Ok(command)
    }
}

/// A machine that runs, and what it has.
struct Guest {
    vm: Vm,
    devices: Devices,
}

fn in_guest<'a>(
    lab: &Lab,
    guests: &mut BTreeMap<&'a str, Guest>,
    machine: &'a str,
    shown: &Shown,
) -> Result<()> {
    if !guests.contains_key(machine) {
        let mut vm = lab.boot(lab::named(machine)?)?;
        let peervram = lab.programs().command_line.clone();
        for program in [&peervram, &build::peer_copy()?] {
            vm.share(program)?;
        }
        let devices = Devices::find(&mut vm, &peervram)?;
        guests.insert(machine, Guest { vm, devices });
    }
    let guest = guests.get_mut(machine).context("it was booted above")?;
    let command = beside_its_broker(&shown.words(), shown.on(&guest.devices)?);
    // As root, in a folder of its own that lasts, since one command reads what another wrote.
    let script = format!(
        "#!/bin/sh\nset -e\nPATH={}:$PATH\nexport HOME=/tmp/book\nmkdir -p /tmp/book\ncd /tmp/book\nsudo() {{ \"$@\"; }}\n\
         {command}\n",
        peervram_lab::wire::SHARE
    );
    let folder = tempfile::tempdir().context("making a folder for a script")?;
    let file = folder.path().join("command.sh");
    fs::write(&file, script).context("writing a script")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).context("making a script executable")?;
    let exit = guest.vm.run_watched(&file, &[], &BTreeMap::new(), SILENCE_LIMIT, |_, _, _| Ok(()));
    let exit = match exit {
        Ok(exit) => exit,
        Err(error) => {
            // What runs there still would answer for the next.
            guests.remove(machine);
            return Err(error);
        }
    };
    ensure!(exit.code == 0, "it ended with code {}\n{}{}", exit.code, exit.stdout, exit.stderr);
    Ok(())
}

/// A command that serves goes on beside what comes after it, once a client gets an answer. What is none of its clients ends
/// it first: it may want the same device.
fn beside_its_broker(words: &[&str], command: String) -> String {
    const END: &str = "if [ -e serve.pid ]; then kill $(cat serve.pid) || true; rm serve.pid; \
                       while [ -e /run/peervram/broker ]; do sleep 1; done; fi";
    if words.starts_with(&SERVES) {
        // A function in the background would be a shell, and not what it runs.
        let serve = command.trim_start_matches("sudo ");
        return format!(
            "{END}\n{serve} > serve.log 2>&1 < /dev/null &\necho $! > serve.pid\n\
             while kill -0 $(cat serve.pid); do peervram status && exit 0; sleep 1; done\n\
             cat serve.log\nexit 1"
        );
    }
    match words {
        ["peervram", client, ..] if CLIENTS.contains(client) => command,
        _ => format!("{END}\n{command}"),
    }
}

/// Whether this program's own command line takes it, and what it names is there.
fn reads(lab: &Lab, shown: &Shown) -> Result<()> {
    let words = shown.words();
    // Before the options of the task stands what cargo is told: "cargo xtask".
    let arguments = CommandLine::try_parse_from(&words[1..]).map_err(|error| anyhow::anyhow!("{error}"))?;
    match arguments.task {
        Task::Lab(lab::Task::Run(run)) => {
            ensure!(!run.plans(lab)?.is_empty(), "no test matches");
            Ok(())
        }
        Task::Sample(arguments) => arguments.check(),
        _ => Ok(()),
    }
}

/// Whether the filter finds a test.
fn finds_tests(shown: &Shown) -> Result<()> {
    let words = shown.words();
    let (ours, libtests) = match words.iter().position(|word| *word == "--") {
        Some(at) => (&words[1..at], &words[at + 1..]),
        None => (&words[1..], &[][..]),
    };
    let libtests = libtests.iter().filter(|word| **word != "--nocapture");
    let mut command = cargo();
    command.args(ours).arg("--").args(libtests).arg("--list").current_dir(PROJECT);
    let output = command.output().context("starting cargo test")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(said.lines().any(|line| line.ends_with(": test")), "it finds no test");
    Ok(())
}

fn runs_here(shown: &Shown) -> Result<()> {
    let words = shown.words();
    let output = cargo().args(&words[1..]).current_dir(PROJECT).output().context("starting cargo")?;
    // A machine that lends nothing is no fault of the command's.
    if !output.status.success() && output.status.code() != Some(4) {
        bail!("{}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_is_there_for_its_clients_and_for_nobody_else() {
        let script = |command: &str| {
            let words: Vec<&str> = command.split(' ').skip_while(|word| *word == "sudo").collect();
            beside_its_broker(&words, command.to_owned())
        };
        let serve = script("sudo peervram serve 01:00.0");
        assert!(serve.contains("\npeervram serve 01:00.0 > serve.log 2>&1 < /dev/null &\n"), "{serve}");
        assert_eq!(script("peervram status"), "peervram status");
        let other = script("sudo peervram reset 01:00.0");
        assert!(
            other.starts_with("if [ -e serve.pid ]") && other.ends_with("\nsudo peervram reset 01:00.0"),
            "{other}"
        );
    }

    #[test]
    fn every_command_of_the_book_is_somebodys() {
        let mut count = 0;
        for (page, text) in pages().unwrap() {
            for shown in shown(&page, &text).unwrap() {
                count += 1;
                let name = shown.name();
                assert!(!matches!(HowRun::of(shown), HowRun::Nobodys(_)), "{name}");
            }
        }
        assert!(count > 50, "only {count} commands were found");
    }

    #[test]
    fn placeholders_become_something_of_ones_own() {
        let devices =
            Devices { lender: "0000:05:00.0".into(), node: Some("/dev/dri/card2".into()), model: None };
        let on = |command: &str| {
            let shown = Shown { page: String::new(), line: 1, command: command.into() };
            shown.on(&devices).unwrap()
        };
        assert_eq!(on("peervram export 01:00.0 -- PROGRAM"), "peervram export 01:00.0 -- true");
        assert_eq!(on("echo 0009:01:00.0 > x"), "echo 0000:05:00.0 > x");
        assert_eq!(on("peervram route 01:00.0 /dev/dri/card0"), "peervram route 01:00.0 /dev/dri/card2");
    }
}
