//! How bytes reach an importer, and how far that is trusted.

use std::fmt;

/// The way an attachment took. Reported, never silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Path {
    /// A dma-buf: the importer reaches the exporter's memory by itself.
    Peer,
    /// The exporter's memory mapped into this process and imported by address. For importers that
    /// are CPUs, or that do DMA to addresses of this process; nothing is copied.
    HostPointer,
    /// Memory of the importer's own, to which lent memory is copied by every
    /// [`enter`](crate::Attachment::enter), and from which it is copied back at the end of each access that may
    /// write. [`Attachment::staging`](crate::Attachment::staging) says who copies.
    Staged,
}

impl Path {
    /// All of them, in the order in which they are tried.
    pub(crate) const ALL: [Self; 3] = [Self::Peer, Self::HostPointer, Self::Staged];

    /// The paths without a copy, in the same order.
    pub(crate) const DIRECT: [Self; 2] = [Self::Peer, Self::HostPointer];

    /// A stable name for scripts and `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::HostPointer => "host-pointer",
            Self::Staged => "staged",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Some of the paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PathSet([bool; 3]);

impl PathSet {
    /// All of them.
    pub const ALL: Self = Self([true; 3]);

    /// Whether `path` is among them.
    pub fn contains(self, path: Path) -> bool {
        Path::ALL.iter().zip(self.0).any(|(&one, is_in)| is_in && one == path)
    }
}

impl FromIterator<Path> for PathSet {
    fn from_iter<T: IntoIterator<Item = Path>>(paths: T) -> Self {
        let paths: Vec<Path> = paths.into_iter().collect();
        Self(Path::ALL.map(|path| paths.contains(&path)))
    }
}

/// What an application is content with before it trusts the bytes of an attachment.
///
/// That a buffer was imported proves nothing about the data path: transfers that arrive at full
/// speed and are all ones have been reported for paths that every look-up calls fine. There is no
/// default; who attaches says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Trust {
    /// No byte has been tested on this path, and accesses may read and write. Copies are the last resort, made
    /// where nothing else can be imported.
    Unverified,
    /// Bytes were tested on this path in this direction, as a current certificate says; where there is
    /// none, one is made while attaching. Where the test fails, another path is taken. An access in a direction
    /// that was not tested is refused.
    Verified(Direction),
}

impl Trust {
    /// What accesses may do.
    pub(crate) fn allows(self) -> Direction {
        match self {
            Self::Unverified => Direction::Both,
            Self::Verified(direction) => direction,
        }
    }
}

/// Which way bytes go, as the importer sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// The importer reads.
    Read,
    /// The importer writes.
    Write,
    /// The importer reads and writes.
    Both,
}

impl Direction {
    /// A stable name for scripts and `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Both => "both",
        }
    }

    /// Each single direction that it stands for.
    pub(crate) fn each(self) -> &'static [Self] {
        match self {
            Self::Read => &[Self::Read],
            Self::Write => &[Self::Write],
            Self::Both => &[Self::Read, Self::Write],
        }
    }

    /// Whether all of `other` is in it.
    pub fn includes(self, other: Self) -> bool {
        self == Self::Both || self == other
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
