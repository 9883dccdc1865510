//! `LeaseWords`: what a broker says of its leases without a message.
//!
//! Messages come late. What is taken back without waiting for a client, at a deadline or for an error of the device, is
//! gone before the client has read that it is. So every lease has a word in memory that its client reads whenever an
//! access ends, and the broker writes it before the kernel takes the memory:
//!
//! ```text
//!   bits 32-63  the low half of the memory's generation, as the broker counts
//!   bits 0-31   the low half of the lease's number: any other, and the lease is over
//! ```
//! [`SharedWords`] also says whether the broker lives.

use std::fmt;
use std::sync::Arc;

use peervram_backends::{Error, Kind, SharedWords};

use crate::Result;
use crate::sync::Mutex;

/// How many leases there can be at a time.
const WORDS: usize = (1 << 17) - 1;

/// What a word says: which generation the memory of which lease is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Word {
    lease: u32,
    generation: u32,
}

impl Word {
    /// Of numbers of which it has the low halves.
    fn of(lease: u64, generation: u64) -> Self {
        Self { lease: lease as u32, generation: generation as u32 }
    }

    /// Whether it is of that lease. Of a lease that is over it is of none, or of the next one.
    pub fn is_of(self, lease: u64) -> bool {
        self.lease == lease as u32
    }

    /// Whether it says that generation.
    pub fn has_generation(self, generation: u64) -> bool {
        self.generation == generation as u32
    }
}

impl From<Word> for u64 {
    fn from(word: Word) -> Self {
        Self::from(word.generation) << 32 | Self::from(word.lease)
    }
}

impl From<u64> for Word {
    fn from(bits: u64) -> Self {
        Self::of(bits, bits >> 32)
    }
}

/// The words of all leases of a broker.
pub(super) struct LeaseWords {
    words: Arc<SharedWords>,
    free: Mutex<Free>,
}

/// Words that no lease has.
#[derive(Default)]
struct Free {
    /// No lease had one from this one on.
    fresh: usize,
    again: Vec<usize>,
}

impl LeaseWords {
    /// Of no lease yet.
    ///
    /// # Errors
    /// As [`SharedWords::new`].
    pub fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Self { words: Arc::new(SharedWords::new(WORDS)?), free: Mutex::default() }))
    }

    /// The memory that they are in.
    pub fn shared(&self) -> &Arc<SharedWords> {
        &self.words
    }

    /// A word for a lease.
    ///
    /// # Errors
    /// [`Kind::Exhausted`]: there are too many leases.
    pub fn take(self: &Arc<Self>, lease: u64) -> Result<LeaseWord> {
        let mut free = self.free.lock();
        let index = match free.again.pop() {
            Some(index) => index,
            None if free.fresh < self.words.count() => {
                free.fresh += 1;
                free.fresh - 1
            }
            None => {
                let why = format!("{} leases are too many", self.words.count());
                return Err(Error::new(Kind::Exhausted, "borrow memory", why).next("return some"));
            }
        };
        Ok(LeaseWord { words: Arc::clone(self), index, lease })
    }
}

impl fmt::Debug for LeaseWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseWords").finish_non_exhaustive()
    }
}

/// The word of one lease. Dropping it says that the lease is over, and frees the word for another lease.
#[derive(Debug)]
pub(super) struct LeaseWord {
    words: Arc<LeaseWords>,
    index: usize,
    lease: u64,
}

impl LeaseWord {
    /// Its number, for the client.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Says that the memory is of `generation`.
    pub fn set(&self, generation: u64) {
        self.words.words.store(self.index, Word::of(self.lease, generation).into());
    }

    /// Says that the lease is over.
    pub fn end(&self) {
        // No lease has the number 0.
        self.words.words.store(self.index, Word::of(0, 0).into());
    }
}

impl Drop for LeaseWord {
    fn drop(&mut self) {
        self.end();
        self.words.free.lock().again.push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use peervram_backends::SharedWordsView;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_word_is_read_as_it_was_written(lease: u64, generation: u64) {
            let word = Word::from(u64::from(Word::of(lease, generation)));
            prop_assert!(word.is_of(lease) && word.has_generation(generation));
            prop_assert!(!word.is_of(lease ^ 1) && !word.has_generation(generation ^ 1));
        }
    }

    #[test]
    fn a_word_that_is_used_again_is_not_taken_for_that_of_the_lease_before() {
        let words = LeaseWords::new().unwrap();
        let view = SharedWordsView::open(words.shared().as_fd().try_clone_to_owned().unwrap()).unwrap();
        let _life = words.shared().live().unwrap();
        let look = |index| Word::from(view.load(index).unwrap());

        let first = words.take(1).unwrap();
        let index = first.index();
        first.set(7);
        assert!(look(index).is_of(1) && look(index).has_generation(7));
        drop(first);
        assert!(!look(index).is_of(1));
        let second = words.take(2).unwrap();
        assert_eq!(second.index(), index);
        second.set(7);
        assert!(!look(index).is_of(1) && look(index).is_of(2));
        let third = words.take(3).unwrap();
        assert_ne!(third.index(), index);
    }
}
