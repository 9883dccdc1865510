//! `peervram completions`: what a shell needs to complete commands and options, out of the program's own
//! definition.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::ending::print_json;

/// Print a completion script for a shell.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    source <(peervram completions bash)                                  for this shell\n  \
    peervram completions fish > ~/.config/fish/completions/peervram.fish  for good\n  \
    peervram completions zsh > \"${fpath[1]}/_peervram\"                    for good")]
pub struct Arguments {
    /// Which shell.
    shell: Shell,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    // Written by itself first: the generator panics where a reader goes away.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut super::Command::command(), "peervram", &mut script);
    if json {
        print_json(&serde_json::json!({ "script": String::from_utf8_lossy(&script) }))?;
    } else {
        peervram_programs::output().write_all(&script)?;
    }
    Ok(ExitCode::SUCCESS)
}
