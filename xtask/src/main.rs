//! The project's tasks: `cargo xtask --help`.

#![forbid(unsafe_code)]

mod bench;
mod beside;
mod book;
mod build;
mod ci;
mod demo;
mod figures;
mod in_guest;
mod lab;
mod mutants;
mod page;
mod peer_copy;
mod quick;
mod referees;
mod routes;
mod sample;
mod shaders;
mod terminal;
mod test;
mod tidy;
mod tools;
mod tree;
mod validation;

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
    Demo(demo::Arguments),
    Sample(sample::Arguments),
    Test(test::Arguments),
    Ci(ci::Arguments),
    Bench(bench::Bench),
    /// Virtual machines with a real kernel: integration tests without a GPU
    #[command(subcommand)]
    Lab(lab::Task),
    Mutants(mutants::Arguments),
    Routes(routes::Arguments),
    Book(book::Arguments),
    Shaders(shaders::Arguments),
    Tidy(tidy::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Sample(arguments) => sample::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Ci(arguments) => ci::run(arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Lab(task) => lab::run(task),
        Task::Mutants(arguments) => mutants::run(&arguments),
        Task::Routes(arguments) => routes::run(&arguments),
        Task::Book(arguments) => book::run(&arguments),
        Task::Shaders(arguments) => shaders::run(&arguments),
        Task::Tidy(arguments) => tidy::run(&arguments),
    };
    let code = match result {
        Ok(code) => code,
        Err(error) => {
            peervram_programs::note!("error: {error:#}");
            terminal::exit_code(&error)
        }
    };
    peervram_programs::end(code)
}
