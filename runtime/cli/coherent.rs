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
            ats: match function.memory_enabled {
                Some(_) => ats(&function.address.sysfs_path().join("config")),
                None => "unknown",
            },
            egm: names(Path::new(EGM_CLASS)),
            memories: None,
            why_not: None,
        };
        if bound && open {
            let opened = memories(function);
            match opened {
                Ok((memories, why_not)) => {
                    (this.memories, this.why_not) = (Some(memories), why_not.map(str::to_owned));
                }
                Err(error) => this.why_not = Some(error.to_string()),
            }
        }
        Some(this)
    }

    /// What it can lend besides its BARs, where it was opened.
    pub fn lends(&self) -> Option<String> {
        let usable = self.memories.as_ref()?.first()?;
        Some(format!(
            "region {}, {}, {} and {}",
            usable.region,
            bytes::in_words(usable.length_bytes),
            usable.used_for,
            usable.cpu_access
        ))
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

/// Opens the GPU, and closes it.
fn memories(function: &Function) -> Result<(Vec<MemoryReport>, Option<&'static str>), Error> {
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
    Ok((reports.collect(), device.fall_back()))
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
