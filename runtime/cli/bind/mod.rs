//! `peervram bind` and `peervram unbind`: give a device to VFIO, and give it back.

mod binding;
#[cfg(test)]
mod tests;

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Args;
use peervram::backends::PciAddress;
use peervram::backends::holders::{Census, Holder};
use peervram::{Error, Kind, Result};
use serde::Serialize;

use self::binding::{Before, Binding, Consent, Kernel, TRIED_UNDO, Write};
use super::ending::print_json;
use super::in_use::InUse;

/// Take a device from its driver and bind it to VFIO, so that it can lend its memory.
///
/// Refuses what is no GPU and has no memory to lend, and whatever the machine needs: a controller with a mounted
/// file system or swap below it, a network card that has a route, the console's serial port or screen, a GPU whose
/// node a program has open. The same of the other functions of its IOMMU group, which have to leave their drivers,
/// too; each is named. What it was bound to is written down, and `peervram unbind` brings exactly that back.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram bind 01:00.0 --dry-run      what it would do, and what stands in the way; anybody may ask\n  \
    sudo peervram bind 01:00.0           do it; vfio-pci, or nvgrace_gpu_vfio_pci for a Grace GPU\n  \
    sudo peervram unbind 01:00.0         undo it\n\n\
It lasts until the machine is started again. Exit codes: 0 bound, or it was already; 1 refused because the machine\n\
needs it, or the kernel would not; 2 wrong usage; 4 this device, or this user, cannot.")]
pub struct BindArguments {
    /// The device's PCI address.
    device: PciAddress,

    /// Say what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,

    /// Take devices of other slots along, where they share its IOMMU group.
    #[arg(long)]
    group: bool,

    /// Take it though the firmware's or the text console's screen is on it: nothing is shown there any more.
    #[arg(long)]
    give_up_screen: bool,
}

/// Give a device that `peervram bind` took back to the driver it had, and those that went along with it.
///
/// Refuses while somebody has it open: the kernel would wait for them without a limit.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram unbind 01:00.0 --dry-run    what it would bring back\n  \
    sudo peervram unbind 01:00.0         do it\n\n\
Exit codes: 0 as it was before; 1 nothing is written down of it, somebody has it open, or the kernel would not;\n\
2 wrong usage; 4 this user cannot.")]
pub struct UnbindArguments {
    /// The device's PCI address.
    device: PciAddress,

    /// Say what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Report {
    device: PciAddress,
    /// Whether anything was changed.
    done: bool,
    functions: Vec<FunctionReport>,
    /// What binding writes, and where.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    writes: Vec<Write>,
    /// What undoes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    undo: Option<String>,
    /// What could not be seen, with the reason: something may hang on it all the same.
    unread: Vec<String>,
}

#[derive(Serialize)]
struct FunctionReport {
    address: PciAddress,
    from: Option<String>,
    to: Option<String>,
}

pub fn bind(arguments: &BindArguments, json: bool) -> anyhow::Result<ExitCode> {
    const TRIED: &str = "bind a device to VFIO";
    let root = Path::new("/");
    let in_use = InUse::read(root);
    let consent = Consent { group: arguments.group, screen: arguments.give_up_screen };
    let binding = Binding::plan(root, arguments.device, &in_use, consent)?;
    let is_done = !arguments.dry_run && !binding.before.is_empty();
    if is_done {
        check_root(TRIED, "bind", arguments.device)?;
        if let [first, ..] = in_use.unread() {
            let why = format!("not seen: {first}. Something of the machine may hang on it");
            return Err(Error::new(Kind::PermissionDenied, TRIED, why).on(arguments.device).into());
        }
        binding.make(root, &mut Sysfs(root))?;
    }
    let function = |before: &Before| FunctionReport {
        address: before.function,
        from: before.driver.clone(),
        to: Some(binding.driver_of(before.function).to_owned()),
    };
    let report = Report {
        device: arguments.device,
        done: is_done,
        functions: binding.before.iter().map(function).collect(),
        writes: binding.writes(),
        undo: (!binding.before.is_empty()).then(|| format!("sudo peervram unbind {}", arguments.device)),
        unread: in_use.unread().to_vec(),
    };
    finish(&report, json, "is bound to a VFIO driver already, and nothing keeps its group")
}

