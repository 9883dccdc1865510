//! The demo's other processes: a broker and a client, which end with the values that stand for them.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use peervram::backends::deadline_after;
use peervram::{Error, Kind, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::other_user::{OtherUser, THIS_PROGRAM};
use super::told::{Told, hear};

const TRIED: &str = "run the demo";
/// How long a process may be silent: a shader is compiled by an emulated CPU, and somebody looks at a picture.
const SILENCE_LIMIT: Duration = Duration::from_secs(600);
/// How long a broker may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at whether a process has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A folder with a socket that other users can connect to; removed with this value.
pub struct Meeting {
    folder: TempDir,
}

impl Meeting {
    pub fn new() -> Result<Self> {
        let failed = |error| Error::os("make a folder for a socket", error);
        let folder = tempfile::Builder::new().prefix("peervram-demo-").tempdir().map_err(failed)?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).map_err(failed)?;
        Ok(Self { folder })
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("broker")
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }
}

/// `peervram serve` in a process of its own.
pub struct Served {
    child: Child,
    log: PathBuf,
    /// By which name it lends.
    pub memory: String,
    /// Memory of what, in its words.
    pub device: String,
}

impl Served {
    /// Starts it with these arguments, and waits until it can be borrowed from.
    ///
    /// # Errors
    /// It cannot lend: its own words.
    pub fn start(meeting: &Meeting, arguments: &[String]) -> Result<Self> {
        let log = meeting.log();
        let failed = |error| Error::os("start a broker", error);
        let errors = fs::File::create(&log).map_err(failed)?;
        let mut child = Command::new(THIS_PROGRAM)
            .args(["serve", "--json", "--socket"])
            .arg(meeting.socket())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .map_err(failed)?;
        let output = child.stdout.take();
        let mut served = Self { child, log, memory: String::new(), device: String::new() };
        let mut said = String::new();
        let mut output = BufReader::new(output.ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?);
        output.read_line(&mut said).map_err(failed)?;
        let Ok(ready) = serde_json::from_str::<Value>(&said) else {
            // An error, in several lines.
            output.read_to_string(&mut said).map_err(failed)?;
            return Err(served.why_it_cannot(&said));
        };
        let memory = &ready["memories"][0];
        let word = |field: &str| memory[field].as_str().unwrap_or_default().to_owned();
        served.memory = word("name");
        served.device = match memory["backing"].as_str() {
            Some(backing) => format!("{} ({backing})", word("device")),
            None => word("device"),
        };
        Ok(served)
    }

    /// What it has said in the place of what it lends.
    fn why_it_cannot(&self, said: &str) -> Error {
        let said: Value = serde_json::from_str(said).unwrap_or_default();
        let word = |field: &str| said["error"][field].as_str().map(str::to_owned);
        let kind = word("code").and_then(|code| Kind::from_code(&code)).unwrap_or(Kind::Os);
        let error = Error::new(kind, "start a broker", word("why").unwrap_or_else(|| self.last_words()));
        let error = match word("device") {
            Some(device) => error.on(device),
            None => error,
        };
        match word("next") {
            Some(next) => error.next(next),
            None => error,
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has, or does before so long is over.
    pub fn ended_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = deadline_after(limit);
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => thread::sleep(LOOK_INTERVAL),
                ended => return ended.ok().flatten(),
            }
        }
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().last().unwrap_or("it has said nothing").to_owned()
    }

    /// Has it end, as a service manager does. Whether it ended well.
    pub fn stop(&mut self) -> Result<bool> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).map_err(|errno| Error::os("end a broker", errno))?;
        Ok(self.ended_within(END_LIMIT).is_some_and(|status| status.success()))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The demo's client, as another user.
pub struct ClientProcess {
    child: Child,
    input: Option<ChildStdin>,
    told: Receiver<Result<(Told, Vec<u8>)>>,
}

impl ClientProcess {
    /// Starts it. What it says of itself goes on to standard error.
    pub fn start(user: &OtherUser, arguments: &[String]) -> Result<Self> {
        let failed = |error: std::io::Error| {
            Error::os("start a client", error).on(user.in_words()).next(
                "let every user read and run this program's file; a container may forbid to change the user",
            )
        };
        let (mut command, _program) = user.this_program().map_err(failed)?;
        command.arg("demo").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let input = child.stdin.take();
        let output = child.stdout.take();
        let (sender, told) = channel();
        let client = Self { child, input, told };
        let output = output.ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
        thread::spawn(move || {
            let mut output = BufReader::new(output);
            while let Some(heard) = hear(&mut output).transpose() {
                let is_last = heard.is_err();
                if sender.send(heard).is_err() || is_last {
                    return;
                }
            }
        });
        Ok(client)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Has it go on.
    pub fn go_on(&mut self) -> Result<()> {
        let told = self.input.as_mut().map_or(Ok(()), |input| input.write_all(b"\n"));
        told.map_err(|error| Error::os("tell the demo's client to go on", error))
    }

    /// What it tells next.
    ///
    /// # Errors
    /// It has ended without a word, or is silent for ten minutes.
    pub fn hear(&mut self) -> Result<(Told, Vec<u8>)> {
        match self.told.recv_timeout(SILENCE_LIMIT) {
            Ok(told) => told,
            Err(RecvTimeoutError::Timeout) => {
                let why = format!("process {} says nothing for {} s", self.id(), SILENCE_LIMIT.as_secs());
                Err(Error::new(Kind::TimedOut, "hear the demo's client", why))
            }
            Err(RecvTimeoutError::Disconnected) => {
                let how =
                    self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                let why = format!("process {} has ended in the middle: {how}", self.id());
                let error = Error::new(Kind::Gone, "hear the demo's client", why);
                Err(error.next("read what it says on standard error above"))
            }
        }
    }
}

impl Drop for ClientProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command of this program that connects to the broker at `socket`, and returns what it prints.
///
/// # Errors
/// It failed: its own words.
pub fn ask(socket: &Path, words: &[&str], json: bool) -> Result<String> {
    let mut command = Command::new(THIS_PROGRAM);
    command.args(words).arg("--socket").arg(socket);
    if json {
        command.arg("--json");
    }
    let output = command.stdin(Stdio::null()).output().map_err(|error| Error::os(TRIED, error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(if json { &output.stdout } else { &output.stderr }).into_owned();
    let why = format!("`peervram {}` says: {}", words.join(" "), said.trim());
    Err(Error::new(Kind::Os, TRIED, why))
}
