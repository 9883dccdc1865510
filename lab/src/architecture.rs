//! `Architecture`: of which processors a machine is, and what is another thing on each as data.
//!
//! A machine has the architecture of its kernel. Guests of another one than the host's see nothing of the private root: busybox
//! is their userland, and the programs of this workspace are built for them without a library beside.

use serde::{Deserialize, Serialize};

/// Of which processors a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Architecture {
    /// 64-bit x86, as the host: QEMU's `q35`, whose firmware describes it by ACPI.
    X86,
    /// 64-bit Arm: QEMU's `virt`, described by a device tree, without firmware.
    Arm64,
}

impl Architecture {
    /// QEMU's program for it.
    pub(crate) const fn qemu(self) -> &'static str {
        match self {
            Architecture::X86 => "qemu-system-x86_64",
            Architecture::Arm64 => "qemu-system-aarch64",
        }
    }

    /// QEMU's machine; interrupts can be remapped, or are translated.
    pub(crate) const fn qemu_machine(self) -> &'static str {
        match self {
            Architecture::X86 => "q35,kernel-irqchip=split",
            Architecture::Arm64 => "virt,gic-version=3",
        }
    }

    /// Whether a guest can run the private root's programs.
    pub const fn is_the_hosts(self) -> bool {
        matches!(self, Architecture::X86)
    }

    /// Where QEMU has the machine's own memory begin.
    pub(crate) const fn memory_base_bytes(self) -> u64 {
        match self {
            Architecture::X86 => 0,
            Architecture::Arm64 => 1 << 30,
        }
    }

    /// What the kernel's command line says of the console, and of clocks that nobody need check.
    pub(crate) const fn command_line(self) -> &'static str {
        match self {
            Architecture::X86 => "console=ttyS0 tsc=reliable no_timer_check",
            Architecture::Arm64 => "console=ttyAMA0 peervram.busybox",
        }
    }
}
