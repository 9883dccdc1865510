//! Lending between processes, by the program: what each command says, and what is left of whoever ends.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::served::{PATIENCE, Served, assert_refused, client, ended, errors_of, peervram, signal};
use rustix::process::Signal;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Until a program's lease is over.
fn wait_until_gone(borrow: &mut Child) {
    let mut lines = BufReader::new(borrow.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("gone: the lease is over")));
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn what_is_lent_to_whom_is_said_in_one_line_when_it_can_be_borrowed() {
    let served = Served::new(&["--host", "64M", "--allow", "user:root,bytes=1M", "--allow", "everybody"]);
    assert_eq!(served.ready["socket"], served.socket.to_str().unwrap());
    let memory = &served.ready["memories"][0];
    assert_eq!((&memory["name"], &memory["size_bytes"]), (&json!("host"), &json!(64 * MIB)));
    let allowed = &served.ready["allowed"];
    assert_eq!((&allowed[0]["who"], &allowed[0]["bytes"]), (&json!("user:root"), &json!(MIB)));
    assert_eq!(allowed[1]["who"], "everybody");

    let tried = served.run(&["borrow", "--size", "5M", "--json"]);
    let tried: Value = serde_json::from_slice(&tried.stdout).unwrap_or_else(|_| panic!("{tried:?}"));
    assert_eq!((&tried["size_bytes"], &tried["memory"]), (&json!(5 * MIB), &json!("host")));
    let told = served.run(&["borrow", "--memory", "host", "--range", "8M+64K"]);
    assert!(text(&told.stdout).contains("64 KiB of host"), "{told:?}");
    assert!(text(&told.stdout).contains("0x800000+64 KiB"), "{told:?}");
    let status = served.wait_for_leases(0);
    assert_eq!((&status["operator"], &status["memories"][0]["free"]), (&json!(true), &json!(64 * MIB)));
    let page = text(&served.run(&["status"]).stdout);
    assert!(page.contains("host memory") && page.contains("Nobody has a lease."), "{page}");
}

#[test]
fn a_program_has_what_it_is_run_with_and_the_lease_ends_with_it() {
    let served = Served::new(&["--host", "16M"]);
    let script =
        "test $1 = $PEERVRAM_FD && test $(stat -L -c %s /proc/self/fd/$1) = 1048576 && read line; exit 7";
    let arguments = ["borrow", "--size", "1M", "--label", "a test", "--", "sh", "-c", script, "sh", "{fd}"];
    let mut borrow = served.client(&arguments).stdin(Stdio::piped()).spawn().unwrap();
    let status = served.wait_for_a_program();
    let lease = &status["leases"][0];
    assert_eq!((&lease["label"], &lease["size"]), (&json!("a test"), &json!(MIB)));
    assert_eq!((&lease["process"], &lease["program"]), (&json!(borrow.id()), &json!("peervram")));
    assert_eq!(lease["importers"], json!(["sh"]));
    let page = text(&served.run(&["status"]).stdout);
    assert!(page.contains("a test") && page.contains("0x0+1 MiB"), "{page}");
    drop(borrow.stdin.take());
    assert_eq!(ended(&mut borrow).code(), Some(7), "{}", errors_of(&mut borrow));
    served.wait_for_leases(0);
}

#[test]
fn a_reset_waits_until_the_program_has_ended_and_is_called_off_if_it_does_not() {
    let served = Served::new(&["--host", "16M"]);
    let mut borrow = served.client(&["borrow", "--size", "1M", "--", "sleep", "600"]).spawn().unwrap();
    served.wait_for_a_program();
    let late = served.run(&["operate", "reset", "host", "--timeout-ms", "200", "--json"]);
    let late = assert_refused(&late, "still-in-use", 1);
    assert!(late["error"]["why"].as_str().unwrap().contains("lease 1"), "{late}");
    // Nobody is torn who might keep the kernel waiting.
    let late = served.run(&["operate", "reset", "host", "--timeout-ms", "200", "--go-on", "--json"]);
    assert_eq!(late.status.code(), Some(1), "{late:?}");
    assert_eq!(served.status()["memories"][0]["generation"], 0);

    let mut reset = served.client(&["operate", "reset", "host", "--timeout-ms", "60000"]).spawn().unwrap();
    served.wait_for("a drain", |status| status["leases"][0]["state"] == "draining");
    // Passed on to the program.
    signal(&borrow, Signal::TERM);
    assert_eq!(ended(&mut borrow).code(), Some(128 + 15));
    assert!(ended(&mut reset).success(), "{}", errors_of(&mut reset));
    assert_eq!(served.status()["memories"][0]["generation"], 1);
    let told = errors_of(&mut borrow);
    for line in ["lease 1: draining: ", "lease 1: called-off: "] {
        assert!(told.contains(line), "no {line} in\n{told}");
    }
}

