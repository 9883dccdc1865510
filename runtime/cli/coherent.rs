//! What `peervram devices` says of a GPU whose memory is coherent with the CPU, besides its BARs.
//!
//! Which GPU it is and what the machine can do is in sysfs. What its regions are only the driver tells whoever
//! opens the device, which resets it; so that is asked for by name.

use std::fs;
use std::io::Write;
use std::path::Path;

use peervram::backends::PciAddress;
use peervram::backends::pci::Function;
use peervram::backends::topology::{ConfigSpace, Search};
use peervram::nvgrace::{DRIVER, Device, Memory, Part};
use peervram::{Error, Result};
use peervram_programs::bytes;
use peervram_programs::note;
use serde::Serialize;

// include/uapi/linux/pci_regs.h
const PCI_EXT_CAP_ID_ATS: u16 = 0x0f;
const PCI_ATS_CTRL: usize = 0x06;
const PCI_ATS_CTRL_ENABLE: u16 = 1 << 15;

/// The size of a configuration space on PCI Express.
const MAX_BYTES: usize = 4096;

/// What the firmware calls the memory's length, in bytes (`nvgrace_gpu_fetch_memory_property`).
const LENGTH_PROPERTY: &str = "of_node/nvidia,gpu-mem-size";

/// Where a driver of extended GPU memory lists it. Linux 7.3 has none.
const EGM_CLASS: &str = "/sys/class/egm";

#[derive(Serialize)]
pub struct CoherentReport {
    /// Which GPU it is; none where its id is in no table.
    part: Option<&'static str>,
    /// Whether the driver that shows its memory has it.
    bound: bool,
    /// Address translation: `on`, `off`, `absent`, or `unknown` without root.
    ats: &'static str,
    /// Extended GPU memory that the kernel lists.
    egm: Vec<String>,
    /// How much memory it has in bytes, as a device tree says; none where ACPI has it, which the kernel shows to its drivers alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    named_bytes: Option<u64>,
    /// What its regions are, where it was opened.
    memories: Option<Vec<MemoryReport>>,
    /// Why it shows no memory, where it was opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
}

#[derive(Serialize)]
struct MemoryReport {
    region: u32,
    used_for: &'static str,
    cpu_access: &'static str,
    length_bytes: u64,
    reported_bytes: u64,
    whole_blocks: u64,
    provider_bar: u32,
}

impl CoherentReport {
    /// None of a device that is no such GPU.
    pub fn of(function: &Function, open: bool) -> Option<Self> {
        let part = Part::of(function.vendor_id, function.device_id);
        let bound = function.driver.as_deref() == Some(DRIVER);
        if part.is_none() && !bound {
            return None;
        }
        let mut this = Self {
            part: part.map(|part| part.name),
            bound,
            // Reading would wake a device that sleeps, of which nobody knows whether its memory is on.
            ats: if function.memory_enabled.is_some() { ats_of(function) } else { "unknown" },
            egm: names(Path::new(EGM_CLASS)),
            named_bytes: named_bytes(&function.address.sysfs_path()),
            memories: None,
            why_not: None,
        };
        if bound && open {
            match Opened::of(function) {
                Ok(Opened { memories, why_not, ats }) => {
                    (this.memories, this.why_not, this.ats) =
                        (Some(memories), why_not.map(str::to_owned), ats);
                }
                Err(error) => this.why_not = Some(error.to_string()),
            }
        }
        Some(this)
    }

    /// What it can lend besides `bars`. How much of its memory is usable only the driver says, to whoever opens it.
    pub fn lends(&self, bars: &str) -> Option<String> {
        match (&self.memories, self.named_bytes) {
            (Some(memories), _) => memories.first().map(|usable| {
                let length = bytes::in_words(usable.length_bytes);
                format!("region {}, {length}, {} and {}", usable.region, usable.used_for, usable.cpu_access)
            }),
            _ if !self.bound || self.why_not.is_some() => None,
            (None, Some(length_bytes)) => {
                Some(format!("{} of coherent memory, as the device tree says", bytes::in_words(length_bytes)))
            }
            (None, None) => Some(format!("coherent memory, if the firmware names any; else {bars}")),
        }
    }

    /// What to bind it to, where another driver has it.
    pub fn bind(&self, address: PciAddress) -> Option<String> {
        let next = || format!("sudo peervram bind {address} binds it to {DRIVER}, which shows its memory");
        (!self.bound).then(next)
    }

    pub fn print(&self, output: &mut impl Write) -> std::io::Result<()> {
        writeln!(
            output,
            "  memory  coherent with the CPU: {}",
            self.part.unwrap_or("a GPU that is in no table")
        )?;
        for memory in self.memories.iter().flatten() {
            writeln!(
                output,
                "    region {}  {:>8}  {}, {}; {} reported, peer-to-peer as BAR {}",
                memory.region,
                bytes::in_words(memory.length_bytes),
                memory.used_for,
                memory.cpu_access,
                bytes::in_words(memory.reported_bytes),
                memory.provider_bar
            )?;
        }
        match (&self.why_not, &self.memories) {
            (Some(why), _) => writeln!(output, "    {why}")?,
            (None, None) if self.bound => writeln!(output, "    --open shows it; opening the GPU resets it")?,
            _ => {}
        }
        writeln!(output, "  ATS     {}", self.ats)?;
        match self.egm.is_empty() {
            true => writeln!(output, "  EGM     this kernel lists none"),
            false => writeln!(output, "  EGM     {}", self.egm.join(", ")),
        }
    }
}

