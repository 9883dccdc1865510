//! The program as a person or a script meets it: exit codes, words, JSON.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn peervram(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peervram")).args(arguments).output().unwrap()
}

/// Runs it with `--json` and expects an error of a code, and an exit code.
fn refused(arguments: &[&str], code: &str, exit: i32) -> Value {
    let output = peervram(&[arguments, &["--json"]].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    let value: Value =
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{arguments:?} says {output:?}"));
    assert_eq!(value["error"]["code"], code, "{arguments:?}: {text}");
    assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {text}");
    assert!(value["error"]["next"].is_string(), "{arguments:?} has no next step: {text}");
    value
}

#[test]
fn wrong_usage_is_exit_code_2_with_an_example() {
    for (arguments, example) in [
        (&["import", "gpu0"][..], "0000:01:00.0"),
        (&["import", "01:00.0", "--range", "5"], "0+16M"),
        (&["import", "01:00.0", "--range", "1.5M+4K"], "0x1000"),
        (&["import", "01:00.0", "--to", "card0"], "/dev/dri/card0"),
        (&["import", "fd:three"], "fd:3"),
        (&["demo", "--size", "640"], "640x480"),
        (&["demo", "--step"], "--show"),
        (&["demo", "--broker", "--json", "--step"], "leave --step"),
        (&["holders", "gpu0"], "0000:01:00.0"),
        (&["holders", "01:00.0", "--all"], "--all"),
        (&["reset", "01:00.0", "--hot", "--function"], "--help"),
        (&["reset", "01:00.0", "--with", "card0"], "/dev/dri/card0"),
        (&["verify"], "--help"),
        (&["verify", "01:00.0", "card0"], "/dev/dri/card0"),
        (&["verify", "vulkan"], "0000:01:00.0"),
        (&["verify", "--host", "vulkan", "vulkan"], "--host vulkan"),
        (&["verify", "--host", "--list"], "--help"),
        (&["verify", "--host", "--bytes", "2.5M"], "0x1000"),
        (&["route", "01:00.0"], "IMPORTER"),
        (&["route", "01:00.0", "gpu0"], "/dev/dri/card0"),
        (&["route", "gpu0", "01:00.0"], "0000:01:00.0"),
        (&["route", "--all", "01:00.0"], "--all"),
        (&["frobnicate"], "--help"),
        // Nothing that would have no effect is taken.
        (&["import", "fd:3", "--verified", "both"], "inherited"),
        (&["import", "fd:3", "--region", "2"], "--region"),
        (&["import", "fd:3", "--range", "0+4K"], "peervram export"),
        (&["import", "01:00.0", "--size", "640x480"], "--picture"),
        (&["import", "01:00.0", "--seconds", "5"], "--show"),
        (&["import", "01:00.0", "--show", "640x480"], "--to /dev/dri/card0"),
        (&["import", "01:00.0", "--to", "/dev/dri/card0", "--checksum"], "leave --to out"),
        (
            &["import", "01:00.0", "--to", "/dev/dri/card0", "--picture", "a.png", "--size", "9x9"],
            "leave --to out",
        ),
        (&["verify", "--host", "--region", "7"], "--region"),
        (&["verify", "--host", "--range", "0+4K"], "--range"),
        (&["verify", "--host", "--outlives-reboots"], "--host"),
        (&["verify", "01:00.0", "--full", "--bytes", "4M"], "--bytes"),
        (&["verify", "--list", "--direction", "read"], "--list"),
        (&["verify", "--list", "--full"], "--list"),
        (&["verify", "--list", "--bytes", "4M"], "--list"),
        (&["verify", "--list", "--seed", "4"], "--list"),
        (&["verify", "--list", "--outlives-reboots"], "--list"),
        (&["verify", "--list", "--region", "2"], "--region"),
        (&["verify", "--list", "--range", "0+4K"], "--range"),
        (&["export", "01:00.0", "--json", "--", "true"], "leave one of them out"),
        (&["demo", "--show", "/dev/dri/card0"], "--lender"),
        (&["demo", "--json", "--lender", "01:00.0", "--show", "/dev/dri/card0", "--step"], "--step"),
        (&["bind"], "--help"),
        (&["bind", "gpu0"], "0000:01:00.0"),
        (&["unbind", "gpu0"], "0000:01:00.0"),
        (&["serve", "gpu0"], "0000:01:00.0"),
        (&["serve", "--allow", "alice"], "user:NAME"),
        (&["serve", "--allow", "everybody,bytes=much"], "0x1000"),
        (&["serve", "--host", "1.5G"], "0x1000"),
        (&["serve", "--host", "5"], "page"),
        (&["serve", "--region", "2"], "--config"),
        (&["serve", "01:00.0", "02:00.0", "--range", "0+4K"], "--config"),
        (&["serve", "--config", "broker.toml", "--host", "1G"], "--help"),
        (&["serve", "--config", "/dev/null", "--allow", "everybody"], "--help"),
        (&["borrow"], "--size"),
        (&["borrow", "--size", "much"], "0x1000"),
        (&["borrow", "--range", "0+4K"], "--memory"),
        (&["borrow", "--size", "4K", "--memory", "host", "--range", "0+4K"], "--help"),
        (&["borrow", "--size", "4K", "--json", "--", "true"], "leave one of them out"),
        (&["status", "--json", "--prometheus"], "leave one of them out"),
        (&["status", "--watch", "0"], "--help"),
        (&["operate"], "--help"),
        (&["operate", "evict", "all"], "--help"),
    ] {
        let output = peervram(arguments);
        let text = String::from_utf8_lossy(if arguments.contains(&"--json") {
            &output.stdout
        } else {
            &output.stderr
        });
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
        assert!(text.contains(example), "{arguments:?} names no {example}: {text}");
    }
}

/// Every command, as the program lists them.
fn commands() -> Vec<String> {
    let help = String::from_utf8(peervram(&["--help"]).stdout).unwrap();
    let lines =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // Lines that go on are indented further.
    let lines = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let commands: Vec<String> =
        lines.filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect();
    assert!(commands.iter().any(|command| command == "import"), "{help}");
    commands.into_iter().filter(|command| command != "help").collect()
}

/// What each command is run with to print something on any machine; FOLDER is one of its own.
const PRINTING: &[&[&str]] = &[
    &["bind", "fffe:fe:1f.7", "--dry-run"],
    &["borrow", "--size", "4K", "--socket", "FOLDER/nobody"],
    &["capture"],
    &["capture", "FOLDER/machine.json"],
    &["completions", "bash"],
    &["demo", "--output", "FOLDER/picture.png", "--size", "64x64"],
    &["demo", "--broker", "--output", "FOLDER/picture.png", "--size", "64x64"],
    &["devices", "--all"],
    &["doctor"],
    &["export", "fffe:fe:1f.7"],
    &["holders"],
    &["import", "fffe:fe:1f.7", "--to", "/dev/null"],
    &["manual", "FOLDER/man"],
    &["operate", "evict", "7", "--socket", "FOLDER/nobody"],
    &["reset", "fffe:fe:1f.7"],
    &["route", "--all"],
    &["route", "fffe:fe:1f.7", "cpu"],
    &["serve", "fffe:fe:1f.7", "--socket", "FOLDER/broker"],
    &["status", "--socket", "FOLDER/nobody"],
    &["status", "--socket", "FOLDER/nobody", "--watch"],
    &["trial", "--lender", "fffe:fe:1f.7", "--report", "FOLDER/trial.md"],
    &["unbind", "fffe:fe:1f.7", "--dry-run"],
    &["verify", "--list"],
    &["verify", "--host", "--bytes", "64K"],
    &["verify", "01:00.0", "/dev/dri/card0"],
];

/// Runs it with a reader, or with one that has gone: its exit code, the files that it has left, and what it complains of.
fn ended(arguments: &[&str], is_read: bool) -> (Option<i32>, Vec<String>, String) {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_peervram"));
    command.args(arguments.iter().map(|word| word.replace("FOLDER", place)));
    command.env("XDG_STATE_HOME", place).current_dir(folder.path());
    let output = if is_read {
        command.output().unwrap()
    } else {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        command.stdout(writer).stderr(std::process::Stdio::piped());
        let child = command.spawn().unwrap();
        // The command would keep the pipe open.
        drop(command);
        child.wait_with_output().unwrap()
    };
    let mut files: Vec<String> = Vec::new();
    let mut folders = vec![folder.path().to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(at).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry)
            } else {
                files.push(entry.strip_prefix(folder.path()).unwrap().display().to_string())
            }
        }
    }
    files.sort_unstable();
    (output.status.code(), files, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_reader_that_has_gone_changes_no_exit_code_and_loses_no_file() {
    let first_words: Vec<&str> = PRINTING.iter().map(|words| words[0]).collect();
    for command in commands() {
        assert!(first_words.contains(&command.as_str()), "no row for {command}");
    }
    for words in PRINTING {
        for arguments in [words.to_vec(), [*words, &["--json"]].concat()] {
            let (read, gone) = (ended(&arguments, true), ended(&arguments, false));
            assert_eq!((gone.0, &gone.1), (read.0, &read.1), "{arguments:?}: {}", gone.2);
            assert!(
                gone.0.is_some_and(|code| code != 101) && !gone.2.contains("panicked"),
                "{arguments:?}: {}",
                gone.2
            );
            assert!(!gone.2.contains("Broken pipe"), "{arguments:?}: {}", gone.2);
        }
    }
}

#[test]
fn what_cannot_be_printed_is_a_failure_where_somebody_reads() {
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for arguments in [&["completions", "bash"][..], &["holders"], &["holders", "--json"]] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_peervram")).args(arguments).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("No space left"),
            "{arguments:?}: {output:?}"
        );
    }
}

