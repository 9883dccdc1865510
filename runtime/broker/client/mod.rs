//! The other end: memory borrowed from a broker, used like this process's own.
//!
//! ```no_run
//! use std::path::Path;
//! use std::sync::Arc;
//! use peervram::backends::drm;
//! use peervram::broker::client;
//! use peervram::{Direction, Trust};
//!
//! # fn main() -> peervram::Result<()> {
//! let export = client::Broker::connect(Path::new("/run/peervram/broker"))?.borrow(client::Wish::of_size(16 << 20))?;
//!
//! // From here on as with an export of this process's own.
//! let screen = Arc::new(drm::Node::open("/dev/dri/card0".as_ref())?);
//! let attachment = export.attach(screen, Trust::Unverified)?;
//! let access = attachment.enter(Direction::Read)?; // refused while the memory is taken back
//! access.finish().check()?;
//! # Ok(())
//! # }
//! ```
//!
//! What the broker says becomes a revoke of this process: gates shut, accesses finish, imports are freed, and then the
//! broker is answered. No message is sent for an access. What the broker takes without waiting for an answer, at a deadline
//! or at its end, it writes into memory that this process reads, before the kernel takes it: an access that is inside then
//! is [`Torn`](crate::Outcome::Torn), also where the message has not come yet. The kernel itself writes there when the
//! broker's process is killed, before it closes the device.

mod brokers_word;
mod call;
mod copying;
mod follow;
mod lease;
mod memory;

pub use lease::Lease;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use peervram_backends::{DmaRange, Error, Kind};

use super::message::{self, Borrow, Done, Nothing};
use crate::{Direction, Result};
use call::Calls;
use follow::Follower;

/// What is to be borrowed.
#[derive(Debug, Clone)]
pub struct Wish(Borrow);

impl Wish {
    /// That many bytes, in one range; whole pages of it.
    pub fn of_size(size_bytes: u64) -> Self {
        Self(Borrow { size: Some(size_bytes), ..Borrow::default() })
    }

    /// Exactly these ranges of a memory, in this order.
    pub fn of_ranges(memory: &str, ranges: &[DmaRange]) -> Self {
        let ranges = ranges.iter().map(|range| (*range).into()).collect();
        Self(Borrow { memory: Some(memory.into()), ranges: Some(ranges), ..Borrow::default() })
    }

    /// Of that memory, and not of whichever has room.
    #[must_use]
    pub fn of(mut self, memory: &str) -> Self {
        self.0.memory = Some(memory.into());
        self
    }

    /// Beginning at a multiple of `alignment_bytes`, a power of two.
    #[must_use]
    pub fn aligned_to(mut self, alignment_bytes: u64) -> Self {
        self.0.alignment = Some(alignment_bytes);
        self
    }

    /// For importers that use it in that direction alone: refused where the kernel could not keep them to it.
    #[must_use]
    pub fn only_to(mut self, direction: Direction) -> Self {
        self.0.direction = Some(direction);
        self
    }

    /// To be given to a network card.
    #[must_use]
    pub fn for_network_card(mut self) -> Self {
        self.0.network_card = Some(true);
        self
    }

    /// With a name that `peervram status` shows, of up to 128 bytes.
    #[must_use]
    pub fn with_label(mut self, label: &str) -> Self {
        self.0.label = Some(label.into());
        self
    }
}

/// A connection to a broker. Leases keep what they need of it: it may be dropped before them.
#[derive(Clone)]
pub struct Broker {
    calls: Arc<Calls>,
    follower: Arc<Follower>,
}

impl Broker {
    /// Connects to the broker that listens at `path`. Blocks until it has accepted.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is no socket, [`Kind::PermissionDenied`] where it may not be connected to,
    /// [`Kind::Gone`] where nobody listens; [`Kind::Unsupported`] where something else than a broker answers.
    pub fn connect(path: &Path) -> Result<Self> {
        let calls = Arc::new(Calls::connect(path)?);
        let follower = Follower::start(path, &calls)?;
        Ok(Self { calls, follower })
    }

    /// Has no message about a lease arrive before this is dropped.
    #[cfg(all(test, not(feature = "shuttle")))]
    pub(super) fn hear_nothing(&self) -> impl Drop + '_ {
        self.follower.hear_nothing()
    }

    /// What is lent to this process's user.
    ///
    /// # Errors
    /// [`Kind::Gone`] where the broker ended.
    pub fn list(&self) -> Result<Vec<message::Memory>> {
        let listed: message::Listed = self.calls.call("List", &Nothing {}, "list what is lent")?;
        Ok(listed.memories)
    }

    /// Borrows memory. Blocks while the broker scrubs it. The dma-buf's descriptor belongs to the lease.
    ///
    /// # Errors
    /// [`Kind::PermissionDenied`] and [`Kind::Exhausted`] by the broker's policy; [`Kind::Exhausted`] where nothing of that size is free;
    /// [`Kind::InvalidInput`] and [`Kind::Unsupported`] for the wish; [`Kind::Gone`] where the broker ended.
    pub fn borrow(&self, wish: Wish) -> Result<Lease> {
        Lease::borrow(&self.calls, &self.follower, &wish.0)
    }

    /// Who has what, for operators.
    ///
    /// # Errors
    /// [`Kind::PermissionDenied`] for whoever is none.
    pub fn status(&self) -> Result<message::Status> {
        self.calls.call("Status", &Nothing {}, "see who has what")
    }

    /// Takes a memory back from everybody, and gives it back at once where its device is still there. For operators.
    /// Returns its generation then. Blocks for that.
    ///
    /// # Errors
    /// As [`Lender::revoke`](crate::Lender::revoke); [`Kind::PermissionDenied`].
    pub fn revoke(&self, memory: &str, options: crate::RevokeOptions) -> Result<u64> {
        self.operate("Revoke", memory, options, "take memory back from everybody")
    }

    /// Resets a memory's device. For operators. Returns its generation then. Blocks for that.
    ///
    /// # Errors
    /// As [`Lender::reset`](crate::Lender::reset); [`Kind::PermissionDenied`].
    pub fn reset(&self, memory: &str, options: crate::RevokeOptions) -> Result<u64> {
        self.operate("Reset", memory, options, "reset a device")
    }

    fn operate(
        &self,
        method: &str,
        memory: &str,
        options: crate::RevokeOptions,
        tried: &'static str,
    ) -> Result<u64> {
        let of = message::OfMemory {
            memory: memory.into(),
            timeout_ms: Some(options.timeout.as_millis() as u64),
            go_on: Some(options.at_deadline == crate::AtDeadline::GoOn),
        };
        let taken: message::Taken = self.calls.call(method, &of, tried)?;
        Ok(taken.generation)
    }

    /// Ends a lease without its client. Its memory goes into quarantine. For operators.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::PermissionDenied`].
    pub fn evict(&self, lease: u64) -> Result<()> {
        let Done {} = self.calls.call("Evict", &message::OfLease { lease }, "evict a lease")?;
        Ok(())
    }

    /// Takes the memory of a lease that ended out of quarantine, on the caller's word that nobody has it. For operators.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::PermissionDenied`].
    pub fn release(&self, lease: u64) -> Result<()> {
        let Done {} = self.calls.call("Release", &message::OfLease { lease }, "end a quarantine")?;
        Ok(())
    }
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broker").finish_non_exhaustive()
    }
}

/// What everything says once the broker is gone.
fn gone(tried: &'static str) -> Error {
    Error::new(Kind::Gone, tried, "the broker has ended, or has given this client up")
        .next("connect again when it is back; its log says why")
}
