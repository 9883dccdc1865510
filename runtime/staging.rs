//! `Staging`: who copies on the path [`Staged`](crate::Path::Staged).

use std::fmt;

/// Who copies between lent memory and the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mover {
    /// The engine of the device that the memory is of.
    OwnerEngine,
    /// An engine of the importer's, by an import that was tested in this direction.
    ImporterEngine,
    /// The CPU, through the BAR: an uncached read answers eight bytes at a time. Memory that is coherent with the
    /// CPU is cached, and as fast as other memory.
    Cpu,
}

impl Mover {
    /// A stable name for scripts and `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::OwnerEngine => "owner-engine",
            Self::ImporterEngine => "importer-engine",
            Self::Cpu => "cpu",
        }
    }
}

impl fmt::Display for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How a staged attachment copies.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Staging {
    /// Who copies out of the lent memory when an access begins.
    pub pull: Mover,
    /// Who copies into it when an access ends that may write; nobody where none may.
    pub push: Option<Mover>,
    /// Whether the importer works on host memory, rather than on memory of its own that its engine fills.
    pub in_host_memory: bool,
    /// Why it is the CPU that copies, where it is.
    pub why_cpu: Option<String>,
}
