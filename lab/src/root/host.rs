//! What the host must have, and how it gets it.
//!
//! Only Debian's own tools for making a Debian root; QEMU, kernels and Mesa live in that root.
//! This module finds out and says what to run; asking and running is the caller's.

use std::path::Path;

/// Something that is missing on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The packages that bring it.
    pub packages: &'static [&'static str],
    /// What it is for.
    pub why: &'static str,
}

struct Tool {
    program: &'static str,
    unprivileged_only: bool,
    missing: Missing,
}

const TOOLS: &[Tool] = &[
    Tool {
        program: "mmdebstrap",
        unprivileged_only: false,
        missing: Missing {
            packages: &["mmdebstrap", "debian-archive-keyring"],
            why: "makes the lab's private Debian root (QEMU, Mesa, busybox) in the cache folder",
        },
    },
    Tool {
        program: "newuidmap",
        unprivileged_only: true,
        missing: Missing { packages: &["uidmap"], why: "lets mmdebstrap work without root" },
    },
    Tool {
        program: "setpriv",
        unprivileged_only: false,
        missing: Missing {
            packages: &["util-linux"],
            why: "gives QEMU its own view of the file system and ends it with the lab",
        },
    },
    Tool {
        program: "tar",
        unprivileged_only: false,
        missing: Missing { packages: &["tar"], why: "unpacks the private root" },
    },
];

/// Whether this process is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What the lab needs and this host lacks.
pub fn missing() -> Vec<Missing> {
    TOOLS
        .iter()
        .filter(|tool| !tool.unprivileged_only || !is_root())
        .filter(|tool| !has_program(tool.program))
        .map(|tool| tool.missing.clone())
        .collect()
}

/// The command that installs it, `sudo` in front where it is needed.
pub fn install_command(missing: &[Missing]) -> Vec<&'static str> {
    let mut command = if is_root() { vec![] } else { vec!["sudo"] };
    command.extend(["apt-get", "install", "--yes", "--no-install-recommends"]);
    command.extend(missing.iter().flat_map(|missing| missing.packages));
    command
}

/// The memory that the host could give to new processes now; none where it does not say.
pub(crate) fn available_memory_mib() -> u64 {
    std::fs::read_to_string("/proc/meminfo").map_or(0, |text| available_in(&text))
}

fn available_in(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// Whether a program of that name is on the search path.
pub fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Administrators' programs are not always on a user's path.
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|folder| is_file(&folder.join(name)))
}

/// Whether the dynamic linker finds a library of that name.
pub fn has_library(name: &str) -> bool {
    ["ldconfig", "/sbin/ldconfig"].iter().any(|program| {
        let output = std::process::Command::new(program).arg("-p").output();
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(name))
    })
}

fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file())
}

/// The archive that this machine's apt takes Debian from, if it is a Debian that has one.
/// Elsewhere mmdebstrap's own default is right.
pub(crate) fn debian_mirror() -> Option<String> {
    let output = std::process::Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL) $(COMPONENT)"])
        .arg("Identifier: Packages")
        .output()
        .ok()?;
    mirror_in(&String::from_utf8_lossy(&output.stdout))
}

/// The first Debian archive, security and third parties left out.
fn mirror_in(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let (address, rest) = line.split_once(' ')?;
        (rest == "Debian Debian main").then(|| address.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_debians() {
        let targets = "https://example.org/apt/ Example Tools main\n\
                       http://mirror.example/debian-security/ Debian Debian-Security main\n\
                       http://mirror.example/debian/ Debian Debian main\n";
        assert_eq!(mirror_in(targets).as_deref(), Some("http://mirror.example/debian/"));
        assert_eq!(mirror_in("http://mirror.example/ubuntu/ Ubuntu Ubuntu main\n"), None);
    }

    #[test]
    fn available_memory_is_read_in_kib() {
        let meminfo = "MemTotal:  24601234 kB\nMemFree:    100 kB\nMemAvailable:   23068672 kB\n";
        assert_eq!(available_in(meminfo), 22528);
        assert_eq!(available_in("MemTotal: 1 kB\n"), 0);
    }

    #[test]
    fn the_command_names_every_package() {
        let command = install_command(&[TOOLS[0].missing.clone(), TOOLS[1].missing.clone()]);
        assert!(command.ends_with(&["mmdebstrap", "debian-archive-keyring", "uidmap"]));
    }
}
