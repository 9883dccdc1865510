//! The files of the project: what is committed, or would be.

use anyhow::{Context, Result, ensure};
use std::process::Command;

use crate::book::PROJECT;

/// Their paths from the project's folder on. One that is deleted and not committed yet is among them.
pub fn files() -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(PROJECT)
        .output()
        .context("starting git")?;
    ensure!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).context("the project's files")?;
    Ok(text.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}
