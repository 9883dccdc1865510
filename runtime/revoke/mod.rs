//! Taking memory back without hurting anyone.
//!
//! The kernel takes a device's memory back on a reset, when its memory decoding or power goes, and when
//! it is closed. It tells importing drivers, not programs; it waits for them without a limit; and whoever
//! touches a mapped BAR meanwhile dies. So every such call goes through here:
//!
//! - [`machine`] decides, in pure code: who must be told, who is late, when the call may be made, what
//!   everyone hears of its outcome. No clock, thread or descriptor is in it.
//! - [`revoker`] acts for all devices of the process: a [`change`] closes gates, waits, has the [`call`] made on a
//!   thread of its own, and opens the gates again. [`closing`] ends a device.
//! - [`stuck`] says what a call that does not come back is waiting for.
//! - [`watch`] begins a revoke when the kernel wants a device back, the device failed, or its owner ended.
//! - [`event`] tells subscribers. [`target`] is what exports and attachments are for a revoke.

pub(crate) mod call;
mod call_thread;
mod call_threads;
mod cause;
mod change;
mod closing;
pub(crate) mod event;
#[cfg(all(test, feature = "host"))]
pub(crate) mod fakes;
pub(crate) mod lending_device;
pub(crate) mod machine;
#[cfg(test)]
mod machine_model;
#[cfg(test)]
mod machine_observer;
#[cfg(test)]
mod machine_properties;
pub(crate) mod revoker;
#[cfg(all(test, feature = "host", not(feature = "shuttle")))]
mod revoker_tests;
#[cfg(all(test, feature = "host"))]
mod shuttle_tests;
mod state;
mod stuck;
pub(crate) mod target;
pub(crate) mod thread_accesses;
pub(crate) mod watch;

pub use cause::RevokeCause;
pub use event::{Event, EventKind, Events, SlowCallback, Subscription};
pub use machine::{AtDeadline, RevokeOptions};
pub use stuck::Stuck;
pub use watch::Watch;
