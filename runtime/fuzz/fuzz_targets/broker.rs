//! Streams of a client to what a broker reads them with: the frames, the calls, the parameters of every method.
//!
//! The first byte of an input says in how long pieces the rest arrives, the second how long a message may be.

#![no_main]

use libfuzzer_sys::fuzz_target;
use peervram::broker::fuzzing::read_calls;

fuzz_target!(|input: &[u8]| {
    let [piece_bytes, limit, stream @ ..] = input else { return };
    let limit = (usize::from(*limit) + 1) * 64;
    let in_pieces = read_calls(stream, usize::from(*piece_bytes), limit);
    // However it is cut, as many messages come.
    assert_eq!(in_pieces, read_calls(stream, stream.len(), limit));
});