pub fn unbind(arguments: &UnbindArguments, json: bool) -> anyhow::Result<ExitCode> {
    let root = Path::new("/");
    if !arguments.dry_run {
        check_root(TRIED_UNDO, "unbind", arguments.device)?;
    }
    let binding = Binding::recorded(root, arguments.device)?;
    let census = Census::take();
    for before in &binding.before {
        check_unheld(&census, before.function)?;
    }
    if !arguments.dry_run {
        binding.undo(root, &mut Sysfs(root))?;
    }
    let function = |before: &Before| FunctionReport {
        address: before.function,
        from: before
            .function
            .driver()
            .filter(|_| arguments.dry_run)
            .or_else(|| Some(binding.driver_of(before.function).to_owned())),
        to: before.driver.clone(),
    };
    let report = Report {
        device: arguments.device,
        done: !arguments.dry_run,
        functions: binding.before.iter().map(function).collect(),
        writes: Vec::new(),
        undo: None,
        unread: Vec::new(),
    };
    finish(&report, json, "is as it was")
}

/// Refuses what a process has open: of an open device the kernel would wait for the process, and of an open group
/// it would refuse the driver, with the device bound to none.
fn check_unheld(census: &Census, function: PciAddress) -> Result<()> {
    let Some(device) = census.device(function) else { return Ok(()) };
    let (holders, why) = match &device.holders[..] {
        [] => (
            &device.group_holders[..],
            "has its IOMMU group open, and the kernel gives no driver a device of it",
        ),
        holders if !holders.iter().any(Holder::is_certain) => (holders, "has it open, or another device"),
        holders => (holders, "has it open, and the kernel would wait for that"),
    };
    if holders.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = holders.iter().map(|holder| holder.process.to_string()).collect();
    let next = "end what has it open, then try again; peervram holders says more";
    let why = format!("{} {why}", names.join(", "));
    Err(Error::new(Kind::Busy, TRIED_UNDO, why).on(function).next(next))
}

fn check_root(tried: &'static str, command: &str, device: PciAddress) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let next = format!("sudo peervram {command} {device}; with --dry-run anybody may ask what it would do");
    Err(Error::new(Kind::PermissionDenied, tried, "only root may").on(device).next(next))
}

fn finish(report: &Report, json: bool, nothing: &str) -> anyhow::Result<ExitCode> {
    if json {
        print_json(report)?;
    } else {
        print(report, nothing, &mut peervram_programs::output())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print(report: &Report, nothing: &str, output: &mut impl io::Write) -> io::Result<()> {
    let name = |driver: &Option<String>| driver.clone().unwrap_or_else(|| "no driver".into());
    if report.functions.is_empty() {
        writeln!(output, "{} {nothing}", report.device)?;
    }
    for FunctionReport { address, from, to } in &report.functions {
        let along = if *address == report.device { "" } else { ", of its IOMMU group," };
        let (from, to) = (name(from), name(to));
        match report.done {
            true => writeln!(output, "{address}{along} was bound to {from} and is bound to {to} now")?,
            false => writeln!(output, "{address}{along} is bound to {from} and would be bound to {to}")?,
        }
    }
    if !report.done {
        for Write { file, text } in &report.writes {
            writeln!(output, "  write {text} to /{}", file.display())?;
        }
    }
    for unread in &report.unread {
        writeln!(output, "not seen: {unread}")?;
    }
    if let Some(undo) = &report.undo {
        writeln!(output, "{undo} undoes it")?;
    }
    Ok(())
}

/// The kernel of this machine.
struct Sysfs<'a>(&'a Path);

impl Kernel for Sysfs<'_> {
    fn load(&mut self, module: &str) -> Result<()> {
        let tried = format!("load the module {module}");
        let output = Command::new("modprobe")
            .arg(module)
            .output()
            .map_err(|error| Error::os(tried.clone(), error).next("modprobe is part of kmod"))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::new(Kind::Unsupported, tried, format!("modprobe says {said:?}"))
            .next("the kernel needs VFIO_PCI; peervram doctor says whether it has it"))
    }

    fn write(&mut self, write: &Write) -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).open(self.0.join(&write.file))?;
        // One write: sysfs takes each for a whole value.
        file.write_all(write.text.as_bytes())
    }
}