#[test]
fn every_command_has_a_man_page_and_is_completed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("man1");
    let output = peervram(&["manual", path.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    let commands = commands();
    let completed = peervram(&["completions", "bash"]);
    let completed = String::from_utf8(completed.stdout).unwrap();
    for command in &commands {
        let page = fs::read_to_string(path.join(format!("peervram-{command}.1"))).unwrap();
        assert!(page.contains("SYNOPSIS") && page.contains(r"peervram\-"), "{page}");
        assert!(completed.contains(command), "{command} is not completed");
    }
    assert!(fs::read_to_string(path.join("peervram.1")).unwrap().contains("import"));

    refused(&["manual", "/proc/nowhere"], "not-found", 1);
    let output = peervram(&["completions", "csh"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn an_absent_device_is_exit_code_1_and_says_where_to_look() {
    let value = refused(&["export", "fffe:fe:1f.7"], "not-found", 1);
    assert_eq!(value["error"]["device"], "fffe:fe:1f.7");
    refused(&["import", "fffe:fe:1f.7", "--to", "/dev/dri/card99"], "not-found", 1);
    refused(&["holders", "fffe:fe:1f.7"], "not-found", 1);
    refused(&["reset", "fffe:fe:1f.7"], "not-found", 1);
    refused(&["bind", "fffe:fe:1f.7", "--dry-run"], "not-found", 1);
    refused(&["unbind", "fffe:fe:1f.7", "--dry-run"], "not-found", 1);
}

#[test]
fn a_descriptor_that_is_none_is_wrong_usage() {
    let value = refused(&["import", "fd:999", "--to", "/dev/null"], "invalid-input", 2);
    assert!(value["error"]["message"].as_str().unwrap().contains("/dev/null"), "{value}");
}

#[test]
fn a_machine_without_a_vulkan_loader_is_exit_code_4() {
    // A loader whose only driver is not there lists no device, as on a machine without a driver.
    let output = Command::new(env!("CARGO_BIN_EXE_peervram"))
        .args(["demo", "--json"])
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json")
        .output()
        .unwrap();
    let value: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert_eq!(value["error"]["code"], "vulkan-missing", "{value}");
    assert_eq!(output.status.code(), Some(4), "{value}");
}

#[test]
fn devices_lists_as_json_what_it_prints() {
    let output = peervram(&["devices", "--all", "--json"]);
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("not-found"), "{output:?}");
        eprintln!("skipped: devices_lists_as_json_what_it_prints: this machine has no PCI bus");
        return;
    }
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    let devices = value["devices"].as_array().unwrap();
    let text = String::from_utf8(peervram(&["devices", "--all"]).stdout).unwrap();
    for device in devices {
        assert!(text.contains(device["address"].as_str().unwrap()), "{device}");
        assert!(device["lend"]["because"].is_string() && device["import"]["because"].is_string(), "{device}");
    }
}

#[test]
fn holders_runs_anywhere_and_says_what_it_cannot_see() {
    let output = peervram(&["holders", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (devices, unread) = (value["devices"].as_array().unwrap(), value["unread"].as_array().unwrap());
    let text = String::from_utf8(peervram(&["holders", "--all"]).stdout).unwrap();
    for device in devices {
        assert!(text.contains(device["address"].as_str().unwrap()), "{device}");
        assert!(device["held_by"].is_array() && device["dma_bufs"].is_array(), "{device}");
    }
    // Who reads no debugfs learns that attached devices are missing, and what to do.
    if std::fs::read("/sys/kernel/debug/dma_buf/bufinfo").is_err() {
        let is_said =
            |gap: &Value| gap["why"].as_str().unwrap().contains("bufinfo") && gap["next"].is_string();
        assert!(unread.iter().any(is_said), "{value}");
        assert!(text.contains("Not seen:"), "{text}");
    }
}

/// Captures this machine, or says why there is nothing to capture.
#[expect(clippy::print_stderr, reason = "what tests print, cargo reads")]
fn captured() -> Option<(tempfile::TempDir, String)> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("machine.json").display().to_string();
    let output = peervram(&["capture", &file]);
    if output.status.code() == Some(4) {
        eprintln!("skipped: this machine has no PCI bus");
        return None;
    }
    assert!(output.status.success(), "{output:?}");
    // What could not be read is said, or that all was.
    assert!(String::from_utf8_lossy(&output.stderr).contains("read"), "{output:?}");
    Some((folder, file))
}

#[test]
fn a_captured_machine_gives_the_answers_of_the_machine_itself() {
    let Some((_folder, file)) = captured() else { return };
    let here: Value = serde_json::from_slice(&peervram(&["route", "--all", "--json"]).stdout).unwrap();
    let there = peervram(&["route", "--all", "--json", "--tree", &file]).stdout;
    assert_eq!(serde_json::from_slice::<Value>(&there).unwrap(), here);
    let text = std::fs::read_to_string(&file).unwrap();
    let topology: Value = serde_json::from_str(&text).unwrap();
    let addresses: Vec<&str> = (topology["places"].as_array().unwrap().iter())
        .map(|place| place["function"]["address"].as_str().unwrap())
        .collect();
    let (first, last) = (addresses[0], addresses[addresses.len() - 1]);
    for importer in [last, "cpu"] {
        let value = peervram(&["route", first, importer, "--tree", &file, "--json"]);
        let value: Value = serde_json::from_slice(&value.stdout).unwrap_or_else(|_| panic!("{value:?}"));
        let answers = ["works", "refused", "importer-cannot", "unknown", "unasked"];
        assert!(answers.contains(&value["answer"].as_str().unwrap()), "{value}");
        let text = String::from_utf8(peervram(&["route", first, importer, "--tree", &file]).stdout).unwrap();
        assert!(text.contains(first) && text.contains("verdict"), "{text}");
    }
}

/// Two functions of a card, a GPU that imports nothing, and a lender that does not answer: each below a root port.
fn made_up_machine(cpu: Value) -> String {
    let place = |address: &str, above: Value, class: u32, driver: Option<&str>, byte: &str| {
        serde_json::json!({
            "function": {
                "address": address, "vendor_id": 0x8086, "device_id": 0x29c0, "class": class, "driver": driver,
                "iommu_group": null, "numa_node": null, "bars": [], "link": null, "drm_nodes": [],
                "memory_enabled": null,
            },
            "above": above, "config": {"known": {"size_bytes": 4096, "bytes": byte.repeat(4096)}},
            "iommu_domain": null, "physical_function": null,
        })
    };
    let root = || serde_json::json!({"host-bridge": "pci0000:00"});
    let port = |address: &str| serde_json::json!({"bridge": address});
    let unread = serde_json::json!({"unread": "made by hand"});
    serde_json::json!({
        "format": "peervram-topology", "version": 1, "kernel_release": {"known": "7.3.4"},
        "command_line": unread, "boot_id": unread, "cpu": {"known": cpu}, "order": {"known": null},
        "places": [
            place("0000:00:00.0", root(), 0x06_0000, None, "00"),
            place("0000:00:01.0", root(), 0x06_0400, Some("pcieport"), "00"),
            place("0000:01:00.0", port("0000:00:01.0"), 0x03_0000, Some("vfio-pci"), "00"),
            place("0000:01:00.1", port("0000:00:01.0"), 0x03_0000, Some("amdgpu"), "00"),
            place("0000:00:02.0", root(), 0x06_0400, Some("pcieport"), "00"),
            place("0000:02:00.0", port("0000:00:02.0"), 0x03_0000, Some("i915"), "00"),
            place("0000:00:03.0", root(), 0x06_0400, Some("pcieport"), "00"),
            place("0000:03:00.0", port("0000:00:03.0"), 0x12_0000, Some("vfio-pci"), "ff"),
        ],
    })
    .to_string()
}

#[test]
fn the_matrix_draws_each_answer_by_a_letter_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("machine.json");
    let tree = file.to_str().unwrap();
    let cpu = |vendor: &str, family: u32| serde_json::json!({"vendor": vendor, "family": family, "model": 1, "name": null, "microcode": null});
    for (cpu, rows, to_i915) in [
        (cpu("AuthenticAMD", 0x19), [". B x ?", "B . x ?", "H H . ?", "? ? ? ."], "importer-cannot"),
        (cpu("GenuineIntel", 6), [". B - ?", "B . - ?", "- - . ?", "? ? ? ."], "refused"),
    ] {
        std::fs::write(&file, made_up_machine(cpu)).unwrap();
        let drawn = peervram(&["route", "--all", "--tree", tree]);
        let text = String::from_utf8(drawn.stdout).unwrap();
        let matrix: Vec<String> = (text.lines().skip(2).take(4))
            .map(|line| line.split_whitespace().skip(2).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(matrix, rows, "{text}");
        // As JSON, and of the pair alone, the same.
        let all = peervram(&["route", "--all", "--json", "--tree", tree]);
        let all: Value = serde_json::from_slice(&all.stdout).unwrap();
        let routes = all["routes"].as_array().unwrap();
        let route = routes
            .iter()
            .find(|route| route["lender"] == "0000:01:00.0" && route["importer"] == "0000:02:00.0");
        assert_eq!(route.unwrap()["answer"], to_i915);
        let one = peervram(&["route", "--json", "--tree", tree, "01:00.0", "02:00.0"]);
        let one: Value = serde_json::from_slice(&one.stdout).unwrap();
        assert_eq!(one["answer"], to_i915);
    }
}

#[test]
fn a_file_that_is_no_captured_machine_is_wrong_usage() {
    refused(&["route", "01:00.0", "02:00.0", "--tree", "/dev/null"], "invalid-input", 2);
    refused(&["route", "--all", "--tree", "/nonexistent.json"], "not-found", 1);
    let Some((folder, file)) = captured() else { return };
    let text = std::fs::read_to_string(&file).unwrap();
    let cut = folder.path().join("cut.json").display().to_string();
    std::fs::write(&cut, &text[..text.len() / 2]).unwrap();
    refused(&["route", "--all", "--tree", &cut], "invalid-input", 2);
    refused(&["route", "fffe:fe:1f.7", "cpu", "--tree", &file], "not-found", 1);
    refused(&["route", "fffe:fe:1f.7", "/dev/dri/card99", "--tree", &file], "not-found", 1);
}

#[test]
fn doctor_ends_with_what_it_found() {
    let output = peervram(&["doctor", "--json"]);
    let value: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let exit = if value["verdict"] == "can-lend" { 0 } else { 4 };
    assert_eq!(output.status.code(), Some(exit), "{value}");
    assert!(value["findings"].as_array().is_some_and(|findings| !findings.is_empty()), "{value}");
    assert!(value["facts"]["kernel_release"].is_string(), "{value}");
    let page = peervram(&["doctor"]);
    let text = String::from_utf8(page.stdout).unwrap();
    assert_eq!(page.status.code(), Some(exit), "{text}");
    assert!(text.contains(value["headline"].as_str().unwrap().split(' ').next().unwrap()), "{text}");
}

#[test]
fn doctor_is_friendly_in_a_container_with_nothing() {
    const NAME: &str = "doctor_is_friendly_in_a_container_with_nothing";
    let namespaces = Command::new("unshare").args(["--user", "--map-root-user", "--mount", "true"]).output();
    if !namespaces.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: {NAME}: user namespaces are not allowed here");
        return;
    }
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    put_program(root.path());
    let inside = |arguments: &[&str]| {
        Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "--root"])
            .arg(root.path())
            .arg("/peervram")
            .args(arguments)
            .env_clear()
            .output()
            .unwrap()
    };
    let page = inside(&["doctor"]);
    let text = String::from_utf8_lossy(&page.stdout);
    assert_eq!(page.status.code(), Some(4), "{page:?}");
    assert!(page.stderr.is_empty(), "{page:?}");
    for words in ["no PCI bus", "no Vulkan", "on the host", "libvulkan1", "peervram demo"] {
        assert!(text.contains(words), "no {words:?} in:\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");

    let json = inside(&["doctor", "--json"]);
    let value: Value = serde_json::from_slice(&json.stdout).unwrap_or_else(|_| panic!("{json:?}"));
    assert_eq!(json.status.code(), Some(4), "{value}");
    assert_eq!(value["verdict"], "nothing", "{value}");
    assert!(value["what_to_do"].as_array().is_some_and(|steps| steps.len() > 1), "{value}");
}

/// Puts the program into an empty root, with the libraries that the dynamic linker wants, and nothing else.
fn put_program(root: &Path) {
    let program = env!("CARGO_BIN_EXE_peervram");
    fs::copy(program, root.join("peervram")).unwrap();
    let libraries = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(libraries.stdout).unwrap();
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        let library = library.trim_end_matches(':');
        let place = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(library, place).unwrap();
    }
}

