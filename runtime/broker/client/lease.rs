//! `Lease`: borrowed memory, as an export.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use super::super::message::{Borrow, Borrowed};
use super::call::Calls;
use super::follow::{Followed, Follower};
use super::memory::BorrowedMemory;
use crate::revoke::revoker::Revoker;
use crate::{Export, Result, RevokeOptions};

/// Borrowed memory: an [`Export`], to be attached to, entered and watched like one of this process's own. Dropping it
/// takes it back from everybody in this process, whatever is late, and tells the broker; it waits for that up to a
/// second. [`Lease::give_back`] says who is late instead.
pub struct Lease {
    export: Export,
    followed: Arc<Followed>,
    follower: Arc<Follower>,
    memory: String,
}

impl Lease {
    pub(super) fn borrow(calls: &Arc<Calls>, follower: &Arc<Follower>, wish: &Borrow) -> Result<Self> {
        // One at a time, so that the follower knows leases in the order of their numbers.
        let mut borrowing = follower.borrow();
        let (borrowed, descriptor): (Borrowed, _) =
            calls.call_for_descriptor("Borrow", wish, "borrow memory")?;
        let exporter = (calls.words())
            .and_then(|words| BorrowedMemory::new(&borrowed, descriptor, &words, calls))
            .map(Arc::new);
        let revoker = Revoker::of_process();
        let exported = exporter.and_then(|memory| {
            let followed = Followed::new(borrowed.lease, calls, &revoker, &memory);
            let export = Export::new(&revoker, followed.device(), &*memory, memory.aperture())?;
            Ok((followed, export))
        });
        let (followed, export) = match exported {
            Ok(exported) => exported,
            Err(error) => {
                follower.forget_early(borrowed.lease);
                super::follow::give_back(calls, borrowed.lease);
                return Err(error);
            }
        };
        follower.add(&mut borrowing, &followed);
        Ok(Self { export, followed, follower: Arc::clone(follower), memory: borrowed.memory })
    }

    /// Its number, as `peervram status` shows it.
    pub fn number(&self) -> u64 {
        self.followed.lease()
    }

    /// The name of the memory that it is of.
    pub fn memory(&self) -> &str {
        &self.memory
    }

    /// The device that it is of, as its lender names it.
    pub fn device(&self) -> &str {
        &self.followed.device().name
    }

    /// Gives the memory back: nobody in this process uses it any more, its descriptors are closed, and the broker is told.
    ///
    /// # Errors
    /// Who is late, and nothing was given back: the lease is dropped then, which does not wait for them for long.
    /// [`Kind::Gone`](crate::Kind::Gone) where the broker has ended it before.
    pub fn give_back(self, options: impl Into<RevokeOptions>) -> Result<()> {
        self.followed.close(options.into())
    }
}

impl Deref for Lease {
    type Target = Export;

    fn deref(&self) -> &Export {
        &self.export
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.follower.remove(self.followed.lease());
        self.followed.end();
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("number", &self.number())
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}
