//! The table of lab tests and the machines that they run on, committed, so that a test that is lost from a machine is a
//! line of a change.

use anyhow::{Context, Result};
use peervram_lab::Programs;
use peervram_lab::machines;
use peervram_lab::suite::{self, Extent, Plan};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::{Files, Violation};

/// Where it is committed.
const FILE: &str = "lab/tests.md";

/// Writes it.
pub fn write(project: &Path, programs: &Programs) -> Result<()> {
    fs::write(project.join(FILE), text(&plans(programs)?)).with_context(|| format!("writing {FILE}"))
}

/// Violations of the committed table.
pub fn check(files: &Files, programs: &Programs) -> Result<Vec<Violation>> {
    let committed = files.get(FILE).map_or("", String::as_str);
    Ok(differences(committed, &text(&plans(programs)?)))
}

/// What runs unless machines are named.
fn plans(programs: &Programs) -> Result<Vec<Plan>> {
    let machines: Vec<_> = machines::everyday().collect();
    suite::plan(programs, &machines, "", Extent::Usual)
}

fn text(plans: &[Plan]) -> String {
    let mut machines_of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for plan in plans {
        for test in &plan.tests {
            machines_of.entry(test).or_default().push(plan.machine.name);
        }
    }
    let runs: usize = machines_of.values().map(Vec::len).sum();
    let mut text = format!(
        "# Tests of the lab\n\nWhich test runs on which machines, where none are named: {} tests, {runs} runs on {} machines. \
         Written by `cargo xtask tidy --write`;\n`cargo xtask tidy` compares. What each machine is: \
         [the lab](../docs/lab.md), `cargo xtask lab list`.\n\n| test | machines |\n|---|---|\n",
        machines_of.len(),
        plans.len()
    );
    for (test, machines) in machines_of {
        let _ = writeln!(text, "| `{test}` | {} |", machines.join(", "));
    }
    text
}

/// The rows that are in one of two tables only; where there are none, whether the tables differ otherwise: in their order, or in
/// what is counted above them.
fn differences(before: &str, after: &str) -> Vec<Violation> {
    let rows = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with("| `")).map(str::to_owned).collect()
    };
    let (committed, now) = (rows(before), rows(after));
    let next = "if that is meant, cargo xtask tidy --write writes it anew";
    let missing = now.iter().filter(|row| !committed.contains(row)).map(|row| format!("lacks {row}: {next}"));
    let stale = committed
        .iter()
        .filter(|row| !now.contains(row))
        .map(|row| format!("has {row}, which is not so: {next}"));
    let mut all: Vec<String> = missing.chain(stale).collect();
    if all.is_empty() && before != after {
        all.push(format!("has other counts or another order than now: {next}"));
    }
    all.into_iter().map(|what| Violation::new(FILE, what)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_is_lost_from_a_machine_or_new_is_found() {
        let machine = machines::named("linux-6.12").unwrap();
        let other = machines::named("epyc-switch").unwrap();
        let tests = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let before = text(&[
            Plan { machine, tests: tests(&["a/b", "a/c"]) },
            Plan { machine: other, tests: tests(&["a/b"]) },
        ]);
        assert!(before.contains("2 tests, 3 runs on 2 machines"), "{before}");
        assert_eq!(differences(&before, &before), []);
        let now = text(&[Plan { machine, tests: tests(&["a/b", "a/d"]) }]);
        // a/b lost a machine, a/c is gone, a/d is new.
        assert_eq!(differences(&before, &now).len(), 4);
        let counted_wrongly = before.replacen("3 runs", "4 runs", 1);
        assert_eq!(differences(&counted_wrongly, &before).len(), 1);
    }
}
