//! A model GPU's process: serves one device of a machine to QEMU, and ends with its owner.
//!
//! It is started before QEMU, which connects while it makes the device. What the two share lies in
//! the machine's folder, which QEMU sees as `/lab`:
//!
//! ```text
//! model0           the socket for QEMU        (the number is the device's place in the row)
//! model0.control   the socket for requests    (`peervram-model ctl` speaks there, too)
//! model0.log       what the process says
//! ```
//! It runs outside the private root: it needs nothing of it.

use anyhow::{Context, Result, bail};
use peervram_model::request::{Answer, Request};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::machine::options::options;
use crate::machine::{Device, Machine, socket_name};
use crate::root::tail;

const START_LIMIT: Duration = Duration::from_secs(30);

/// A request takes no time but for a checksum of gigabytes.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A model GPU that serves. Dropping it ends it.
pub struct Model {
    child: Child,
    folder: PathBuf,
    index: usize,
}

impl Model {
    /// Starts the machine's model GPUs, with their files in `folder`; each is ready for QEMU.
    pub fn start_all(program: &Path, machine: &Machine, folder: &Path) -> Result<Vec<Model>> {
        let models: Vec<Model> = machine
            .devices
            .iter()
            .enumerate()
            .filter(|(_, device)| device.is_served())
            .map(|(index, device)| Model::start(program, folder, index, device))
            .collect::<Result<_>>()?;
        models.into_iter().map(Model::ready).collect()
    }

    fn start(program: &Path, folder: &Path, index: usize, device: &Device) -> Result<Model> {
        let arguments = match device {
            Device::ModelGpu { id, vram_mib } => {
                options(&[("--id", &id.to_string()), ("--vram-mib", &vram_mib.to_string())])
            }
            Device::Grace(grace) => grace.model_arguments(folder, index)?,
            _ => bail!("{device:?} is no model GPU"),
        };
        let log = File::create(folder.join(log_name(index)))
            .with_context(|| format!("making a file in {}", folder.display()))?;
        // Complaints only, unless somebody wants to see more.
        let level = std::env::var_os("RUST_LOG").unwrap_or_else(|| "warn".into());
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .arg("serve")
            .args(arguments)
            .arg("--socket")
            .arg(folder.join(socket_name(index)))
            .arg("--control")
            .arg(folder.join(control_name(index)))
            .env("NO_COLOR", "1")
            .env("RUST_LOG", level)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting setpriv (package `util-linux`)")?;
        Ok(Model { child, folder: folder.into(), index })
    }

    /// Waits until it listens. It makes the socket for requests first.
    fn ready(mut self) -> Result<Model> {
        let start = Instant::now();
        while !self.folder.join(socket_name(self.index)).exists() {
            self.check_alive()?;
            if start.elapsed() > START_LIMIT {
                bail!("model GPU {} does not listen within {} s", self.index, START_LIMIT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(self)
    }

    /// Which of the machine's devices it is.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Fails with its last words if it has ended. For the guest, its device is then all ones, and
    /// QEMU waits for every answer.
    pub fn check_alive(&mut self) -> Result<()> {
        let Some(status) = self.child.try_wait()? else { return Ok(()) };
        let words = fs::read(self.folder.join(log_name(self.index))).unwrap_or_default();
        let words = String::from_utf8_lossy(&words);
        bail!("model GPU {} has ended: {status}\n{}", self.index, tail(&words, 10));
    }

    /// Asks it something. An error means that it is lost; a refusal is an answer.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        self.check_alive()?;
        self.exchange(request).with_context(|| format!("asking model GPU {} to {request:?}", self.index))
    }

    fn exchange(&self, request: &Request) -> Result<Answer> {
        let mut stream = UnixStream::connect(self.folder.join(control_name(self.index)))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        serde_json::from_str(&answer).with_context(|| format!("it answers {answer:?}"))
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn control_name(index: usize) -> String {
    format!("model{index}.control")
}

fn log_name(index: usize) -> String {
    format!("model{index}.log")
}

/// The names of the logs in a machine's folder.
pub(crate) fn logs(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with("model") && name.ends_with(".log"));
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::named;

    #[test]
    fn a_program_that_does_not_serve_is_an_error_with_its_words() {
        let folder = tempfile::tempdir().unwrap();
        let machine = named("two-models-root-ports").unwrap();
        let error = Model::start_all(Path::new("/bin/ls"), machine, folder.path()).err().unwrap();
        let text = format!("{error:#}");
        assert!(text.contains("model GPU 0 has ended") && text.contains("ls:"), "{text}");
    }
}
