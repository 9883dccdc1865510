//! `cargo xtask lab referees`: the kernel's own tests of VFIO, on the lab's devices.
//!
//! Whoever wrote the lab's devices wrote its tests, too. These were written by others, for the same ioctls.

use anyhow::{Context, Result};
use peervram_lab::machine::Kernel;
use peervram_lab::{Lab, Vm, machines};
use peervram_programs::{Table, behind, columns};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::terminal::FAILED;

/// How long a test may say nothing. The longest map and unmap a gigabyte, page by page.
const SILENCE_LIMIT: Duration = Duration::from_secs(600);

/// A device of the machine, by its place in the row.
const DEVICES: [(&str, usize); 3] = [("network card", 0), ("model GPU", 1), ("shared memory", 2)];

/// What cannot pass in the lab: part of a program's name, the device, and why.
const EXCUSED: &[(&str, &str, &str)] = &[
    (
        "vfio_",
        "shared memory",
        "the tests' library maps every BAR and takes each for whole pages; BAR 0 of ivshmem is 256 bytes",
    ),
    (
        "vfio_pci_sriov_uapi_test",
        "network card",
        "the lab's kernel has no virtual functions (CONFIG_PCI_IOV)",
    ),
];
/// How the kernel's tests say that they do not apply (`KSFT_SKIP`).
const SKIPPED: i32 = 4;

/// One program on one device.
#[derive(Debug, Serialize)]
struct Run {
    program: String,
    device: &'static str,
    passed: usize,
    skipped: Vec<Verdict>,
    failed: Vec<Verdict>,
    took_s: f64,
}

/// What is not ok, with what was said of it.
#[derive(Debug, PartialEq, Serialize)]
struct Verdict {
    test: String,
    why: String,
    /// Why it cannot be otherwise here.
    #[serde(skip_serializing_if = "Option::is_none")]
    excused: Option<&'static str>,
}

pub fn run(lab: &Lab, json: bool) -> Result<ExitCode> {
    let machine = crate::lab::named(machines::REFEREES)?;
    let Kernel::Own { version, .. } = machine.kernel else {
        anyhow::bail!("{} has no kernel of ours", machine.name)
    };
    let programs = lab.selftests(version)?;
    let mut vm = lab.boot(machine)?;
    let addresses = addresses(&mut vm, &lab.programs().command_line)?;
    let mut runs = Vec::new();
    for program in &programs {
        for (device, place) in DEVICES {
            let run = one(&mut vm, program, device, &addresses[place])?;
            if !json {
                peervram_programs::note!("{} on the {device}: {}", run.program, run.in_words());
            }
            runs.push(run);
        }
    }
    let is_excused = |verdict: &Verdict| verdict.excused.is_some();
    let needless = EXCUSED.iter().filter(|(.., why)| {
        !runs.iter().flat_map(|run| &run.failed).any(|verdict| verdict.excused == Some(*why))
    });
    let needless: Vec<String> =
        needless.map(|(program, device, why)| format!("{program} on the {device}: {why}")).collect();
    let is_good = needless.is_empty() && runs.iter().flat_map(|run| &run.failed).all(is_excused);
    if json {
        peervram_programs::say!("{:#}", serde_json::json!({ "machine": machine.name, "runs": runs }));
    } else {
        print(&runs)?;
        for needless in needless {
            peervram_programs::say!("\nexcused, and passes: {needless}");
        }
    }
    Ok(ExitCode::from(if is_good { 0 } else { FAILED }))
}

/// The addresses of the row's devices, in its order, as the buses have it.
fn addresses(vm: &mut Vm, command_line: &Path) -> Result<Vec<String>> {
    let said = vm.run(command_line, &["devices", "--json", "--all"])?;
    let devices: serde_json::Value = serde_json::from_str(&said.stdout)
        .with_context(|| format!("`peervram devices` says {}{}", said.stdout, said.stderr))?;
    let list = devices["devices"].as_array().map_or(&[][..], Vec::as_slice);
    let is_ours = |device: &&serde_json::Value| device["driver"] == "vfio-pci";
    let found: Vec<String> = list
        .iter()
        .filter(is_ours)
        .filter_map(|device| Some(device["address"].as_str()?.to_owned()))
        .collect();
    anyhow::ensure!(found.len() == DEVICES.len(), "{} devices are bound to vfio-pci: {found:?}", found.len());
    Ok(found)
}

fn one(vm: &mut Vm, program: &Path, device: &'static str, address: &str) -> Result<Run> {
    let begun = Instant::now();
    let said = vm.run_watched(program, &[address], &BTreeMap::new(), SILENCE_LIMIT, |_, _, _| Ok(()))?;
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut run = Run::read(&name, device, &said.stdout, &said.stderr);
    run.took_s = begun.elapsed().as_secs_f64();
    if run.passed + run.skipped.len() + run.failed.len() == 0 {
        let told = said.stderr.split_whitespace().collect::<Vec<_>>().join(" ");
        if said.code == SKIPPED {
            run.skipped.push(Verdict { test: "all".into(), why: told, excused: None });
        } else {
            let why = format!("it ended with code {} and told of no test: {told}", said.code);
            run.failed.push(Verdict::failed(&name, device, "all", why));
        }
    }
    Ok(run)
}

