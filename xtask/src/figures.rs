//! `Figures`: what all benchmarks of a run found, as one table with the limit beside each.
//!
//! Each benchmark prints a table of its own, with what belongs to it alone; this one comes last. It is made of the
//! lines of JSON that they print for it: a report of `peervram-benches`, or a single row.

use anyhow::{Context, Result};
use peervram_programs::{Table, UNBROKEN};
use serde::Deserialize;
use std::io::{self, Write};

/// One figure.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Figure {
    /// What was measured.
    pub what: String,
    /// What it was measured against; nothing where it is a time.
    #[serde(default)]
    pub against: Option<String>,
    /// The median of the ratios; there is none of a time.
    #[serde(default)]
    pub ratio: Option<f64>,
    #[serde(default)]
    ratio_least: Option<f64>,
    #[serde(default)]
    ratio_most: Option<f64>,
    /// The median of the times, in `unit`.
    #[serde(default)]
    pub ours: Option<f64>,
    #[serde(default)]
    unit: Option<String>,
    #[serde(default)]
    least: Option<f64>,
    #[serde(default)]
    most: Option<f64>,
    /// What it may be at most; or at least, where more is better.
    #[serde(default)]
    pub limit: Option<f64>,
    #[serde(default)]
    pub more_is_better: bool,
    /// Whether it is to be the limit, no more and no less.
    #[serde(default)]
    exactly: bool,
}

/// What `peervram-benches --json` prints, as far as it is read here.
#[derive(Deserialize)]
struct Report {
    rows: Vec<Figure>,
}

/// All of a run.
#[derive(Debug, Default)]
pub struct Figures(Vec<(Figure, String)>);

impl Figures {
    /// Adds the report or the figure in a line of JSON, measured at `place`.
    pub fn read(&mut self, line: &str, place: &str) -> Result<()> {
        let failed = || format!("reading what a benchmark found: {line}");
        let figures = match serde_json::from_str::<Report>(line) {
            Ok(report) => report.rows,
            Err(_) => vec![serde_json::from_str(line).with_context(failed)?],
        };
        self.0.extend(figures.into_iter().map(|figure| (figure, place.to_owned())));
        Ok(())
    }

    /// Adds one that was measured at `place`.
    pub fn push(&mut self, figure: Figure, place: &str) {
        self.0.push((figure, place.to_owned()));
    }

    /// Whether one is beyond its limit.
    pub fn is_over(&self) -> bool {
        self.0.iter().any(|(figure, _)| figure.is_within() == Some(false))
    }

    /// Prints the table.
    pub fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let heading = ["what", "against", "median", "spread", "limit", "verdict", "where"];
        let mut table = Table::new(&heading).with_figures_in(2..=4).without_rule();
        self.0.iter().for_each(|(figure, place)| table.row(figure.cells(place)));
        table.print(out, UNBROKEN)
    }
}

impl Figure {
    /// A time in seconds, which may be `limit_s` at most.
    pub fn seconds(what: &str, seconds: f64, limit_s: f64) -> Figure {
        Figure {
            what: what.into(),
            against: None,
            ratio: None,
            ratio_least: None,
            ratio_most: None,
            ours: Some(seconds),
            unit: Some("s".into()),
            least: None,
            most: None,
            limit: Some(limit_s),
            more_is_better: false,
            exactly: false,
        }
    }

    /// A ratio of `what` to the same `against` something else, its median and its spread, which is to be `limit` at
    /// least.
    pub fn of_more(against: &str, what: &str, ratio: f64, spread: [Option<f64>; 2], limit: f64) -> Figure {
        let [ratio_least, ratio_most] = spread;
        Figure {
            against: Some(against.into()),
            ratio: Some(ratio),
            ratio_least,
            ratio_most,
            ours: None,
            unit: None,
            more_is_better: true,
            ..Figure::seconds(what, 0.0, limit)
        }
    }

    /// Whether it keeps its limit; none where it has none. What is no number keeps none.
    fn is_within(&self) -> Option<bool> {
        let (limit, figure) = (self.limit?, self.ratio.or(self.ours).unwrap_or(f64::NAN));
        Some(match () {
            () if self.exactly => figure == limit,
            () if self.more_is_better => figure >= limit,
            () => figure <= limit,
        })
    }