#[test]
fn a_program_that_does_not_mind_is_not_waited_for() {
    let served = Served::new(&["--host", "16M"]);
    let arguments = ["borrow", "--size", "1M", "--answer", "at-once", "--", "sleep", "600"];
    let mut borrow = served.client(&arguments).spawn().unwrap();
    served.wait_for_leases(1);
    let reset = served.run(&["operate", "reset", "host", "--timeout-ms", "60000", "--json"]);
    let reset: Value = serde_json::from_slice(&reset.stdout).unwrap_or_else(|_| panic!("{reset:?}"));
    assert_eq!(reset["generation"], 1);
    let revoked = served.run(&["operate", "revoke", "host", "--timeout-ms", "60000"]);
    assert!(text(&revoked.stdout).contains("generation 2"), "{revoked:?}");

    let evicted = served.run(&["operate", "evict", "1"]);
    assert!(text(&evicted.stdout).contains("lease 1 has ended"), "{evicted:?}");
    served.wait_for_leases(0);
    signal(&borrow, Signal::TERM);
    assert_eq!(ended(&mut borrow).code(), Some(128 + 15));
    let told = errors_of(&mut borrow);
    for line in ["draining: ", "restored: there again, of generation 1", "gone: the lease is over"] {
        assert!(told.contains(line), "no {line} in\n{told}");
    }
}

#[test]
fn who_is_killed_leaves_nothing_behind_in_the_books() {
    let served = Served::new(&["--host", "16M"]);
    let mut borrow = served.client(&["borrow", "--size", "1M", "--", "sleep", "5"]).spawn().unwrap();
    served.wait_for_a_program();
    borrow.kill().unwrap();
    borrow.wait().unwrap();
    let status = served.wait_for_leases(0);
    // Host memory is each lease's own, so that what the program still has is nobody else's.
    assert_eq!((&status["memories"][0]["free"], &status["quarantine"]), (&json!(16 * MIB), &json!([])));
}

#[test]
fn a_broker_that_is_killed_is_heard_of_and_its_socket_is_used_again() {
    let mut served = Served::new(&["--host", "16M"]);
    let mut borrow = served.client(&["borrow", "--size", "1M", "--", "sleep", "600"]).spawn().unwrap();
    served.wait_for_a_program();
    let mut watching = served.client(&["status", "--watch", "--json"]).spawn().unwrap();
    served.child.kill().unwrap();
    served.child.wait().unwrap();
    assert_eq!(ended(&mut watching).code(), Some(1));
    wait_until_gone(&mut borrow);
    signal(&borrow, Signal::TERM);
    assert_eq!(ended(&mut borrow).code(), Some(128 + 15));

    assert!(served.socket.exists());
    assert_refused(&served.run(&["status", "--json"]), "gone", 1);
    let folder = std::mem::replace(&mut served.folder, tempfile::tempdir().unwrap());
    let again = Served::started(folder, |command| {
        command.args(["--host", "16M"]);
    });
    again.wait_for_leases(0);
}

#[test]
fn a_broker_that_is_told_to_end_does_so_and_removes_its_socket() {
    for how in [Signal::TERM, Signal::INT] {
        let mut served = Served::new(&["--host", "16M"]);
        let mut borrow = served.client(&["borrow", "--size", "1M", "--", "cat"]);
        let mut borrow = borrow.stdin(Stdio::piped()).spawn().unwrap();
        served.wait_for_a_program();
        signal(&served.child, how);
        assert!(ended(&mut served.child).success());
        assert!(!served.socket.exists());
        wait_until_gone(&mut borrow);
        drop(borrow.stdin.take());
        assert!(ended(&mut borrow).success());
    }
}

