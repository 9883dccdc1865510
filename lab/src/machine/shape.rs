//! `Shape`: what the kernel looks at when it decides how one function reaches another.
//!
//! A shape is a tree of bridges, a CPU, what the ports' ACS control registers say and the kernel's
//! parameters.

use super::tree::RootBus;

/// What a machine for shapes has beside its CPU.
#[derive(Debug)]
pub struct Shape {
    /// Its bridges and functions.
    pub tree: &'static [RootBus],
    /// What is added to the kernel's command line.
    pub parameters: &'static str,
    /// What the ACS control registers are made to say, one after the other.
    pub settings: &'static [Setting],
}

/// What the ACS control registers of a machine's ports are made to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// What a person reads.
    pub name: &'static str,
    /// The bits of some ports, named by their places in the tree.
    pub ports: &'static [(&'static str, u16)],
    /// The bits of all other ports that have the register; without it they are left as the kernel made them.
    pub others: Option<u16>,
}

/// Bits of the register, `PCI_ACS_*` in `linux/pci_regs.h`.
pub const SOURCE_VALIDATION: u16 = 1 << 0;
/// Requests between functions below the port go up.
pub const REQUEST_REDIRECT: u16 = 1 << 2;
/// Answers, too.
pub const COMPLETION_REDIRECT: u16 = 1 << 3;
/// What was sent up comes down again.
pub const UPSTREAM_FORWARDING: u16 = 1 << 4;
