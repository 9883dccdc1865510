//! The tree of a machine for shapes, as the guest's kernel has it: which address is at which place.
//!
//! ```text
//! Tree::find -> take_for -> bind -> functions, AcsPorts
//! ```
//! Absent: what the kernel makes of it. That is asked of the holder, and predicted by peervram.

use anyhow::{Context, Result, ensure};
use peervram::backends::PciAddress;
use peervram::backends::pci::Function;
use peervram_lab::machine::shape::Shape;
use peervram_lab::machine::{Facts, PciId};
use peervram_lab::machines::shapes;
use peervram_lab::tree::{self, Node, Part, Placed};
use std::fs;
use std::path::PathBuf;

use crate::guest;
use crate::holder::Hold;

/// Where the kernel shows buses, each a link to a folder in that of the bridge.
const BUSES: &str = "/sys/class/pci_bus";

/// A place of the tree, found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The place, as the tree names it.
    pub path: String,
    /// What is there.
    pub node: Node,
    /// Where the kernel has it.
    pub address: PciAddress,
}

/// The tree of this machine.
#[derive(Debug)]
pub struct Tree {
    /// The machine's shape.
    pub shape: &'static Shape,
    /// Everything in it, bridges before what is below them.
    pub all: Vec<Found>,
}

impl Tree {
    /// Finds everything that the machine's shape says.
    pub fn find(facts: &Facts) -> Result<Tree> {
        let shape = shapes::of(&facts.machine).with_context(|| format!("{} has no shape", facts.machine))?;
        let all = tree::placed(shape.tree).iter().map(find).collect::<Result<_>>()?;
        Ok(Tree { shape, all })
    }

    /// The functions, in order; the others are bridges.
    pub fn functions(&self) -> impl Iterator<Item = &Found> {
        self.all.iter().filter(|found| found.node.part == Part::Function)
    }

    /// The ports with ACS, in order.
    pub fn acs_ports(&self) -> impl Iterator<Item = &Found> {
        self.all.iter().filter(|found| found.node.part == Part::Port)
    }

    /// Makes the kernel take bridges for other ones where the tree says so.
    pub fn take_for(&self) -> Result<()> {
        for found in &self.all {
            let Some(id) = found.node.taken_for else { continue };
            let taken = Hold::open()?.take_for(&found.address.to_string(), id);
            taken.with_context(|| format!("having the kernel take {} for {id}", found.address))?;
        }
        Ok(())
    }

    /// Binds every function to vfio-pci, whatever it is bound to now. A function that was bound is unbound
    /// first, so the kernel forgets what it has decided about its memory.
    pub fn bind(&self) -> Result<()> {
        self.functions().try_for_each(|found| guest::bind(&found.address.to_string(), "vfio-pci"))
    }
}

fn find(placed: &Placed) -> Result<Found> {
    let lost = || format!("nothing is at {}", placed.path);
    let (root, steps) = placed.path.split_once(':').with_context(lost)?;
    let mut folder = root_bus(root).with_context(lost)?;
    let mut address = None;
    for step in steps.split('/') {
        let found = child(&folder, step).with_context(lost)?;
        folder.push(found.to_string());
        address = Some(found);
    }
    let found = Found { path: placed.path.clone(), node: placed.node, address: address.with_context(lost)? };
    found.check()?;
    Ok(found)
}

/// The folder of the host bridge with the root bus of that number. Where each is a PCI domain of its own, the number is still another on
/// each.
fn root_bus(number: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(BUSES).with_context(|| format!("looking into {BUSES}"))?;
    let buses = entries.filter_map(|entry| fs::canonicalize(entry.ok()?.path()).ok());
    let mut bridges = buses.filter_map(|bus| Some(bus.parent()?.parent()?.to_owned()));
    let is_it = |bridge: &PathBuf| {
        let name = bridge.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("pci") && name.ends_with(&format!(":{number}"))
    };
    bridges.find(is_it).with_context(|| format!("there is no root bus {number}"))
}

/// The function below a bridge whose device and function numbers are those.
fn child(bridge: &PathBuf, step: &str) -> Result<PciAddress> {
    let entries = fs::read_dir(bridge).with_context(|| format!("looking into {}", bridge.display()))?;
    let mut addresses = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_there = |address: &PciAddress| step == format!("{:02x}.{:x}", address.device, address.function);
    addresses.find(is_there).with_context(|| format!("{} has no {step}", bridge.display()))
}

impl Found {
    /// A function is what its place says; bridges have names of QEMU's own.
    fn check(&self) -> Result<()> {
        if self.node.part != Part::Function {
            return Ok(());
        }
        let wanted = PciId::SHARED_MEMORY;
        let Function { vendor_id: vendor, device_id: device, .. } = Function::read(self.address)?;
        let seen = PciId { vendor, device };
        ensure!(seen == wanted, "at {} ({}) is {seen}, not {wanted}", self.path, self.address);
        Ok(())
    }
}
