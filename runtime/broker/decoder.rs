//! `Decoder`: messages out of a stream of bytes: each ends with a NUL.
//!
//! Pure, and fuzzed: whatever comes, it keeps at most one message's limit of bytes beyond what was pushed last, and
//! every message that it gives has come whole.

/// The longest call that a broker reads, in bytes. `Borrow` with 1,024 ranges takes some 50 KiB.
pub(crate) const MAX_CALL_BYTES: usize = 64 << 10;
/// The longest reply that a client reads, in bytes: `Status` with thousands of leases.
pub(crate) const MAX_REPLY_BYTES: usize = 16 << 20;

/// A message is longer than what is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong {
    /// The limit, in bytes.
    pub limit: usize,
}

/// Finds the ends of messages.
#[derive(Debug)]
pub(crate) struct Decoder {
    limit: usize,
    bytes: Vec<u8>,
    /// Where the first message that was not given yet begins.
    begin: usize,
    /// Up to where there is no end of a message, from `begin` on.
    searched: usize,
    /// How many bytes were dropped from the front: positions in the stream are counted from its begin.
    dropped: u64,
}

/// A message, and where it lies in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    /// Without the NUL.
    pub bytes: Vec<u8>,
    /// The position of its NUL in the stream. A descriptor came with the message that has the last byte of what the
    /// kernel gave with it.
    pub end: u64,
}

impl Decoder {
    /// Of messages up to `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, bytes: Vec::new(), begin: 0, searched: 0, dropped: 0 }
    }

    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        // What was given is dropped before there is more, so that a message is moved once at most.
        self.bytes.drain(..self.begin);
        self.dropped += self.begin as u64;
        self.searched -= self.begin;
        self.begin = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// How many bytes were pushed in all.
    pub fn position(&self) -> u64 {
        self.dropped + self.bytes.len() as u64
    }

    /// Whether part of a message waits for the rest.
    pub fn is_inside(&self) -> bool {
        self.begin < self.bytes.len()
    }

    /// The next message that has come whole.
    ///
    /// # Errors
    /// It is too long. Nothing after it can be read.
    pub fn next(&mut self) -> Result<Option<Message>, TooLong> {
        let end = self.bytes[self.searched..].iter().position(|byte| *byte == 0).map(|at| self.searched + at);
        let length = end.unwrap_or(self.bytes.len()) - self.begin;
        if length > self.limit {
            return Err(TooLong { limit: self.limit });
        }
        let Some(end) = end else {
            self.searched = self.bytes.len();
            return Ok(None);
        };
        let bytes = self.bytes[self.begin..end].to_vec();
        (self.begin, self.searched) = (end + 1, end + 1);
        Ok(Some(Message { bytes, end: self.dropped + end as u64 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(decoder: &mut Decoder) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| decoder.next().unwrap()).map(|message| message.bytes).collect()
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_before_it_has_come() {
        let mut decoder = Decoder::new(4);
        decoder.push(b"1234");
        assert_eq!(decoder.next(), Ok(None));
        decoder.push(b"\0");
        assert_eq!(decoder.next().unwrap().unwrap().bytes, b"1234");
        decoder.push(b"12345");
        assert_eq!(decoder.next(), Err(TooLong { limit: 4 }));
        assert_eq!(decoder.next(), Err(TooLong { limit: 4 }));
    }

    proptest! {
        /// However the stream is cut, the messages are the same, and where they end too.
        #[test]
        fn cuts_change_nothing(
            messages in prop::collection::vec(prop::collection::vec(1_u8.., 0..40), 0..20),
            cuts in prop::collection::vec(1_usize..50, 1..40),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(|message| [message.as_slice(), &[0]].concat()).collect();
            let mut decoder = Decoder::new(64);
            let (mut seen, mut rest) = (Vec::new(), stream.as_slice());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.push(now);
                while let Some(message) = decoder.next().unwrap() {
                    prop_assert_eq!(stream[message.end as usize], 0);
                    prop_assert!(message.end < decoder.position());
                    seen.push(message.bytes);
                }
                rest = later;
            }
            prop_assert_eq!(seen, messages);
            prop_assert_eq!((decoder.position(), decoder.is_inside()), (stream.len() as u64, false));
            prop_assert!(all(&mut decoder).is_empty());
        }
    }
}
