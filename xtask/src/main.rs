//! The project's tasks: `cargo xtask --help`.

mod bench;
mod build;
mod lab;
mod terminal;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The project's tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Bench(bench::Bench),
    /// Virtual machines with a real kernel: integration tests without a GPU
    #[command(subcommand)]
    Lab(lab::Task),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Lab(task) => lab::run(task),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            terminal::exit_code(&error)
        }
    }
}
