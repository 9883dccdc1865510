//! Fixes that `peervram route` prints, applied as printed: the pair was refused and works then. What a virtual
//! machine can do at run time is done; a kernel's parameter and a card's slot are those of a second machine,
//! and the first one's test says that they are the very ones that were printed.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use peervram::backends::topology::{MapType, Reading, Search, Topology};
use peervram::backends::{Aperture, DmaBuf, Exporter, Importer, OnRevoke, PciAddress, RawBytes, vfio};
use peervram::route::{Answer, End, FixKind, KernelMessages, Route};
use peervram::{Attachment, Error, Kind, Lender, Trust};
use peervram_lab::machine::shape::Setting;
use peervram_lab::machines;
use peervram_lab::machines::shapes::{
    self, FIXED_BY_PARAMETER, FIXED_BY_SLOT, REFUSED_BY_ACS, REFUSED_BY_SLOT,
};
use peervram_lab::tree::{self, Part};
use rustix::io::Errno;

use crate::acs::AcsPorts;
use crate::crossing::{VRAM, refused, scattered};
use crate::guest::Guest;
use crate::holder::Hold;
use crate::test::{Test, Verdict};
use crate::tree::Tree;

pub const TESTS: &[Test] = &[
    Test::of_shapes("route/predicted-groups-are-the-kernels", predicted_groups),
    Test::of_shapes("route/acs-parameter-printed-is-the-one-that-mends", acs_parameter_printed)
        .on(|facts| facts.machine == REFUSED_BY_ACS),
    Test::of_shapes("route/acs-parameter-booted-mends-the-pair", acs_parameter_booted)
        .on(|facts| facts.machine == FIXED_BY_PARAMETER),
    Test::of_shapes("route/acs-registers-written-as-printed-mend-the-pair", acs_registers_written)
        .on(|facts| facts.machine == REFUSED_BY_ACS),
    Test::of_shapes("route/verdict-that-was-kept-is-forgotten-as-printed", kept_verdict_is_forgotten)
        .on(|facts| facts.machine == REFUSED_BY_ACS),
    Test::of_shapes("route/free-slot-printed-is-the-one-that-mends", free_slot_printed)
        .on(|facts| facts.machine == REFUSED_BY_SLOT),
    Test::of_shapes("route/card-in-that-slot-mends-the-pair", card_in_that_slot)
        .on(|facts| facts.machine == FIXED_BY_SLOT),
    Test::new("route/passthrough-printed-is-the-one-that-mends", passthrough_printed)
        .on(|facts| facts.machine == machines::MACHINES[0].name),
    Test::new("route/passthrough-is-not-printed-for-a-mended-kernel", passthrough_is_not_printed)
        .on(|facts| facts.mended),
    Test::of_shapes(
        "route/several-ranges-below-a-port-that-redirects-are-refused",
        several_ranges_below_a_port,
    )
    .on(|facts| facts.machine == "shapes-ports-epyc"),
    Test::of_all("route/passthrough-booted-maps-several-ranges", passthrough_booted)
        .on(|facts| facts.machine == machines::PASSTHROUGH),
];

/// Places of functions on the machines of [`REFUSED_BY_ACS`]: below two ports of one switch.
const FIRST: &str = "00:02.0/00.0/00.0/00.0";
const SECOND: &str = "00:02.0/00.0/01.0/00.0";
/// Beside the switch on [`REFUSED_BY_SLOT`], and the slot there.
const BESIDE: &str = "00:03.0/00.0";
const SLOT: &str = "00:02.0/00.0/01.0";

fn at(tree: &Tree, path: &str) -> Result<PciAddress> {
    let found = tree.all.iter().find(|found| found.path == path);
    Ok(found.with_context(|| format!("nothing is at {path}"))?.address)
}

fn explain(provider: PciAddress, client: PciAddress) -> Result<Route> {
    Ok(Route::explain(&Topology::read()?, provider, &End::Function(client), &KernelMessages::read())?)
}

/// What the kernel says when it maps memory of one for the other: where it is, or an errno.
fn map(provider: PciAddress, client: PciAddress, ranges: u64) -> Result<Result<Vec<u64>, Errno>> {
    let device = vfio::Device::open(provider)?;
    let buffer = device.export(&scattered(&device, ranges * 4096, ranges)?)?;
    let hold = Hold::open()?;
    hold.attach(&client.to_string(), &buffer).context("attaching, which never looks at the route")?;
    Ok(match hold.map() {
        Ok(()) => Ok(hold.state()?.ranges.iter().map(|range| range.dma_address).collect()),
        Err(errno) => Err(errno),
    })
}

