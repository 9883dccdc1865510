//! `peervram capture`: this machine's PCI tree as a file, to be looked at on another.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use peervram::Error;

use super::ending::print_json;
use super::tree;
use peervram_programs::note;

/// Write what decides about routes on this machine as JSON: the PCI tree, its configuration spaces, the
/// processor, the kernel's release and command line.
///
/// Run it as root: others may read the first 64 bytes of a configuration space, which say nothing of
/// ACS. What could not be read is said on standard error, and is in the file. Changes nothing, and wakes
/// no device.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sudo peervram capture machine.json                          here\n  \
    sudo peervram capture --redact machine.json                 to be shown to others\n  \
    peervram route --tree machine.json 01:00.0 02:00.0          anywhere\n\n\
    A configuration space may hold serial numbers of cards, and the command line what you wrote there: --redact\n    \
    leaves these out, and every answer stays the same.")]
pub struct Arguments {
    /// Where to write it; without it, to standard output.
    file: Option<PathBuf>,

    /// Leave out serial numbers of cards, the boot's id, and of the command line what decides nothing.
    #[arg(long)]
    redact: bool,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    let mut topology = tree::read(None)?;
    if arguments.redact {
        topology = topology.redacted();
    }
    let mut text = topology.to_json();
    text.push('\n');
    match &arguments.file {
        Some(path) => fs::write(path, text)
            .map_err(|error| Error::os("write a captured topology", error).on(path.display()))?,
        None => peervram_programs::output().write_all(text.as_bytes())?,
    }
    let unread = topology.unread();
    // What is captured is JSON itself; where it goes to a file there is room for a report.
    if let Some(file) = arguments.file.as_ref().filter(|_| json) {
        print_json(
            &serde_json::json!({ "file": file, "functions": topology.places().len(), "unread": unread }),
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    let read = if unread.is_empty() { "all of it was read" } else { "not read:" };
    note!("{} functions; {read}", topology.places().len());
    for what in &unread {
        note!("  {what}");
    }
    Ok(ExitCode::SUCCESS)
}