#[test]
fn what_cannot_be_done_is_refused_in_words() {
    let served = Served::new(&["--host", "16M"]);
    let json = |arguments: &[&str]| served.run(&[arguments, &["--json"]].concat());
    assert_refused(&json(&["borrow", "--size", "1G"]), "invalid-input", 2);
    let mut borrow = served.client(&["borrow", "--memory", "host", "--range", "0+4K", "--", "sleep", "600"]);
    let mut borrow = borrow.spawn().unwrap();
    served.wait_for_a_program();
    assert_refused(&json(&["borrow", "--memory", "host", "--range", "0+8K"]), "exhausted", 1);
    signal(&borrow, Signal::TERM);
    ended(&mut borrow);
    assert_refused(&json(&["borrow", "--size", "1M", "--memory", "vram"]), "not-found", 1);
    assert_refused(&json(&["borrow", "--memory", "host", "--range", "0+5"]), "invalid-input", 2);
    assert_refused(&json(&["operate", "evict", "99"]), "not-found", 1);
    assert_refused(&json(&["operate", "release", "99"]), "not-found", 1);
    assert_refused(&json(&["operate", "reset", "vram"]), "not-found", 1);
    let program = served.run(&["borrow", "--size", "1M", "--", "/nonexistent"]);
    assert_eq!(program.status.code(), Some(1), "{program:?}");
    assert!(text(&program.stderr).contains("/nonexistent"), "{program:?}");
    served.wait_for_leases(0);

    let taken = client(&served.socket, &["serve", "--json"]).output().unwrap();
    let taken = assert_refused(&taken, "busy", 1);
    assert!(
        taken["error"]["message"].as_str().unwrap().contains("a broker listens there already"),
        "{taken}"
    );
    served.wait_for_leases(0);

    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    for arguments in [&["status"][..], &["borrow", "--size", "1M"], &["operate", "evict", "1"]] {
        let nobody = client(&place("nobody"), &[arguments, &["--json"]].concat()).output().unwrap();
        let nobody = assert_refused(&nobody, "not-found", 1);
        assert!(nobody["error"]["next"].as_str().unwrap().contains("peervram serve"), "{nobody}");
    }
    fs::write(place("file"), "of somebody else").unwrap();
    assert_refused(&client(&place("file"), &["serve", "--json"]).output().unwrap(), "invalid-input", 2);
    assert_eq!(fs::read_to_string(place("file")).unwrap(), "of somebody else");
    assert_refused(&client(&place("no/folder"), &["serve", "--json"]).output().unwrap(), "not-found", 1);
    let long = place(&"x".repeat(120));
    assert_refused(&client(&long, &["serve", "--json"]).output().unwrap(), "invalid-input", 2);
    // A device that is not there costs nobody a socket.
    let absent = client(&place("absent"), &["serve", "fffe:fe:1f.7", "--json"]).output().unwrap();
    assert_refused(&absent, "not-found", 1);
    assert!(!place("absent").exists());

    fs::write(place("wrong.toml"), "[[memory]]\nhost = \"64M\"\nregoin = 2\n").unwrap();
    let wrong = peervram().args(["serve", "--json", "--config"]).arg(place("wrong.toml")).output().unwrap();
    let wrong = assert_refused(&wrong, "invalid-input", 2);
    let message = wrong["error"]["message"].as_str().unwrap();
    assert!(message.contains("line 3: unknown field `regoin`"), "{message}");
}

/// By a user namespace, in which this user is another one: nothing of the machine is changed.
#[test]
fn another_user_borrows_what_is_allowed_and_sees_no_more() {
    const NAME: &str = "another_user_borrows_what_is_allowed_and_sees_no_more";
    let is_root = rustix::process::geteuid().is_root();
    let as_nobody = |served: &Served, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        command.arg(served.folder.path().join("peervram"));
        command.arg(arguments[0]).arg("--socket").arg(&served.socket).args(&arguments[1..]);
        command.output().unwrap()
    };
    if !is_root || Command::new("setpriv").arg("--version").output().is_err() {
        eprintln!("skipped: {NAME}: only root with setpriv is somebody else");
        return;
    }
    let open = |served: &Served| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(served.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_peervram"), served.folder.path().join("peervram")).unwrap();
    };
    let served = Served::new(&["--host", "16M", "--allow", "user:65534,bytes=1M,leases=2"]);
    open(&served);
    assert!(as_nobody(&served, &["borrow", "--size", "1M"]).status.success());
    assert_refused(&as_nobody(&served, &["borrow", "--size", "2M", "--json"]), "exhausted", 1);
    assert_refused(
        &as_nobody(&served, &["borrow", "--size", "4K", "--network-card", "--json"]),
        "permission-denied",
        4,
    );
    assert_refused(&as_nobody(&served, &["operate", "reset", "host", "--json"]), "permission-denied", 4);
    let page = as_nobody(&served, &["status"]);
    let page = text(&page.stdout);
    assert!(page.contains("16 MiB") && page.contains("shown to operators"), "{page}");

    let closed = Served::new(&["--host", "16M"]);
    open(&closed);
    let refused = as_nobody(&closed, &["borrow", "--size", "4K", "--json"]);
    assert_eq!(refused.status.code(), Some(4), "{refused:?}");
    let page = text(&as_nobody(&closed, &["status"]).stdout);
    assert!(page.contains("lends nothing to this user"), "{page}");
}

