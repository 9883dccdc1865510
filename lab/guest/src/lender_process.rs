//! A process that lends: it owns the VFIO device, so that what hangs in the kernel with the
//! device is not the test.
//!
//! A reset that waits for an importer cannot be killed. Were it a thread of the test, the test
//! could not end either, its descriptors would stay open, and a holder among them would never let
//! go.

use anyhow::{Context, Result, bail, ensure};
use peervram::backends::{Aperture, DmaBuf, DmaRange, DmaRanges, Exporter, RawBytes, drm, vfio};
use peervram::{Direction, Lender, Trust};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::crossing::scattered;

const RESET: &str = "reset";

/// A lender in a process of its own; ended with this value.
pub struct LenderProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Its descriptor of the device.
    device: i32,
}

impl LenderProcess {
    /// Starts one that exports `size_bytes` of the function's VRAM in that many ranges; gives it
    /// and the dma-buf.
    pub fn start(function: &str, size_bytes: u64, ranges: u64) -> Result<(LenderProcess, DmaBuf)> {
        let mut child = Command::new("/proc/self/exe")
            .args(["lend", function, &size_bytes.to_string(), &ranges.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a lender")?;
        let input = child.stdin.take().context("the lender has no input")?;
        let output = BufReader::new(child.stdout.take().context("the lender has no output")?);
        let mut lender = LenderProcess { child, input, output, device: -1 };
        lender.device = lender.hear()?.parse().context("the lender's descriptor of the device")?;
        let number = lender.hear()?.parse().context("the lender's descriptor of the dma-buf")?;
        let buffer = lender.descriptor(number)?;
        Ok((lender, DmaBuf::from_fd(buffer)?))
    }

    /// Its device, as if it had sent us the descriptor.
    pub fn adopt_device(&self, function: &str) -> Result<vfio::Device> {
        Ok(vfio::Device::adopt(self.descriptor(self.device)?, function.parse()?)?)
    }

    /// A pidfd that becomes readable when the process ends.
    pub fn pidfd(&self) -> Result<OwnedFd> {
        Ok(pidfd_open(self.pid(), PidfdFlags::empty())?)
    }

    fn descriptor(&self, number: i32) -> Result<OwnedFd> {
        pidfd_getfd(self.pidfd()?, number, PidfdGetfdFlags::empty())
            .with_context(|| format!("taking descriptor {number} of the lender"))
    }

    /// Tells the process to reset the device; does not wait.
    pub fn begin_reset(&mut self) -> Result<()> {
        writeln!(self.input, "{RESET}").context("talking to the lender")
    }

    /// Waits for the end of the reset: how long the call took.
    pub fn end_reset(&mut self) -> Result<Duration> {
        let microseconds = self.hear()?.parse().context("the lender's report")?;
        Ok(Duration::from_micros(microseconds))
    }

    /// Kills it as hard as a process can be killed. What the kernel does for it goes on.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if the process has ended.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Whether it sleeps where no signal reaches it, in that function of the kernel.
    pub fn hangs_in(&self, function: &str) -> Result<bool> {
        let folder = format!("/proc/{}", self.child.id());
        let status = fs::read_to_string(format!("{folder}/stat"))?;
        // "123 (name) D ...", and a name may have brackets.
        let state = status.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        let place = fs::read_to_string(format!("{folder}/wchan"))?;
        Ok(state == Some('D') && place == function)
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("listening to the lender")?;
        if line.is_empty() {
            bail!("the lender is gone; standard error has its reason");
        }
        Ok(line.trim().to_string())
    }
}

impl Drop for LenderProcess {
    fn drop(&mut self) {
        // A lender that hangs in the kernel must not take the test with it: no waiting without end.
        self.child.kill().ok();
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The child process. Says the descriptor of its dma-buf, then obeys until its input ends.
pub fn lend(function: &str, size_bytes: &str, ranges: &str) -> Result<()> {
    let device = vfio::Device::open(function.parse()?)?;
    let ranges: DmaRanges = scattered(&device, size_bytes.parse()?, ranges.parse()?)?;
    let buffer = device.export(&ranges)?;
    say(&device.as_fd().as_raw_fd().to_string())?;
    say(&buffer.as_fd().as_raw_fd().to_string())?;
    for line in io::stdin().lines() {
        ensure!(line? == RESET, "the only order is {RESET:?}");
        let start = Instant::now();
        device.reset()?;
        say(&start.elapsed().as_micros().to_string())?;
    }
    Ok(())
}

/// Starts a process that takes its memory back again and again under an import of the node, and kills it
/// that long after the first time.
pub fn revoke_until_killed(function: &str, node: &Path, after: Duration) -> Result<()> {
    let mut child = Command::new("/proc/self/exe")
        .arg("revoke")
        .arg(function)
        .arg(node)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting a process that takes back")?;
    let output = child.stdout.take().context("it has no output")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    std::thread::sleep(after);
    let was_running = child.try_wait()?.is_none();
    child.kill()?;
    child.wait()?;
    ensure!(was_running && !line.is_empty(), "it ended by itself; standard error has its reason");
    Ok(())
}

/// Runs in the lender process.
pub fn revoke(function: &str, node: &str) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let device = vfio::Device::open(function.parse()?)?;
    let memory = device.regions().iter().filter(|region| region.index < 6 && region.flags.mmap);
    let memory = memory.max_by_key(|region| region.size_bytes).context("it has no memory")?;
    let ranges = DmaRanges::new(memory, &[DmaRange::new(0, 1 << 20)])?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let node = Arc::new(drm::Node::open(Path::new(node))?);
    let attachment = export.attach(node, Trust::Unverified)?;
    for round in 0.. {
        lender.reset(PATIENCE)?;
        attachment.current()?;
        attachment.enter(Direction::Read)?.finish().check()?;
        if round == 0 {
            say("taken back")?;
        }
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "{line}")?;
    output.flush().context("talking to the test")
}
