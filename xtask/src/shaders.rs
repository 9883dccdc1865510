//! `cargo xtask shaders`: the committed SPIR-V, made again from its source.
//!
//! The compiler is the one in the lab's private root, so that everyone makes the same bytes.

use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::lab::{self, Setup};
use crate::terminal::Steps;

const FOLDERS: [&str; 2] = ["backends/src/vulkan/shaders", "samples/shaders"];

/// Compile the compute shaders (GLSL) to the SPIR-V files beside them
#[derive(Args)]
pub struct Arguments {
    /// Write nothing; fail if a file is not what its source compiles to
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    setup: Setup,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let steps = Steps::default();
    let lab = lab::open(&arguments.setup, &steps)?;
    if arguments.check {
        check(lab.root())?;
    } else {
        for source in sources()? {
            fs::write(source.with_extension("spv"), compile(lab.root(), &source)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails if a committed file is not what its source compiles to.
pub fn check(root: &Path) -> Result<()> {
    for source in sources()? {
        let committed = fs::read(source.with_extension("spv"))
            .with_context(|| format!("reading the SPIR-V of {}", source.display()))?;
        if compile(root, &source)? != committed {
            bail!("{} does not compile to its .spv; run `cargo xtask shaders`", source.display());
        }
        peervram_programs::say!("{}: ok", source.display());
    }
    Ok(())
}

fn sources() -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    for folder in FOLDERS {
        let before = sources.len();
        let entries = fs::read_dir(folder)
            .with_context(|| format!("reading {folder}; run cargo xtask in the project's folder"))?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        sources.extend(paths.filter(|path| path.extension().is_some_and(|extension| extension == "comp")));
        if sources.len() == before {
            bail!("there are no shaders in {folder}");
        }
    }
    sources.sort();
    Ok(sources)
}

/// Compiles one shader with the root's compiler and the root's own loader and libraries.
fn compile(root: &Path, source: &Path) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let result = folder.path().join("shader.spv");
    let output = Command::new(root.join("lib64/ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(root.join("usr/lib/x86_64-linux-gnu"))
        .arg(root.join("usr/bin/glslangValidator"))
        .args(["--quiet", "--target-env", "vulkan1.1", "-o"])
        .arg(&result)
        .arg(source)
        .output()
        .context("starting the root's glslangValidator")?;
    if !output.status.success() {
        bail!("{}: {}", source.display(), String::from_utf8_lossy(&output.stdout));
    }
    fs::read(&result).with_context(|| format!("reading what {} compiled to", source.display()))
}