#[test]
fn who_watches_gets_a_line_for_each_change_and_ends_with_the_reader() {
    let served = Served::new(&["--host", "16M"]);
    let mut watching = served.client(&["status", "--watch", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(next()["leases"], json!([]));
    let mut borrow = served.client(&["borrow", "--size", "1M", "--", "sleep", "600"]).spawn().unwrap();
    assert_eq!(next()["leases"][0]["lease"], 1);
    drop(lines);
    assert!(ended(&mut watching).success());
    signal(&borrow, Signal::TERM);
    ended(&mut borrow);
}

#[test]
fn prometheus_reads_a_file_that_is_replaced_as_a_whole() {
    let mut served = Served::new(&["--host", "16M"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("peervram.prom");
    let name = file.to_str().unwrap().to_owned();
    assert!(served.run(&["status", "--prometheus", &name]).status.success());
    let written = fs::read_to_string(&file).unwrap();
    assert!(written.contains("peervram_broker_up 1\n"), "{written}");
    assert!(
        written.contains("peervram_broker_free_bytes{memory=\"host\",device=\"host memory\"} 16777216\n")
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let printed = text(&served.run(&["status", "--prometheus"]).stdout);
    assert_eq!(printed, written);
    served.child.kill().unwrap();
    served.child.wait().unwrap();
    assert_eq!(served.run(&["status", "--prometheus", &name]).status.code(), Some(1));
    let down = fs::read_to_string(&file).unwrap();
    assert!(down.ends_with("peervram_broker_up 0\n"), "{down}");
}

#[test]
fn a_service_manager_passes_a_socket_on_and_hears_that_it_is_ready_alive_and_over() {
    let folder = tempfile::tempdir().unwrap();
    let notify = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    notify.set_read_timeout(Some(PATIENCE)).unwrap();
    let path = folder.path().join("activated");
    let listener = UnixListener::bind(&path).unwrap();
    // As sd_listen_fds(3) has it: the third descriptor, and the number of the process itself.
    let script = "exec 3<&0 0</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_peervram"), "serve", "--host", "16M", "--json"]);
    command.env("NOTIFY_SOCKET", folder.path().join("notify")).env("WATCHDOG_USEC", "400000");
    command.stdin(std::os::fd::OwnedFd::from(listener)).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let next = || {
        let mut buffer = [0; 128];
        let length = notify.recv(&mut buffer).unwrap();
        text(&buffer[..length])
    };
    assert_eq!(next(), "READY=1");
    // Again and again.
    for _ in 0..3 {
        assert_eq!(next(), "WATCHDOG=1");
    }
    assert!(client(&path, &["borrow", "--size", "1M"]).output().unwrap().status.success());
    signal(&child, Signal::TERM);
    let over = std::iter::repeat_with(next).find(|told| told != "WATCHDOG=1").unwrap();
    assert_eq!(over, "STOPPING=1");
    assert!(ended(&mut child).success());
    // The service manager's socket is the service manager's.
    assert!(path.exists());
    let mut ready = String::new();
    child.stdout.take().unwrap().read_to_string(&mut ready).unwrap();
    let ready: Value = serde_json::from_str(&ready).unwrap();
    assert_eq!(ready["socket"], path.to_str().unwrap());
}

#[test]
fn a_broker_is_ready_soon_and_small() {
    let begun = std::time::Instant::now();
    let served = Served::new(&["--host", "16M"]);
    let took = begun.elapsed();
    served.wait_for_leases(0);
    let status = fs::read_to_string(format!("/proc/{}/status", served.child.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let kilobytes: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kilobytes < 8 << 10, "{kilobytes} kB of its own");
    // Limits are for a machine that has nothing else to do; this one is generous.
    assert!(took < Duration::from_secs(10), "{took:?}");
}

/// The doctor's line is about the usual socket, which is this test's own by XDG_RUNTIME_DIR where this user is not root.
#[test]
fn the_doctor_says_whether_a_broker_answers() {
    let output = peervram().args(["doctor", "--json"]).output().unwrap();
    let value: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let findings = value["findings"].as_array().unwrap();
    let broker = findings.iter().find(|finding| finding["section"] == "broker").unwrap();
    assert!(broker["seen"].as_str().unwrap().contains("broker"), "{broker}");
    assert!(broker["code"].as_str().unwrap().starts_with("broker"), "{broker}");
}
