//! `peervram holders`: who holds a VFIO device and its dma-bufs, and so whom a reset would wait for.
//!
//! Reads /proc and debugfs and nothing else: no device is opened, because opening a VFIO device resets it.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use peervram::backends::PciAddress;
use peervram::backends::holders::{Attached, Buffer, Census, Device, Exporter, Holder, Unread};
use peervram::backends::pci::{Function, is_vfio_driver};
use peervram::{Error, Kind, Result};
use peervram_programs::{Table, bytes, columns, lines};
use serde::Serialize;

use super::ending::print_json;

/// Say who holds a VFIO device and the dma-bufs of its memory.
///
/// A reset, switching memory off and closing the device wait until every importer has unmapped, without
/// a limit and without saying for whom. This names them: the dma-bufs, the devices attached to them, the
/// processes with a descriptor of them, and those that have the node of an attached device open, one of
/// which holds the import.
///
/// Root sees everything. Anybody else sees their own processes and is told what is missing. Do not run it
/// while a reset hangs on work that never ends: reading debugfs may then hang as well.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sudo peervram holders 01:00.0          before a reset, or when one does not return\n  \
    sudo peervram holders                  every device that is bound to VFIO\n  \
    sudo peervram holders 01:00.0 --json   for scripts: .devices[0].reset_waits_for\n\n\
A dma-buf marked ? has no name and may be of another device. \"references\" counts what holds it in the\n\
kernel, too: more of them than processes named are imports, or descriptors in a socket's queue.")]
pub struct Arguments {
    /// The device, by PCI address. Without it, every device that is bound to VFIO.
    device: Option<PciAddress>,

    /// Every device that is bound to VFIO.
    #[arg(long, conflicts_with = "device")]
    all: bool,
}

#[derive(Serialize)]
struct Report {
    devices: Vec<DeviceReport>,
    unread: Vec<UnreadReport>,
}

#[derive(Serialize)]
struct DeviceReport {
    address: String,
    driver: Option<String>,
    held_by: Vec<HolderReport>,
    /// Who has its IOMMU group open: no driver of the kernel gets it meanwhile.
    group_held_by: Vec<HolderReport>,
    dma_bufs: Vec<BufferReport>,
    /// Nothing where the attached devices are not known, or not those of every dma-buf.
    reset_waits_for: Option<Vec<ImporterReport>>,
}

#[derive(Serialize)]
struct BufferReport {
    inode: u64,
    size_bytes: u64,
    name: Option<String>,
    exporter: String,
    /// False where it may be of another device.
    is_certain: bool,
    attached: Option<Vec<String>>,
    references: u64,
    held_by: Vec<HolderReport>,
}

#[derive(Serialize)]
struct ImporterReport {
    device: String,
    dma_bufs: Vec<u64>,
    /// Processes that have a node of it open; one of them holds the import.
    candidates: Vec<CandidateReport>,
}

#[derive(Serialize)]
struct CandidateReport {
    node: String,
    pid: u32,
    comm: String,
}

#[derive(Serialize)]
struct HolderReport {
    pid: u32,
    comm: String,
    descriptors: Vec<u32>,
    possible_descriptors: Vec<u32>,
    mappings: usize,
    possible_mappings: usize,
}

