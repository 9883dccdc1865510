//! Which devices' memory this thread has an access to.
//!
//! A thread that has an access and asks for a revoke would wait for itself. An access cannot leave its thread, so a
//! thread-local list is enough.

use std::cell::RefCell;

use super::machine::DeviceId;
use crate::sync::thread_local;

thread_local! {
    /// A device for each access; few, and mostly the last access ends first.
    static ACCESSES: RefCell<Vec<DeviceId>> = const { RefCell::new(Vec::new()) };
}

/// An access to memory of `device` begins on this thread.
pub(crate) fn begin(device: DeviceId) {
    ACCESSES.with(|devices| devices.borrow_mut().push(device));
}

/// An access to memory of `device` ends, or goes on without this thread.
pub(crate) fn end(device: DeviceId) {
    ACCESSES.with(|devices| {
        let mut devices = devices.borrow_mut();
        if let Some(at) = devices.iter().rposition(|&other| other == device) {
            devices.swap_remove(at);
        }
    });
}

/// Whether this thread has an access to memory of `device` that is not finished.
pub(crate) fn has_access(device: DeviceId) -> bool {
    ACCESSES.with(|devices| devices.borrow().contains(&device))
}
