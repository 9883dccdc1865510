//! `DMA_READ` and `DMA_WRITE`: messages by which the device reaches memory that came without a
//! file. Encoding, decoding, and finding out which of two layouts the client speaks. Pure.
//!
//! The specification and libvfio-user have a 64-bit count with the data behind it, at byte 32.
//! QEMU's `VFIOUserDMARW` had a 32-bit count with the data at byte 28, in a message that is 32
//! bytes longer than the data all the same. A message does not say which one it is, but:
//!
//! - a *request to read* is the same in both;
//! - its *reply* has zeros at 28..32 in the wide layout and zeros in its last four bytes in the
//!   narrow one: a non-zero byte at either place tells, and a non-zero byte anywhere tells where
//!   to look with a read of four bytes;
//! - a *write* in the narrow layout whose first word is not zero has an absurd count in the wide
//!   one and is refused with `E2BIG`; one that is all zeros is right in both.

use crate::protocol::{HEADER_BYTES, Header, command};

/// The most bytes of one message. QEMU 11.1 cuts replies that do not fit into the socket's send
/// buffer (208 KiB by default) and loses the stream.
pub const CHUNK_BYTES_MAX: usize = 64 << 10;
/// What a message holds besides its data, in both layouts.
pub const FRAME_BYTES: usize = HEADER_BYTES + 16;

/// Where the data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// 32-bit count, data at byte 28.
    Narrow,
    /// 64-bit count, data at byte 32.
    Wide,
}

/// A request to read.
pub fn encode_read(id: u16, address: u64, count: usize) -> Vec<u8> {
    let mut message = Vec::with_capacity(FRAME_BYTES);
    message.extend_from_slice(bytemuck::bytes_of(&Header::command(
        id,
        command::DMA_READ,
        FRAME_BYTES as u32,
    )));
    message.extend_from_slice(&address.to_ne_bytes());
    message.extend_from_slice(&(count as u64).to_ne_bytes());
    message
}

/// A request to write at most [`CHUNK_BYTES_MAX`] bytes.
pub fn encode_write(id: u16, address: u64, data: &[u8], layout: Layout) -> Vec<u8> {
    let size_bytes = FRAME_BYTES + data.len();
    let mut message = Vec::with_capacity(size_bytes);
    message.extend_from_slice(bytemuck::bytes_of(&Header::command(
        id,
        command::DMA_WRITE,
        size_bytes as u32,
    )));
    message.extend_from_slice(&address.to_ne_bytes());
    match layout {
        Layout::Narrow => message.extend_from_slice(&(data.len() as u32).to_ne_bytes()),
        Layout::Wide => message.extend_from_slice(&(data.len() as u64).to_ne_bytes()),
    }
    message.extend_from_slice(data);
    message.resize(size_bytes, 0);
    message
}

/// What a reply to a read of `count` bytes holds.
#[derive(Debug, PartialEq, Eq)]
pub enum ReadReply<'a> {
    /// The data, and the layout if it is certain now.
    Data(&'a [u8], Option<Layout>),
    /// The layout cannot be told: read four bytes at this offset into the range, and see.
    Ask(usize),
    /// Not a reply to that read.
    Malformed,
}

/// The data in the payload (all after the header) of a reply to a read of `count` bytes.
pub fn decode_read_reply(payload: &[u8], count: usize, layout: Option<Layout>) -> ReadReply<'_> {
    let Some(body) = payload.get(8..).filter(|body| body.len() == count + 8) else {
        return ReadReply::Malformed;
    };
    // From here on: count (4), then narrow data (count) and padding (4),
    // or padding (4) and wide data (count).
    let body = &body[4..];
    let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    let layout = layout.or_else(|| {
        if !is_zero(&body[..4]) {
            Some(Layout::Narrow)
        } else if !is_zero(&body[body.len() - 4..]) {
            Some(Layout::Wide)
        } else {
            None
        }
    });
    match layout {
        Some(Layout::Narrow) => ReadReply::Data(&body[..count], layout),
        Some(Layout::Wide) => ReadReply::Data(&body[4..], layout),
        None => match body.iter().position(|byte| *byte != 0) {
            None => ReadReply::Data(&body[..count], None),
            Some(position) => ReadReply::Ask(position.min(count.saturating_sub(4))),
        },
    }
}

/// The layout, from the payload of the reply to the read of four bytes that
/// [`ReadReply::Ask`] wanted. Narrow shows the byte that was seen; wide does not show it at 28..32.
pub fn layout_of_answer(payload: &[u8]) -> Layout {
    match payload.get(12..16) {
        Some([0, 0, 0, 0]) | None => Layout::Wide,
        Some(_) => Layout::Narrow,
    }
}

/// How to write `data` while the layout is unknown: this many leading bytes are zero and can go in
/// either layout as a message of their own; what follows begins with a word that is not zero.
pub fn zero_prefix_bytes(data: &[u8]) -> usize {
    match data.iter().position(|byte| *byte != 0) {
        None => data.len(),
        Some(position) => position,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a client answers.
    fn reply(memory: &[u8], offset: usize, count: usize, layout: Layout) -> Vec<u8> {
        let mut payload = vec![0; 16 + count];
        payload[8..12].copy_from_slice(&(count as u32).to_ne_bytes());
        let at = if layout == Layout::Narrow { 12 } else { 16 };
        payload[at..at + count].copy_from_slice(&memory[offset..offset + count]);
        payload
    }

    proptest! {
        #[test]
        fn every_read_is_understood_in_both_layouts(
            mut memory in proptest::collection::vec(prop_oneof![4 => Just(0u8), 1 => any::<u8>()], 4..64),
            narrow in any::<bool>(),
            zeros in 0usize..8,
        ) {
            let layout = if narrow { Layout::Narrow } else { Layout::Wide };
            let count = memory.len();
            let zeros = zeros.min(count / 2);
            memory[..zeros].fill(0);
            memory[count - zeros..].fill(0);
            let payload = reply(&memory, 0, count, layout);
            let known = match decode_read_reply(&payload, count, None) {
                ReadReply::Data(data, _) => { prop_assert_eq!(data, &memory[..]); return Ok(()); }
                ReadReply::Ask(offset) => layout_of_answer(&reply(&memory, offset, 4, layout)),
                ReadReply::Malformed => { prop_assert!(false); return Ok(()); }
            };
            prop_assert_eq!(known, layout);
            prop_assert_eq!(decode_read_reply(&payload, count, Some(known)), ReadReply::Data(&memory[..], Some(known)));
        }

        #[test]
        fn a_narrow_write_with_a_first_byte_is_refused_by_a_wide_client(
            data in proptest::collection::vec(any::<u8>(), 4..64), first in 1u8..,
        ) {
            let mut data = data;
            data[0] = first;
            let message = encode_write(1, 0, &data, Layout::Narrow);
            let wide_count = u64::from_ne_bytes(message[24..32].try_into().unwrap());
            prop_assert!(wide_count > (message.len() - FRAME_BYTES) as u64);
        }
    }

    #[test]
    fn replies_of_the_wrong_size_are_malformed() {
        for size in [0, 7, 8, 15, 17, 20, 24] {
            assert_eq!(
                decode_read_reply(&vec![1; size], 4 + (size == 20) as usize, None),
                ReadReply::Malformed
            );
        }
    }
}
