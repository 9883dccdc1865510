//! `Report`: rows of figures as one table, or as JSON with every round.

use std::io::{self, Write};

use peervram::backends::vfio::kernel_release;
use serde::Serialize;

use crate::samples::Samples;

/// Everything that was measured in one run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Who lent.
    pub lender: String,
    kernel_release: String,
    cpus: usize,
    /// How often both sides took their turn.
    pub rounds: usize,
    /// How many times a turn has.
    pub cycles: usize,
    rows: Vec<Row>,
    skipped: Vec<Skip>,
}

/// One thing that was measured, against another.
#[derive(Debug, Serialize)]
struct Row {
    what: String,
    against: &'static str,
    unit: Unit,
    /// Median of the rounds' medians.
    ours: f64,
    theirs: f64,
    /// Median of the rounds' ratios.
    ratio: f64,
    ratio_least: f64,
    ratio_most: f64,
    limit: Option<f64>,
    verdict: Option<Verdict>,
    rounds: Vec<Round>,
}

/// What one round found: the median of each side.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Round {
    /// Of what is measured.
    pub ours: f64,
    /// Of what it is compared with.
    pub theirs: f64,
}

/// What the figures of a row are.
#[derive(Clone, Copy, Debug, Serialize)]
pub enum Unit {
    /// Nanoseconds.
    #[serde(rename = "ns")]
    Ns,
    /// Nanoseconds for each MiB of memory.
    #[serde(rename = "ns/MiB")]
    NsPerMib,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Over,
}

#[derive(Debug, Serialize)]
struct Skip {
    what: &'static str,
    why: String,
}

impl Report {
    /// An empty report.
    pub fn new(rounds: usize, cycles: usize) -> Report {
        Report {
            lender: String::new(),
            kernel_release: kernel_release(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            rounds,
            cycles,
            rows: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// Adds a row: `what`, measured `against` something else, in `rounds`, whose median ratio may be
    /// `limit` at most.
    pub fn row(
        &mut self,
        what: impl Into<String>,
        against: &'static str,
        unit: Unit,
        rounds: Vec<Round>,
        limit: Option<f64>,
    ) {
        let of = |figure: fn(&Round) -> f64| rounds.iter().map(figure).collect::<Samples>();
        let ratios = of(|round| round.ours / round.theirs);
        let ratio = ratios.median();
        self.rows.push(Row {
            what: what.into(),
            against,
            unit,
            ours: of(|round| round.ours).median(),
            theirs: of(|round| round.theirs).median(),
            ratio,
            ratio_least: ratios.least(),
            ratio_most: ratios.most(),
            limit,
            // Not a number, were there one, is no pass.
            verdict: limit.map(|limit| if ratio <= limit { Verdict::Ok } else { Verdict::Over }),
            rounds,
        });
    }

    /// Says that something cannot be measured here.
    pub fn skip(&mut self, what: &'static str, why: impl Into<String>) {
        self.skipped.push(Skip { what, why: why.into() });
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whether a ratio is over its limit.
    pub fn is_over(&self) -> bool {
        self.rows.iter().any(|row| row.verdict == Some(Verdict::Over))
    }

    /// Prints the table.
    pub fn print(&self, output: &mut impl Write) -> io::Result<()> {
        let mut lines = vec![
            ["what", "median", "against", "median", "ratio", "spread", "limit", "verdict"].map(String::from),
        ];
        lines.extend(self.rows.iter().map(Row::cells));
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
        writeln!(
            output,
            "{}; Linux {}, {} CPUs; {} rounds of {} cycles, medians; spread: the rounds' ratios\n",
            self.lender, self.kernel_release, self.cpus, self.rounds, self.cycles
        )?;
        for (number, line) in lines.iter().enumerate() {
            let mut text = String::new();
            for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
                // Words to the left, figures to the right.
                text += &match column {
                    0 | 2 | 7 => format!("{cell:width$}  "),
                    _ => format!("{cell:>width$}  "),
                };
            }
            writeln!(output, "{}", text.trim_end())?;
            if number == 0 {
                writeln!(output, "{}", "-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)))?;
            }
        }
        for skip in &self.skipped {
            writeln!(output, "\nskipped: {}: {}", skip.what, skip.why)?;
        }
        Ok(())
    }

    /// Prints everything, with every round, as one line of JSON.
    pub fn print_json(&self, output: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *output, self)?;
        writeln!(output)
    }
}

impl Row {
    fn cells(&self) -> [String; 8] {
        [
            self.what.clone(),
            self.unit.show(self.ours),
            self.against.into(),
            self.unit.show(self.theirs),
            format!("{:.2}", self.ratio),
            format!("{:.2}-{:.2}", self.ratio_least, self.ratio_most),
            self.limit.map_or_else(String::new, |limit| format!("{limit:.2}")),
            self.verdict.map_or("", Verdict::word).into(),
        ]
    }
}

impl Unit {
    fn show(self, figure: f64) -> String {
        match self {
            Unit::Ns => format!("{:.1} us", figure / 1e3),
            Unit::NsPerMib => format!("{figure:.0} ns/MiB"),
        }
    }
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Over => "OVER",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(pairs: &[(f64, f64)]) -> Vec<Round> {
        pairs.iter().map(|&(ours, theirs)| Round { ours, theirs }).collect()
    }

    #[test]
    fn the_median_of_the_ratios_decides() {
        let mut report = Report::new(3, 1);
        report.row("a", "b", Unit::Ns, rounds(&[(10.0, 10.0), (11.0, 10.0), (90.0, 10.0)]), Some(1.1));
        assert!(!report.is_over());
        report.row("a", "b", Unit::Ns, rounds(&[(12.0, 10.0)]), None);
        assert!(!report.is_over());
        report.row("a", "b", Unit::Ns, rounds(&[(12.0, 10.0)]), Some(1.1));
        assert!(report.is_over());
        let mut text = Vec::new();
        report.print(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("1.00-9.00") && text.contains("OVER"), "{text}");
    }

    #[test]
    fn no_figures_are_no_pass() {
        let mut report = Report::new(1, 1);
        report.row("a", "b", Unit::Ns, Vec::new(), Some(1.1));
        assert!(report.is_over());
    }
}
