//! `Grace`: a model GPU whose memory is memory of the machine, and what the machine needs for it.
//!
//! ```text
//! coherent0   a file in the machine's folder     (the number is the device's place in the row)
//!   the model   has it as VRAM, and shows it by no BAR
//!   QEMU        has it as the memory of a NUMA node, right behind the machine's own
//!   the kernel  is told to leave it alone (memmap=), and what it is by the firmware's SSDT
//! ```
//! So every byte is seen by the guest through the driver's regions, by other devices as memory of the machine,
//! and by the host in the file.
//!
//! The memory lies below 4 GiB: QEMU's q35 has a DSDT of revision 1, and in such a machine every ACPI integer has
//! 32 bits. A base of 4 GiB is silently read as 0, and the driver then hands out the kernel's own memory (seen).

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::Path;

use super::options::options;
use super::{Device, Machine, PciId, Topology, ssdt};

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

impl Memory {
    /// The kernel parameter that keeps the kernel off the memory.
    pub fn kernel_argument(&self) -> String {
        format!("memmap={:#x}${:#x}", self.size_bytes, self.base_bytes)
    }
}

/// The memories of a machine's GPUs that the firmware names, one behind the other.
pub(crate) fn memories(machine: &Machine) -> Vec<Memory> {
    let mut end_bytes = u64::from(machine.memory_mib) << 20;
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
    arguments.extend(options(&[("-acpitable", &format!("file=/lab/{SSDT}"))]));
    arguments
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
    if memories.is_empty() {
        return Ok(());
    }
    let path = folder.join(SSDT);
    fs::write(&path, table(machine, &memories)?).with_context(|| format!("writing {}", path.display()))
}

/// The firmware's words: each GPU's memory, by the GPU's place in QEMU's own table.
fn table(machine: &Machine, memories: &[Memory]) -> Result<Vec<u8>> {
    ensure!(
        machine.topology == Topology::RootPorts,
        "{}: a GPU like this sits behind a root port",
        machine.name
    );
    let mut properties = Vec::new();
    for (device, kind) in machine.devices.iter().enumerate() {
        let Device::Grace(grace) = kind else { continue };
        let (base_bytes, size_bytes) = match grace.firmware {
            Firmware::NamesNone => continue,
            Firmware::NamesNoBytes => (0, 0),
            Firmware::NamesMemory => {
                let memory = memories.iter().find(|memory| memory.device == device);
                let memory = memory.with_context(|| format!("device {device} has no memory"))?;
                let end_bytes = memory.base_bytes + memory.size_bytes;
                ensure!(
                    end_bytes <= LOW_MEMORY_END_BYTES,
                    "the memory of device {device} ends at {end_bytes:#x}, beyond QEMU's low memory: an ACPI \
                     integer of this machine could not say where it begins"
                );
                (memory.base_bytes, memory.size_bytes)
            }
        };
        // A root port's slot, as `Topology` numbers it, and the device in it: QEMU calls them by devfn.
        let path = format!("\\_SB_.PCI0.S{:02X}_.S00_", (device + 2) << 3);
        properties.push(ssdt::Properties {
            path,
            integers: vec![("nvidia,gpu-mem-base-pa", base_bytes), ("nvidia,gpu-mem-size", size_bytes)],
        });
    }
    Ok(ssdt::table(&properties))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::{MACHINES, named};

    #[test]
    fn every_machines_memory_can_be_named_in_32_bits() {
        for machine in MACHINES.iter().filter(|machine| machine.facts().has_grace()) {
            let memories = memories(machine);
            assert!(!memories.is_empty(), "{}", machine.name);
            table(machine, &memories).unwrap();
            let end_bytes =
                memories.iter().map(|memory| memory.base_bytes + memory.size_bytes).max().unwrap();
            assert!(end_bytes < LOW_MEMORY_END_BYTES, "{} has more low memory than QEMU", machine.name);
        }
    }

    #[test]
    fn a_base_that_would_be_read_as_zero_is_refused() {
        let mut machine = *named("small-gh200").unwrap();
        machine.memory_mib = 4096;
        let error = table(&machine, &memories(&machine)).unwrap_err().to_string();
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
        let bytes = table(machine, &memories(machine)).unwrap();
        let has = |path: &[u8]| bytes.windows(path.len()).any(|window| window == path);
        assert!(has(b"PCI0S10_S00_") && has(b"PCI0S38_S00_") && !has(b"PCI0S30_S00_"));
    }
}
