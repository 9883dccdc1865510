//! Which processes and devices hold dma-bufs, and which VFIO devices those dma-bufs belong to.
//!
//! A VFIO device that is reset waits until everyone who has mapped its memory has let go, and tells
//! nobody whom it waits for. A [`Census`] names them, out of `/proc` and debugfs:
//! - a dma-buf, the devices attached to it, and the processes with a descriptor or mapping of it;
//! - a VFIO device, and the processes that have it open or mapped: either keeps it open;
//! - the processes that have a device's IOMMU group open: no driver of the kernel gets the device meanwhile;
//! - the processes that have the node of an attached device open. An import is a handle of that
//!   node (a GEM handle), which holds the buffer without a descriptor: one of them has it.
//!
//! Order of calls: [`Census::take`], and while a revoke may be in flight
//! [`Census::take_during_revoke`]. What could not be read is in [`Census::unread`]: a census is never
//! incomplete in silence.
//!
//! Absent on purpose: which handle of which process holds an import (the kernel does not tell),
//! descriptors that are on their way through a socket, and threads that have a table of descriptors of
//! their own. A buffer's [`references`](Buffer::references) beyond what is named hint at them. Nothing
//! here opens a device, changes anything, or needs a privilege; root sees more.

mod bufinfo;
mod descriptor;
mod proc_fs;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use proc_fs::{Files, Held, ProcFs};

use crate::PciAddress;
use crate::pci::is_vfio_driver;

/// How an exporter names its dma-bufs (`DMA_BUF_SET_NAME`): `peervram 0000:01:00.0`.
const NAME_PREFIX: &str = "peervram ";

/// Who holds what, at the time it was taken.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census {
    /// Every dma-buf that was seen, of whatever exporter, in order of inode.
    pub buffers: Vec<Buffer>,
    /// Every VFIO device: a PCI function that is bound to a VFIO driver, or that somebody has open.
    pub devices: Vec<Device>,
    /// Nodes of devices that import, those that somebody has open.
    pub nodes: Vec<Node>,
    /// Whether bufinfo was read: otherwise there may be more buffers, and what is attached is unknown.
    pub has_bufinfo: bool,
    /// What could not be read, and why.
    pub unread: Vec<Unread>,
}

/// A dma-buf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    /// Its inode number, by which [`DmaBuf::inode`](crate::DmaBuf::inode) knows it.
    pub inode: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The kernel module that exports it: `vfio_pci_core`, `udmabuf`.
    pub exporter_name: String,
    /// The name that its owner gave it.
    pub name: Option<String>,
    /// Whose memory it is.
    pub exporter: Exporter,
    /// The devices attached to it; nothing where bufinfo was not read, or is older than the buffer.
    /// Attached is not mapped: a reset waits for those that have it mapped and do not let go.
    pub attached: Option<Vec<Attached>>,
    /// How many references the kernel counts: descriptors, mappings, imports, messages in sockets.
    pub references: u64,
    /// The processes that have a descriptor or a mapping of it.
    pub holders: Vec<Holder>,
}

/// Whose memory a dma-buf is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exporter {
    /// This device's, by the name of the buffer.
    Known(PciAddress),
    /// One of these VFIO devices': the kernel does not say of which. They are those that a process with a
    /// descriptor of the buffer has open. If there are none such, they are every open one, or every one at
    /// all where not everything could be read. A guess: an owner may have passed its only descriptor on to
    /// another owner.
    OneOf(Vec<PciAddress>),
    /// The dma-buf belongs to no VFIO device.
    NotVfio,
}

impl Exporter {
    /// Whether it is, or may be, this device.
    pub fn may_be(&self, address: PciAddress) -> bool {
        match self {
            Self::Known(known) => *known == address,
            Self::OneOf(candidates) => candidates.contains(&address),
            Self::NotVfio => false,
        }
    }
}

/// A device that is attached to a dma-buf.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attached {
    /// A PCI function.
    Pci(PciAddress),
    /// Anything else, as the kernel calls it: `iommu` is an iommufd, for the DMA of VFIO devices.
    Other(String),
}

