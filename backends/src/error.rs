//! One shape for every error: what was tried, on which device, why it failed, what to do next.
//!
//! A [`Kind`] is what a program matches on; its [`code`](Kind::code) is stable and appears in
//! `--json`. The errno is kept, never translated away.

use std::borrow::Cow;
use std::fmt;
use std::io;

use rustix::io::Errno;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something failed, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// A value was wrong before any call was made: alignment, bounds, syntax.
    InvalidInput,
    /// No such device, region or node.
    NotFound,
    /// The device is bound to another driver, or to none.
    NotBoundToVfio,
    /// The IOMMU group, or the bus that is to be reset, holds a device that is not ours.
    GroupNotViable,
    /// The permissions of a file or a limit forbid it.
    PermissionDenied,
    /// Somebody else holds it.
    Busy,
    /// The running kernel is older than the feature.
    KernelTooOld,
    /// This driver, or this device under it, does not have the operation.
    Unsupported,
    /// The memory has no peer-to-peer provider, so it cannot become a dma-buf.
    NoPeerProvider,
    /// The kernel refuses peer-to-peer between these two devices.
    RouteRefused,
    /// The importing driver cannot map memory of another PCI device.
    ImporterCannot,
    /// Memory decoding is off, or the device sleeps: the memory cannot be reached now.
    MemoryDisabled,
    /// The memory was taken back.
    Revoked,
    /// The device, or the exporter behind a dma-buf, is gone.
    Gone,
    /// A BAR mapping or an attachment keeps the device open.
    StillInUse,
    /// The Vulkan loader, driver, device or extension is missing.
    VulkanMissing,
    /// A Vulkan call failed.
    Vulkan,
    /// The deadline passed.
    TimedOut,
    /// A path was tested and is not to be trusted: bytes were wrong, or nobody saw them who could tell;
    /// or it was not tested for what is to be done.
    Unverified,
    /// Nothing of what was asked for is free: memory, or a limit that was set for whoever asks.
    Exhausted,
    /// The caller would wait for itself.
    WouldDeadlock,
    /// The kernel does not come back from a call, and cannot be made to.
    Stuck,
    /// Code that an application gave panicked: a hook of an owner, exporter or importer, a signal, a callback.
    Panicked,
    /// Anything else the operating system said.
    Os,
}

impl Kind {
    /// All of them.
    const ALL: [Self; 24] = [
        Self::InvalidInput,
        Self::NotFound,
        Self::NotBoundToVfio,
        Self::GroupNotViable,
        Self::PermissionDenied,
        Self::Busy,
        Self::KernelTooOld,
        Self::Unsupported,
        Self::NoPeerProvider,
        Self::RouteRefused,
        Self::ImporterCannot,
        Self::MemoryDisabled,
        Self::Revoked,
        Self::Gone,
        Self::StillInUse,
        Self::VulkanMissing,
        Self::Vulkan,
        Self::TimedOut,
        Self::Unverified,
        Self::Exhausted,
        Self::WouldDeadlock,
        Self::Stuck,
        Self::Panicked,
        Self::Os,
    ];

    /// The kind of that [`code`](Kind::code), as another process says it.
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// A stable name for scripts and `--json`.
    pub fn code(self) -> &'static str {
        match self {
            Self::InvalidInput => "invalid-input",
            Self::NotFound => "not-found",
            Self::NotBoundToVfio => "not-bound-to-vfio",
            Self::GroupNotViable => "group-not-viable",
            Self::PermissionDenied => "permission-denied",
            Self::Busy => "busy",
            Self::KernelTooOld => "kernel-too-old",
            Self::Unsupported => "unsupported",
            Self::NoPeerProvider => "no-peer-provider",
            Self::RouteRefused => "route-refused",
            Self::ImporterCannot => "importer-cannot",
            Self::MemoryDisabled => "memory-disabled",
            Self::Revoked => "revoked",
            Self::Gone => "gone",
            Self::StillInUse => "still-in-use",
            Self::VulkanMissing => "vulkan-missing",
            Self::Vulkan => "vulkan",
            Self::TimedOut => "timed-out",
            Self::Unverified => "unverified",
            Self::Exhausted => "exhausted",
            Self::WouldDeadlock => "would-deadlock",
            Self::Stuck => "stuck",
            Self::Panicked => "panicked",
            Self::Os => "os",
        }
    }

    /// Whether the machine, rather than the request, is what stands in the way: another kernel,
    /// driver, device or permission would make the same request succeed.
    pub fn cannot_run_here(self) -> bool {
        matches!(
            self,
            Self::NotBoundToVfio
                | Self::GroupNotViable
                | Self::PermissionDenied
                | Self::KernelTooOld
                | Self::Unsupported
                | Self::NoPeerProvider
                | Self::RouteRefused
                | Self::ImporterCannot
                | Self::VulkanMissing
        )
    }
}

/// What was tried, on which device, why it failed, and what to do next.
///
/// One pointer wide, so that results stay small. `Debug` prints the same sentence as `Display`: it is what a
/// `main` that returns an error prints.
#[derive(Clone, thiserror::Error)]
#[error(transparent)]
pub struct Error(Box<Details>);

#[derive(Clone)]
struct Details {
    kind: Kind,
    tried: Cow<'static, str>,
    device: Option<String>,
    why: Cow<'static, str>,
    errno: Option<Errno>,
    next: Option<Cow<'static, str>>,
}

impl std::error::Error for Details {}

