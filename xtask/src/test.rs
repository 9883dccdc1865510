//! `cargo xtask test`: everything, in one count.

use anyhow::{Context, Result, bail};
use clap::Args;
use peervram_lab::Lab;
use peervram_lab::machines;
use peervram_lab::report::Counts;
use peervram_lab::suite::{self, Extent};
use peervram_programs::Table;
use std::io::{BufRead, BufReader, Write};
use std::process::{ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::beside::Kernels;
use crate::build::cargo;
use crate::figures::Figures;
use crate::lab::{self, Pace, Setup};
use crate::quick::{self, Choice};
use crate::terminal::{self, FAILED, Steps};
use crate::{book, demo, peer_copy, routes, sample, shaders, tidy, validation};

/// Every test: unit and integration tests here, the demo, the samples, and the lab
///
/// The last line is `N passed, N failed, N skipped` over all of it. A skip says why and is no pass. It takes half an
/// hour on two cores, and as long again where nothing is built or fetched yet.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask test             everything
  cargo xtask test --quick     before a commit: what changed, here, in a minute or two
  cargo xtask test --times     everything, and what took longest")]
pub struct Arguments {
    /// Leave the virtual machines out; they count as one skip then
    #[arg(long)]
    no_lab: bool,
    /// Only the unit and integration tests of packages with changes that are not committed (else those of the last
    /// commit), here; the packages that depend on them are compiled
    #[arg(long, conflicts_with_all = ["no_lab", "times"])]
    quick: bool,
    /// Say at the end how long each part took, and which tests of the lab took longest
    #[arg(long)]
    times: bool,
    #[command(flatten)]
    setup: Setup,
}

impl Arguments {
    /// All of it, and what took longest.
    pub fn everything(setup: Setup) -> Arguments {
        Arguments { no_lab: false, quick: false, times: true, setup }
    }
}

/// A run: its counts, and how long its parts took.
#[derive(Default)]
struct Run {
    counts: Counts,
    parts: Vec<(String, Duration)>,
    /// The lab's tests, each with its machine and how many seconds it took.
    of_lab: Vec<(String, f64)>,
}

impl Run {
    /// Says which part begins, and adds what comes of it.
    fn part(&mut self, what: impl Into<String>, run: impl FnOnce() -> Result<Counts>) -> Result<()> {
        let what = what.into();
        let line = if self.parts.is_empty() { "" } else { "\n" };
        peervram_programs::say!("{line}{what}");
        let begun = Instant::now();
        let counts = run()?;
        self.counts.passed += counts.passed;
        self.counts.failed += counts.failed;
        self.counts.skipped += counts.skipped;
        self.parts.push((what, begun.elapsed()));
        Ok(())
    }

    /// What took how long: every part, and the slowest tests of the lab.
    fn print_times(&mut self) -> Result<()> {
        let out = &mut peervram_programs::output();
        let mut parts = Table::new(&["part", "seconds"]);
        for (what, took) in &self.parts {
            parts.row([what.clone(), format!("{:.0}", took.as_secs_f64())]);
        }
        self.of_lab.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut slowest = Table::new(&["test of the lab, on its machine", "seconds"]);
        for (name, seconds) in self.of_lab.iter().take(SHOWN).filter(|(_, seconds)| *seconds >= SLOW_S) {
            slowest.row([name.clone(), format!("{seconds:.1}")]);
        }
        peervram_programs::say!("");
        parts.print(out, WIDTH).and_then(|()| writeln!(out)).and_then(|()| slowest.print(out, WIDTH))?;
        Ok(())
    }
}

/// A test that takes longer is worth a look.
const SLOW_S: f64 = 2.0;
/// How many slow tests are shown.
const SHOWN: usize = 25;
/// Of the tables of times.
const WIDTH: usize = 100;

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    run_beside(arguments, (!arguments.no_lab && !arguments.quick).then(Kernels::begin).flatten())
}