#[derive(Serialize)]
struct UnreadReport {
    what: String,
    why: String,
    next: String,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    // Before the census, so that a typing error is answered at once.
    let asked = arguments.device.map(|address| Function::read(address).map(|_| address)).transpose()?;
    let census = Census::take();
    let devices = match asked {
        Some(address) => vec![device_report(&census, held_or_bound(&census, address)?)],
        None => census.devices.iter().map(|device| device_report(&census, device)).collect(),
    };
    let report = Report { devices, unread: census.unread.iter().map(UnreadReport::from).collect() };
    if json {
        print_json(&report)?;
    } else {
        print(&report, &mut peervram_programs::output(), columns())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A device that is being unbound has no driver any more and waits for those who have it open.
fn held_or_bound(census: &Census, address: PciAddress) -> Result<&Device> {
    let driver = address.driver();
    let is_bound = driver.as_deref().is_some_and(is_vfio_driver);
    census.device(address).filter(|device| is_bound || !device.holders.is_empty()).ok_or_else(|| {
        let why = match driver {
            Some(driver) => format!("it is bound to {driver}, which lends nothing"),
            None => "it is bound to no driver".to_owned(),
        };
        Error::new(Kind::NotBoundToVfio, "say who holds a VFIO device", why)
            .on(address)
            .next("peervram holders, without an address, lists the devices that are bound to VFIO")
    })
}

fn device_report(census: &Census, device: &Device) -> DeviceReport {
    let buffers: Vec<&Buffer> = census.buffers_of(device.address).collect();
    DeviceReport {
        address: device.address.to_string(),
        driver: device.address.driver(),
        held_by: device.holders.iter().map(HolderReport::from).collect(),
        group_held_by: device.group_holders.iter().map(HolderReport::from).collect(),
        dma_bufs: buffers.iter().map(|buffer| BufferReport::from(*buffer)).collect(),
        reset_waits_for: importers(census, &buffers),
    }
}

/// The devices attached to these buffers, and who may have done it.
fn importers(census: &Census, buffers: &[&Buffer]) -> Option<Vec<ImporterReport>> {
    if !census.has_bufinfo {
        return None;
    }
    let mut inodes: BTreeMap<&Attached, Vec<u64>> = BTreeMap::new();
    for buffer in buffers {
        for device in buffer.attached.as_ref()? {
            let inodes = inodes.entry(device).or_default();
            // A device that is attached twice is one to wait for.
            if inodes.last() != Some(&buffer.inode) {
                inodes.push(buffer.inode);
            }
        }
    }
    let importer = |(device, dma_bufs): (&Attached, Vec<u64>)| {
        let candidates = census.nodes_of(device).flat_map(|node| {
            node.holders.iter().map(|holder| CandidateReport {
                node: node.path.clone(),
                pid: holder.process.pid,
                comm: holder.process.comm.clone(),
            })
        });
        ImporterReport { device: device.to_string(), dma_bufs, candidates: candidates.collect() }
    };
    Some(inodes.into_iter().map(importer).collect())
}

impl From<&Buffer> for BufferReport {
    fn from(buffer: &Buffer) -> Self {
        Self {
            inode: buffer.inode,
            size_bytes: buffer.size_bytes,
            name: buffer.name.clone(),
            exporter: buffer.exporter_name.clone(),
            is_certain: matches!(buffer.exporter, Exporter::Known(_)),
            attached: buffer.attached.as_ref().map(|list| list.iter().map(ToString::to_string).collect()),
            references: buffer.references,
            held_by: buffer.holders.iter().map(HolderReport::from).collect(),
        }
    }
}

impl From<&Holder> for HolderReport {
    fn from(holder: &Holder) -> Self {
        Self {
            pid: holder.process.pid,
            comm: holder.process.comm.clone(),
            descriptors: holder.descriptors.clone(),
            possible_descriptors: holder.possible_descriptors.clone(),
            mappings: holder.mappings,
            possible_mappings: holder.possible_mappings,
        }
    }
}

impl From<&Unread> for UnreadReport {
    fn from(unread: &Unread) -> Self {
        Self { what: unread.what.clone(), why: unread.why.clone(), next: unread.next.clone() }
    }
}

fn print(report: &Report, output: &mut impl Write, width: usize) -> io::Result<()> {
    if report.devices.is_empty() {
        writeln!(output, "No device is bound to VFIO; peervram devices says what could be.")?;
    }
    for device in &report.devices {
        print_device(device, output, width)?;
        writeln!(output)?;
    }
    if !report.unread.is_empty() {
        writeln!(output, "Not seen:")?;
        for unread in &report.unread {
            for (number, line) in
                lines(&format!("{}: {}", unread.what, unread.why), width - 4).iter().enumerate()
            {
                writeln!(output, "{}{line}", if number == 0 { "  " } else { "    " })?;
            }
            for (number, line) in lines(&unread.next, width - 10).iter().enumerate() {
                writeln!(output, "{}{line}", if number == 0 { "    next: " } else { "          " })?;
            }
        }
    }
    Ok(())
}

fn print_device(device: &DeviceReport, output: &mut impl Write, width: usize) -> io::Result<()> {
    match &device.driver {
        Some(driver) => writeln!(output, "{}, bound to {driver}", device.address)?,
        None => writeln!(output, "{}, being unbound", device.address)?,
    }
    match &device.held_by[..] {
        [] => writeln!(output, "  held by    nobody seen")?,
        holders => {
            holders.iter().try_for_each(|holder| writeln!(output, "  held by    {}", words(holder)))?
        }
    }
    for holder in &device.group_held_by {
        writeln!(output, "  its group  is open in {}", words(holder))?;
    }
    if device.dma_bufs.is_empty() {
        writeln!(output, "  dma-bufs   none seen")?;
    } else {
        let mut table = Table::new(&["dma-buf", "size", "references", "attached", "held by"]);
        for buffer in &device.dma_bufs {
            let mark = if buffer.is_certain { "" } else { " ?" };
            table.row([
                format!("{}{mark}", buffer.inode),
                bytes::in_words(buffer.size_bytes),
                buffer.references.to_string(),
                match &buffer.attached {
                    None => "unknown".to_owned(),
                    Some(devices) => list(devices.iter().map(|device| printable(device))),
                },
                list(buffer.held_by.iter().map(words)),
            ]);
        }
        writeln!(output)?;
        table.print(output, width)?;
        writeln!(output)?;
    }
    match &device.reset_waits_for {
        None => writeln!(output, "  a reset waits for  unknown: the attached devices are not seen"),
        Some(importers) if importers.is_empty() => {
            writeln!(output, "  a reset waits for  nobody: no device is attached")
        }
        Some(importers) => importers.iter().try_for_each(|importer| {
            let inodes = list(importer.dma_bufs.iter().map(ToString::to_string));
            writeln!(output, "  a reset waits for  {} to unmap {inodes}", printable(&importer.device))?;
            if importer.candidates.is_empty() {
                return writeln!(output, "    imported by nobody seen");
            }
            importer.candidates.iter().try_for_each(|candidate| {
                let CandidateReport { node, pid, comm } = candidate;
                writeln!(output, "    imported perhaps by {pid} {} through {node}", printable(comm))
            })
        }),
    }
}

/// "412 lender (fd 5, 6; 2 mappings)".
fn words(holder: &HolderReport) -> String {
    let mut how = Vec::new();
    for (numbers, what) in [(&holder.descriptors, "fd"), (&holder.possible_descriptors, "perhaps fd")] {
        if !numbers.is_empty() {
            how.push(format!("{what} {}", list(numbers.iter().map(ToString::to_string))));
        }
    }
    for (count, what) in [(holder.mappings, "mapping"), (holder.possible_mappings, "possible mapping")] {
        match count {
            0 => {}
            1 => how.push(format!("1 {what}")),
            _ => how.push(format!("{count} {what}s")),
        }
    }
    format!("{} {} ({})", holder.pid, printable(&holder.comm), how.join("; "))
}

/// "a, b", or a dash for none.
fn list(items: impl Iterator<Item = String>) -> String {
    let items: Vec<_> = items.collect();
    if items.is_empty() { "-".to_owned() } else { items.join(", ") }
}

/// Names that processes choose may hold line breaks and escape sequences.
fn printable(name: &str) -> String {
    name.escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use peervram::backends::holders::{Node, Process};

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    fn holder(pid: u32, comm: &str, descriptors: &[u32], mappings: usize) -> Holder {
        let process = Process { pid, comm: comm.into() };
        let descriptors = descriptors.to_vec();
        Holder { process, descriptors, possible_descriptors: Vec::new(), mappings, possible_mappings: 0 }
    }

    fn census(attached: Option<Vec<Attached>>) -> Census {
        let lender = address("0000:01:00.0");
        let buffer = |inode, exporter| Buffer {
            inode,
            size_bytes: 16 << 20,
            exporter_name: "vfio_pci_core".into(),
            name: None,
            exporter,
            attached: attached.clone(),
            references: 3,
            holders: vec![holder(12, "len\nder", &[6, 7], 0)],
        };
        Census {
            has_bufinfo: attached.is_some(),
            buffers: vec![
                buffer(7, Exporter::Known(lender)),
                buffer(8, Exporter::OneOf(vec![lender])),
                buffer(9, Exporter::NotVfio),
            ],
            devices: vec![Device {
                address: lender,
                holders: vec![holder(12, "len\nder", &[5], 2)],
                group_holders: vec![holder(13, "vmm", &[4], 0)],
            }],
            nodes: vec![Node {
                path: "/dev/dri/renderD128".into(),
                attaches_as: Attached::Pci(address("0000:02:00.0")),
                holders: vec![holder(14, "importer", &[3], 0)],
            }],
            unread: vec![Unread { what: "mice".into(), why: "too quick".into(), next: "a cat".into() }],
        }
    }

    fn text(census: &Census) -> String {
        let devices = census.devices.iter().map(|device| device_report(census, device)).collect();
        let report = Report { devices, unread: census.unread.iter().map(UnreadReport::from).collect() };
        let mut output = Vec::new();
        print(&report, &mut output, 100).unwrap();
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn it_names_processes_buffers_and_whom_a_reset_waits_for() {
        let importer = Attached::Pci(address("0000:02:00.0"));
        let text = text(&census(Some(vec![importer.clone(), importer])));
        for expected in [
            "held by    12 len\\nder (fd 5; 2 mappings)",
            "its group  is open in 13 vmm (fd 4)",
            "7        16 MiB  3           0000:02:00.0, 0000:02:00.0  12 len\\nder (fd 6, 7)",
            "8 ?",
            "a reset waits for  0000:02:00.0 to unmap 7, 8\n",
            "imported perhaps by 14 importer through /dev/dri/renderD128",
            "mice: too quick\n    next: a cat",
        ] {
            assert!(text.contains(expected), "no {expected:?} in\n{text}");
        }
        assert!(!text.contains("\n9 "), "of no VFIO device:\n{text}");
    }

    #[test]
    fn what_is_not_known_is_not_nobody() {
        let mut census_without = census(None);
        for _with_buffers_then_without in 0..2 {
            let unknown = text(&census_without);
            assert!(unknown.contains("a reset waits for  unknown"), "{unknown}");
            census_without.buffers.clear();
        }
        let none = text(&census(Some(Vec::new())));
        assert!(none.contains("a reset waits for  nobody"), "{none}");
        assert!(text(&Census::default()).contains("No device is bound"));
    }
}
