//! Hooks: code that is not this crate's, called by one function.
//!
//! Owners, exporters, importers, engines, signals and callbacks are whoever's. One that panics must not leave a gate
//! shut, a count wrong or a revoke halfway: [`call`] catches the panic and makes an error of it that names the hook.
//! [`Guarded`] puts it around every method of a trait, so that whoever has a guarded value cannot go past it.
//!
//! Absent on purpose: limits. A hook that blocks holds up the thread that called it: a revoke says so when its
//! call's limit is over. Destructors of an application's types are not hooks, and must not panic.

mod engine;
mod exporter;
mod guarded;
mod importer;
#[cfg(all(test, feature = "host", not(feature = "shuttle")))]
mod matrix;
mod owner;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use peervram_backends::{Error, Kind};

pub(crate) use guarded::Guarded;
pub(crate) use owner::guard_owner;

use crate::Result;

/// The hooks, each with the name that its implementer knows it by.
macro_rules! hooks {
    ($($hook:ident = $name:literal,)*) => {
        /// A hook.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Hook {
            $(
                #[doc = $name]
                $hook,
            )*
        }

        impl Hook {
            /// All of them.
            #[cfg(all(test, feature = "host", not(feature = "shuttle")))]
            pub const ALL: &'static [Self] = &[$(Self::$hook),*];

            /// What it is called.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$hook => $name,)*
                }
            }
        }
    };
}

hooks! {
    ExporterName = "Exporter::name",
    ExporterPciAddress = "Exporter::pci_address",
    ExporterRegions = "Exporter::regions",
    ExporterExport = "Exporter::export",
    ExporterBeginImport = "Exporter::begin_import",
    ExporterEndExport = "Exporter::end_export",
    ExporterExportsNewMemory = "Exporter::exports_new_memory",
    ExporterMap = "Exporter::map",
    ExporterCheckReachable = "Exporter::check_reachable",
    ExporterWaitUntilReady = "Exporter::wait_until_ready",
    ExporterCpuAccess = "Exporter::cpu_access",
    ExporterProviderBar = "Exporter::provider_bar",
    ExporterShadow = "Exporter::shadow",
    ExporterUnshadow = "Exporter::unshadow",
    ExporterRetireMappings = "Exporter::retire_mappings",
    ExporterCloseDevice = "Exporter::close_device",
    ExporterInterrupts = "Exporter::interrupts",
    ImporterName = "Importer::name",
    ImporterPciAddress = "Importer::pci_address",
    ImporterDriver = "Importer::driver",
    ImporterOnRevoke = "Importer::on_revoke",
    ImporterOnRefusal = "Importer::on_refusal",
    ImporterGovernedByP2pdma = "Importer::governed_by_p2pdma",
    ImporterImport = "Importer::import",
    ImporterImportHostPointer = "Importer::import_host_pointer",
    ImporterStage = "Importer::stage",
    ImporterHostMemory = "Importer::host_memory",
    ImporterEngines = "Importer::engines",
    ImporterEngineNames = "Importer::engine_names",
    ImporterRelease = "Importer::release",
    OwnerName = "Owner::name",
    OwnerFlush = "Owner::flush",
    OwnerInvalidate = "Owner::invalidate",
    OwnerQuiesce = "Owner::quiesce",
    OwnerResume = "Owner::resume",
    OwnerEngine = "Owner::engine",
    EngineName = "Engine::name",
    EngineRead = "Engine::read",
    EngineWrite = "Engine::write",
    EngineCopy = "Engine::copy",
    SignalWait = "Signal::wait",
    SignalDrop = "the drop of a Signal",
    Callback = "the callback of on_event",
    Progress = "the progress callback of verify",
    RevokingCall = "the call given to Lender::revoke or restore",
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Calls a hook. `whose` names the device or program, and is called only where the hook panicked.
///
/// # Errors
/// What the hook says; [`Kind::Panicked`] where it panicked.
pub(crate) fn call<T>(
    hook: Hook,
    whose: impl FnOnce() -> String,
    act: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let panic = match catch_unwind(AssertUnwindSafe(act)) {
        Ok(result) => return result,
        Err(panic) => panic,
    };
    let said = (panic.downcast_ref::<&str>().copied())
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("nothing that can be shown");
    let error = Error::new(Kind::Panicked, format!("call {hook}"), format!("it panicked: {said}"));
    // The name is a hook, too.
    let error = match catch_unwind(AssertUnwindSafe(whose)) {
        Ok(whose) => error.on(whose),
        Err(_) => error,
    };
    let error = error.next("mend the hook; what it was called for failed, and nothing else is held up");
    tracing::error!(%error, "a hook panicked");
    Err(error)
}

/// Calls a hook that cannot fail; gives `otherwise` where it panicked.
pub(crate) fn ask<T>(hook: Hook, whose: impl FnOnce() -> String, otherwise: T, act: impl FnOnce() -> T) -> T {
    call(hook, whose, || Ok(act())).unwrap_or(otherwise)
}
