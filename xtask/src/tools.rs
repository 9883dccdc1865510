//! Cargo's own additions that tasks use: of one version for everyone, built into the user's cache folder where the
//! machine has no such one.

use anyhow::{Result, bail};
use peervram_lab::cache;
use peervram_lab::progress::step;
use std::process::Command;

use crate::build::cargo;
use crate::terminal::Steps;

/// Licences and sources of dependencies.
pub const DENY: Tool =
    Tool { name: "cargo-deny", version: "0.20.2", is_any_version_good: true, tells_version: &["--version"] };
/// One wrong line after the other.
pub const MUTANTS: Tool = Tool {
    name: "cargo-mutants",
    version: "27.1.0",
    is_any_version_good: false,
    tells_version: &["mutants", "--version"],
};

/// A program that cargo can install.
pub struct Tool {
    name: &'static str,
    version: &'static str,
    /// Whether another version that the machine has will do: what it prints is read by nobody.
    is_any_version_good: bool,
    /// What has it tell its version.
    tells_version: &'static [&'static str],
}

impl Tool {
    /// The program.
    ///
    /// # Errors
    /// The machine has none, and it cannot be built.
    pub fn command(&self, steps: &Steps) -> Result<Command> {
        let Tool { name, version, is_any_version_good, tells_version } = self;
        if let Ok(output) = Command::new(name).args(*tells_version).output()
            && output.status.success()
            && (*is_any_version_good || String::from_utf8_lossy(&output.stdout).contains(version))
        {
            return Ok(Command::new(name));
        }
        let what = format!("{name}@{version}");
        let program = format!("bin/{name}");
        let folder = cache::entry(&format!("tools-{}", cache::key(&[&what])), &[&program], |draft| {
            step(steps, &format!("building {name}, which this machine lacks (some minutes, once)"), || {
                let output =
                    cargo().args(["install", "--quiet", "--locked", &what, "--root"]).arg(draft).output()?;
                if !output.status.success() {
                    bail!("cargo install {what}: {}", String::from_utf8_lossy(&output.stderr));
                }
                Ok(())
            })
        })?;
        Ok(Command::new(folder.join(program)))
    }
}
