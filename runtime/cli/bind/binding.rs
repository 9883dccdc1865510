//! `Binding`: a device taken from its driver and given to VFIO, with what was before, so that it can be undone.
//!
//! [`Binding::plan`] reads, refuses what must not be taken, and changes nothing; [`Binding::make`] writes down what
//! was before and does it; [`Binding::undo`] brings exactly that back. Everything is below a root, and what is
//! written goes through a [`Kernel`], so that tests have one of their own.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use peervram::backends::PciAddress;
use peervram::backends::pci::{Function, blocks_its_group, is_vfio_driver};
use peervram::nvgrace;
use peervram::{Error, Kind, Result};
use peervram_programs::replace;
use serde::{Deserialize, Serialize};

use crate::devices::nothing_to_lend;
use crate::in_use::{InUse, Use, words};

const TRIED: &str = "bind a device to VFIO";
pub const TRIED_UNDO: &str = "give a device back to its driver";
const DEVICES: &str = "sys/bus/pci/devices";
const DRIVERS: &str = "sys/bus/pci/drivers";
/// What was before, one file for each device. It goes with the boot, as bindings do.
const RECORDS: &str = "run/peervram/bound";

/// What the user agreed to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Consent {
    /// Devices in other slots that share the IOMMU group lose their drivers, too.
    pub group: bool,
    /// A screen goes dark.
    pub screen: bool,
}

/// One device, and those that have to go with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    pub device: PciAddress,
    /// The VFIO driver.
    pub to: String,
    /// What changes, as it was before; the device first. Empty where all is as it should be.
    pub before: Vec<Before>,
}

/// A function as it was before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Before {
    pub function: PciAddress,
    pub driver: Option<String>,
    pub driver_override: Option<String>,
}

/// A text for a file of sysfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Write {
    /// From the root on.
    pub file: PathBuf,
    pub text: String,
}

/// What changes a machine.
pub trait Kernel {
    /// Loads a module.
    fn load(&mut self, module: &str) -> Result<()>;
    /// Writes into a file of sysfs.
    fn write(&mut self, write: &Write) -> io::Result<()>;
}

impl Binding {
    /// What it takes to bind `device`.
    ///
    /// # Errors
    /// [`Kind::Gone`] of what does not answer; [`Kind::Unsupported`] of what is no GPU or lender, or where there is no
    /// IOMMU; [`Kind::Busy`] where something of the machine hangs on what would lose its driver;
    /// [`Kind::GroupNotViable`] where devices of other slots would have to go along, and nobody agreed.
    pub fn plan(root: &Path, device: PciAddress, in_use: &InUse, consent: Consent) -> Result<Self> {
        let function = Function::read_from(&root.join(DEVICES), device)?;
        check_lends(&function)?;
        let Some(group) = function.iommu_group else {
            let why =
                "it is in no IOMMU group: no IOMMU is in use, and VFIO gives devices away only behind one";
            let next = "peervram doctor says how to enable it";
            return Err(Error::new(Kind::Unsupported, TRIED, why).on(device).next(next));
        };
        let to = match nvgrace::Part::of(function.vendor_id, function.device_id) {
            Some(_) => nvgrace::DRIVER,
            None => "vfio-pci",
        };
        let mut taken = Vec::new();
        // vfio-pci shows a Grace GPU's BARs, and none of its memory.
        let is_right = |driver: &str| is_vfio_driver(driver) && (to != nvgrace::DRIVER || driver == to);
        if !function.driver.as_deref().is_some_and(is_right) {
            taken.push(function);
        }
        taken.extend(neighbours(root, device));
        check_unused(&taken, device, in_use, consent)?;
        check_neighbours(&taken, device, group, consent)?;
        let before = taken.iter().map(|function| Before::read(root, function.address)).collect();
        Ok(Self { device, to: to.to_owned(), before })
    }

    /// The driver that a function is given to: a neighbour has nothing to lend.
    pub fn driver_of(&self, function: PciAddress) -> &str {
        if function == self.device { &self.to } else { "vfio-pci" }
    }