impl Run {
    /// Reads what a test says by the Test Anything Protocol, as the kernel's harness does: "ok 1 name", "not ok 2 name",
    /// "ok 3 name # SKIP why", with lines that begin with # before the one that they are about. What ends a test is in `errors`,
    /// with the last part of the test's name.
    fn read(program: &str, device: &'static str, text: &str, errors: &str) -> Run {
        let mut run = Run {
            program: program.to_owned(),
            device,
            passed: 0,
            skipped: Vec::new(),
            failed: Vec::new(),
            took_s: 0.0,
        };
        let mut said: Vec<&str> = Vec::new();
        for line in text.lines() {
            if let Some(about) = line.strip_prefix('#') {
                said.push(about.trim());
                continue;
            }
            let (is_ok, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
                (Some(rest), _) => (true, rest),
                (_, Some(rest)) => (false, rest),
                _ => continue,
            };
            let name = rest.split_once(' ').map_or("", |(_, name)| name);
            match (is_ok, name.split_once("# SKIP")) {
                (true, Some((name, why))) => {
                    let (test, why) = (name.trim().to_owned(), why.trim().to_owned());
                    run.skipped.push(Verdict { test, why, excused: None });
                }
                (true, None) => run.passed += 1,
                (false, _) => {
                    said.retain(|line| !line.starts_with("FAIL") && !line.starts_with("RUN"));
                    let last = said.len().saturating_sub(3);
                    let short = name.trim().rsplit('.').next().unwrap_or_default();
                    let ended = errors.lines().rev().find(|line| line.contains(short));
                    let why = said[last..].iter().copied().chain(ended).collect::<Vec<_>>().join("; ");
                    run.failed.push(Verdict::failed(program, device, name.trim(), why));
                }
            }
            said.clear();
        }
        run
    }

    fn in_words(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped in {:.1} s",
            self.passed,
            self.failed.len(),
            self.skipped.len(),
            self.took_s
        )
    }
}

impl Verdict {
    fn failed(program: &str, device: &str, test: &str, why: String) -> Verdict {
        let is_it = |row: &&(&str, &str, &str)| program.contains(row.0) && device == row.1;
        Verdict { test: test.to_owned(), why, excused: EXCUSED.iter().find(is_it).map(|row| row.2) }
    }
}

fn print(runs: &[Run]) -> Result<()> {
    let out = &mut peervram_programs::output();
    let mut table = Table::new(&["program", "device", "passed", "failed", "excused", "skipped", "s"]);
    for run in runs {
        let excused = run.failed.iter().filter(|verdict| verdict.excused.is_some()).count();
        table.row([
            run.program.clone(),
            run.device.to_owned(),
            run.passed.to_string(),
            (run.failed.len() - excused).to_string(),
            excused.to_string(),
            run.skipped.len().to_string(),
            format!("{:.1}", run.took_s),
        ]);
    }
    table.print(out, columns())?;
    // What is said of many tests is said once.
    let mut said: BTreeMap<(&str, &str, &str, &str), Vec<&str>> = BTreeMap::new();
    for run in runs {
        for (verdicts, word) in [(&run.failed, "failed"), (&run.skipped, "skipped")] {
            for Verdict { test, why, excused } in verdicts {
                let (word, why) = excused.map_or((word, &**why), |excused| ("excused", excused));
                said.entry((word, &run.program, run.device, why)).or_default().push(test);
            }
        }
    }
    for ((word, program, device, why), tests) in said {
        let which = match &tests[..] {
            [first, more @ ..] if !more.is_empty() => format!("{first} and {} more", more.len()),
            tests => tests.join(", "),
        };
        writeln!(out)?;
        behind(out, columns(), &format!("{word:8} "), &format!("{program} on the {device}: {which}"))?;
        behind(out, columns(), "         ", why)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_read_as_the_harness_writes_them() {
        let text = "TAP version 13\n1..4\n# Starting 4 tests from 2 test cases.\n#  RUN           global.a ...\n\
                    #            OK  global.a\nok 1 global.a\n#  RUN           global.b ...\n\
                    # b.c:12:b:Expected 0 (0) == rc (-22)\n# b: Test terminated by assertion\n\
                    #          FAIL  global.b\nnot ok 2 global.b\nok 3 global.c # SKIP no driver\n\
                    # Totals: pass:1 fail:1 xfail:0 xpass:0 skip:1 error:0\nsomething else\n";
        let run = Run::read("vfio_test", "model GPU", text, "# a: other\n# b: Test terminated by timeout\n");
        assert_eq!(run.passed, 1);
        let verdict = |test: &str, why: &str| Verdict { test: test.into(), why: why.into(), excused: None };
        assert_eq!(run.skipped, [verdict("global.c", "no driver")]);
        let why = "b.c:12:b:Expected 0 (0) == rc (-22); b: Test terminated by assertion; # b: Test terminated by timeout";
        assert_eq!(run.failed, [verdict("global.b", why)]);
        assert!(run.in_words().starts_with("1 passed, 1 failed, 1 skipped"));
    }
}
