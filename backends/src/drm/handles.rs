//! `Handles`: who uses the GEM handles of one open file, and how often.
//!
//! The kernel gives one handle for one dma-buf in one open file, however often it is imported
//! (`drm_gem_prime_fd_to_handle`), and one close ends it for all. So each has one user: a [`Node`](super::Node), which
//! counts its imports, or one gbm device, whose library counts them itself.

use std::collections::HashMap;

use drm::buffer::Handle;

use crate::{Error, Kind, Result};

/// Who closes a handle when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum User {
    /// The node of the open file.
    Node,
    /// The gbm device of that number.
    #[cfg_attr(
        not(any(feature = "gbm", test)),
        expect(dead_code, reason = "gbm devices alone are such users")
    )]
    Gbm(u64),
}

/// The handles that are in use.
#[derive(Debug, Default)]
pub(crate) struct Handles(HashMap<Handle, (User, usize)>);

impl Handles {
    /// Counts one use more of `handle`, as the kernel gave it to `user`.
    ///
    /// # Errors
    /// As [`Handles::check`].
    pub(crate) fn take(&mut self, handle: Handle, user: User) -> Result<()> {
        self.check(handle, user)?;
        self.0.entry(handle).or_insert((user, 0)).1 += 1;
        Ok(())
    }

    /// Fails where another one than `user` uses `handle`.
    ///
    /// # Errors
    /// [`Kind::Busy`]. It stays that one's: `user` must not close it.
    pub(crate) fn check(&self, handle: Handle, user: User) -> Result<()> {
        let who = match self.0.get(&handle) {
            Some((owner, _)) if *owner != user => match owner {
                User::Node => "the node",
                User::Gbm(_) => "a gbm device",
            },
            _ => return Ok(()),
        };
        let why = format!("{who} has imported it in the same open file, where it has one handle for all");
        Err(Error::new(Kind::Busy, "import a dma-buf by PRIME", why)
            .next("use that import, or free it first, or open the node once more (Node::open)"))
    }

    /// Counts one use less. True where that was the last.
    pub(crate) fn give_back(&mut self, handle: Handle) -> bool {
        match self.0.get_mut(&handle) {
            Some((_, count)) if *count > 1 => {
                *count -= 1;
                false
            }
            _ => self.0.remove(&handle).is_some(),
        }
    }

    /// Whether anybody but `user` uses a handle.
    #[cfg(feature = "gbm")]
    pub(crate) fn are_used_by_others(&self, user: User) -> bool {
        self.0.values().any(|(owner, _)| *owner != user)
    }

    /// Whether anybody uses that handle.
    #[cfg(feature = "gbm")]
    pub(crate) fn is_used(&self, handle: Handle) -> bool {
        self.0.contains_key(&handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    fn handle(number: u32) -> Handle {
        NonZeroU32::new(number).unwrap().into()
    }

    #[test]
    fn the_last_of_several_uses_closes() {
        let mut handles = Handles::default();
        for _ in 0..3 {
            handles.take(handle(1), User::Node).unwrap();
        }
        handles.take(handle(2), User::Gbm(7)).unwrap();
        assert!(!handles.give_back(handle(1)) && !handles.give_back(handle(1)));
        assert!(handles.give_back(handle(1)));
        // A handle that is not in use is not closed again.
        assert!(!handles.give_back(handle(1)));
        assert!(handles.give_back(handle(2)));
    }

    #[test]
    fn a_handle_has_one_owner() {
        let mut handles = Handles::default();
        handles.take(handle(1), User::Gbm(7)).unwrap();
        for other in [User::Node, User::Gbm(8)] {
            let error = handles.take(handle(1), other).unwrap_err();
            assert_eq!(error.kind(), Kind::Busy);
            assert!(error.to_string().contains("a gbm device has imported it"), "{error}");
        }
        handles.take(handle(1), User::Gbm(7)).unwrap();
        assert!(!handles.give_back(handle(1)) && handles.give_back(handle(1)));
        handles.take(handle(1), User::Node).unwrap();
    }
}