fn bar_address(function: PciAddress) -> Result<u64> {
    let function = peervram::backends::pci::Function::read(function)?;
    Ok(function.bar(VRAM).context("it has no BAR 2")?.address)
}

fn ensure_refused(provider: PciAddress, client: PciAddress) -> Result<Route> {
    let mapped = map(provider, client, 1)?;
    ensure!(mapped == Err(Errno::INVAL), "mapping says {mapped:x?}");
    let route = explain(provider, client)?;
    ensure!(route.answer() == Answer::Refused, "{}", route.verdict_words);
    Ok(route)
}

fn ensure_mended(provider: PciAddress, client: PciAddress) -> Verdict {
    let mapped = map(provider, client, 1)?;
    ensure!(mapped == Ok(vec![bar_address(provider)?]), "mapping says {mapped:x?}");
    let route = explain(provider, client)?;
    ensure!(route.map_type() == Some(MapType::BusAddress), "{}", route.verdict_words);
    Ok(())
}

/// Has the kernel forget what it has decided.
fn forget(tree: &Tree) -> Result<()> {
    tree.bind()
}

/// Types what was printed. There is no setpci in the guest, so this stands in for it.
fn type_as_root(command: &str) -> Result<()> {
    match command.split(' ').collect::<Vec<_>>()[..] {
        ["setpci", "-s", port, register] => write_register(port.parse()?, register),
        _ => {
            let output = Command::new("sh").args(["-c", command]).output().context("starting sh")?;
            ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        }
    }
}

/// `ECAP_ACS+6.w=VALUE:MASK`, as setpci has it: bits of the mask become those of the value.
fn write_register(port: PciAddress, register: &str) -> Result<()> {
    let parts = register.strip_prefix("ECAP_ACS+").and_then(|rest| rest.split_once(".w="));
    let (offset, assignment) = parts.with_context(|| format!("{register} is no word of ACS"))?;
    let (value, mask) = assignment.split_once(':').context("no mask")?;
    let hex = |digits: &str| u16::from_str_radix(digits, 16);
    let (offset, value, mask) = (hex(offset)?, hex(value)?, hex(mask)?);
    let topology = Topology::read()?;
    let Some(Reading::Known(config)) = topology.place(port).map(|place| &place.config) else {
        bail!("{port} was not read");
    };
    let Search::Found(acs) = config.acs() else { bail!("{port} has no ACS") };
    let file = OpenOptions::new().read(true).write(true).open(port.sysfs_path().join("config"))?;
    let at = u64::from(acs.offset + offset);
    let mut now = [0; 2];
    file.read_exact_at(&mut now, at)?;
    let bits = u16::from_le_bytes(now) & !mask | value & mask;
    file.write_all_at(&bits.to_le_bytes(), at)?;
    Ok(())
}

/// Every group of this machine's kernel, and every one that is predicted.
fn predicted_groups(guest: &Guest) -> Verdict {
    let topology = Topology::read()?;
    let predicted = topology.predicted_iommu_groups().map_err(anyhow::Error::msg)?;
    let mut groups: BTreeMap<u32, Vec<PciAddress>> = BTreeMap::new();
    let mut without = HashSet::new();
    for place in topology.places() {
        match place.function.iommu_group {
            Some(group) => groups.entry(group).or_default().push(place.address()),
            None => drop(without.insert(place.address())),
        }
    }
    let sorted = |mut group: Vec<PciAddress>| {
        group.retain(|function| !without.contains(function));
        group.sort_unstable();
        group
    };
    let mut seen: Vec<_> = groups.into_values().map(sorted).collect();
    let mut predicted: Vec<_> = predicted.into_iter().map(sorted).filter(|group| !group.is_empty()).collect();
    seen.sort();
    predicted.sort();
    ensure!(seen == predicted, "the kernel's groups are {seen:?}, predicted {predicted:?}");
    let several = seen.iter().filter(|group| group.len() > 1).count();
    let text = format!("{} groups, {several} of several functions", seen.len());
    guest.cell("IOMMU groups", &guest.facts().machine, "predicted as the kernel made them", &text)
}

