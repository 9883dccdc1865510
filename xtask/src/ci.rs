//! `cargo xtask ci`: what every change must pass, tests and lint; the same as CI runs.

use anyhow::{Context, Result, bail};
use clap::Args;
use peervram_lab::cache;
use peervram_lab::progress::step;
use std::process::{Command, ExitCode};

use crate::build::cargo;
use crate::lab::Setup;
use crate::terminal::{FAILED, Steps};
use crate::test;

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
    let mut failed = Vec::new();
    for (what, words, environment) in LINT {
        peervram_terminal::say!("lint: {what}");
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
    peervram_terminal::say!("lint: licences and sources of dependencies");
    let checked = deny(&Steps::default())?
        .args(["--log-level", "error", "check", "bans", "licenses", "sources"])
        .status();
    if !checked.context("starting cargo-deny")?.success() {
        failed.push("licences and sources of dependencies");
    }
    if !failed.is_empty() {
        peervram_terminal::say!("lint FAILED: {}", failed.join(", "));
        return Ok(ExitCode::from(FAILED));
    }
    peervram_terminal::say!("lint: ok");
    if arguments.lint {
        Ok(ExitCode::SUCCESS)
    } else {
        test::run(&test::Arguments::everything(arguments.setup))
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

/// cargo-deny's version, for everyone the same.
const DENY: &str = "cargo-deny@0.20.2";

/// cargo-deny, built into the user's cache folder where the machine has none.
fn deny(steps: &Steps) -> Result<Command> {
    if Command::new("cargo-deny").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return Ok(Command::new("cargo-deny"));
    }
    let folder = cache::entry(&format!("tools-{}", cache::key(&[DENY])), |draft| {
        step(steps, "building cargo-deny, which this machine lacks (some minutes, once)", || {
            let output =
                cargo().args(["install", "--quiet", "--locked", DENY, "--root"]).arg(draft).output()?;
            if !output.status.success() {
                bail!("cargo install {DENY}: {}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(())
        })
    })?;
    Ok(Command::new(folder.join("bin/cargo-deny")))
}