    fn show(&self, figure: f64) -> String {
        match self.unit.as_deref() {
            _ if self.ratio.is_some() => format!("{figure:.2}"),
            Some("ns") if figure >= 1e3 => format!("{:.1} us", figure / 1e3),
            Some(unit @ "ns/MiB") => format!("{figure:.0} {unit}"),
            Some("instructions" | "calls") => format!("{figure:.0}"),
            Some(unit) => format!("{figure:.1} {unit}"),
            None => format!("{figure:.2}"),
        }
    }

    fn cells(&self, place: &str) -> [String; 7] {
        let figure = self.ratio.or(self.ours).map_or_else(|| "none".into(), |figure| self.show(figure));
        let spread = match (self.ratio_least.or(self.least), self.ratio_most.or(self.most)) {
            (Some(least), Some(most)) => format!("{}-{}", self.show(least), self.show(most)),
            _ => String::new(),
        };
        let sign = match () {
            () if self.exactly => "=",
            () if self.more_is_better => ">=",
            () => "<=",
        };
        [
            self.what.clone(),
            self.against.clone().unwrap_or_default(),
            figure,
            spread,
            self.limit.map_or_else(String::new, |limit| format!("{sign} {}", self.show(limit))),
            match self.is_within() {
                Some(true) => "ok".into(),
                Some(false) => "OVER".into(),
                None => String::new(),
            },
            place.into(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_and_single_figures_become_one_table() {
        let mut figures = Figures::default();
        let report = r#"{"lender":"x","rows":[
            {"kind":"ratio","what":"crossing","against":"raw","unit":"ns","ours":5e5,"theirs":5e5,"ratio":1.05,
             "ratio_least":0.9,"ratio_most":1.2,"limit":1.1,"verdict":"ok","rounds":[]},
            {"kind":"figure","what":"access","unit":"ns","ours":34.4,"least":33.0,"most":36.1,"limit":60.0,"rounds":[]}
        ],"skipped":[]}"#;
        figures.read(&report.replace('\n', " "), "a-machine").unwrap();
        figures
            .read(
                r#"{"what":"reads","against":"bare","ratio":0.83,"limit":0.8,"more_is_better":true}"#,
                "here",
            )
            .unwrap();
        figures.push(Figure::seconds("build", 61.2, 90.0), "here");
        figures.push(Figure::of_more("by hand", "copies", 0.99, [Some(0.95), None], 0.98), "here");
        assert!(!figures.is_over());
        let mut text = Vec::new();
        figures.print(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        for part in [
            "1.05  0.90-1.20",
            "<= 1.10  ok",
            "34.4 ns  33.0 ns-36.1 ns",
            ">= 0.80  ok",
            "61.2 s",
            "a-machine",
        ] {
            let squeezed = text.split("   ").collect::<String>();
            assert!(text.contains(part) || squeezed.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn what_is_beyond_its_limit_on_the_wrong_side_is_over() {
        let over = |line: &str| {
            let mut figures = Figures::default();
            figures.read(line, "here").unwrap();
            figures.is_over()
        };
        assert!(over(r#"{"what":"a","ratio":1.2,"limit":1.1}"#));
        assert!(over(r#"{"what":"a","ratio":0.7,"limit":0.8,"more_is_better":true}"#));
        assert!(!over(r#"{"what":"a","ratio":1.2,"limit":1.1,"more_is_better":true}"#));
        assert!(!over(r#"{"what":"a","ratio":1.2}"#));
        assert!(over(r#"{"what":"a","ours":4,"unit":"calls","limit":5,"exactly":true}"#));
        assert!(!over(r#"{"what":"a","ours":5,"unit":"calls","limit":5,"exactly":true}"#));
        assert!(!over(r#"{"what":"a","ours":4,"unit":"calls","limit":5}"#));
        // What was not measured keeps no limit.
        assert!(over(r#"{"what":"a","limit":1.1}"#));
        assert!(Figures::default().read("{}", "here").is_err());
    }
}