fn acs_parameter_printed(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    forget(&tree)?;
    let (provider, client) = (at(&tree, FIRST)?, at(&tree, SECOND)?);
    let route = ensure_refused(provider, client)?;
    let fix = route.recommended().context("nothing is recommended")?;
    ensure!(fix.kind == FixKind::DisableAcsRedirect, "{fix:?}");
    let booted = shapes::of(FIXED_BY_PARAMETER).context("no such machine")?.parameters;
    ensure!(fix.commands == [booted], "printed is {:?}, booted will be {booted:?}", fix.commands);
    ensure!(fix.groups.as_ref().is_some_and(|groups| groups.now.len() > groups.then.len()), "{fix:?}");
    // The kernel names the same ports, by their addresses of this boot.
    ensure!(route.messages.iter().any(|line| line.contains("ACS redirect is set")), "{:?}", route.messages);
    // The last time: it has said so of other ports, where a test before this one set other bits.
    let hint = route.messages.iter().rfind(|line| line.contains("pci=disable_acs_redir="));
    let ports = route.verdict.as_ref().map(|verdict| verdict.redirects.clone()).unwrap_or_default();
    let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
    let named = format!("pci=disable_acs_redir={}", ports.join(";"));
    ensure!(hint.is_some_and(|line| line.ends_with(&named)), "the kernel says {hint:?}, not {named}");
    Ok(())
}

fn acs_parameter_booted(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    let parameter = tree.shape.parameters;
    let topology = Topology::read()?;
    let line = topology.command_line.known().context("the command line was not read")?;
    ensure!(line.split(' ').any(|word| word == parameter), "the command line is {line:?}");
    ensure_mended(at(&tree, FIRST)?, at(&tree, SECOND)?)
}

fn acs_registers_written(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    let _ports = AcsPorts::take(&tree)?;
    forget(&tree)?;
    let (provider, client) = (at(&tree, FIRST)?, at(&tree, SECOND)?);
    let route = ensure_refused(provider, client)?;
    let fix = route.fixes.iter().find(|fix| fix.kind == FixKind::WriteAcs).context("it is not printed")?;
    fix.commands.iter().try_for_each(|command| type_as_root(command))?;
    ensure_mended(provider, client)
}

fn kept_verdict_is_forgotten(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    let ports = AcsPorts::take(&tree)?;
    forget(&tree)?;
    let (provider, client) = (at(&tree, FIRST)?, at(&tree, SECOND)?);
    ensure_refused(provider, client)?;
    ports.set(&Setting { name: "off", ports: &[], others: Some(0) })?;
    // No port redirects any more, and the kernel still gives its old answer.
    let mapped = map(provider, client, 1)?;
    ensure!(mapped == Err(Errno::INVAL), "mapping says {mapped:x?}");
    let route = explain(provider, client)?;
    ensure!(route.answer() == Answer::Works, "{}", route.verdict_words);
    let fix = route.recommended().context("nothing is recommended")?;
    ensure!(fix.kind == FixKind::Rebind, "{fix:?}");
    fix.commands.iter().try_for_each(|command| type_as_root(command))?;
    ensure_mended(provider, client)
}

fn free_slot_printed(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    forget(&tree)?;
    let (provider, client) = (at(&tree, FIRST)?, at(&tree, BESIDE)?);
    let route = ensure_refused(provider, client)?;
    let fix = route.recommended().context("nothing is recommended")?;
    ensure!(fix.kind == FixKind::MoveCard && fix.then == Some(MapType::BusAddress), "{fix:?}");
    let printed = format!("Put the card at {client} into the slot of {}", at(&tree, SLOT)?);
    ensure!(fix.what == printed, "{:?} is printed, not {printed:?}", fix.what);
    // The other machine is this one, with that card in that slot.
    let functions = |name: &str| -> Result<HashSet<String>> {
        let shape = shapes::of(name).context("no such machine")?;
        let functions =
            tree::placed(shape.tree).into_iter().filter(|placed| placed.node.part == Part::Function);
        Ok(functions.map(|placed| placed.path).collect())
    };
    let mut moved = functions(REFUSED_BY_SLOT)?;
    moved.remove(BESIDE);
    moved.insert(format!("{SLOT}/00.0"));
    ensure!(functions(FIXED_BY_SLOT)? == moved, "the other machine has {:?}", functions(FIXED_BY_SLOT)?);
    Ok(())
}

fn card_in_that_slot(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    ensure_mended(at(&tree, FIRST)?, at(&tree, &format!("{SLOT}/00.0"))?)
}

