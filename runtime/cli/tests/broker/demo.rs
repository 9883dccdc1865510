//! `peervram demo --broker`: what it shows, and how it ends where something goes wrong in the middle.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Stdio};

use peervram::backends::ImageLayout;
use peervram::backends::vulkan;
use peervram_programs::picture::Picture;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::served::{assert_refused, ended, errors_of, peervram};

const SIZE: &str = "320x200";

/// The card, and the card painted over, as the CPU computes them.
fn pictures() -> (Picture, Picture) {
    let card = Picture::test_card(320, 200);
    let mut bytes = card.bytes().to_vec();
    vulkan::paint(&mut bytes, &ImageLayout::packed(320, 200), 64).unwrap();
    let painted = Picture::new(320, 200, bytes).unwrap();
    assert!(painted.count_differing(&card) > 1000);
    (card, painted)
}

/// Whether the test can draw. Says so where it cannot.
fn can_draw(test: &str) -> bool {
    let mut command = peervram();
    let output = command.args(["demo", "--size", "16x16", "--output", "/dev/null"]).output().unwrap();
    if output.status.code() == Some(4) {
        peervram_programs::note!("skipped: {test}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    output.status.code() != Some(4)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn two_processes_draw_a_picture_into_lent_memory_and_again_after_a_revoke() {
    if !can_draw("two_processes_draw_a_picture_into_lent_memory_and_again_after_a_revoke") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (png, card_png) = (folder.path().join("painted.png"), folder.path().join("card.png"));
    let mut command = peervram();
    command
        .args(["demo", "--broker", "--json", "--size", SIZE, "--output"])
        .arg(&png)
        .arg("--card")
        .arg(&card_png);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let (card, painted) = pictures();
    assert_eq!(Picture::load(&card_png).unwrap().count_differing(&card), 0);
    assert_eq!(Picture::load(&png).unwrap().count_differing(&painted), 0);

    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["passed"], true);
    let (broker, client) = (&report["broker"], &report["client"]);
    assert_ne!(broker["process"], client["process"], "{report}");
    assert_eq!(broker["user"] == client["user"], report["one_user_because"].is_string(), "{report}");
    assert!(!is_root() || client["user"] != "root", "{report}");
    for (generation, status) in report["status"].as_array().unwrap().iter().enumerate() {
        let lease = &status["leases"][0];
        assert_eq!((&lease["generation"], &lease["process"]), (&json!(generation), &client["process"]));
        assert!(!is_root() || lease["user"] == 65534, "{status}");
        assert_eq!(lease["importers"].as_array().unwrap().len(), 1, "{status}");
    }
    let steps = report["steps"].as_array().unwrap();
    let step = |what: &str| steps.iter().filter(|step| step["what"] == what).collect::<Vec<_>>();
    assert_eq!(step("compares the picture").len(), 2);
    for compared in step("compares the picture") {
        assert_eq!(compared["check"]["what"], "all 256000 bytes right");
    }
    assert!(
        step("enters once more")[0]["check"]["what"].as_str().unwrap().starts_with("gate shut"),
        "{report}"
    );
    assert_eq!(step("hears, imports anew")[0]["generation"], 1);
}

/// A demo that waits for Enter in the middle, and its broker.
fn in_the_middle(png: &Path) -> (Child, impl Iterator<Item = String>, Pid) {
    let mut command = peervram();
    command.args(["demo", "--broker", "--step", "--size", SIZE, "--output"]).arg(png).stdin(Stdio::piped());
    let mut demo = command.spawn().unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines().map(Result::unwrap);
    let broker = lines.find(|line| line.starts_with("Broker: ")).unwrap();
    let number = broker.split("process ").nth(1).unwrap().split(',').next().unwrap();
    let broker = Pid::from_raw(number.parse().unwrap()).unwrap();
    assert!(lines.any(|line| line == "the test card is in the borrowed memory"));
    (demo, lines, broker)
}

#[test]
fn a_demo_whose_broker_dies_in_the_middle_fails_and_says_so() {
    if !can_draw("a_demo_whose_broker_dies_in_the_middle_fails_and_says_so") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let png = folder.path().join("painted.png");
    let (mut demo, lines, broker) = in_the_middle(&png);
    kill_process(broker, Signal::KILL).unwrap();
    demo.stdin.take().unwrap().write_all(b"\n").unwrap();
    let table = lines.collect::<Vec<_>>().join("\n");
    assert_eq!(ended(&mut demo).code(), Some(1), "{table}");
    let errors = errors_of(&mut demo);
    for words in ["ended in the middle", "signal: 9", "the broker has ended", "next: run the demo again"] {
        assert!(errors.contains(words), "no {words:?} in\n{errors}\n{table}");
    }
    // What was right before is shown, and what the client heard.
    assert!(table.contains("all 256000 bytes right"), "{table}");
    assert!(table.contains("gone; its gate is shut"), "{table}");
    assert!(!png.exists());
}

#[test]
fn a_demo_that_waits_goes_on_and_leaves_no_process_behind() {
    if !can_draw("a_demo_that_waits_goes_on_and_leaves_no_process_behind") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let png = folder.path().join("painted.png");
    let (mut demo, lines, broker) = in_the_middle(&png);
    demo.stdin.take().unwrap().write_all(b"\n\n").unwrap();
    let text = lines.collect::<Vec<_>>().join("\n");
    assert!(ended(&mut demo).success(), "{text}\n{}", errors_of(&mut demo));
    for words in ["$ peervram status", "$ peervram operate revoke host", "generation 1", "Picture: "] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    assert!(!text.contains("WRONG") && png.exists(), "{text}");
    assert!(!Path::new(&format!("/proc/{}", broker.as_raw_nonzero())).exists());
}

#[test]
fn what_the_other_process_lacks_is_said_in_its_words() {
    let mut command = peervram();
    command.args(["demo", "--broker", "--json"]);
    let drivers = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].map(|name| (name, "/nonexistent.json"));
    assert_refused(&command.envs(drivers).output().unwrap(), "vulkan-missing", 4);
    let mut command = peervram();
    command.args(["demo", "--broker", "--json", "--lender", "fffe:fe:1f.7"]);
    assert_refused(&command.output().unwrap(), "not-found", 1);
}

#[test]
fn who_may_not_change_the_user_says_that_both_are_one() {
    if !can_draw("who_may_not_change_the_user_says_that_both_are_one") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let mut command = peervram();
    command.args(["demo", "--broker", "--size", "64x64", "--output"]).arg(folder.path().join("painted.png"));
    if is_root() {
        command.uid(4711).gid(4711);
    }
    // Neither have users that others could be in a namespace.
    command.env("PATH", folder.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("both processes are of one user"), "{errors}");
    assert!(errors.contains("run the demo as root"), "{errors}");
}