    /// The module to load first, where a driver is not there yet.
    fn module(&self, root: &Path, function: PciAddress) -> Option<String> {
        let driver = self.driver_of(function);
        // The kernel's build writes a module's name with hyphens or underscores; modprobe takes either.
        (!root.join(DRIVERS).join(driver).exists()).then(|| driver.to_owned())
    }

    /// What is written, in order.
    pub fn writes(&self) -> Vec<Write> {
        self.before.iter().flat_map(|before| before.writes(self.driver_of(before.function))).collect()
    }

    /// Does it. Where the kernel refuses, what was done is undone.
    pub fn make(&self, root: &Path, kernel: &mut dyn Kernel) -> Result<()> {
        let earlier = Self::recorded(root, self.device).ok();
        self.joined(earlier.as_ref()).record(root)?;
        let made = self.before.iter().try_for_each(|before| {
            if let Some(module) = self.module(root, before.function) {
                kernel.load(&module)?;
            }
            let to = self.driver_of(before.function);
            for write in before.writes(to) {
                kernel.write(&write).map_err(|error| write_error(TRIED, before.function, &write, error))?;
            }
            check_driver(root, before.function, Some(to), TRIED)
        });
        let undone = |kernel: &mut dyn Kernel| match &earlier {
            None => self.undo(root, kernel),
            Some(earlier) => self.restore(root, kernel).and_then(|()| earlier.record(root)),
        };
        made.map_err(|error| match undone(kernel) {
            Ok(()) => error,
            Err(undo) => {
                let next = format!("what was before could not be brought back: {}", undo.headline());
                error.next(next)
            }
        })
    }

    /// Brings back what was before, and forgets it.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where a driver is not loaded any more; whatever the kernel says. What is left to do stays
    /// written down.
    pub fn undo(&self, root: &Path, kernel: &mut dyn Kernel) -> Result<()> {
        self.restore(root, kernel)?;
        fs::remove_file(root.join(record_of(self.device)))
            .map_err(|error| Error::os(TRIED_UNDO, error).on(self.device))
    }

    fn restore(&self, root: &Path, kernel: &mut dyn Kernel) -> Result<()> {
        for before in self.before.iter().rev() {
            let function = before.function;
            let Some(folder) = Some(root.join(DEVICES).join(function.to_string())).filter(|at| at.exists())
            else {
                // It was taken out of the machine: there is nothing to bring back.
                continue;
            };
            let mut write = |write: Write| {
                kernel.write(&write).map_err(|error| write_error(TRIED_UNDO, function, &write, error))
            };
            write(driver_override(function, before.driver_override.as_deref()))?;
            let driver = driver(&folder);
            if driver == before.driver {
                continue;
            }
            match &driver {
                Some(driver) if is_vfio_driver(driver) => {
                    write(to_driver(driver, "unbind", function))?;
                }
                // Somebody has bound it anew since, and knows why.
                Some(_) => continue,
                None => {}
            }
            if let Some(driver) = &before.driver {
                if !root.join(DRIVERS).join(driver).exists() {
                    let why = format!("its driver {driver} is not loaded any more");
                    let next = format!("load its module, then sudo peervram unbind {}", self.device);
                    return Err(Error::new(Kind::NotFound, TRIED_UNDO, why).on(function).next(next));
                }
                write(to_driver(driver, "bind", function))?;
            }
            check_driver(root, function, before.driver.as_deref(), TRIED_UNDO)?;
        }
        Ok(())
    }

