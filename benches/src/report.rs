//! `Report`: rows of figures as one table, or as JSON with every round.

use std::io::{self, Write};

use peervram::backends::vfio::kernel_release;
use serde::Serialize;

use peervram_programs::{Samples, Table, UNBROKEN};

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

/// One thing that was measured.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Row {
    Ratio(Ratio),
    Figure(Figure),
}

/// One thing that was measured against another.
#[derive(Debug, Serialize)]
struct Ratio {
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

/// One thing that was measured by itself.
#[derive(Debug, Serialize)]
struct Figure {
    what: String,
    unit: Unit,
    /// Median of the rounds' medians.
    ours: f64,
    least: f64,
    most: f64,
    /// In the same unit.
    limit: Option<f64>,
    /// Whether less than the limit is wrong, too.
    exactly: bool,
    verdict: Option<Verdict>,
    /// The median of each round.
    rounds: Vec<f64>,
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
    /// Instructions that a CPU executed.
    #[serde(rename = "instructions")]
    Instructions,
    /// Calls of a function or of the kernel.
    #[serde(rename = "calls")]
    Calls,
}

/// What a count may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    AtMost(f64),
    Exactly(f64),
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

    /// Adds a row of a ratio: `what`, measured `against` something else, in `rounds`, whose median ratio may be
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
        self.rows.push(Row::Ratio(Ratio {
            what: what.into(),
            against,
            unit,
            ours: of(|round| round.ours).median(),
            theirs: of(|round| round.theirs).median(),
            ratio,
            ratio_least: ratios.least(),
            ratio_most: ratios.most(),
            limit,
            verdict: limit.map(|limit| Limit::AtMost(limit).verdict(ratio)),
            rounds,
        }));
    }

    /// Adds a row of `what` by itself: a median for each of `rounds`, whose median may be `limit` at most.
    pub fn figure(&mut self, what: impl Into<String>, unit: Unit, rounds: Vec<f64>, limit: Option<f64>) {
        self.add(what.into(), unit, rounds, limit.map(Limit::AtMost));
    }

    /// Adds a row of `what`, counted in each of `rounds`, whose median keeps to `limit`.
    pub fn count(&mut self, what: impl Into<String>, unit: Unit, rounds: Vec<f64>, limit: Limit) {
        self.add(what.into(), unit, rounds, Some(limit));
    }

    fn add(&mut self, what: String, unit: Unit, rounds: Vec<f64>, limit: Option<Limit>) {
        let of_rounds: Samples = rounds.iter().copied().collect();
        let ours = of_rounds.median();
        self.rows.push(Row::Figure(Figure {
            what,
            unit,
            ours,
            least: of_rounds.least(),
            most: of_rounds.most(),
            limit: limit.map(Limit::figure),
            exactly: matches!(limit, Some(Limit::Exactly(_))),
            verdict: limit.map(|limit| limit.verdict(ours)),
            rounds,
        }));
    }

    /// Says that something cannot be measured here.
    pub fn skip(&mut self, what: &'static str, why: impl Into<String>) {
        self.skipped.push(Skip { what, why: why.into() });
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whether a row is over its limit.
    pub fn is_over(&self) -> bool {
        self.rows.iter().any(|row| row.verdict() == Some(Verdict::Over))
    }

    /// Prints the table.
    pub fn print(&self, output: &mut impl Write) -> io::Result<()> {
        // Words stand at the left, figures at the right.
        let heading = ["what", "median", "against", "median", "ratio", "spread", "limit", "verdict"];
        let mut table = Table::new(&heading).with_figures_in([1, 3, 4, 5, 6]);
        self.rows.iter().for_each(|row| table.row(row.cells()));
        writeln!(
            output,
            "{}; Linux {}, {} CPUs; {} rounds of {} cycles, medians; spread: of the rounds\n",
            self.lender, self.kernel_release, self.cpus, self.rounds, self.cycles
        )?;
        table.print(output, UNBROKEN)?;
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
    fn verdict(&self) -> Option<Verdict> {
        match self {
            Row::Ratio(ratio) => ratio.verdict,
            Row::Figure(figure) => figure.verdict,
        }
    }

    fn cells(&self) -> [String; 8] {
        let verdict = self.verdict().map_or("", Verdict::word).into();
        match self {
            Row::Ratio(ratio) => [
                ratio.what.clone(),
                ratio.unit.show(ratio.ours),
                ratio.against.into(),
                ratio.unit.show(ratio.theirs),
                format!("{:.2}", ratio.ratio),
                format!("{:.2}-{:.2}", ratio.ratio_least, ratio.ratio_most),
                ratio.limit.map_or_else(String::new, |limit| format!("{limit:.2}")),
                verdict,
            ],
            Row::Figure(figure) => [
                figure.what.clone(),
                figure.unit.show(figure.ours),
                String::new(),
                String::new(),
                String::new(),
                format!("{}-{}", figure.unit.show(figure.least), figure.unit.show(figure.most)),
                figure.limit.map_or_else(String::new, |limit| figure.unit.show(limit)),
                verdict,
            ],
        }
    }
}

impl Unit {
    fn show(self, figure: f64) -> String {
        match self {
            Unit::Ns if figure < 1e3 => format!("{figure:.1} ns"),
            Unit::Ns => format!("{:.1} us", figure / 1e3),
            Unit::NsPerMib => format!("{figure:.0} ns/MiB"),
            Unit::Instructions | Unit::Calls => format!("{figure:.0}"),
        }
    }
}

impl Limit {
    fn figure(self) -> f64 {
        match self {
            Limit::AtMost(figure) | Limit::Exactly(figure) => figure,
        }
    }

    fn verdict(self, found: f64) -> Verdict {
        // Not a number, were there one, is no pass.
        let is_kept = match self {
            Limit::AtMost(most) => found <= most,
            Limit::Exactly(figure) => found == figure,
        };
        if is_kept { Verdict::Ok } else { Verdict::Over }
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
    fn a_figure_by_itself_has_a_limit_of_its_unit() {
        let mut report = Report::new(3, 1);
        report.figure("a", Unit::Ns, vec![50.0, 59.0, 4000.0], Some(60.0));
        report.figure("a", Unit::Ns, vec![4000.0], None);
        assert!(!report.is_over());
        let mut text = Vec::new();
        report.print(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("50.0 ns-4.0 us  60.0 ns  ok"), "{text}");
        report.figure("a", Unit::Ns, vec![61.0], Some(60.0));
        assert!(report.is_over());
    }

    #[test]
    fn a_count_that_is_exact_may_be_neither_more_nor_less() {
        for (found, is_over) in [(4.0, true), (5.0, false), (6.0, true)] {
            let mut report = Report::new(1, 1);
            report.count("a", Unit::Calls, vec![found], Limit::Exactly(5.0));
            assert_eq!(report.is_over(), is_over, "{found}");
            let mut report = Report::new(1, 1);
            report.count("a", Unit::Instructions, vec![found], Limit::AtMost(5.0));
            assert_eq!(report.is_over(), found > 5.0, "{found}");
        }
    }

    #[test]
    fn no_figures_are_no_pass() {
        let mut report = Report::new(1, 1);
        report.row("a", "b", Unit::Ns, Vec::new(), Some(1.1));
        assert!(report.is_over());
        let mut report = Report::new(1, 1);
        report.figure("a", Unit::Ns, Vec::new(), Some(60.0));
        assert!(report.is_over());
    }
}
