//! `Call`: a revoking call, and what surrounds it on every device that it touches.
//!
//! ```text
//! owners quiesce -> BARs under mappings become shadow memory -> the call
//!     -> the device is ready -> BARs come back -> owners resume
//! ```
//! Nothing here decides or waits for anyone but the kernel.

use std::sync::Arc;

use peervram_backends::Kind;

use super::lending_device::{LendingDevice, names};
use super::machine::{After, Change, DeviceId};
use crate::Result;
use crate::hook::{self, Hook};

/// What a call did that came back without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Took {
    /// It took memory back, or gave it back.
    Memory,
    #[cfg_attr(
        any(not(feature = "broker"), feature = "shuttle"),
        allow(dead_code, reason = "of brokers and their clients")
    )]
    /// It was called off by whoever makes it: everything is as it was before. Who was torn for it is torn all the same.
    Nothing,
}

/// A call that is to be made.
pub(crate) struct Call {
    pub what: Change,
    /// What it is, as a verb phrase for messages: "reset a device".
    pub tried: &'static str,
    /// All devices that it touches.
    pub devices: Vec<Arc<LendingDevice>>,
    /// It is made on the thread that asks for it, and its limit does not count: it waits for no kernel, or its caller for it.
    pub is_made_here: bool,
    /// Asks the kernel.
    pub make: Box<dyn FnOnce() -> Result<Took> + Send>,
    /// Where the memory is afterwards; asked of the device where this is none.
    pub after: Option<After>,
}

impl Call {
    /// Makes it. Returns what it says, and where the memory of each device is then.
    pub fn make(self) -> (Result<()>, Vec<(DeviceId, After)>) {
        // What is given back was quiesced and shadowed when it was taken.
        let left = match self.what {
            Change::Restore => Ok(()),
            Change::Take(_) => {
                // Each device is left, whatever the one before it says.
                let left: Vec<Result<()>> = self.devices.iter().map(|device| leave(device)).collect();
                left.into_iter().collect()
            }
        };
        let whose = || names(&self.devices);
        let made = hook::call(Hook::RevokingCall, whose, self.make);
        let here = if matches!(made, Ok(Took::Nothing)) { After::Untouched } else { After::Here };
        let mut result = made.and(left);
        let after = (self.devices.iter())
            .map(|device| {
                let after = self.after.unwrap_or_else(|| match come_back(device) {
                    Ok(()) => here,
                    Err(error) if error.kind() == Kind::MemoryDisabled => After::Away,
                    Err(error) => {
                        if result.is_ok() {
                            result = Err(error);
                        }
                        After::Away
                    }
                });
                (device.id, after)
            })
            .collect();
        if let Err(error) = &result {
            tracing::warn!(%error, "a call on a device that lends failed");
        }
        (result, after)
    }
}

/// Nothing of this process touches the memory from here on. No hook that fails stops that.
///
/// # Errors
/// [`Kind::Panicked`] alone: what an owner or a device says for itself is in the log.
fn leave(device: &LendingDevice) -> Result<()> {
    let mut told: Vec<Result<()>> = device.exports().iter().map(|export| export.quiesce()).collect();
    if let Ok(exporter) = device.exporter() {
        let shadowed = exporter.shadow();
        if let Err(error) = &shadowed {
            tracing::error!(%error, "mapped memory stays under a revoke: touching it is a SIGBUS");
        }
        told.push(shadowed);
    }
    let panicked = told.into_iter().filter_map(Result::err).find(|error| error.kind() == Kind::Panicked);
    panicked.map_or(Ok(()), Err)
}

/// Maps the memory again and has its owners prepare it, if it can be reached.
fn come_back(device: &LendingDevice) -> Result<()> {
    let exporter = device.exporter()?;
    exporter.check_reachable()?;
    let ready = exporter.wait_until_ready(&mut |why| device.tell_not_ready(why));
    device.set_ready();
    ready?;
    exporter.unshadow()?;
    device.exports().iter().try_for_each(|export| export.resume())
}