    /// What was written down of a device.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where peervram did not bind it.
    pub fn recorded(root: &Path, device: PciAddress) -> Result<Self> {
        let text = fs::read_to_string(root.join(record_of(device))).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                let driver = driver(&root.join(DEVICES).join(device.to_string()));
                let driver = driver.map_or("no driver".to_owned(), |driver| driver.to_string());
                let why = format!(
                    "nothing is written down of it in /{RECORDS}: peervram has not bound it since the machine started"
                );
                Error::new(Kind::NotFound, TRIED_UNDO, why).on(device).next(format!(
                    "it is bound to {driver}; whoever bound it (driverctl, libvirt, a line of /etc/modprobe.d) can undo \
                     that"
                ))
            }
            _ => Error::os(TRIED_UNDO, error).on(device),
        })?;
        let wrong = |why: String| {
            let file = format!("/{}", record_of(device).display());
            Error::new(Kind::InvalidInput, TRIED_UNDO, format!("{file}: {why}")).on(device)
        };
        let this: Self = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if this.device == device { Ok(this) } else { Err(wrong(format!("it is about {}", this.device))) }
    }

    /// With the functions that an earlier bind of the device has taken: they are still to be given back.
    fn joined(&self, earlier: Option<&Self>) -> Self {
        let mut this = self.clone();
        let others = earlier.into_iter().flat_map(|earlier| &earlier.before);
        let others =
            others.filter(|other| self.before.iter().all(|before| before.function != other.function));
        this.before.extend(others.cloned());
        this
    }

    /// Writes down what was before, for nobody but root to read or change.
    fn record(&self, root: &Path) -> Result<()> {
        let file = root.join(record_of(self.device));
        let written = || -> io::Result<()> {
            let folder = file.parent().unwrap_or(root);
            // The folder above has the broker's socket, too, to which everybody may connect.
            if let Some(above) = folder.parent() {
                fs::DirBuilder::new().recursive(true).mode(0o755).create(above)?;
            }
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
            let text = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
            replace(&file, 0o600, text.as_bytes())
        };
        written().map_err(|error| {
            Error::os(TRIED, error)
                .on(self.device)
                .next(format!("/{RECORDS} must be writable: what was before is written down there"))
        })
    }
}

impl Before {
    fn read(root: &Path, function: PciAddress) -> Self {
        let folder = root.join(DEVICES).join(function.to_string());
        let text = fs::read_to_string(folder.join("driver_override")).unwrap_or_default();
        // `driver_override_show` in drivers/pci/pci-sysfs.c prints (null) for none.
        let text = Some(text.trim().to_owned()).filter(|text| !text.is_empty() && text != "(null)");
        Self { function, driver: driver(&folder), driver_override: text }
    }

    /// What gives it to a driver.
    fn writes(&self, to: &str) -> Vec<Write> {
        let mut writes = vec![driver_override(self.function, Some(to))];
        writes.extend(self.driver.as_deref().map(|driver| to_driver(driver, "unbind", self.function)));
        let probe = PathBuf::from("sys/bus/pci/drivers_probe");
        writes.push(Write { file: probe, text: self.function.to_string() });
        writes
    }
}

fn record_of(device: PciAddress) -> PathBuf {
    Path::new(RECORDS).join(format!("{device}.json"))
}

fn driver_override(function: PciAddress, driver: Option<&str>) -> Write {
    // An empty line is none; an empty text is no write.
    let text = driver.unwrap_or("\n").to_owned();
    Write { file: Path::new(DEVICES).join(function.to_string()).join("driver_override"), text }
}

fn to_driver(driver: &str, what: &str, function: PciAddress) -> Write {
    Write { file: Path::new(DRIVERS).join(driver).join(what), text: function.to_string() }
}

fn driver(folder: &Path) -> Option<String> {
    Some(fs::read_link(folder.join("driver")).ok()?.file_name()?.to_string_lossy().into_owned())
}

fn write_error(tried: &'static str, function: PciAddress, write: &Write, error: io::Error) -> Error {
    let (text, file) = (write.text.trim(), write.file.display());
    Error::os(tried, error)
        .on(function)
        .next(format!("that was writing {text:?} to /{file}; the kernel's log may say more (dmesg)"))
}

