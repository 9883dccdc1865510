//! Taking memory back without hurting anyone.
//!
//! The kernel takes a device's memory back on a reset, when its memory decoding or power goes, and when
//! it is closed. It tells importing drivers, not programs; it waits for them without a limit; and whoever
//! touches a mapped BAR meanwhile dies. So every such call goes through here:
//!
//! - [`machine`] decides, in pure code: who must be told, who is late, when the call may be made, what
//!   everyone hears of its outcome. No clock, thread or descriptor is in it.
//! - [`keeper`] acts: it closes gates, waits, has the [`call`] made on a thread of its own, and opens again.
//! - [`stuck`] says what a call that does not come back is waiting for.
//! - [`watch`] hears of what is not ours: the kernel wants a device back, it failed, its owner ended.

pub(crate) mod call;
mod call_threads;
mod cause;
pub(crate) mod entry;
pub(crate) mod event;
#[cfg(all(test, feature = "host"))]
pub(crate) mod fakes;
pub(crate) mod held;
#[cfg(all(test, feature = "host"))]
mod interleavings;
pub(crate) mod keeper;
pub(crate) mod machine;
#[cfg(test)]
mod machine_model;
#[cfg(test)]
mod machine_observer;
#[cfg(test)]
mod machine_properties;
#[cfg(all(test, feature = "host", not(feature = "shuttle")))]
mod shell_tests;
pub(crate) mod stuck;
pub(crate) mod watch;

pub use cause::RevokeCause;
pub use event::{Event, Events, SlowCallback, Subscription, What};
pub use machine::{AtDeadline, Terms};
pub use stuck::Stuck;
pub use watch::Watch;