impl Attached {
    fn named(name: &str) -> Self {
        match descriptor::function_named(name) {
            Some(address) => Self::Pci(address),
            None => Self::Other(name.to_owned()),
        }
    }

    /// What iommufd attaches as (`iommufd_global_device`).
    fn iommufd() -> Self {
        Self::Other("iommu".into())
    }
}

impl fmt::Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Other(name) => f.write_str(name),
        }
    }
}

/// A VFIO device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its address.
    pub address: PciAddress,
    /// The processes that have it open or mapped.
    pub holders: Vec<Holder>,
    /// The processes that have its IOMMU group open (`/dev/vfio/26`). Such a process owns the DMA of the whole
    /// group: drivers of the kernel are refused its devices with EBUSY (`iommu_device_use_default_domain` in
    /// drivers/iommu/iommu.c).
    pub group_holders: Vec<Holder>,
}

/// A node through which processes import: `/dev/dri/renderD128`, `/dev/iommu`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its path.
    pub path: String,
    /// What it attaches to a dma-buf as.
    pub attaches_as: Attached,
    /// The processes that have it open.
    pub holders: Vec<Holder>,
}

/// A process, and how it holds something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Which process.
    pub process: Process,
    /// The numbers of its descriptors.
    pub descriptors: Vec<u32>,
    /// The numbers of those that may be of this device or of another: of a device that was opened through its
    /// group, Linux 6.12 does not say.
    pub possible_descriptors: Vec<u32>,
    /// How many mappings it has.
    pub mappings: usize,
    /// How many more mappings may be of this device or of another: of a device that was opened through
    /// its group, the kernel does not say.
    pub possible_mappings: usize,
}

impl Holder {
    /// Whether the kernel says that it is this device's or buffer's, and not perhaps another's.
    pub fn is_certain(&self) -> bool {
        !self.descriptors.is_empty() || self.mappings > 0
    }
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its name, which it may choose (`/proc/PID/comm`).
    pub comm: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.comm.escape_debug())
    }
}

/// Something that a census could not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unread {
    /// What is missing.
    pub what: String,
    /// Why.
    pub why: String,
    /// What to do about it.
    pub next: String,
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.what, self.why, self.next)
    }
}

/// Which dma-bufs there are and which devices are attached to them, and nothing else: bufinfo alone, which is read before
/// every revoke. Kept as the kernel wrote it, because hardly ever somebody asks.
#[derive(Debug, Clone, Default)]
pub struct Attachments(String);

impl Attachments {
    /// A census of this moment. Blocks as [`Census::take`] can.
    ///
    /// # Errors
    /// Why bufinfo cannot be read.
    pub fn read() -> Result<Self, Unread> {
        ProcFs::at(Path::new("/")).bufinfo().map(Self)
    }

    /// Whether the buffer of that inode exists. Whoever may make dma-bufs can add rows to the list that are none, and take
    /// none away: a buffer that is not listed was freed.
    pub fn has_buffer(&self, inode: u64) -> bool {
        bufinfo::parse(&self.0).iter().any(|row| row.inode == inode)
    }

    /// The devices attached to the buffers of those inodes.
    pub fn to(&self, inodes: &[u64]) -> Vec<Attached> {
        let rows = bufinfo::parse(&self.0);
        let of_them = rows.into_iter().filter(|row| inodes.contains(&row.inode));
        let mut attached: Vec<Attached> = of_them.flat_map(|row| row.attached).collect();
        attached.sort();
        attached.dedup();
        attached
    }
}

impl Census {
    /// Looks at every process, and at bufinfo.
    ///
    /// Can block: bufinfo takes the reservation lock of every dma-buf of the machine, with the list of all
    /// of them locked, and the mappings of a process are behind a lock of its memory. Whoever holds one of
    /// them while a device is revoked holds the reader up, too.
    pub fn take() -> Self {
        Self::of(&ProcFs::at(Path::new("/")), true)
    }

    /// As [`take`](Census::take), with nothing that can wait for a revoke: neither bufinfo, and so no
    /// attached devices, nor mappings. [`unread`](Census::unread) says so.
    pub fn take_during_revoke() -> Self {
        Self::of(&ProcFs::at(Path::new("/")), false)
    }

