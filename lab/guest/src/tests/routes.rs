//! How one function reaches the memory of another: what peervram predicts, and what the kernel says, for every
//! ordered pair of functions of every shape.

use anyhow::{Context, Result, bail};
use peervram::backends::pci::Function;
use peervram::backends::{DmaBuf, DmaRange, DmaRanges, Exporter, PciAddress, vfio};
use peervram_lab::machine::{Facts, Topology};
use peervram_lab::routes;
use rustix::io::Errno;

use crate::acs::AcsPorts;
use crate::crossing::VRAM;
use crate::guest::Guest;
use crate::holder::Hold;
use crate::test::{Test, Verdict};
use crate::tree::{Found, Tree};

pub const TESTS: &[Test] =
    &[Test::of_all("routes/prediction-is-the-kernels-answer", prediction_is_the_answer).on(has_tree)];

fn has_tree(facts: &Facts) -> bool {
    facts.topology == Topology::Tree
}

/// What the kernel says to a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Mapped, at the address of the BAR.
    BusAddress,
    /// Mapped, at an IO virtual address.
    ThroughHostBridge,
    /// Not mapped, `EINVAL`.
    NotSupported,
}

fn prediction_is_the_answer(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    let ports = AcsPorts::take(&tree)?;
    for setting in tree.shape.settings {
        ports.set(setting)?;
        tree.bind()?;
        let answers = answers(&tree)?;
        let count = |wanted| answers.iter().filter(|(_, _, answer)| *answer == wanted).count();
        let row = format!("{}: {}", guest.facts().machine, setting.name);
        for (column, text) in [
            ("CPU", guest.facts().cpu.clone()),
            ("functions", tree.functions().count().to_string()),
            ("pairs", answers.len().to_string()),
            ("bus address", count(Answer::BusAddress).to_string()),
            ("through host bridge", count(Answer::ThroughHostBridge).to_string()),
            ("not supported", count(Answer::NotSupported).to_string()),
        ] {
            guest.cell(routes::TABLE, &row, column, &text)?;
        }
    }
    Ok(())
}

/// What the kernel says to every ordered pair: provider, client, answer.
fn answers(tree: &Tree) -> Result<Vec<(&Found, &Found, Answer)>> {
    let hold = Hold::open()?;
    let mut answers = Vec::new();
    for provider in tree.functions() {
        let lent = Lent::new(provider.address).with_context(|| format!("lending {}", provider.path))?;
        for client in tree.functions() {
            let answer = lent.ask(&hold, client.address);
            let answer = answer.with_context(|| format!("{} for {}", provider.path, client.path))?;
            answers.push((provider, client, answer));
        }
    }
    Ok(answers)
}

/// A page of a function's memory, exported.
struct Lent {
    buffer: DmaBuf,
    bar_address: u64,
    _device: vfio::Device,
}

impl Lent {
    fn new(address: PciAddress) -> Result<Lent> {
        let device = vfio::Device::open(address)?;
        let buffer = device.export(&DmaRanges::new(device.region(VRAM)?, &[DmaRange::new(0, 4096)])?)?;
        let bars = Function::read(address)?.bars;
        let bar = bars.iter().find(|bar| bar.index == VRAM).context("it has no BAR 2")?;
        Ok(Lent { buffer, bar_address: bar.address, _device: device })
    }

    /// Has the kernel map it for a client, and looks at where.
    fn ask(&self, hold: &Hold, client: PciAddress) -> Result<Answer> {
        hold.attach(&client.to_string(), &self.buffer).context("attaching")?;
        let mapped = hold.map();
        let ranges = hold.state()?.ranges;
        hold.release().context("releasing")?;
        match (mapped, &ranges[..]) {
            (Ok(()), [range]) if range.dma_address == self.bar_address => Ok(Answer::BusAddress),
            (Ok(()), [_]) => Ok(Answer::ThroughHostBridge),
            (Err(Errno::INVAL), []) => Ok(Answer::NotSupported),
            (mapped, ranges) => bail!("the kernel says {mapped:?} and {ranges:x?}"),
        }
    }
}