fn check_driver(root: &Path, function: PciAddress, wanted: Option<&str>, tried: &'static str) -> Result<()> {
    let found = driver(&root.join(DEVICES).join(function.to_string()));
    if found.as_deref() == wanted {
        return Ok(());
    }
    let name = |driver: Option<&str>| driver.unwrap_or("no driver").to_owned();
    let why = format!("it is bound to {}, not to {}", name(found.as_deref()), name(wanted));
    Err(Error::new(Kind::Os, tried, why).on(function).next("the kernel's log says why (dmesg)"))
}

/// Refuses what nobody would borrow memory of.
fn check_lends(function: &Function) -> Result<()> {
    function.check_answers(TRIED)?;
    let Some(why) = nothing_to_lend(function) else { return Ok(()) };
    let next = "peervram devices lists what can lend";
    Err(Error::new(Kind::Unsupported, TRIED, why).on(function.address).next(next))
}

/// The other functions of its group whose drivers keep user space out.
fn neighbours(root: &Path, device: PciAddress) -> Vec<Function> {
    let folder = root.join(DEVICES).join(device.to_string()).join("iommu_group/devices");
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut addresses: Vec<PciAddress> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    addresses.sort_unstable();
    let functions = addresses.into_iter().filter(|address| *address != device);
    let functions = functions.filter_map(|address| Function::read_from(&root.join(DEVICES), address).ok());
    functions.filter(|function| function.driver.as_deref().is_some_and(blocks_its_group)).collect()
}

fn check_unused(taken: &[Function], device: PciAddress, in_use: &InUse, consent: Consent) -> Result<()> {
    let is_meant = |used: &Use| !(consent.screen && used.is_screen());
    let mut uses: Vec<Use> = Vec::new();
    let mut lines = Vec::new();
    for function in taken {
        let of_it: Vec<Use> = in_use.of(function.address).into_iter().filter(is_meant).collect();
        if !of_it.is_empty() {
            lines.push(format!("of {}: {}", named(function), words(&of_it)));
        }
        uses.extend(of_it);
    }
    if uses.is_empty() {
        return Ok(());
    }
    let why = format!("the machine needs it, or one of its IOMMU group. {}", lines.join("; "));
    let next = if uses.iter().all(Use::is_screen) {
        "if nobody looks at that screen: --give-up-screen"
    } else if taken.iter().any(|function| function.address != device) {
        "free what is named first; a device of another slot is got rid of by moving the card to another slot"
    } else {
        "free what is named first"
    };
    Err(Error::new(Kind::Busy, TRIED, why).on(device).next(next))
}

fn check_neighbours(taken: &[Function], device: PciAddress, group: u32, consent: Consent) -> Result<()> {
    let is_of_card = |other: PciAddress| {
        (other.domain, other.bus, other.device) == (device.domain, device.bus, device.device)
    };
    let others: Vec<&Function> = taken.iter().filter(|function| !is_of_card(function.address)).collect();
    let list = |functions: &[&Function]| {
        functions.iter().map(|function| named(function)).collect::<Vec<_>>().join(", ")
    };
    let bridges: Vec<&Function> = (taken.iter())
        .filter(|function| function.address != device && function.class >> 16 == 0x06)
        .collect();
    // `vfio_pci_core_register_device` in drivers/vfio/pci/vfio_pci_core.c takes no bridge.
    if !bridges.is_empty() {
        let why = format!("its IOMMU group {group} has bridges that VFIO does not take: {}", list(&bridges));
        let next = "put the card into another slot";
        return Err(Error::new(Kind::GroupNotViable, TRIED, why).on(device).next(next));
    }
    if others.is_empty() || consent.group {
        return Ok(());
    }
    let why = format!(
        "its IOMMU group {group} has devices of other slots, which would lose their drivers: {}",
        list(&others)
    );
    let next = "put the card into another slot; or, if nothing needs them, add --group";
    Err(Error::new(Kind::GroupNotViable, TRIED, why).on(device).next(next))
}

/// "0000:01:00.0 (amdgpu)".
fn named(function: &Function) -> String {
    format!("{} ({})", function.address, function.driver.as_deref().unwrap_or("no driver"))
}
