//! `cargo xtask test --quick`: what a person runs before each commit.
//!
//! The tests of the packages whose files changed, and a compilation of the packages that depend on them. Changed is what
//! is not committed; where everything is, what the last commit changed.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

use crate::book::PROJECT;
use crate::build::cargo;

/// A package of the workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Package {
    name: String,
    /// Its folder, from the project's on; empty for the project's own.
    folder: String,
    /// The packages of the workspace that it is built with.
    needs: Vec<String>,
}

/// What is tested and what is only compiled.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    /// The packages with changed files.
    pub changed: Vec<String>,
    /// The packages that depend on these, however far.
    pub depending: Vec<String>,
    /// The model checker of the revoke machine has its reason to run.
    pub searches_the_machine: bool,
}

/// What the changed files ask for.
pub fn choose() -> Result<Choice> {
    let packages = packages()?;
    let files = changed_files()?;
    Ok(choice(&packages, &files))
}

fn choice(packages: &[Package], files: &[String]) -> Choice {
    let owner = |file: &String| {
        let owns = |package: &&Package| {
            package.folder.is_empty() || file.starts_with(&format!("{}/", package.folder))
        };
        // The innermost folder that is a package's.
        packages.iter().filter(owns).max_by_key(|package| package.folder.len())
    };
    let changed: BTreeSet<&str> =
        files.iter().filter_map(owner).map(|package| package.name.as_str()).collect();
    let mut reached = changed.clone();
    loop {
        let before = reached.len();
        let needs_one = |package: &&Package| package.needs.iter().any(|need| reached.contains(need.as_str()));
        let more: Vec<&str> =
            packages.iter().filter(needs_one).map(|package| package.name.as_str()).collect();
        reached.extend(more);
        if reached.len() == before {
            break;
        }
    }
    let owned = |names: BTreeSet<&str>| names.into_iter().map(str::to_owned).collect();
    let searches_the_machine = files.iter().any(|file| file.starts_with("runtime/revoke/machine"));
    Choice {
        depending: owned(reached.difference(&changed).copied().collect()),
        changed: owned(changed),
        searches_the_machine,
    }
}

fn packages() -> Result<Vec<Package>> {
    let output = cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(PROJECT)
        .output()
        .context("starting cargo")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    packages_of(&serde_json::from_slice(&output.stdout).context("what cargo metadata says")?)
}

fn packages_of(metadata: &Value) -> Result<Vec<Package>> {
    let root = metadata["workspace_root"].as_str().context("no workspace_root")?;
    let all = metadata["packages"].as_array().context("no packages")?;
    let of = |package: &Value| -> Option<Package> {
        let folder = package["manifest_path"].as_str()?.strip_suffix("/Cargo.toml")?;
        // Those in the workspace have a path.
        let needs = package["dependencies"].as_array()?.iter().filter(|need| need["path"].is_string());
        Some(Package {
            name: package["name"].as_str()?.into(),
            folder: folder.strip_prefix(root)?.trim_start_matches('/').into(),
            needs: needs.filter_map(|need| Some(need["name"].as_str()?.to_owned())).collect(),
        })
    };
    all.iter().map(|package| of(package).context("a package without name or folder")).collect()
}

fn changed_files() -> Result<Vec<String>> {
    let tracked = git(&["diff", "--name-only", "--no-renames", "-z", "HEAD"])?;
    let new = git(&["ls-files", "-z", "--others", "--exclude-standard"])?;
    let changed = [tracked, new].concat();
    if changed.is_empty() {
        return git(&[
            "diff-tree",
            "--root",
            "--no-commit-id",
            "--name-only",
            "--no-renames",
            "-r",
            "-z",
            "HEAD",
        ]);
    }
    Ok(changed)
}

fn git(arguments: &[&str]) -> Result<Vec<String>> {
    let output = Command::new("git").args(arguments).current_dir(PROJECT).output().context("starting git")?;
    if !output.status.success() {
        bail!("git {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8(output.stdout).context("names of files")?;
    Ok(text.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, folder: &str, needs: &[&str]) -> Package {
        let needs = needs.iter().map(|&need| need.to_owned()).collect();
        Package { name: name.into(), folder: folder.into(), needs }
    }

    fn chosen(files: &[&str]) -> Choice {
        let packages = [
            package("library", "", &["backends"]),
            package("backends", "backends", &[]),
            package("cli", "runtime/cli", &["library"]),
            package("lab", "lab", &[]),
        ];
        choice(&packages, &files.iter().map(|&file| file.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_change_reaches_every_package_that_is_built_with_it() {
        let all = chosen(&["backends/src/lib.rs"]);
        assert_eq!(all.changed, ["backends"]);
        assert_eq!(all.depending, ["cli", "library"]);
        assert!(!all.searches_the_machine);
    }

    #[test]
    fn a_file_is_of_the_innermost_package() {
        let inner = chosen(&["runtime/cli/main.rs"]);
        assert_eq!((inner.changed, inner.depending), (vec!["cli".to_owned()], vec![]));
        let outer = chosen(&["runtime/revoke/machine.rs", "README.md"]);
        assert_eq!((outer.changed, outer.searches_the_machine), (vec!["library".to_owned()], true));
    }

    #[test]
    fn this_workspace_is_read() {
        let packages = packages().unwrap();
        let of = |name: &str| packages.iter().find(|package| package.name == name).unwrap();
        assert_eq!((of("peervram").folder.as_str(), of("xtask").folder.as_str()), ("", "xtask"));
        assert!(of("peervram").needs.contains(&"peervram-backends".to_owned()));
    }
}
