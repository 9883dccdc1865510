//! `Call`: a revoking call, and what surrounds it on every device that it touches.
//!
//! ```text
//! owners quiesce -> BARs under mappings become shadow memory -> the call
//!     -> the device is ready -> BARs come back -> owners resume
//! ```
//! Nothing here decides or waits for anyone but the kernel.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use peervram_backends::{Error, Kind};

use super::entry::{Entry, names};
use super::machine::{After, Change, DeviceId};
use crate::Result;

/// A call that is to be made.
pub(crate) struct Call {
    pub what: Change,
    /// What it is, as a verb phrase for messages: "reset a device".
    pub tried: &'static str,
    /// All devices that it touches.
    pub entries: Vec<Arc<Entry>>,
    /// Asks the kernel.
    pub make: Box<dyn FnOnce() -> Result<()> + Send>,
    /// Where the memory is afterwards; asked of the device where this is none.
    pub after: Option<After>,
}

impl Call {
    /// Makes it: what it says, and where the memory of each device is then.
    pub fn make(self) -> (Result<()>, Vec<(DeviceId, After)>) {
        let (tried, entries) = (self.tried, self.entries.clone());
        // Owners' hooks are somebody else's code.
        let made = catch_unwind(AssertUnwindSafe(|| self.make_in_order()));
        let (result, after) = made.unwrap_or_else(|_| {
            let error = Error::new(Kind::Os, tried, "an owner's hook panicked").on(names(&entries));
            (Err(error), entries.iter().map(|entry| (entry.id, After::Away)).collect())
        });
        if let Err(error) = &result {
            tracing::warn!(%error, "a call on a device that lends failed");
        }
        (result, after)
    }

    fn make_in_order(self) -> (Result<()>, Vec<(DeviceId, After)>) {
        // What is given back was quiesced and shadowed when it was taken.
        if self.what != Change::Restore {
            self.entries.iter().for_each(|entry| leave(entry));
        }
        let mut result = (self.make)();
        let after = (self.entries.iter())
            .map(|entry| {
                let after = self.after.unwrap_or_else(|| match come_back(entry) {
                    Ok(()) => After::Here,
                    Err(error) if error.kind() == Kind::MemoryDisabled => After::Away,
                    Err(error) => {
                        if result.is_ok() {
                            result = Err(error);
                        }
                        After::Away
                    }
                });
                (entry.id, after)
            })
            .collect();
        (result, after)
    }
}

/// Nothing of this process touches the memory from here on.
fn leave(entry: &Entry) {
    entry.lent().iter().for_each(|lent| lent.quiesce());
    if let Ok(exporter) = entry.exporter()
        && let Err(error) = exporter.shadow()
    {
        tracing::error!(%error, "mapped memory stays under a revoke: touching it is a SIGBUS");
    }
}

/// If the memory can be reached, it is as before, and its owners have prepared it.
fn come_back(entry: &Entry) -> Result<()> {
    let exporter = entry.exporter()?;
    exporter.check_reachable()?;
    let ready = exporter.wait_until_ready(&mut |why| entry.tell_not_ready(why));
    entry.set_ready();
    ready?;
    exporter.unshadow()?;
    entry.lent().iter().try_for_each(|lent| lent.resume())
}