/// Runs while `kernels` are made.
pub fn run_beside(arguments: &Arguments, kernels: Option<Kernels>) -> Result<ExitCode> {
    let steps = Steps::default();
    let mut run = Run::default();
    // Opened first: the host's tests use the kernel headers and the shader compiler in its root.
    let wants_lab = !arguments.no_lab && !arguments.quick;
    let lab = wants_lab.then(|| lab::open(&arguments.setup, &steps)).transpose()?;
    let missing = [demo::missing_vulkan(), validation::missing()].concat();
    terminal::install(&missing, arguments.setup.yes)?;
    if arguments.quick {
        run_quick(&mut run)?;
    } else {
        run_all(&mut run, lab.as_ref(), kernels)?;
    }
    if arguments.times {
        run.print_times()?;
    }
    peervram_programs::say!("\n{}", run.counts);
    Ok(ExitCode::from(if run.counts.failed > 0 { FAILED } else { 0 }))
}

fn run_all(run: &mut Run, lab: Option<&Lab>, kernels: Option<Kernels>) -> Result<()> {
    run.part("unit and integration tests on this machine", || cargo_test(lab, &["--workspace"], &[]))?;
    let shell = ["--package", "peervram", "--lib", "--features", "shuttle"];
    run.part("the threads of a revoke, in many orders", || cargo_test(None, &shell, &["shuttle_tests"]))?;
    if let Some(lab) = lab {
        run.part("Vulkan by the private root's driver", || validation::tests_in_root(lab))?;
    }
    let demo =
        |on_kernel, broker| Ok(one(report(succeeds(demo::run(&demo::Arguments::usual(on_kernel, broker))))));
    run.part("demo on the embedded default", || demo(false, false))?;
    run.part("demo between two processes", || demo(false, true))?;
    let Some(lab) = lab else {
        return run
            .part("skipped: the lab: --no-lab was given", || Ok(Counts { skipped: 1, ..Counts::default() }));
    };
    if let Some(kernels) = kernels {
        kernels.wait(lab.progress());
    }
    run.part("demo on a real kernel", || demo(true, false))?;
    run.part("demo between two processes on a real kernel", || demo(true, true))?;
    run.part("samples", || sample::run_all(lab))?;
    run.part("peer-copy", || {
        let (no_files, extent) = (peer_copy::Files::default(), peer_copy::Extent::Quick);
        Ok(one(report(peer_copy::run(lab, &no_files, extent, &mut Figures::default()))))
    })?;
    run.part("the commands of the book", || book::run_pages(lab, ""))?;
    run.part("shaders", || Ok(one(report(shaders::check(lab.root())))))?;
    let mut outcomes = Vec::new();
    run.part("the lab's tests", || {
        outcomes = lab_tests(lab)?;
        Ok(Counts::of(&outcomes))
    })?;
    for outcome in &outcomes {
        let named =
            |tested: &suite::Tested| (format!("{} on {}", tested.name, outcome.machine), tested.seconds);
        run.of_lab.extend(outcome.tests.iter().map(named));
    }
    run.part("the page of routes", || Ok(one(report(routes::check(&outcomes)))))
}

/// What changed, and what depends on it.
fn run_quick(run: &mut Run) -> Result<()> {
    let Choice { changed, depending, searches_the_machine } = quick::choose()?;
    if changed.is_empty() {
        peervram_programs::say!("no file of a package has changed");
        return Ok(());
    }
    let named = |packages: &[String]| -> Vec<String> {
        packages.iter().flat_map(|package| ["--package".to_owned(), package.clone()]).collect()
    };
    peervram_programs::say!("changed: {}", changed.join(", "));
    run.part("the rules of the tree", || Ok(one(tidy::is_tidy()?)))?;
    let packages = named(&changed);
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    let left_out: &[&str] = if searches_the_machine { &[] } else { &["--skip", MODEL_CHECKER] };
    run.part("unit and integration tests of these", || cargo_test(None, &packages, left_out))?;
    if depending.is_empty() {
        return Ok(());
    }
    run.part(format!("compiling what depends on them: {}", depending.join(", ")), || {
        let mut command = cargo();
        command.args(["check", "--quiet", "--all-targets"]).args(named(&depending));
        Ok(one(command.status().context("starting cargo")?.success()))
    })
}