/// What a GPU says that was opened, and so is awake.
struct Opened {
    memories: Vec<MemoryReport>,
    why_not: Option<&'static str>,
    ats: &'static str,
}

impl Opened {
    /// Opens the GPU, and closes it.
    fn of(function: &Function) -> Result<Self, Error> {
        let address = function.address;
        let device = Device::open(address, &mut |why| note!("{address}: {why}"))?;
        let mut memories: Vec<Memory> = device.memories().to_vec();
        // The usable one first.
        memories.sort_by_key(|memory| std::cmp::Reverse(memory.region_index));
        let reports = memories.iter().map(|memory| MemoryReport {
            region: memory.region_index,
            used_for: memory.used_for.name(),
            cpu_access: memory.cpu_access().name(),
            length_bytes: memory.length_bytes,
            reported_bytes: memory.reported_bytes,
            whole_blocks: memory.whole_blocks(),
            provider_bar: peervram::nvgrace::PROVIDER_BAR,
        });
        Ok(Self { memories: reports.collect(), why_not: device.fall_back(), ats: ats_of(function) })
    }
}

fn ats_of(function: &Function) -> &'static str {
    ats(&function.address.sysfs_path().join("config"))
}

/// What a device tree says of the function in that folder; none where it says that there are no bytes, of a link that is down.
fn named_bytes(function: &Path) -> Option<u64> {
    let bytes = fs::read(function.join(LENGTH_PROPERTY)).ok()?;
    Some(u64::from_be_bytes(bytes.try_into().ok()?)).filter(|length_bytes| *length_bytes > 0)
}

/// What the function's capability says, as far as this user may read.
fn ats(config: &Path) -> &'static str {
    let Ok(bytes) = fs::read(config) else { return "unknown" };
    let size_bytes = fs::metadata(config).map_or(MAX_BYTES, |data| data.len() as usize);
    let Ok(space) = ConfigSpace::new(bytes, size_bytes) else { return "unknown" };
    match space.extended_capability(PCI_EXT_CAP_ID_ATS) {
        Search::Absent => "absent",
        Search::Unread => "unknown",
        Search::Found(at) => match space.bytes().get(at + PCI_ATS_CTRL..at + PCI_ATS_CTRL + 2) {
            Some(&[low, high]) if u16::from_le_bytes([low, high]) & PCI_ATS_CTRL_ENABLE != 0 => "on",
            Some(_) => "off",
            None => "unknown",
        },
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_trees_length_is_read() {
        let function = tempfile::tempdir().unwrap();
        assert_eq!(named_bytes(function.path()), None);
        fs::create_dir(function.path().join("of_node")).unwrap();
        let says = |bytes: &[u8]| {
            fs::write(function.path().join(LENGTH_PROPERTY), bytes).unwrap();
            named_bytes(function.path())
        };
        assert_eq!(says(&(96_u64 << 30).to_be_bytes()), Some(96 << 30));
        assert_eq!((says(&[0; 8]), says(&[1; 4])), (None, None));
    }

    #[test]
    fn what_is_lent_is_no_bar_before_it_is_opened() {
        let closed = CoherentReport {
            part: None,
            bound: true,
            ats: "absent",
            egm: vec![],
            named_bytes: None,
            memories: None,
            why_not: None,
        };
        assert!(
            closed.lends("BAR 4, 32 MiB").unwrap().ends_with("if the firmware names any; else BAR 4, 32 MiB")
        );
        let named = CoherentReport { named_bytes: Some(1600 << 20), ..closed };
        let words = named.lends("BAR 4, 32 MiB").unwrap();
        assert!(words.starts_with("1600 MiB of coherent memory") && !words.contains("BAR"), "{words}");
        // One that was opened and has none, and one that another driver has, lend what their BARs are.
        let without = CoherentReport { memories: Some(vec![]), ..named };
        assert_eq!(without.lends("BAR 4, 32 MiB"), None);
        assert_eq!(CoherentReport { memories: None, bound: false, ..without }.lends(""), None);
    }

    #[test]
    fn ats_is_read_from_the_capability() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config");
        let read = |bytes: &[u8]| {
            fs::write(&file, bytes).unwrap();
            ats(&file)
        };
        let mut config = vec![0; MAX_BYTES];
        assert_eq!(read(&config), "absent");
        config[0x100..0x104].copy_from_slice(&(0x0001_000f_u32).to_le_bytes());
        assert_eq!(read(&config), "off");
        config[0x107] = 0x80;
        assert_eq!(read(&config), "on");
        assert_eq!(ats(&folder.path().join("none")), "unknown");
    }
}
