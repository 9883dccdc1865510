//! Embeds the git revision, so that `peervram --version` names the exact tree.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let head = "../../.git/HEAD";
    if Path::new(head).exists() {
        println!("cargo:rerun-if-changed={head}");
    }
    let revision = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok());
    let version = env!("CARGO_PKG_VERSION");
    match revision {
        Some(revision) => println!("cargo:rustc-env=PEERVRAM_VERSION={version} ({})", revision.trim()),
        None => println!("cargo:rustc-env=PEERVRAM_VERSION={version}"),
    }
}
