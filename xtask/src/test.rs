//! `cargo xtask test`: everything, in one count.

use anyhow::{Context, Result, bail};
use clap::Args;
use peervram_lab::Lab;
use peervram_lab::machines;
use peervram_lab::report::Counts;
use peervram_lab::suite::{self, Extent};
use std::io::{BufRead, BufReader};
use std::process::{ExitCode, Stdio};
use std::thread;

use crate::build::cargo;
use crate::figures::Figures;
use crate::lab::{self, Pace, Setup};
use crate::terminal::{self, FAILED, Steps};
use crate::{book, demo, peer_copy, routes, sample, shaders, validation};

/// Every test: unit and integration tests here, the demo, the samples, and the lab
///
/// The last line is `N passed, N failed, N skipped` over all of it. A skip says why and is no pass.
#[derive(Args)]
pub struct Arguments {
    /// Leave the virtual machines out; they count as one skip then
    #[arg(long)]
    no_lab: bool,
    #[command(flatten)]
    setup: Setup,
}

impl Arguments {
    /// All of it.
    pub fn everything(setup: Setup) -> Arguments {
        Arguments { no_lab: false, setup }
    }
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let steps = Steps::default();
    // Opened first: the host's tests use the kernel headers and the shader compiler in its root.
    let lab = if arguments.no_lab { None } else { Some(lab::open(&arguments.setup, &steps)?) };
    let missing = [demo::missing_vulkan(), validation::missing()].concat();
    terminal::install(&missing, arguments.setup.yes)?;

    let mut counts = Counts::default();
    peervram_programs::say!("unit and integration tests on this machine");
    add(&mut counts, cargo_test(lab.as_ref(), &["--workspace"], &[])?);
    peervram_programs::say!("\nthe threads of a revoke, in many orders");
    let shell = ["--package", "peervram", "--lib", "--features", "shuttle"];
    add(&mut counts, cargo_test(None, &shell, &["shuttle_tests"])?);
    if let Some(lab) = &lab {
        peervram_programs::say!("\nVulkan by the private root's driver");
        add(&mut counts, validation::tests_in_root(lab)?);
    }
    peervram_programs::say!("\ndemo on the embedded default");
    add(&mut counts, one(report(succeeds(demo::run(&demo::Arguments::usual(false))))));
    match &lab {
        Some(lab) => {
            peervram_programs::say!("\ndemo on a real kernel");
            add(&mut counts, one(report(succeeds(demo::run(&demo::Arguments::usual(true))))));
            peervram_programs::say!("\nsamples");
            add(&mut counts, sample::run_all(lab)?);
            peervram_programs::say!("\npeer-copy");
            let no_files = peer_copy::Files::default();
            add(
                &mut counts,
                one(report(peer_copy::run(
                    lab,
                    &no_files,
                    peer_copy::Extent::Quick,
                    &mut Figures::default(),
                ))),
            );
            peervram_programs::say!("\nthe commands of the book");
            add(&mut counts, book::run_pages(lab, "")?);
            peervram_programs::say!("\nshaders");
            add(&mut counts, one(report(shaders::check(lab.root()))));
            add(&mut counts, lab_tests(lab)?);
        }
        None => {
            peervram_programs::say!("\nskipped: the lab: --no-lab was given");
            counts.skipped += 1;
        }
    }
    peervram_programs::say!("\n{counts}");
    Ok(ExitCode::from(if counts.failed > 0 { FAILED } else { 0 }))
}

fn add(sum: &mut Counts, counts: Counts) {
    sum.passed += counts.passed;
    sum.failed += counts.failed;
    sum.skipped += counts.skipped;
}

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

fn lab_tests(lab: &Lab) -> Result<Counts> {
    let machines: Vec<_> = machines::everyday().collect();
    let plans = suite::plan(lab.programs(), &machines, "", Extent::Usual)?;
    let outcomes = lab::run_plans(lab, &plans, &Pace::usual(), peervram_programs::output())?;
    let mut counts = Counts::of(&outcomes);
    peervram_programs::say!("\nthe page of routes");
    add(&mut counts, one(report(routes::check(&outcomes))));
    Ok(counts)
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
