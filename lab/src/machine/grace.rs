//! `Grace`: a model GPU whose memory is memory of the machine, and what the machine needs for it.
//!
//! ```text
//! coherent0   a file in the machine's folder     (the number is the device's place in the row)
//!   the model   has it as VRAM, and shows it by no BAR
//!   QEMU        has it as the memory of a NUMA node, right behind the machine's own
//!   the kernel  is told to leave it alone (memmap=, mem=), and what it is by the firmware
//! ```
//! So every byte is seen by the guest through the driver's regions, by other devices as memory of the machine,
//! and by the host in the file.
//!
//! On x86 the memory lies below 4 GiB: QEMU's q35 has a DSDT of revision 1, and in such a machine every ACPI integer has
//! 32 bits. A base of 4 GiB is silently read as 0, and the driver then hands out the kernel's own memory (seen). On arm64 a device
//! tree says the same ([`device_tree`](super::device_tree)), in 64 bits: there the memory begins at 4 GiB.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::Path;

use super::options::options;
use super::{Architecture, Device, Machine, PciId, Topology, ssdt};

/// Where QEMU's q35 ends its low memory, whatever it has above.
const LOW_MEMORY_END_BYTES: u64 = 2816 << 20;

/// The real BARs 2 and 4 of the model, which the driver shows memory in the place of.
const BAR_MIB: u32 = 32;

/// A GPU whose memory is coherent with the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grace {
    /// What it calls itself.
    pub id: PciId,
    /// How much memory it has. With the hardware bug more than 1.5 GiB: one of them becomes reserved memory.
    pub memory_mib: u32,
    /// Partitions of it (MIG) must not be cached.
    pub has_mig_bug: bool,
    /// It tells by CXL whether its memory is ready.
    pub has_cxl: bool,
    /// What the firmware says of its memory.
    pub firmware: Firmware,
}

/// What the firmware says of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// Where it is and how long.
    NamesMemory,
    /// Nothing.
    NamesNone,
    /// The firmware says that the memory has no bytes, as it does if the link to the CPU is down.
    NamesNoBytes,
}

/// Where a GPU's memory is in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    device: usize,
    base_bytes: u64,
    pub size_bytes: u64,
}

impl Grace {
    /// What its model is told besides its sockets.
    pub(crate) fn model_arguments(&self, folder: &Path, index: usize) -> Result<Vec<String>> {
        let file = folder.join(file_name(index));
        let file = file.to_str().with_context(|| format!("{} is no text", file.display()))?;
        let bar_mib = BAR_MIB.to_string();
        let mut arguments = options(&[
            ("--id", &self.id.to_string()),
            ("--vram-mib", &self.memory_mib.to_string()),
            ("--vram-file", file),
            ("--bar-mib", &bar_mib),
            ("--bar4-mib", &bar_mib),
            ("--vendor-word", if self.has_mig_bug { "0" } else { "1" }),
        ]);
        arguments.push("--coherent".into());
        if self.has_cxl {
            arguments.push("--cxl".into());
        }
        Ok(arguments)
    }
}

/// The kernel parameters that keep the kernel off the memories. On arm64 they lie behind all that the kernel may have.
pub(crate) fn kernel_arguments(machine: &Machine) -> Vec<String> {
    let memories = memories(machine);
    match machine.architecture() {
        Architecture::X86 => {
            let argument =
                |memory: &Memory| format!("memmap={:#x}${:#x}", memory.size_bytes, memory.base_bytes);
            memories.iter().map(argument).collect()
        }
        Architecture::Arm64 if memories.is_empty() => Vec::new(),
        Architecture::Arm64 => vec![format!("mem={}M", machine.memory_mib)],
    }
}

/// The memories of a machine's GPUs that the firmware names, one behind the other.
pub(crate) fn memories(machine: &Machine) -> Vec<Memory> {
    let mut end_bytes = machine.architecture().memory_base_bytes() + (u64::from(machine.memory_mib) << 20);
    let graces = machine.devices.iter().enumerate().filter_map(|(device, kind)| match kind {
        Device::Grace(grace) if grace.firmware == Firmware::NamesMemory => Some((device, grace)),
        _ => None,
    });
    graces
        .map(|(device, grace)| {
            let (base_bytes, size_bytes) = (end_bytes, u64::from(grace.memory_mib) << 20);
            end_bytes += size_bytes;
            Memory { device, base_bytes, size_bytes }
        })
        .collect()
}

/// QEMU's words for them, beside a memory of the machine's own called `ram`.
pub(crate) fn qemu_arguments(memories: &[Memory]) -> Vec<String> {
    let mut arguments = options(&[("-numa", "node,nodeid=0,cpus=0-1,memdev=ram")]);
    for (memory, node) in memories.iter().zip(1..) {
        let name = file_name(memory.device);
        let size_bytes = memory.size_bytes;
        arguments.extend(options(&[
            (
                "-object",
                &format!("memory-backend-file,id={name},size={size_bytes},share=on,mem-path=/lab/{name}"),
            ),
            ("-numa", &format!("node,nodeid={node},memdev={name}")),
        ]));
    }
    arguments
}

