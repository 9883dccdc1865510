//! Which devices' memory this thread is inside of.
//!
//! A thread that is inside and asks for a revoke would wait for itself. An access cannot leave its
//! thread, so the thread knows.

use std::cell::RefCell;

use super::machine::DeviceId;
use crate::sync::thread_local;

thread_local! {
    /// One for each access; few, and mostly the last one ends first.
    static HELD: RefCell<Vec<DeviceId>> = const { RefCell::new(Vec::new()) };
}

pub(crate) fn enter(device: DeviceId) {
    HELD.with(|held| held.borrow_mut().push(device));
}

pub(crate) fn leave(device: DeviceId) {
    HELD.with(|held| {
        let mut held = held.borrow_mut();
        if let Some(at) = held.iter().rposition(|&one| one == device) {
            held.swap_remove(at);
        }
    });
}

/// Whether this thread has an access to memory of `device` that is not finished.
pub(crate) fn by_this_thread(device: DeviceId) -> bool {
    HELD.with(|held| held.borrow().contains(&device))
}
