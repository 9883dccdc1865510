//! A broker in a process of its own, so that it can be killed: it lends the beginning of a model GPU's VRAM, for which
//! the GPU's driver answers.

use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use peervram::Lender;
use peervram::backends::{Aperture, DmaRange, DmaRanges, PciAddress, vfio};
use peervram::broker::{Broker, Offer, Policy, Rule, Who};
use peervram_model_driver::{ModelGpu, VRAM_BAR};

use crate::blocks;
use crate::borrower;

/// What it lends, in bytes.
pub const POOL_BYTES: u64 = 8 << 20;
/// By which name.
pub const MEMORY: &str = "vram";

/// A broker in a process of its own; ended with this value.
pub struct BrokerProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl BrokerProcess {
    /// Starts one for that GPU, and waits until it listens at `socket`.
    pub fn start(function: PciAddress, socket: &Path) -> Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg("serve")
            .arg(function.to_string())
            .arg(socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a broker")?;
        let input = child.stdin.take().context("the broker has no input")?;
        let output = BufReader::new(child.stdout.take().context("the broker has no output")?);
        let mut broker = Self { child, input, output };
        broker.hear()?;
        Ok(broker)
    }

    /// Has the GPU's own engine put the blocks of `seed` at a place in VRAM.
    pub fn fill(&mut self, seed: u32, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        writeln!(self.input, "fill {seed} {offset_bytes} {length_bytes}").context("talking to the broker")?;
        self.hear()
    }

    fn hear(&mut self) -> Result<()> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("listening to the broker")?;
        ensure!(line == "done\n", "the broker says {line:?}; standard error has the reason");
        Ok(())
    }

    /// Kills it as hard as a process can be killed, and waits for its end.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Who may borrow in the lab: its borrowers.
pub fn policy() -> Policy {
    Policy::owner_only().and(Rule::allow(Who::User(borrower::USER)))
}

/// A model GPU whose memory is lent by a broker of this process.
pub struct ServedModel {
    pub driver: Arc<ModelGpu>,
    pub lender: Arc<Lender<vfio::Device>>,
    pub broker: Broker,
}

impl ServedModel {
    /// Lends the beginning of its VRAM, with its engine to scrub it.
    pub fn serve(function: PciAddress, socket: &Path, pool_bytes: u64) -> Result<Self> {
        let device = vfio::Device::open(function)?;
        let driver = Arc::new(ModelGpu::new(&device)?);
        let ranges = DmaRanges::new(device.region(VRAM_BAR)?, &[DmaRange::new(0, pool_bytes)])?;
        let lender = Arc::new(Lender::new(device));
        let aperture = Aperture::owned(ranges, Arc::clone(&driver) as _);
        let broker = serve_lender(&lender, aperture, socket)?;
        Ok(Self { driver, lender, broker })
    }
}

/// Lends `aperture` by a broker at `socket`.
pub fn serve_lender(lender: &Arc<Lender<vfio::Device>>, aperture: Aperture, socket: &Path) -> Result<Broker> {
    let offer = Offer::with_reset(MEMORY, lender, aperture, |lender, options| lender.reset(options))?;
    Ok(Broker::serve(Broker::listen(socket)?, vec![offer], policy())?)
}

/// The child process: lends, and fills memory as it is told, until its input ends.
pub fn serve(function: &str, socket: &str) -> Result<()> {
    let served = ServedModel::serve(function.parse()?, &PathBuf::from(socket), POOL_BYTES)?;
    say_done()?;
    for line in io::stdin().lines() {
        let line = line?;
        let ["fill", seed, offset, length] = line.split(' ').collect::<Vec<_>>()[..] else {
            bail!("a broker does not {line:?}");
        };
        blocks::fill(&served.driver, seed.parse()?, 0, length.parse()?, offset.parse()?)?;
        say_done()?;
    }
    served.broker.close();
    Ok(())
}

fn say_done() -> Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "done")?;
    output.flush().context("talking to the test")
}
