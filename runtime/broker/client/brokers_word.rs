//! `BrokersWord`: what the broker says of one lease without a message, as its client reads it.

use std::sync::Arc;

use peervram_backends::SharedWordsView;

use super::super::lease_words::Word;
use crate::gate::Origin;
use crate::sync::atomic::{AtomicU64, Ordering};

/// The word of one lease, and what its client has heard.
pub(super) struct BrokersWord {
    words: Arc<SharedWordsView>,
    index: usize,
    lease: u64,
    /// The generation that the broker's last message said.
    known: AtomicU64,
}

impl BrokersWord {
    /// Of a lease of which the broker has said that its memory is of `generation`. There is a word of that number.
    pub fn new(words: &Arc<SharedWordsView>, index: usize, lease: u64, generation: u64) -> Self {
        Self { words: Arc::clone(words), index, lease, known: AtomicU64::new(generation) }
    }

    /// The broker has said that the memory is of `generation`. Whoever is inside by what it said before is torn already.
    pub fn set_known(&self, generation: u64) {
        self.known.store(generation, Ordering::Release);
    }

    /// The generation that the broker's last message said.
    pub fn known(&self) -> u64 {
        self.known.load(Ordering::Acquire)
    }
}

impl Origin for BrokersWord {
    fn is_as_heard(&self) -> bool {
        let is_as_heard = |word: Word| word.is_of(self.lease) && word.has_generation(self.known());
        self.words.load(self.index).map(Word::from).is_some_and(is_as_heard)
    }
}
