//! Building programs of this workspace: cargo is asked where they are.

use anyhow::{Context, Result, bail, ensure};
use peervram_lab::{Absent, GuestPrograms, Programs, host};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The cargo that runs this task.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Builds packages and gives the path of each one's program or library, in the same order.
pub fn artifacts(packages: &[&str]) -> Result<Vec<PathBuf>> {
    let messages = build(packages, &[])?;
    packages.iter().map(|package| path(&messages, package)).collect()
}

/// Builds packages and gives cargo's messages.
fn build(packages: &[&str], options: &[&str]) -> Result<String> {
    build_by(cargo(), packages, options)
}

fn build_by(mut command: Command, packages: &[&str], options: &[&str]) -> Result<String> {
    command.args(["build", "--quiet", "--message-format=json-render-diagnostics"]).args(options);
    for package in packages {
        command.args(["--package", package]);
    }
    let output = command.stderr(Stdio::inherit()).output().context("starting cargo")?;
    if !output.status.success() {
        bail!("`cargo build` of {}: {}", packages.join(", "), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The path of a program or library in cargo's messages.
fn path(messages: &str, name: &str) -> Result<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .find_map(|message| artifact(&message, name))
        .with_context(|| format!("cargo built {name} but names no program of it"))
}

/// The program `peervram`.
pub fn command_line() -> Result<PathBuf> {
    path(&build(&["peervram-cli"], &[])?, "peervram")
}

/// What the lab needs of this workspace.
pub fn lab_programs() -> Result<Programs> {
    // By itself: features that the guest's packages leave out are not to change theirs.
    let command_line = command_line()?;
    let packages = [
        "peervram-lab-guest",
        "peervram-lab-shim",
        "peervram-model",
        "peervram-lab-layer",
        "peervram-lab-drm",
    ];
    let Ok([agent, shim, model, layer, drm]) = <[PathBuf; 5]>::try_from(artifacts(&packages)?) else {
        bail!("cargo built fewer programs than packages");
    };
    Ok(Programs { agent, command_line, shim, model, layer, drm, for_arm64 })
}

/// What guests of arm64 run, linked against nothing: Rust's library for musl has a C library in it, and its own linker links them. So no
/// compiler and no library of that architecture is needed.
fn for_arm64() -> Result<GuestPrograms> {
    add_target(ARM64)?;
    let build = |package: &str, program: &str| {
        let mut command = cargo();
        command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER", "rust-lld");
        // An emulated CPU reads all of a program over 9p, each time that it is started.
        command.env("CARGO_PROFILE_DEV_STRIP", "debuginfo");
        path(&build_by(command, &[package], &["--target", ARM64])?, program)
    };
    Ok(GuestPrograms {
        agent: build("peervram-lab-guest", "peervram-lab-guest")?,
        command_line: build("peervram-cli", "peervram")?,
    })
}

const ARM64: &str = "aarch64-unknown-linux-musl";

/// Rust's library for a target, installed by rustup where it is not there.
fn add_target(target: &str) -> Result<()> {
    let sysroot = Command::new("rustc").args(["--print", "target-libdir", "--target", target]).output();
    let has_it = sysroot.is_ok_and(|said| {
        said.status.success() && Path::new(String::from_utf8_lossy(&said.stdout).trim()).exists()
    });
    if has_it {
        return Ok(());
    }
    let absent = |why: String| {
        Absent(format!(
            "no programs for machines of arm64: Rust's library for {target} is not there, and {why}"
        ))
    };
    if !host::has_program("rustup") {
        bail!(absent("without rustup it cannot be installed".into()));
    }
    peervram_programs::note!(
        "$ rustup target add {target}    (27 MB: Rust's library for programs of arm64 guests)"
    );
    let output =
        Command::new("rustup").args(["target", "add", target]).output().context("starting rustup")?;
    if !output.status.success() {
        bail!(absent(format!(
            "rustup cannot install it: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(())
}

/// The tests of Vulkan's backend, as programs that run elsewhere.
pub fn vulkan_tests() -> Result<Vec<PathBuf>> {
    let mut command = cargo();
    command.args(["test", "--no-run", "--quiet", "--message-format=json-render-diagnostics"]);
    command.args(["--package", "peervram-backends", "--features", "ash"]);
    command.args(["--test", "vulkan", "--test", "vulkan_release"]);
    let output = command.stderr(Stdio::inherit()).output().context("starting cargo")?;
    ensure!(output.status.success(), "`cargo test --no-run` of peervram-backends: {}", output.status);
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let programs: Vec<PathBuf> =
        messages.filter_map(|message| Some(message["executable"].as_str()?.into())).collect();
    ensure!(programs.len() == 2, "cargo names {} programs of tests, not two", programs.len());
    Ok(programs)
}

/// The benchmarks, optimised.
pub fn benches() -> Result<PathBuf> {
    path(&build(&["peervram-benches"], &["--release"])?, "peervram-benches")
}

/// The benchmark of copies, optimised, with the driver of the lab's model GPU.
pub fn peer_copy() -> Result<PathBuf> {
    path(
        &build(&["peervram-peer-copy"], &["--release", "--features", "peervram-peer-copy/model"])?,
        "peer-copy",
    )
}

/// A program of a package with the feature `gbm`, linked against the libgbm of the private root: the host has none, or
/// one without what linkers look for. It runs in a guest.
pub fn with_gbm(root: &Path, package: &str, program: &str) -> Result<PathBuf> {
    let library = root.join(LIBGBM);
    ensure!(library.exists(), "the private root has no {}", library.display());
    let folder = std::path::absolute(LINKED).with_context(|| format!("finding the folder {LINKED}"))?;
    fs::create_dir_all(&folder).with_context(|| format!("making the folder {}", folder.display()))?;
    // The name that `-lgbm` stands for; Debian has it in a package for developers.
    let link = folder.join("libgbm.so");
    fs::remove_file(&link).ok();
    std::os::unix::fs::symlink(&library, &link).with_context(|| format!("linking {}", link.display()))?;
    let mut command = cargo();
    // Where compilers look for libraries, for rustc links by them.
    command.env("LIBRARY_PATH", folder);
    let options = ["--bin", program, "--features", &format!("{package}/gbm")];
    path(&build_by(command, &[package], &options)?, program)
}

/// Where Debian has it.
const LIBGBM: &str = "usr/lib/x86_64-linux-gnu/libgbm.so.1";

/// Where the linker finds it.
const LINKED: &str = "target/libgbm";

/// The package of the samples.
pub const SAMPLES: &str = "peervram-samples";

/// A sample.
pub fn sample(name: &str) -> Result<PathBuf> {
    path(&build(&[SAMPLES], &["--bin", name])?, name)
}

/// The path in cargo's message, if it is about the program or C library of that name, or named after that
/// package.
fn artifact(message: &Value, wanted: &str) -> Option<PathBuf> {
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let kinds = message["target"]["kind"].as_array()?;
    if !kinds.iter().any(|kind| kind == "bin" || kind == "cdylib") {
        return None;
    }
    let name = message["target"]["name"].as_str()?;
    if name.replace('_', "-") != wanted.replace('_', "-") {
        return None;
    }
    Some(message["filenames"].as_array()?.first()?.as_str()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_of_a_package_is_found() {
        let message = serde_json::json!({
            "reason": "compiler-artifact",
            "target": { "kind": ["cdylib"], "name": "peervram_lab_shim" },
            "filenames": ["/target/debug/libpeervram_lab_shim.so"],
        });
        let path = artifact(&message, "peervram-lab-shim").unwrap();
        assert_eq!(path, PathBuf::from("/target/debug/libpeervram_lab_shim.so"));
        assert_eq!(artifact(&message, "peervram-lab"), None);
        assert!(artifact(&message, "peervram_lab_shim").is_some());
    }
}
