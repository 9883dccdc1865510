//! `cargo xtask ci`: what every change must pass, tests and lint; the same as CI runs.

use anyhow::{Context, Result};
use clap::Args;
use std::process::ExitCode;

use crate::beside::Kernels;
use crate::build::cargo;
use crate::lab::Setup;
use crate::terminal::{FAILED, Steps};
use crate::{test, tidy, tools};

/// Lint, then every test: formatting, clippy and documentation with warnings as errors, licences
#[derive(Args)]
pub struct Arguments {
    /// Only the lint
    #[arg(long)]
    lint: bool,
    #[command(flatten)]
    setup: Setup,
}

pub fn run(arguments: Arguments) -> Result<ExitCode> {
    let kernels = (!arguments.lint).then(Kernels::begin).flatten();
    let mut failed = Vec::new();
    for (what, words, environment) in LINT {
        peervram_programs::say!("lint: {what}");
        let mut command = cargo();
        if !command
            .args(*words)
            .envs(environment.iter().copied())
            .status()
            .context("starting cargo")?
            .success()
        {
            failed.push(*what);
        }
    }
    peervram_programs::say!("lint: licences and sources of dependencies");
    let checked = tools::DENY
        .command(&Steps::default())?
        .args(["--log-level", "error", "check", "bans", "licenses", "sources"])
        .status();
    if !checked.context("starting cargo-deny")?.success() {
        failed.push("licences and sources of dependencies");
    }
    peervram_programs::say!("lint: rules of the tree");
    if !tidy::is_tidy()? {
        failed.push("rules of the tree");
    }
    if !failed.is_empty() {
        peervram_programs::say!("lint FAILED: {}", failed.join(", "));
        return Ok(ExitCode::from(FAILED));
    }
    peervram_programs::say!("lint: ok");
    if arguments.lint {
        Ok(ExitCode::SUCCESS)
    } else {
        test::run_beside(&test::Arguments::everything(arguments.setup), kernels)
    }
}

type Lint = (&'static str, &'static [&'static str], &'static [(&'static str, &'static str)]);

const LINT: &[Lint] = &[
    ("formatting", &["fmt", "--all", "--check"], &[]),
    (
        "clippy",
        &["clippy", "--quiet", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"],
        &[],
    ),
    (
        "the library alone",
        &[
            "clippy",
            "--quiet",
            "--package",
            "peervram",
            "--lib",
            "--no-default-features",
            "--features",
            "vfio",
            "--",
            "-D",
            "warnings",
        ],
        &[],
    ),
    (
        "documentation",
        &["doc", "--quiet", "--workspace", "--no-deps", "--all-features", "--document-private-items"],
        &[("RUSTDOCFLAGS", "-D warnings")],
    ),
];
