//! `cargo xtask ci`: what every change must pass, tests and lint; the same as CI runs.

use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use crate::lab::Setup;
use crate::terminal::FAILED;
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
        println!("lint: {what}");
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
    println!("lint: licences and sources of dependencies");
    let checked = deny()?.args(["--log-level", "error", "check", "bans", "licenses", "sources"]).status();
    if !checked.context("starting cargo-deny")?.success() {
        failed.push("licences and sources of dependencies");
    }
    if !failed.is_empty() {
        println!("lint FAILED: {}", failed.join(", "));
        return Ok(ExitCode::from(FAILED));
    }
    println!("lint: ok");
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

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// cargo-deny, installed below `target/` where the machine has none.
fn deny() -> Result<Command> {
    if Command::new("cargo-deny").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return Ok(Command::new("cargo-deny"));
    }
    let program = PathBuf::from("target/tools/bin/cargo-deny");
    if !program.exists() {
        println!("cargo-deny is missing: building it below target/tools (some minutes, once)");
        let status = cargo()
            .args(["install", "--quiet", "--locked", "--root", "target/tools", "cargo-deny@0.19"])
            .status()
            .context("starting cargo install")?;
        if !status.success() {
            bail!("cargo-deny could not be built; install it, or see above");
        }
    }
    Ok(Command::new(program))
}