    /// The dma-bufs that are, or may be, of this device's memory.
    pub fn buffers_of(&self, address: PciAddress) -> impl Iterator<Item = &Buffer> {
        self.buffers.iter().filter(move |buffer| buffer.exporter.may_be(address))
    }

    /// The VFIO device at that address.
    pub fn device(&self, address: PciAddress) -> Option<&Device> {
        self.devices.iter().find(|device| device.address == address)
    }

    /// The open nodes of an attached device: one of their processes holds the import.
    pub fn nodes_of(&self, attached: &Attached) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |node| node.attaches_as == *attached)
    }

    fn of(files: &ProcFs, with_everything: bool) -> Self {
        let mut unread = Vec::new();
        let rows = if with_everything {
            files.bufinfo()
        } else {
            Err(Unread {
                what: "the devices attached to dma-bufs, and dma-bufs that no process has a descriptor of"
                    .into(),
                why: "left out, because reading bufinfo can wait for the revoke".into(),
                next: "look again when it is over".into(),
            })
        };
        let rows = rows.map(|text| bufinfo::parse(&text)).map_err(|gap| unread.push(gap)).ok();
        let functions = files.vfio_functions();
        let processes = files.processes(with_everything, &mut unread);

        let mut buffers: BTreeMap<u64, Buffer> = BTreeMap::new();
        for row in rows.iter().flatten().cloned() {
            let buffer = Buffer {
                inode: row.inode,
                size_bytes: row.size_bytes,
                exporter_name: row.exporter_name,
                name: row.name,
                exporter: Exporter::NotVfio,
                attached: Some(row.attached),
                references: row.references,
                holders: Vec::new(),
            };
            buffers.insert(row.inode, buffer);
        }
        let mut devices: BTreeMap<PciAddress, Vec<Holder>> =
            functions.iter().map(|&address| (address, Vec::new())).collect();
        let mut group_holders: BTreeMap<PciAddress, Vec<Holder>> = BTreeMap::new();
        let mut nodes: BTreeMap<String, Node> = BTreeMap::new();
        for Files { process, descriptors, mappings } in &processes {
            let candidates = candidates(descriptors, &functions);
            for (number, held) in descriptors {
                let holders = match held {
                    Held::Buffer(info) => {
                        let new = || Buffer {
                            inode: info.inode,
                            size_bytes: info.size_bytes,
                            exporter_name: info.exporter_name.clone(),
                            name: info.name.clone(),
                            exporter: Exporter::NotVfio,
                            attached: None,
                            references: info.references,
                            holders: Vec::new(),
                        };
                        &mut buffers.entry(info.inode).or_insert_with(new).holders
                    }
                    Held::Device(address) => devices.entry(*address).or_default(),
                    Held::DrmNode(name) => match files.drm_device(name) {
                        Some(device) => node(&mut nodes, format!("/dev/dri/{name}"), device),
                        // Unplugged meanwhile: what it attached went with it.
                        None => continue,
                    },
                    Held::Iommufd => node(&mut nodes, "/dev/iommu".into(), Attached::iommufd()),
                    Held::Group(functions) => {
                        for address in functions {
                            let holders = group_holders.entry(*address).or_default();
                            holder(holders, process).descriptors.push(*number);
                        }
                        continue;
                    }
                    Held::SomeDevice => {
                        for address in &candidates {
                            let holder = holder(devices.entry(*address).or_default(), process);
                            match candidates.len() {
                                1 => holder.descriptors.push(*number),
                                _ => holder.possible_descriptors.push(*number),
                            }
                        }
                        continue;
                    }
                    Held::BufferInode(_) => continue,
                };
                holder(holders, process).descriptors.push(*number);
            }
            for held in mappings {
                match held {
                    Held::BufferInode(inode) => {
                        if let Some(buffer) = buffers.get_mut(inode) {
                            holder(&mut buffer.holders, process).mappings += 1;
                        }
                    }
                    Held::Device(address) => {
                        holder(devices.entry(*address).or_default(), process).mappings += 1;
                    }
                    Held::SomeDevice => {
                        for address in &candidates {
                            let holder = holder(devices.entry(*address).or_default(), process);
                            match candidates.len() {
                                1 => holder.mappings += 1,
                                _ => holder.possible_mappings += 1,
                            }
                        }
                    }
                    _ => {}
                }
            }
        }

        // Where a process could not be looked at, any device may be open in it.
        let is_complete = unread.is_empty();
        let others: Vec<PciAddress> = devices
            .iter()
            .filter(|(_, holders)| !is_complete || !holders.is_empty())
            .map(|(&address, _)| address)
            .collect();
        let open_of: BTreeMap<u32, Vec<PciAddress>> =
            processes.iter().map(|files| (files.process.pid, open_devices(&files.descriptors))).collect();
        for buffer in buffers.values_mut() {
            buffer.exporter = exporter(buffer, &open_of, &others);
        }
        Self {
            buffers: buffers.into_values().collect(),
            devices: (devices.into_iter())
                .map(|(address, holders)| {
                    let group_holders = group_holders.remove(&address).unwrap_or_default();
                    Device { address, holders, group_holders }
                })
                .collect(),
            nodes: nodes.into_values().collect(),
            has_bufinfo: rows.is_some(),
            unread,
        }
    }
}

