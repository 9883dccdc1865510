//! What `packaging/` has, held to what the program takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::served::{Served, assert_refused, peervram};

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging")
}

fn read(name: &str) -> String {
    fs::read_to_string(packaging().join(name)).unwrap()
}

/// The example, with a group that every machine has.
fn example() -> String {
    let example = read("broker.toml");
    assert!(example.contains("\ngroup = \"peervram\"\n"));
    example.replace("\ngroup = \"peervram\"\n", "\ngroup = 4711\n")
}

#[test]
fn the_unit_starts_the_program_as_it_can_be_started() {
    let unit = read("systemd/peervram-broker.service");
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let words: Vec<&str> = start.split(' ').collect();
    assert_eq!(words[0], "/usr/bin/peervram");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("broker.toml");
    fs::write(&file, example()).unwrap();
    let installed = "/etc/peervram/broker.toml";
    assert!(words.contains(&installed), "{start}");
    let arguments: Vec<String> =
        words[1..].iter().map(|word| word.replace(installed, file.to_str().unwrap())).collect();
    // `Served` begins with the command.
    assert_eq!(arguments[0], "serve");
    let served = Served::started(folder, |command| {
        command.args(&arguments[1..]);
    });
    assert_eq!(served.ready["memories"][0]["name"], "host");
    assert_eq!(served.ready["allowed"][0]["number"], 4711);
    // The socket unit listens where clients look.
    let socket = read("systemd/peervram-broker.socket");
    assert!(socket.contains("\nListenStream=/run/peervram/broker\n"));
    let help = peervram().args(["status", "--help"]).output().unwrap();
    assert!(String::from_utf8_lossy(&help.stdout).contains("/run/peervram/broker"));
}

/// With every key that is a comment: nothing is wrong with it but that the device is not there.
#[test]
fn the_example_has_every_key_and_no_other() {
    let all: Vec<&str> = include_str!("../../broker/plan.rs")
        .lines()
        .skip_while(|line| !line.starts_with("struct File"))
        .take_while(|line| !line.starts_with("/// A number of bytes"))
        .filter_map(|line| {
            line.strip_prefix("    ")?.split_once(": ").filter(|(name, _)| !name.contains(' '))
        })
        .map(|(name, _)| name)
        .collect();
    assert!(all.len() > 12 && all.contains(&"network_card"), "{all:?}");
    let uncommented: String = example()
        .lines()
        .map(|line| {
            match line.strip_prefix('#').filter(|rest| rest.starts_with(|first: char| first != ' ')) {
                Some(rest) => format!("{rest}\n"),
                None => format!("{line}\n"),
            }
        })
        .collect();
    for key in all {
        let key = key.replace('_', "-");
        let is_there = uncommented
            .lines()
            .any(|line| line.starts_with(&format!("{key} = ")) || line == format!("[[{key}]]"));
        // Those that exclude one that is there are named in a comment.
        assert!(is_there || uncommented.contains(&format!("{key} = ")), "{key} is not in the example");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("broker.toml");
    fs::write(&file, uncommented.replace("0000:01:00.0", "fffe:fe:1f.7")).unwrap();
    let mut command = peervram();
    command
        .args(["serve", "--json", "--socket"])
        .arg(folder.path().join("broker"))
        .arg("--config")
        .arg(&file);
    let refused = assert_refused(&command.output().unwrap(), "not-found", 1);
    assert_eq!(refused["error"]["device"], "fffe:fe:1f.7");
}

#[test]
fn systemd_takes_the_units_and_finds_little_exposed() {
    const NAME: &str = "systemd_takes_the_units_and_finds_little_exposed";
    let analyze = |arguments: &[&str]| Command::new("systemd-analyze").args(arguments).output();
    let version = analyze(&["--version"]).ok().and_then(|output| String::from_utf8(output.stdout).ok());
    let version = version.and_then(|text| text.split_whitespace().nth(1)?.parse::<u32>().ok());
    if version.is_none_or(|version| version < 250) {
        eprintln!("skipped: {NAME}: no systemd-analyze that looks at files");
        return;
    }
    // Where the program is said to be, there has to be one.
    let folder = tempfile::tempdir().unwrap();
    let unit =
        read("systemd/peervram-broker.service").replace("/usr/bin/peervram", env!("CARGO_BIN_EXE_peervram"));
    let without_manual = |text: &str| text.replace("Documentation=man:peervram-serve(1)\n", "");
    for (name, text) in [
        ("peervram-broker.service", &unit),
        ("peervram-broker.socket", &read("systemd/peervram-broker.socket")),
    ] {
        fs::write(folder.path().join(name), without_manual(text)).unwrap();
    }
    let service = folder.path().join("peervram-broker.service");
    let verified = analyze(&["verify", service.to_str().unwrap()]).unwrap();
    let said = String::from_utf8_lossy(&verified.stderr);
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("peervram")).collect();
    assert!(ours.is_empty(), "{said}");
    let exposed =
        analyze(&["security", "--offline=true", "--threshold=20", service.to_str().unwrap()]).unwrap();
    assert!(exposed.status.success(), "{}", String::from_utf8_lossy(&exposed.stdout));
}