fn passthrough_printed(guest: &Guest) -> Verdict {
    let (provider, client) = (guest.lender()?.parse()?, guest.virtio_gpu()?.parse()?);
    let mapped = map(provider, client, 2)?;
    ensure!(mapped.is_err(), "several ranges are mapped, at {mapped:x?}");
    let route = explain(provider, client)?;
    let fix = route.fixes.iter().find(|fix| fix.kind == FixKind::Passthrough).context("it is not printed")?;
    let booted = machines::named(machines::PASSTHROUGH).context("no such machine")?.parameters;
    ensure!(fix.commands == [booted], "printed is {:?}, booted will be {booted:?}", fix.commands);
    // Lending one range is the other remedy.
    ensure!(map(provider, client, 1)?.is_ok(), "one range is not mapped");
    Ok(())
}

fn passthrough_is_not_printed(guest: &Guest) -> Verdict {
    let (provider, client) = (guest.lender()?.parse()?, guest.virtio_gpu()?.parse()?);
    let mapped = map(provider, client, 2)?;
    ensure!(mapped.is_ok(), "two ranges are not mapped: {mapped:x?}");
    let route = explain(provider, client)?;
    ensure!(route.map_type() == Some(MapType::ThroughHostBridge), "{}", route.verdict_words);
    ensure!(!route.fixes.iter().any(|fix| fix.kind == FixKind::Passthrough), "it is printed all the same");
    Ok(())
}

/// The holder on behalf of a function, as an importer.
struct Holder(PciAddress);

impl Importer for Holder {
    type Memory = Hold;

    fn name(&self) -> String {
        format!("the holder at {}", self.0)
    }

    fn pci_address(&self) -> Option<PciAddress> {
        Some(self.0)
    }

    fn on_revoke(&self) -> OnRevoke {
        OnRevoke::Reimport
    }

    fn governed_by_p2pdma(&self) -> bool {
        true
    }

    fn import(&self, dma_buf: &DmaBuf) -> peervram::Result<Hold> {
        let failed = |errno| Error::os("import by the holder", errno).on(self.name());
        let hold =
            Hold::open().map_err(|error| Error::new(Kind::Os, "open the holder", error.to_string()))?;
        hold.attach(&self.0.to_string(), dma_buf).map_err(failed)?;
        hold.map().map_err(failed)?;
        Ok(hold)
    }

    fn release(&self, hold: Hold) -> peervram::Result<()> {
        hold.release().map_err(|errno| Error::os("let go", errno).on(self.name()))
    }
}

/// Two functions of one slot: their port is above both, and sends their requests up all the same.
fn several_ranges_below_a_port(guest: &Guest) -> Verdict {
    let tree = Tree::find(guest.facts())?;
    let ports = AcsPorts::take(&tree)?;
    forget(&tree)?;
    let (provider, client) = (at(&tree, "00:03.0/00.0")?, at(&tree, "00:03.0/00.1")?);
    let attach = || -> Result<peervram::Result<()>> {
        let device = vfio::Device::open(provider)?;
        let ranges = scattered(&device, 2 * 4096, 2)?;
        let lender = Lender::new(device);
        let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
        let attached = export.attach(Arc::new(Holder(client)), Trust::Unverified);
        Ok(attached.map_err(Error::from).and_then(Attachment::detach))
    };
    let error = refused(attach()?, Kind::RouteRefused)?;
    ensure!(error.raw_os_error().is_none(), "the kernel was asked: {error}");
    let next = format!("peervram route {provider} {client}");
    ensure!(error.to_string().contains(&next), "{error}");
    ports.set(&Setting { name: "off", ports: &[], others: Some(0) })?;
    forget(&tree)?;
    Ok(attach()??)
}

fn passthrough_booted(guest: &Guest) -> Verdict {
    let (provider, client) = (guest.lender()?.parse()?, guest.card()?.address());
    let kind = client.sysfs_path().join("iommu_group/type");
    let kind = fs::read_to_string(&kind).with_context(|| kind.display().to_string())?;
    ensure!(kind.trim() == "identity", "the client's domain is {kind:?}");
    let device = vfio::Device::open(provider)?;
    let ranges = scattered(&device, 3 * 4096, 3)?;
    drop(device);
    let bar = bar_address(provider)?;
    let expected: Vec<u64> = ranges.as_slice().iter().map(|range| bar + range.offset_bytes).collect();
    let mapped = map(provider, client, 3)?;
    ensure!(mapped.as_ref() == Ok(&expected), "they are at {mapped:x?}, not {expected:x?}");
    let route = explain(provider, client)?;
    ensure!(route.map_type() == Some(MapType::ThroughHostBridge), "{}", route.verdict_words);
    ensure!(!route.fixes.iter().any(|fix| fix.kind == FixKind::Passthrough), "it is printed all the same");
    Ok(())
}