/// QEMU's words for the firmware's table of an x86 machine.
pub(crate) fn ssdt_arguments(machine: &Machine) -> Vec<String> {
    if memories(machine).is_empty() {
        Vec::new()
    } else {
        options(&[("-acpitable", &format!("file=/lab/{SSDT}"))])
    }
}

const SSDT: &str = "ssdt.aml";

fn file_name(index: usize) -> String {
    format!("coherent{index}")
}

/// Makes the files of a machine with such GPUs in its folder. They have holes: what nobody writes takes no room.
pub(crate) fn lay_out(machine: &Machine, folder: &Path) -> Result<()> {
    let memories = memories(machine);
    for (index, device) in machine.devices.iter().enumerate() {
        let Device::Grace(grace) = device else { continue };
        let path = folder.join(file_name(index));
        let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
        file.set_len(u64::from(grace.memory_mib) << 20)
            .with_context(|| format!("making {} as long as the memory", path.display()))?;
    }
    if memories.is_empty() || machine.architecture() != Architecture::X86 {
        return Ok(());
    }
    let path = folder.join(SSDT);
    fs::write(&path, table(machine)?).with_context(|| format!("writing {}", path.display()))
}

/// The firmware's words: each GPU's memory, by the GPU's place in QEMU's own table.
fn table(machine: &Machine) -> Result<Vec<u8>> {
    ensure!(
        machine.topology == Topology::RootPorts,
        "{}: a GPU like this sits behind a root port",
        machine.name
    );
    let mut properties = Vec::new();
    for said in said(machine) {
        let end_bytes = said.base_bytes + said.size_bytes;
        ensure!(
            end_bytes <= LOW_MEMORY_END_BYTES,
            "the memory of device {} ends at {end_bytes:#x}, beyond QEMU's low memory: an ACPI integer of this machine \
             could not say where it begins",
            said.device
        );
        // A root port's slot and the device in it: QEMU calls them by devfn.
        let path = format!("\\_SB_.PCI0.S{:02X}_.S00_", Topology::slot_of(said.device) << 3);
        properties.push(ssdt::Properties { path, integers: said.integers().into() });
    }
    Ok(ssdt::table(&properties))
}

/// What the firmware says of a device's memory.
pub(super) struct Said {
    pub device: usize,
    base_bytes: u64,
    size_bytes: u64,
}

impl Said {
    /// The names that the driver asks for.
    pub fn integers(&self) -> [(&'static str, u64); 2] {
        [("nvidia,gpu-mem-base-pa", self.base_bytes), ("nvidia,gpu-mem-size", self.size_bytes)]
    }
}

/// What the firmware says, device by device; of some nothing.
pub(super) fn said(machine: &Machine) -> Vec<Said> {
    let memories = memories(machine);
    let of_device = |(device, kind): (usize, &Device)| {
        let Device::Grace(grace) = kind else { return None };
        let (base_bytes, size_bytes) = match grace.firmware {
            Firmware::NamesNone => return None,
            Firmware::NamesNoBytes => (0, 0),
            Firmware::NamesMemory => {
                let memory = memories.iter().find(|memory| memory.device == device)?;
                (memory.base_bytes, memory.size_bytes)
            }
        };
        Some(Said { device, base_bytes, size_bytes })
    };
    machine.devices.iter().enumerate().filter_map(of_device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::{MACHINES, named};

    #[test]
    fn every_machines_memory_can_be_named_in_32_bits() {
        let is_x86 = |machine: &&Machine| machine.architecture() == Architecture::X86;
        for machine in MACHINES.iter().filter(is_x86).filter(|machine| machine.facts().has_grace()) {
            let memories = memories(machine);
            assert!(!memories.is_empty(), "{}", machine.name);
            table(machine).unwrap();
            let end_bytes =
                memories.iter().map(|memory| memory.base_bytes + memory.size_bytes).max().unwrap();
            assert!(end_bytes < LOW_MEMORY_END_BYTES, "{} has more low memory than QEMU", machine.name);
        }
    }

    #[test]
    fn a_base_that_would_be_read_as_zero_is_refused() {
        let mut machine = *named("small-gh200").unwrap();
        machine.memory_mib = 4096;
        let error = table(&machine).unwrap_err().to_string();
        assert!(error.contains("ACPI integer"), "{error}");
    }

    #[test]
    fn the_memory_is_the_kernels_to_leave_alone_and_qemus_to_have() {
        let machine = named("small-gh200").unwrap();
        assert_eq!(machine.command_line(), "intel_iommu=on memmap=0x64000000$0x40000000");
        let arguments = machine.qemu_arguments().join(" ");
        assert!(arguments.contains("-m 2624 "), "{arguments}");
        assert!(arguments.contains("-numa node,nodeid=1,memdev=coherent0"), "{arguments}");
        assert!(!arguments.contains("memory-backend=ram"), "{arguments}");
    }

    #[test]
    fn a_gpu_without_a_word_from_the_firmware_is_in_no_table() {
        let machine = named("small-gh200").unwrap();
        let bytes = table(machine).unwrap();
        let has = |path: &[u8]| bytes.windows(path.len()).any(|window| window == path);
        assert!(has(b"PCI0S10_S00_") && has(b"PCI0S38_S00_") && !has(b"PCI0S30_S00_"));
    }
}
