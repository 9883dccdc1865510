//! `cargo xtask tidy`: rules of the tree that no compiler keeps.
//!
//! Each rule is a module that finds violations in text or data, and knows nothing of where they come from; this one
//! reads the tree. A rule that the tree broke before it was a rule has a list of exceptions that may only shrink:
//! one that is not needed any more is a violation, too.

mod layers;
mod names;
mod pages;
mod rings;
mod table;
mod unsafety;

use anyhow::{Context, Result};
use clap::Args;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use crate::book::PROJECT;
use crate::build::{self, cargo};
use crate::terminal::FAILED;
use crate::tree;

/// Check the rules of the tree that no compiler keeps
///
/// Packages depend downwards only; no ring of files that import each other is larger than three; packages without
/// `unsafe` forbid it; pages have short lines, and links that lead somewhere; nothing names a path of one machine, or a
/// registry; the table of lab tests and machines is the one that is committed. The last line counts violations.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask tidy           what is not in order; part of `cargo xtask ci --lint`
  cargo xtask tidy --write   write the table of lab tests and machines anew")]
pub struct Arguments {
    /// Write the table of lab tests and machines (lab/tests.md), instead of comparing it
    #[arg(long)]
    write: bool,
}

/// Something that is not in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Violation {
    /// A file, with a line where there is one; or a package.
    place: String,
    what: String,
}

impl Violation {
    fn new(place: impl fmt::Display, what: impl Into<String>) -> Self {
        Self { place: place.to_string(), what: what.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// Text files, by their path from the project's folder on.
type Files = BTreeMap<String, String>;

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.write {
        table::write(Path::new(PROJECT), &build::lab_programs()?)?;
    }
    Ok(ExitCode::from(if is_tidy()? { 0 } else { FAILED }))
}

/// Says what is not in order, and whether nothing is.
pub fn is_tidy() -> Result<bool> {
    let violations = violations(Path::new(PROJECT))?;
    for violation in &violations {
        peervram_programs::say!("{violation}");
    }
    peervram_programs::say!("{} violations", violations.len());
    Ok(violations.is_empty())
}

/// Everything in the tree that is not in order.
fn violations(project: &Path) -> Result<Vec<Violation>> {
    let files = files(project)?;
    let mut all = layers::check(&metadata()?)?;
    all.extend(rings::check(&files)?);
    all.extend(unsafety::check(&files));
    all.extend(pages::check(&files));
    all.extend(names::check(&files));
    all.extend(table::check(&files, &build::lab_programs()?)?);
    all.sort();
    Ok(all)
}

/// What is committed, or would be: text only.
fn files(project: &Path) -> Result<Files> {
    let mut files = Files::new();
    for name in tree::files()? {
        // One that is deleted and not committed yet is listed; pictures are no text.
        if let Ok(text) = fs::read_to_string(project.join(&name)) {
            files.insert(name, text);
        }
    }
    anyhow::ensure!(files.len() > 100, "only {} files are in {}", files.len(), project.display());
    Ok(files)
}

/// What cargo says of the workspace's packages.
fn metadata() -> Result<serde_json::Value> {
    let output = cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(PROJECT)
        .output()
        .context("starting cargo metadata")?;
    anyhow::ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("reading what cargo metadata says")
}

/// Files made up for a test.
#[cfg(test)]
fn made_up(files: &[(&str, &str)]) -> Files {
    files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}
