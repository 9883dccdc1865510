//! `cargo xtask routes`: the table of shapes, by running them all.

use anyhow::{Context, Result, bail};
use clap::Args;
use peervram_lab::Machine;
use peervram_lab::machines::shapes;
use peervram_lab::report::Counts;
use peervram_lab::routes::Routes;
use peervram_lab::suite::{self, Extent, Outcome};
use std::fs;
use std::process::ExitCode;

use crate::lab::{self, Pace, Setup};
use crate::terminal::{FAILED, Steps};

const PAGE: &str = "docs/routes-table.md";

/// Compare predicted routes with the kernel's answers on every shape, and write docs/routes-table.md
#[derive(Args)]
pub struct Arguments {
    /// Write nothing; fail if the page is not what the run finds
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    setup: Setup,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let steps = Steps::default();
    let lab = lab::open(&arguments.setup, &steps)?;
    let machines: Vec<&Machine> = shapes::MACHINES.iter().collect();
    let plans = suite::plan(lab.programs(), &machines, "routes/", Extent::Everywhere)?;
    let outcomes = lab::run_plans(&lab, &plans, &Pace::usual(), peervram_programs::output())?;
    if Counts::of(&outcomes).failed > 0 {
        return Ok(ExitCode::from(FAILED));
    }
    let routes = found(&outcomes)?.context("no machine said anything of routes")?;
    if !arguments.check {
        fs::write(PAGE, routes.page()).with_context(|| format!("writing {PAGE}"))?;
    } else if fs::read_to_string(PAGE).with_context(|| format!("reading {PAGE}"))? != routes.page() {
        bail!("{PAGE} is not what this run found; run `cargo xtask routes`");
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails if a row that a run found is not so on the page.
pub fn check(outcomes: &[Outcome]) -> Result<()> {
    let page = fs::read_to_string(PAGE).with_context(|| format!("reading {PAGE}"))?;
    check_page(&page, outcomes)
}

fn check_page(page: &str, outcomes: &[Outcome]) -> Result<()> {
    let rows = found(outcomes)?.map(|routes| routes.page_rows()).unwrap_or_default();
    match rows.iter().find(|row| !page.lines().any(|line| line == *row)) {
        Some(row) => bail!("{PAGE} lacks the row\n    {row}\nrun `cargo xtask routes`"),
        None => Ok(()),
    }
}

fn found(outcomes: &[Outcome]) -> Result<Option<Routes>> {
    Routes::of(outcomes.iter().flat_map(|outcome| &outcome.cells))
}

#[cfg(test)]
mod tests {
    use super::*;
    use peervram_lab::wire::Cell;

    #[test]
    fn a_row_that_is_not_on_the_page_is_a_failure() {
        let said = [("CPU", "EPYC"), ("lenders", "2"), ("clients", "2"), ("pairs", "4")];
        let counted =
            [("bus address", "1"), ("through host bridge", "3"), ("not supported", "0"), ("right", "4")];
        let cell = |(column, text): (&str, &str)| Cell {
            table: "routes".into(),
            row: "a: off".into(),
            column: column.into(),
            text: text.into(),
        };
        let outcome = Outcome {
            machine: "a".into(),
            release: None,
            boot_s: 0.0,
            total_s: 0.0,
            tests: Vec::new(),
            cells: said.into_iter().chain(counted).map(cell).collect(),
        };
        let row = "| a: off | EPYC | 2 | 2 | 4 | 1 | 3 | 0 | 4 |";
        let page = format!("# Routes\n\n{row}\n| b: off | EPYC | 2 | 2 | 4 | 1 | 3 | 0 | 4 |\n");
        check_page(&page, std::slice::from_ref(&outcome)).unwrap();
        let error = check_page(&page.replace("| 3 |", "| 2 |"), &[outcome]).unwrap_err();
        assert!(error.to_string().contains(row), "{error}");
    }
}
