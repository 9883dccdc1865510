//! `peervram manual`: man pages, one for the program and one for each command, out of its own definition.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use clap::{Args, CommandFactory};
use peervram::Error;

use super::ending::print_json;
use peervram_programs::say;

/// Write the man pages into a folder.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sudo peervram manual /usr/local/share/man/man1     for good: man peervram-import\n  \
    peervram manual . && man ./peervram-import.1       to look at one")]
pub struct Arguments {
    /// The folder; it is made if it is not there.
    folder: PathBuf,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    let pages = write(&arguments.folder).map_err(|error| {
        Error::os("write man pages", error)
            .on(arguments.folder.display())
            .next("name a folder that you may write to")
    })?;
    if json {
        print_json(&serde_json::json!({ "pages": pages }))?;
    } else {
        say!("{} pages in {}", pages.len(), arguments.folder.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes every page and gives their paths.
fn write(folder: &Path) -> io::Result<Vec<PathBuf>> {
    fs::create_dir_all(folder)?;
    let mut program = super::Command::command();
    // Options of all commands are told of in each one's page.
    program.build();
    let mut pages = Vec::new();
    let commands = program.get_subcommands().filter(|command| command.get_name() != "help").cloned();
    let commands: Vec<_> = commands.collect();
    for command in std::iter::once(program).chain(commands) {
        let name = command.get_bin_name().unwrap_or("peervram").replace(' ', "-");
        let mut text = Vec::new();
        clap_mangen::Man::new(command).title(name.to_uppercase()).render(&mut text)?;
        let path = folder.join(format!("{name}.1"));
        fs::write(&path, text)?;
        pages.push(path);
    }
    Ok(pages)
}