/// The devices of which a descriptor or mapping of a process may be where the kernel does not say: those that the
/// process has open, else those of the groups that it has open, else any.
fn candidates(descriptors: &[(u32, Held)], functions: &[PciAddress]) -> Vec<PciAddress> {
    let open = open_devices(descriptors);
    if !open.is_empty() {
        return open;
    }
    let groups = descriptors.iter().flat_map(|(_, held)| match held {
        Held::Group(functions) => &functions[..],
        _ => &[],
    });
    let mut of_groups: Vec<PciAddress> =
        groups.filter(|address| functions.contains(address)).copied().collect();
    of_groups.sort_unstable();
    of_groups.dedup();
    if of_groups.is_empty() { functions.to_vec() } else { of_groups }
}

/// The devices that a process has open, each once.
fn open_devices(descriptors: &[(u32, Held)]) -> Vec<PciAddress> {
    let mut open: Vec<PciAddress> = descriptors
        .iter()
        .filter_map(|(_, held)| match held {
            Held::Device(address) => Some(*address),
            _ => None,
        })
        .collect();
    open.sort_unstable();
    open.dedup();
    open
}

fn node(nodes: &mut BTreeMap<String, Node>, path: String, attaches_as: Attached) -> &mut Vec<Holder> {
    let new = || Node { path: path.clone(), attaches_as, holders: Vec::new() };
    &mut nodes.entry(path.clone()).or_insert_with(new).holders
}

/// The entry of that process, which is the last one if there is one: they come process by process.
fn holder<'holders>(holders: &'holders mut Vec<Holder>, process: &Process) -> &'holders mut Holder {
    if holders.last().is_none_or(|holder| holder.process != *process) {
        holders.push(Holder {
            process: process.clone(),
            descriptors: Vec::new(),
            possible_descriptors: Vec::new(),
            mappings: 0,
            possible_mappings: 0,
        });
    }
    let last = holders.len() - 1;
    &mut holders[last]
}

fn exporter(buffer: &Buffer, open_of: &BTreeMap<u32, Vec<PciAddress>>, others: &[PciAddress]) -> Exporter {
    // Any process may name its buffer anything, but only VFIO makes one of a VFIO device.
    if !is_vfio_driver(&buffer.exporter_name) {
        return Exporter::NotVfio;
    }
    let named = buffer.name.as_deref().and_then(|name| name.strip_prefix(NAME_PREFIX));
    if let Some(address) = named.and_then(descriptor::function_named) {
        return Exporter::Known(address);
    }
    let mut candidates: Vec<PciAddress> = buffer
        .holders
        .iter()
        .filter_map(|holder| open_of.get(&holder.process.pid))
        .flatten()
        .copied()
        .collect();
    candidates.sort_unstable();
    candidates.dedup();
    Exporter::OneOf(if candidates.is_empty() { others.to_vec() } else { candidates })
}

#[cfg(test)]
mod tests;
