//! `Served`: a broker of the program, with a socket of its own, for tests.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take on a machine that has a lot to do.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The program, with whose output nobody's terminal is disturbed.
pub fn peervram() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peervram"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A broker that runs.
pub struct Served {
    pub child: Child,
    pub socket: PathBuf,
    /// What it said when it was ready.
    pub ready: Value,
    pub folder: TempDir,
    _output: BufReader<ChildStdout>,
}

impl Served {
    /// `peervram serve` with these arguments, when it is ready.
    pub fn new(arguments: &[&str]) -> Self {
        Self::started(tempfile::tempdir().unwrap(), |command| {
            command.args(arguments);
        })
    }

    /// As `change` has the command, which ends in `serve --json --socket PATH`.
    pub fn started(folder: TempDir, change: impl FnOnce(&mut Command)) -> Self {
        let socket = folder.path().join("broker");
        let mut command = peervram();
        command.args(["serve", "--json", "--socket"]).arg(&socket).stderr(Stdio::inherit());
        change(&mut command);
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line:?}"));
        Self { child, socket, ready, folder, _output: output }
    }

    /// A command that connects to it.
    pub fn client(&self, arguments: &[&str]) -> Command {
        client(&self.socket, arguments)
    }

    /// Runs it to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.client(arguments).output().unwrap()
    }

    /// `peervram status --json`.
    pub fn status(&self) -> Value {
        let output = self.run(&["status", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Waits until `peervram status` shows what is wanted.
    pub fn wait_for(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let status = self.status();
            if is_so(&status) {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "{what} does not come: {status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for that many leases.
    pub fn wait_for_leases(&self, count: usize) -> Value {
        self.wait_for("a lease", |status| status["leases"].as_array().unwrap().len() == count)
    }

    /// Waits for the lease of a program that the broker is to wait for: it is there a moment before the program is its
    /// importer.
    pub fn wait_for_a_program(&self) -> Value {
        self.wait_for("an importer", |status| {
            !status["leases"][0]["importers"].as_array().is_none_or(Vec::is_empty)
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command that connects to `socket`: the words after the command's name come after the socket.
pub fn client(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = peervram();
    command.arg(arguments[0]).arg("--socket").arg(socket).args(&arguments[1..]);
    command
}

pub fn signal(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

/// Waits for its end, and no longer than a test may take.
pub fn ended(child: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What it wrote to standard error, after its end.
pub fn errors_of(child: &mut Child) -> String {
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

/// An error as `--json` has it, of a code.
pub fn assert_refused(output: &Output, code: &str, exit: i32) -> Value {
    let value: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert_eq!(value["error"]["code"], code, "{value}");
    assert_eq!(output.status.code(), Some(exit), "{value}");
    assert!(value["error"]["next"].is_string(), "no next step: {value}");
    value
}
