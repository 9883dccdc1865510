//! How one function reaches the memory of another: what peervram predicts, and what the kernel says, for every
//! function that lends and every function or bridge that maps, of every shape.

use anyhow::{Context, Result, bail, ensure};
use peervram::backends::pci::Function;
use peervram::backends::topology::{Expected, MapType, Topology};
use peervram::backends::{DmaBuf, DmaRange, DmaRanges, Exporter, PciAddress, vfio};
use peervram_lab::machine::Facts;
use peervram_lab::machine::shape::{
    COMPLETION_REDIRECT, REQUEST_REDIRECT, SOURCE_VALIDATION, UPSTREAM_FORWARDING,
};
use peervram_lab::machines::shapes;
use peervram_lab::routes::{self, Row};
use rustix::io::Errno;
use std::fs;

use crate::acs::AcsPorts;
use crate::crossing::VRAM;
use crate::guest::Guest;
use crate::holder::Hold;
use crate::test::{Test, Verdict};
use crate::tree::{Found, Tree};

pub const TESTS: &[Test] = &[
    Test::of_shapes("routes/prediction-is-the-kernels-answer", prediction_is_the_answer),
    Test::of_shapes("routes/answer-is-kept-until-the-driver-is-unbound", answer_is_kept).on(has_settings),
    Test::of_shapes("routes/who-is-first-on-the-root-bus-decides", who_is_first_decides)
        .on(|facts| facts.machine == "shapes-trusted-hosts"),
    Test::of_shapes("routes/parameter-switches-off-more-than-redirects", parameter_switches_off_more)
        .on(|facts| facts.machine == "shapes-acs-switch-parameter"),
];

/// Whether its second setting of ACS makes another shape of it than the first, for some pairs.
fn has_settings(facts: &Facts) -> bool {
    shapes::of(&facts.machine).is_some_and(|shape| shape.settings.len() > 2)
}

fn prediction_is_the_answer(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    let ports = AcsPorts::take(&tree)?;
    let mut wrong = Vec::new();
    for setting in tree.shape.settings {
        ports.set(setting)?;
        tree.bind()?;
        let pairs = Pair::all(&tree)?;
        let shape = format!("{}: {}", guest.facts().machine, setting.name);
        let count = |map_type| pairs.iter().filter(|pair| pair.answer == map_type).count();
        let row = Row {
            cpu: guest.facts().cpu.clone(),
            lenders: tree.functions().count(),
            clients: tree.all.len(),
            pairs: pairs.len(),
            bus_address: count(MapType::BusAddress),
            through_host_bridge: count(MapType::ThroughHostBridge),
            not_supported: count(MapType::NotSupported),
            right: pairs.iter().filter(|pair| pair.is_right()).count(),
            shape,
        };
        for (column, text) in row.cells() {
            guest.cell(routes::TABLE, &row.shape, column, &text)?;
        }
        let of_this_shape = pairs.iter().filter(|pair| !pair.is_right());
        wrong.extend(of_this_shape.map(|pair| format!("{}: {pair}", row.shape)));
    }
    ensure!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

/// The kernel keeps its answers with the provider's driver. peervram predicts what it says to whom it has not
/// answered yet.
fn answer_is_kept(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    let ports = AcsPorts::take(&tree)?;
    let [first, second, ..] = tree.shape.settings else { bail!("it has no two settings") };
    ports.set(first)?;
    tree.bind()?;
    let before = Pair::all(&tree)?;
    ports.set(second)?;
    let kept = Pair::all(&tree)?;
    let other = before.iter().zip(&kept).find(|(before, kept)| before.answer != kept.answer);
    ensure!(other.is_none(), "without unbinding, the answer has changed: {other:?}");
    ensure!(kept.iter().any(|pair| !pair.is_right()), "no answer depends on what was written");
    tree.bind()?;
    let after = Pair::all(&tree)?;
    all_right(&after)?;
    ensure!(after.iter().zip(&kept).any(|(after, kept)| after.answer != kept.answer), "nothing has changed");
    Ok(())
}

/// The first on the kernel's list of the bus, which is not the one with the lowest address once that was
/// removed and found again.
fn who_is_first_decides(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    tree.bind()?;
    let before = Pair::all(&tree)?;
    all_right(&before)?;
    // Only this host bridge is on the kernel's list.
    let first = find_again(guest, &tree, &["40:00.0"])?;
    let without = Pair::all(&first)?;
    all_right(&without)?;
    let supported = |pairs: &[Pair]| pairs.iter().filter(|pair| pair.answer != MapType::NotSupported).count();
    let (there, then) = (supported(&before), supported(&without));
    ensure!(then < there, "{then} pairs are supported with another first device, {there} before");
    // Now the others come after it.
    let again = find_again(guest, &first, &["40:01.0"])?;
    let after = Pair::all(&again)?;
    all_right(&after)?;
    ensure!(
        supported(&after) == there,
        "in the first order {} are supported, {there} before",
        supported(&after)
    );
    Ok(())
}

/// Of a port that `pci=disable_acs_redir=` names, Linux 7.3 leaves the other bits as the firmware had set them,
/// and does not set those that isolate functions (`__pci_config_acs` begins with `fw_ctrl`). The lab's firmware
/// sets none.
fn parameter_switches_off_more(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    let isolating = SOURCE_VALIDATION | REQUEST_REDIRECT | COMPLETION_REDIRECT | UPSTREAM_FORWARDING;
    for (path, bits) in AcsPorts::take(&tree)?.before() {
        let is_named = tree.shape.parameters.split(['=', ';']).any(|word| word == path);
        let expected = if is_named { 0 } else { isolating };
        ensure!(bits == expected, "the ACS control of {path} says {bits:#x}, not {expected:#x}");
    }
    Ok(())
}

/// Removes what is at those places, and has the kernel find it again; everything is bound and named as before.
fn find_again(guest: &Guest, tree: &Tree, paths: &[&str]) -> Result<Tree> {
    let wanted = |found: &&Found| paths.contains(&found.path.as_str());
    for found in tree.all.iter().filter(wanted) {
        fs::write(found.address.sysfs_path().join("remove"), "1").context("removing a function")?;
    }
    fs::write("/sys/bus/pci/rescan", "1").context("scanning the bus again")?;
    let tree = Tree::find(guest.facts())?;
    tree.take_for()?;
    tree.bind()?;
    Ok(tree)
}

fn all_right(pairs: &[Pair]) -> Result<()> {
    let wrong: Vec<String> =
        pairs.iter().filter(|pair| !pair.is_right()).map(|pair| pair.to_string()).collect();
    ensure!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

/// A function that lends and one that asks: what is expected, and what the kernel says.
#[derive(Debug)]
struct Pair<'tree> {
    provider: &'tree Found,
    client: &'tree Found,
    expected: Expected,
    answer: MapType,
}

impl std::fmt::Display for Pair<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Pair { provider, client, expected, answer } = self;
        let place = |found: &Found| format!("{} ({})", found.path, found.address);
        let (provider, client) = (place(provider), place(client));
        write!(
            formatter,
            "{client} maps memory of {provider}: expected {expected:?}, the kernel says {answer}"
        )
    }
}

