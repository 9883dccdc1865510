//! `Handles`: who uses the GEM handles of one open file, and how often.
//!
//! The kernel gives one handle for one dma-buf in one open file, however often it is imported
//! (`drm_gem_prime_fd_to_handle`), and one close ends it for all. So each has one user: a [`Node`](super::Node), which
//! counts its imports, or one gbm device, whose library counts them itself.

use drm::buffer::Handle;

use crate::{Error, Kind};

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

/// One handle that is in use.
#[derive(Debug)]
struct Used {
    handle: Handle,
    user: User,
    count: usize,
}

/// The handles that are in use, by their numbers: mostly a few, and each import and release looks one up.
#[derive(Debug, Default)]
pub(crate) struct Handles(Vec<Used>);

impl Handles {
    /// Where a handle is, or belongs.
    fn find(&self, handle: Handle) -> Result<usize, usize> {
        self.0.binary_search_by_key(&u32::from(handle), |used| used.handle.into())
    }

    /// Counts one use more of `handle`, as the kernel gave it to `user`.
    ///
    /// # Errors
    /// As [`Handles::check`].
    pub(crate) fn take(&mut self, handle: Handle, user: User) -> crate::Result<()> {
        match self.find(handle) {
            Ok(index) => {
                self.0[index].check(user)?;
                self.0[index].count += 1;
            }
            Err(index) => self.0.insert(index, Used { handle, user, count: 1 }),
        }
        Ok(())
    }

    /// Fails where another one than `user` uses `handle`.
    ///
    /// # Errors
    /// [`Kind::Busy`]. It stays that one's: `user` must not close it.
    #[cfg_attr(not(feature = "gbm"), expect(dead_code, reason = "gbm devices alone look before they take"))]
    pub(crate) fn check(&self, handle: Handle, user: User) -> crate::Result<()> {
        self.find(handle).map_or(Ok(()), |index| self.0[index].check(user))
    }

    /// Counts one use less. True where that was the last.
    pub(crate) fn give_back(&mut self, handle: Handle) -> bool {
        let Ok(index) = self.find(handle) else { return false };
        self.0[index].count -= 1;
        if self.0[index].count > 0 {
            return false;
        }
        self.0.remove(index);
        true
    }

    /// Whether anybody but `user` uses a handle.
    #[cfg(feature = "gbm")]
    pub(crate) fn are_used_by_others(&self, user: User) -> bool {
        self.0.iter().any(|used| used.user != user)
    }

    /// Whether anybody uses that handle.
    #[cfg(feature = "gbm")]
    pub(crate) fn is_used(&self, handle: Handle) -> bool {
        self.find(handle).is_ok()
    }
}

impl Used {
    fn check(&self, user: User) -> crate::Result<()> {
        if self.user == user {
            return Ok(());
        }
        let who = match self.user {
            User::Node => "the node",
            User::Gbm(_) => "a gbm device",
        };
        let why = format!("{who} has imported it in the same open file, where it has one handle for all");
        Err(Error::new(Kind::Busy, "import a dma-buf by PRIME", why)
            .next("use that import, or free it first, or open the node once more (Node::open)"))
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
    fn handles_are_found_in_whatever_order_they_came() {
        let mut handles = Handles::default();
        for number in [7, 3, 9, 1, 5] {
            handles.take(handle(number), User::Node).unwrap();
        }
        handles.take(handle(5), User::Node).unwrap();
        let last: Vec<bool> = [9, 5, 1, 3, 7, 5].map(|number| handles.give_back(handle(number))).into();
        assert_eq!(last, [true, false, true, true, true, true]);
        assert!(handles.0.is_empty());
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