/// The search of every order of a small world: half of the library's tests' time.
const MODEL_CHECKER: &str = "revoke::machine_model";

fn one(passed: bool) -> Counts {
    Counts { passed: usize::from(passed), failed: usize::from(!passed), skipped: 0 }
}

fn succeeds(result: Result<ExitCode>) -> Result<()> {
    if result? == ExitCode::SUCCESS { Ok(()) } else { bail!("it ended with another code than 0") }
}

fn report(result: Result<()>) -> bool {
    match result {
        Ok(()) => true,
        Err(error) => {
            peervram_programs::say!("FAILED: {error:#}");
            false
        }
    }
}

/// Runs `cargo test` on `what`, only tests of those names, and adds its counts up.
fn cargo_test(lab: Option<&Lab>, what: &[&str], names: &[&str]) -> Result<Counts> {
    let mut command = cargo();
    command.arg("test").args(what).args(["--no-fail-fast", "--"]).args(names).arg("--show-output");
    command.env("PEERVRAM_REQUIRE_VULKAN", "1");
    command.envs(validation::environment()?).env("PEERVRAM_REQUIRE_VALIDATION", "1");
    if let Some(lab) = lab {
        command.env("PEERVRAM_KERNEL_HEADERS", lab.root().join("usr/include"));
    }
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("starting cargo test")?;
    // Cargo's progress, and what a test says past libtest, comes on standard error: passed on as it comes.
    let progress = BufReader::new(child.stderr.take().context("cargo has no standard error")?);
    let passed_on = thread::spawn(move || {
        let mut skips = Vec::new();
        for line in progress.lines().map_while(Result::ok) {
            peervram_programs::note!("{line}");
            skips.extend(line.starts_with(SKIPPED).then_some(line));
        }
        skips
    });
    let output = child.wait_with_output().context("waiting for cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let skips = passed_on.join().unwrap_or_default();
    let mut counts = count(&text, skips.len());
    if output.status.success() {
        text.lines()
            .filter(|line| line.starts_with(SKIPPED))
            .for_each(|line| peervram_programs::say!("{line}"));
    } else {
        peervram_programs::say!("{text}");
        // A crate that does not compile has no test that failed.
        counts.failed = counts.failed.max(1);
    }
    Ok(counts)
}

/// How a test says that it could not run; libtest takes it for passed.
const SKIPPED: &str = "skipped: ";

/// The sum of libtest's result lines; `skips` more skips were said past libtest.
pub fn count(text: &str, skips: usize) -> Counts {
    let number = |line: &str, word: &str| -> usize {
        let mut words = line.split([' ', ';']).rev().skip_while(|candidate| *candidate != word);
        words.nth(1).and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    let mut counts = Counts::default();
    for line in text.lines().filter(|line| line.starts_with("test result: ")) {
        counts.passed += number(line, "passed");
        counts.failed += number(line, "failed");
        counts.skipped += number(line, "ignored");
    }
    let skips = skips + text.lines().filter(|line| line.starts_with(SKIPPED)).count();
    counts.passed = counts.passed.saturating_sub(skips);
    counts.skipped += skips;
    counts
}

fn lab_tests(lab: &Lab) -> Result<Vec<suite::Outcome>> {
    let machines: Vec<_> = machines::everyday().collect();
    let plans = suite::plan(lab.programs(), &machines, "", Extent::Usual)?;
    lab::run_plans(lab, &plans, &Pace::usual(), peervram_programs::output())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_added_up() {
        let text = "test result: ok. 26 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
                    skipped: reads-a-header: no headers\n\
                    test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out\n";
        // The skip is printed between the results, after the test that it is of has been counted.
        let counts = count(text, 1);
        assert_eq!((counts.passed, counts.failed, counts.skipped), (27, 2, 3));
    }
}
