//! What a person reads: machine by machine, test by test, the tables that tests filled, and one last line
//! to count on.

use serde::Serialize;
use std::io::{self, Write};

use crate::run::routes::Routes;
use crate::run::suite::{Outcome, Plan, Tested, Watcher};
use crate::run::table;
use crate::vm::wire::{Cell, Verdict};

/// How many tests ended in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed, or did not run because the machine was lost.
    pub failed: usize,
    /// Tests that were not tried, with a reason. A skip is not a pass.
    pub skipped: usize,
}

impl Counts {
    /// Counts the tests of all machines.
    pub fn of(outcomes: &[Outcome]) -> Counts {
        let mut counts = Counts::default();
        for tested in outcomes.iter().flat_map(|outcome| &outcome.tests) {
            counts.add(&tested.verdict);
        }
        counts
    }

    fn add(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Failed { .. } => self.failed += 1,
            Verdict::Skipped { .. } => self.skipped += 1,
        }
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Counts { passed, failed, skipped } = self;
        write!(formatter, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// Writes as it happens. A writer that fails ends nothing: the verdict is in the outcome.
#[derive(Debug)]
pub struct Text<W: Write> {
    writer: W,
    width: usize,
    unpassed: Vec<(String, Tested)>,
    machine: String,
    cells: Vec<Cell>,
    counts: Counts,
}

impl<W: Write> Text<W> {
    /// Writes to `writer`.
    pub fn new(writer: W) -> Text<W> {
        Text {
            writer,
            width: 0,
            unpassed: Vec::new(),
            machine: String::new(),
            cells: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// What the whole run found out about routes, the reasons of failures and skips, and the last line.
    pub fn finish(mut self) -> io::Result<W> {
        match Routes::of(&self.cells) {
            Ok(Some(routes)) => write!(self.writer, "\nall machines:\n\n{routes}")?,
            Ok(None) => {}
            Err(error) => writeln!(self.writer, "\nno table of all routes: {error:#}")?,
        }
        for (machine, tested) in &self.unpassed {
            let (word, reason) = match &tested.verdict {
                Verdict::Passed => continue,
                Verdict::Failed { reason } => ("FAILED", reason),
                Verdict::Skipped { reason } => ("skipped", reason),
            };
            writeln!(self.writer, "\n{word}: {} on {machine}", tested.name)?;
            for line in reason.lines() {
                writeln!(self.writer, "    {line}")?;
            }
        }
        writeln!(self.writer, "\n{}", self.counts)?;
        Ok(self.writer)
    }
}

impl<W: Write> Watcher for Text<W> {
    fn machine_starts(&mut self, plan: &Plan) {
        let tests = if plan.tests.len() == 1 { "test" } else { "tests" };
        writeln!(self.writer, "{} starts: {} {tests}", plan.machine.name, plan.tests.len()).ok();
    }

    fn machines_run(&mut self, plans: &[&Plan]) {
        let names: Vec<&str> = plans.iter().map(|plan| plan.machine.name).collect();
        let run = if names.len() == 1 { "runs" } else { "run" };
        writeln!(self.writer, "{} still {run}", names.join(" and ")).ok();
    }

    fn machine_begins(&mut self, plan: &Plan) {
        self.machine = plan.machine.name.into();
        self.width = plan.tests.iter().map(String::len).max().unwrap_or(0);
        writeln!(self.writer, "\n{}: {}", plan.machine.name, plan.machine.about).ok();
    }

    fn machine_is_up(&mut self, release: &str, boot_s: f64) {
        writeln!(self.writer, "  Linux {release}, up after {boot_s:.1} s").ok();
    }

    fn tested(&mut self, tested: &Tested) {
        let word = match tested.verdict {
            Verdict::Passed => "ok",
            Verdict::Failed { .. } => "FAILED",
            Verdict::Skipped { .. } => "skipped",
        };
        let width = self.width;
        writeln!(self.writer, "  {:width$}  {word:7}  {:6.2} s", tested.name, tested.seconds).ok();
        self.counts.add(&tested.verdict);
        if tested.verdict != Verdict::Passed {
            self.unpassed.push((self.machine.clone(), tested.clone()));
        }
    }

    fn machine_ends(&mut self, outcome: &Outcome) {
        writeln!(self.writer, "  boot to last verdict: {:.1} s", outcome.total_s).ok();
        for table in table::all(&outcome.cells) {
            write!(self.writer, "\n{table}").ok();
        }
        self.cells.extend_from_slice(&outcome.cells);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines;
    use crate::vm::wire::Cell;

    fn tested(name: &str, verdict: Verdict) -> Tested {
        Tested { name: name.into(), verdict, seconds: 1.0 }
    }

    #[test]
    fn reasons_come_after_and_counts_last() {
        let mut text = Text::new(Vec::new());
        let tests = vec!["lab/a".to_string(), "lab/b".to_string(), "lab/c".to_string()];
        text.machine_begins(&Plan { machine: machines::named("epyc-root-ports").unwrap(), tests });
        text.machine_is_up("7.3.4", 6.0);
        text.tested(&tested("lab/a", Verdict::Passed));
        text.tested(&tested("lab/b", Verdict::Failed { reason: "EINVAL\nno way".into() }));
        text.tested(&tested("lab/c", Verdict::Skipped { reason: "no Vulkan".into() }));
        let text = String::from_utf8(text.finish().unwrap()).unwrap();
        assert!(text.contains("FAILED: lab/b on epyc-root-ports\n    EINVAL\n    no way\n"));
        assert!(text.contains("skipped: lab/c on epyc-root-ports\n    no Vulkan\n"));
        assert_eq!(text.lines().last(), Some("1 passed, 1 failed, 1 skipped"));
    }

    #[test]
    fn tables_come_with_their_machine_and_before_reasons() {
        let mut text = Text::new(Vec::new());
        let machine = machines::named("small-revoke").unwrap();
        text.machine_begins(&Plan { machine, tests: vec!["a/b".into()] });
        text.tested(&tested("a/b", Verdict::Failed { reason: "the reason".into() }));
        let [table, row, column, text_of_cell] =
            ["revoke", "reset", "virtio-gpu", "right bytes"].map(str::to_owned);
        text.machine_ends(&Outcome {
            machine: machine.name.into(),
            release: None,
            boot_s: 3.0,
            total_s: 4.0,
            tests: Vec::new(),
            cells: vec![Cell { table, row, column, text: text_of_cell }],
        });
        let text = String::from_utf8(text.finish().unwrap()).unwrap();
        let expected = "4.0 s\n\n  revoke  virtio-gpu\n  reset   right bytes\n\nFAILED: a/b";
        assert!(text.contains(expected), "{text}");
    }
}
