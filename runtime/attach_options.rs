//! `AttachOptions`: how an importer is attached; and `NotAttached`: why it could not be.

use std::fmt;
use std::sync::Arc;

use peervram_backends::{Error, Kind};

use crate::path::PathSet;
use crate::verify::{Limits, Store};
use crate::{Path, Trust};

/// How an importer is to be attached: how far its bytes are trusted, how that is tested, which paths may be taken, and
/// where certificates are kept. A [`Trust`] alone is enough where the defaults are good: every path, the tests of
/// [`Limits::default`], the user's certificates.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    pub(crate) trust: Trust,
    pub(crate) limits: Limits,
    pub(crate) paths: PathSet,
    /// None for the user's.
    store: Option<Arc<Store>>,
    /// What messages call the attachment, beside its importer.
    pub(crate) label: Option<Arc<str>>,
}

impl AttachOptions {
    /// Every path, with [`Limits::default`] and the user's certificates.
    pub fn new(trust: Trust) -> Self {
        Self { trust, limits: Limits::default(), paths: PathSet::ALL, store: None, label: None }
    }

    /// Tests within `limits`, where a path is to be verified.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Tries no path but these, in the usual order whatever the order here. An application that must not copy leaves
    /// [`Path::Staged`] out; one that measures paths names one. Without any, attaching is refused as
    /// [`Kind::InvalidInput`].
    #[must_use]
    pub fn with_paths(mut self, paths: &[Path]) -> Self {
        self.paths = paths.iter().copied().collect();
        self
    }

    /// Reads and keeps certificates in `store`, and not with the user's.
    #[must_use]
    pub fn with_store(mut self, store: Arc<Store>) -> Self {
        self.store = Some(store);
        self
    }

    /// Has messages call the attachment so, beside its importer: who is late in a revoke is "llvmpipe (frame 3)". For
    /// importers that attach several times.
    #[must_use]
    pub fn with_label(mut self, label: &str) -> Self {
        self.label = Some(label.into());
        self
    }

    pub(crate) fn store(&self) -> &Store {
        self.store.as_deref().unwrap_or_else(|| Store::of_user())
    }
}

impl From<Trust> for AttachOptions {
    fn from(trust: Trust) -> Self {
        Self::new(trust)
    }
}

/// Why an importer could not be attached. `?` makes an [`Error`] of it, with the kind and errno of the first path that
/// was refused and the reasons of all in words.
#[must_use]
#[derive(Clone)]
pub struct NotAttached {
    error: Error,
    refused: Vec<(Path, Error)>,
}

impl NotAttached {
    /// No path was taken, of those that were tried for memory of `device`.
    pub(crate) fn by_any_path(refused: Vec<(Path, Error)>, device: &str) -> Self {
        const TRIED: &str = "attach to lent memory";
        let Some((_, first)) = refused.first() else {
            let error = Error::new(Kind::InvalidInput, TRIED, "the options name no path").on(device);
            return error.next("name one in AttachOptions::with_paths").into();
        };
        let reasons: Vec<String> =
            refused.iter().map(|(path, error)| format!("by {path}: {error}")).collect();
        let error = Error::new(first.kind(), TRIED, reasons.join(". ")).on(device);
        let error = match refused.iter().find_map(|(_, error)| error.raw_os_error()) {
            Some(errno) => error.raw_errno(errno),
            None => error,
        };
        Self { error, refused }
    }

    /// All of it in one error.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The kind of [`NotAttached::error`].
    pub fn kind(&self) -> Kind {
        self.error.kind()
    }

    /// The paths that were tried, in that order, each with the reason why it was not taken. None where the memory was
    /// away, and no path was tried.
    pub fn refused(&self) -> &[(Path, Error)] {
        &self.refused
    }
}

impl From<Error> for NotAttached {
    fn from(error: Error) -> Self {
        Self { error, refused: Vec::new() }
    }
}

impl From<NotAttached> for Error {
    fn from(not_attached: NotAttached) -> Self {
        not_attached.error
    }
}

impl fmt::Display for NotAttached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

/// As the error prints.
impl fmt::Debug for NotAttached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.error, f)
    }
}

impl std::error::Error for NotAttached {}