impl Pair<'_> {
    /// Every function of a tree lends to everything in it: to itself, and to bridges, too.
    fn all(tree: &Tree) -> Result<Vec<Pair<'_>>> {
        let topology = Topology::read()?;
        let hold = Hold::open()?;
        let mut pairs = Vec::new();
        for provider in tree.functions() {
            let lent = Lent::new(provider.address).with_context(|| format!("lending {}", provider.path))?;
            for client in &tree.all {
                let expected = topology.expected_map_type(provider.address, client.address).expected;
                let answer = lent.ask(&hold, client.address);
                let answer = answer.with_context(|| format!("{} for {}", provider.path, client.path))?;
                pairs.push(Pair { provider, client, expected, answer });
            }
        }
        Ok(pairs)
    }

    fn is_right(&self) -> bool {
        self.expected.known() == Some(self.answer)
    }
}

/// A page of a function's memory, exported.
struct Lent {
    buffer: DmaBuf,
    bar_address: u64,
    /// Last: it stays open while the memory is lent.
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

    /// Has the kernel map it for a client, and looks at where. The kernel hands out no IO address that is one
    /// of the client's host bridge's memory (`iova_reserve_pci_windows`).
    fn ask(&self, hold: &Hold, client: PciAddress) -> Result<MapType> {
        hold.attach(&client.to_string(), &self.buffer).context("attaching")?;
        let mapped = hold.map();
        let ranges = hold.state()?.ranges;
        hold.release().context("releasing")?;
        match (mapped, &ranges[..]) {
            (Ok(()), [range]) if range.dma_address == self.bar_address => Ok(MapType::BusAddress),
            (Ok(()), [_]) => Ok(MapType::ThroughHostBridge),
            (Err(Errno::INVAL), []) => Ok(MapType::NotSupported),
            (mapped, ranges) => bail!("the kernel says {mapped:?} and {ranges:x?}"),
        }
    }
}
