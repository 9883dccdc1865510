//! The program `peervram`: parse, run, say how it ended.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
