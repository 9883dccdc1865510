//! The program `peervram`: one file or folder per command, and the words in which they end.

#![forbid(unsafe_code)]

mod arguments;
mod bind;
mod broker;
mod capture;
mod child;
mod coherent;
mod completions;
mod demo;
mod devices;
mod doctor;
mod ending;
mod export;
#[cfg(test)]
mod fake_root;
mod holders;
mod import;
mod in_use;
mod manual;
mod opened;
mod pci_names;
mod picture;
mod reset;
mod route;
mod tree;
mod trial;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Lend one GPU's VRAM to another GPU.
///
/// One GPU is bound to vfio-pci; ranges of its memory become dma-bufs that another GPU's Vulkan or
/// DRM driver imports, without a copy through system memory.
#[derive(Parser)]
#[command(
    name = "peervram",
    version = env!("PEERVRAM_VERSION"),
    after_help = "Examples:\n  \
        peervram doctor                                   look at the whole machine, and say what to do\n  \
        peervram devices                                  who can lend, who can import, what stands in the way\n  \
        peervram bind 01:00.0 --dry-run                   give a GPU to VFIO, if nothing needs it; unbind undoes it\n  \
        peervram demo                                     lend a picture to Vulkan, on any machine\n  \
        peervram import 01:00.0 --range 0+4M --checksum   read VRAM by Vulkan compute\n  \
        peervram route 01:00.0 02:00.0                    which way bytes go, why not, what would change it\n  \
        peervram verify 01:00.0 vulkan                    whether bytes arrive, tested\n  \
        peervram holders 01:00.0                          whom a reset of it would wait for\n  \
        peervram reset 01:00.0                            reset it, and show whom that waits for\n  \
        peervram serve 01:00.0 --allow user:NAME          lend to other processes and users\n  \
        peervram borrow --size 16M -- PROGRAM             run a program with memory that another process lends\n  \
        peervram status                                   who has what\n  \
        peervram trial --lender 01:00.0                   try all of it on real GPUs, for a report to send\n\n\
        Exit codes: 0 done, 1 failed, 2 wrong usage, 4 cannot run on this machine."
)]
struct Command {
    /// Print one JSON value instead of text.
    #[arg(long, global = true)]
    json: bool,

    /// Say more; twice for everything. Goes to standard error.
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    subcommand: Subcommands,
}

#[derive(Subcommand)]
enum Subcommands {
    Devices(devices::Arguments),
    Bind(bind::BindArguments),
    Unbind(bind::UnbindArguments),
    Doctor(doctor::Arguments),
    Export(export::Arguments),
    Import(import::Arguments),
    Demo(demo::Arguments),
    Holders(holders::Arguments),
    Reset(reset::Arguments),
    Route(route::Arguments),
    Capture(capture::Arguments),
    Verify(verify::Arguments),
    Serve(broker::serve::Arguments),
    Borrow(broker::borrow::Arguments),
    Status(broker::status::Arguments),
    Operate(broker::operate::Arguments),
    Trial(trial::Arguments),
    Completions(completions::Arguments),
    Manual(manual::Arguments),
}

fn main() -> ExitCode {
    let command = Command::parse();
    let level = match command.verbose {
        // A service's log is read when it is too late to ask for more.
        0 if matches!(command.subcommand, Subcommands::Serve(_)) => "info",
        0 => "error",
        1 => "info",
        _ => "trace",
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::new(format!(
            "peervram={level},peervram_backends={level},peervram_nvgrace={level}"
        )))
        .init();
    let result = match command.subcommand {
        Subcommands::Devices(arguments) => devices::run(&arguments, command.json),
        Subcommands::Bind(arguments) => bind::bind(&arguments, command.json),
        Subcommands::Unbind(arguments) => bind::unbind(&arguments, command.json),
        Subcommands::Doctor(arguments) => doctor::run(&arguments, command.json),
        Subcommands::Export(arguments) => export::run(&arguments, command.json),
        Subcommands::Import(arguments) => import::run(&arguments, command.json),
        Subcommands::Demo(arguments) => demo::run(&arguments, command.json),
        Subcommands::Holders(arguments) => holders::run(&arguments, command.json),
        Subcommands::Reset(arguments) => reset::run(&arguments, command.json),
        Subcommands::Route(arguments) => route::run(&arguments, command.json),
        Subcommands::Capture(arguments) => capture::run(&arguments, command.json),
        Subcommands::Verify(arguments) => verify::run(&arguments, command.json),
        Subcommands::Serve(arguments) => broker::serve::run(&arguments, command.json),
        Subcommands::Borrow(arguments) => broker::borrow::run(&arguments, command.json),
        Subcommands::Status(arguments) => broker::status::run(&arguments, command.json),
        Subcommands::Operate(arguments) => broker::operate::run(&arguments, command.json),
        Subcommands::Trial(arguments) => trial::run(&arguments, command.json),
        Subcommands::Completions(arguments) => completions::run(&arguments, command.json),
        Subcommands::Manual(arguments) => manual::run(&arguments, command.json),
    };
    peervram_programs::end(ending::of(result, command.json))
}