#[test]
fn what_has_no_engine_is_not_verified_and_says_what_would_be() {
    for importer in ["02:00.0", "/dev/dri/card0"] {
        let value = refused(&["verify", "01:00.0", importer], "unsupported", 4);
        assert!(value["error"]["next"].as_str().unwrap().contains("docs/verify.md"), "{value}");
    }
}

#[test]
fn stored_certificates_are_listed_and_what_is_none_is_named() {
    let state = tempfile::tempdir().unwrap();
    let list = |json: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peervram"));
        let output =
            command.args(["verify", "--list"]).args(json).env("XDG_STATE_HOME", state.path()).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(list(&[]).starts_with("No certificates in "));
    std::fs::create_dir(state.path().join("peervram")).unwrap();
    std::fs::write(state.path().join("peervram/old.json"), r#"{"format": 99}"#).unwrap();
    assert!(list(&[]).contains("old.json: it is of format 99"), "{}", list(&[]));
    let value: Value = serde_json::from_str(&list(&["--json"])).unwrap();
    assert_eq!(value["certificates"], serde_json::json!([]));
    assert!(value["ignored"][0]["why"].as_str().unwrap().contains("format 99"), "{value}");
}

#[test]
fn help_teaches_each_command() {
    for command in [
        "bind", "borrow", "capture", "demo", "devices", "doctor", "export", "holders", "import", "operate",
        "reset", "route", "serve", "status", "unbind", "verify",
    ] {
        let output = peervram(&[command, "--help"]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.lines().count() > 8, "{command}: {text}");
    }
    let output = peervram(&["--version"]);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("peervram 0."));
}