impl fmt::Debug for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// An error of `kind`: what was `tried`, and `why` it failed.
    pub fn new(kind: Kind, tried: impl Into<Cow<'static, str>>, why: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Details {
            kind,
            tried: tried.into(),
            device: None,
            why: why.into(),
            errno: None,
            next: None,
        }))
    }

    /// An error that the operating system reported and that has no better explanation.
    ///
    /// The kinds that an errno settles by itself (permission, busy, absent) are set; callers that
    /// know more build the error with [`Error::new`] and [`Error::errno`].
    pub fn os(tried: impl Into<Cow<'static, str>>, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        let errno = error.raw_os_error().map(Errno::from_raw_os_error);
        let kind = match errno {
            Some(Errno::ACCESS | Errno::PERM) => Kind::PermissionDenied,
            Some(Errno::NOENT) => Kind::NotFound,
            Some(Errno::BUSY) => Kind::Busy,
            _ => Kind::Os,
        };
        let mut built = Self::new(kind, tried, error.to_string());
        built.0.errno = errno;
        built
    }

    /// Names the device it happened on.
    #[must_use]
    pub fn on(mut self, device: impl fmt::Display) -> Self {
        self.0.device = Some(device.to_string());
        self
    }

    /// Keeps the errno that the kernel gave.
    #[must_use]
    pub fn errno(mut self, errno: Errno) -> Self {
        self.0.errno = Some(errno);
        self
    }

    /// Keeps an errno by number, of an error that this one summarises.
    #[must_use]
    pub fn raw_errno(self, errno: i32) -> Self {
        self.errno(Errno::from_raw_os_error(errno))
    }

    /// Says what to do next.
    #[must_use]
    pub fn next(mut self, step: impl Into<Cow<'static, str>>) -> Self {
        self.0.next = Some(step.into());
        self
    }

    /// What was tried, where, and why it failed, without the next step.
    pub fn headline(&self) -> String {
        self.0.headline()
    }

    /// What to match on.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What was tried, as a verb phrase: "export a dma-buf".
    pub fn tried(&self) -> &str {
        &self.0.tried
    }

    /// The device, node or file it happened on.
    pub fn device(&self) -> Option<&str> {
        self.0.device.as_deref()
    }

    /// The reason in words.
    pub fn why(&self) -> &str {
        &self.0.why
    }

    /// The errno behind it, by number.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0.errno.map(Errno::raw_os_error)
    }

    /// The next step, where one is known.
    pub fn next_step(&self) -> Option<&str> {
        self.0.next.as_deref()
    }
}

impl Details {
    fn headline(&self) -> String {
        let device = self.device.as_ref().map(|device| format!(" ({device})")).unwrap_or_default();
        format!("cannot {}{device}: {}", self.tried, self.why)
    }
}

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.headline())?;
        if let Some(next) = &self.next {
            write!(f, "; {next}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sentence_names_what_where_why_and_next() {
        let error = Error::new(Kind::KernelTooOld, "export a dma-buf", "Linux 6.12 has no dma-buf export")
            .on("0000:01:00.0")
            .errno(Errno::NOTTY)
            .next("boot Linux 6.19 or later");
        assert_eq!(
            error.to_string(),
            "cannot export a dma-buf (0000:01:00.0): Linux 6.12 has no dma-buf export; boot Linux 6.19 or later"
        );
        assert_eq!(
            error.headline(),
            "cannot export a dma-buf (0000:01:00.0): Linux 6.12 has no dma-buf export"
        );
        assert_eq!(error.raw_os_error(), Some(Errno::NOTTY.raw_os_error()));
        assert!(error.kind().cannot_run_here());
    }

    /// A code is what scripts know an error by, so each has its row, and none is there of before.
    #[test]
    fn every_code_is_on_the_page_of_errors() {
        let (_, function) = include_str!("error.rs").split_once("pub fn code(self)").unwrap();
        let (arms, _) = function.split_once("\n    }\n").unwrap();
        let mut codes: Vec<&str> = arms.lines().filter_map(|arm| arm.split('"').nth(1)).collect();
        assert!(codes.contains(&Kind::Busy.code()) && codes.len() > 20, "{codes:?}");
        let kinds: Vec<Option<Kind>> = codes.iter().map(|code| Kind::from_code(code)).collect();
        assert!(kinds.iter().all(Option::is_some) && kinds.len() == Kind::ALL.len(), "{codes:?}, {kinds:?}");
        let page =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/errors.md")).unwrap();
        let (_, table) = page.split_once("| code | means | do |\n|---|---|---|\n").unwrap();
        let rows = table.lines().take_while(|line| line.starts_with('|'));
        let mut shown: Vec<&str> = rows.filter_map(|row| row.split('`').nth(1)).collect();
        codes.sort_unstable();
        shown.sort_unstable();
        assert_eq!(shown, codes);
    }

    #[test]
    fn an_errno_that_settles_the_matter_sets_the_kind() {
        assert_eq!(Error::os("open", Errno::ACCESS).kind(), Kind::PermissionDenied);
        assert_eq!(Error::os("open", Errno::BUSY).kind(), Kind::Busy);
        assert_eq!(Error::os("open", Errno::IO).kind(), Kind::Os);
        assert_eq!(Error::os("open", Errno::IO).raw_os_error(), Some(5));
    }

    /// `fn main() -> peervram::Result<()>` prints an error by its `Debug`.
    #[test]
    fn what_main_prints_is_the_sentence() {
        let error = Error::new(Kind::Busy, "open a device", "it has an owner").on("0000:01:00.0");
        assert_eq!(format!("{error:?}"), "cannot open a device (0000:01:00.0): it has an owner");
        assert_eq!(format!("{error:#?}"), error.to_string());
    }

    #[test]
    fn results_stay_small() {
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }
}
