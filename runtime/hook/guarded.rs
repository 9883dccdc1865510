//! `Guarded`: a value of an application's whose hooks are called so that a panic is an error.

use std::sync::{Arc, OnceLock};

use peervram_backends::{Importer, OnRevoke};

use super::engine::ImporterEngines;
use super::{Hook, ask};

/// An application's exporter or importer. It has the same trait, and no method of it panics.
pub(crate) struct Guarded<T> {
    pub(super) inner: Arc<T>,
    /// Of an importer, asked once: what a revoke is told does not change.
    on_revoke: OnceLock<OnRevoke>,
    pub(super) engines: ImporterEngines<T>,
}

impl<T> Guarded<T> {
    /// Of `inner`, which others may have, too.
    pub fn new(inner: Arc<T>) -> Self {
        Self { inner, on_revoke: OnceLock::new(), engines: ImporterEngines::default() }
    }

    /// What is guarded, for whoever gave it.
    pub fn inner(&self) -> &Arc<T> {
        &self.inner
    }
}

impl<I: Importer> Guarded<I> {
    /// What is not known is freed before, which is right for every driver.
    pub(super) fn on_revoke_once(&self) -> OnRevoke {
        *self.on_revoke.get_or_init(|| {
            let whose = || self.inner.name();
            ask(Hook::ImporterOnRevoke, whose, OnRevoke::FreeBefore, || self.inner.on_revoke())
        })
    }
}
