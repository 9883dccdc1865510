//! `DMA_READ` and `DMA_WRITE`: messages by which the device reaches memory that came without a
//! file. Encoding and decoding. Pure.
//!
//! The layout is that of the specification, of libvfio-user and of QEMU from 11.1 on: address, 64-bit
//! count, data at byte 32. Older QEMUs had a 32-bit count with the data at byte 28; their replies are
//! refused here, because the first word of the data lies where the count's upper half should be.

use crate::protocol::{HEADER_BYTES, Header, command};

/// The most bytes of one message. QEMU 11.1 cuts replies that do not fit into the socket's send
/// buffer (208 KiB by default) and loses the stream.
pub const CHUNK_BYTES_MAX: usize = 64 << 10;
/// What a message holds besides its data.
pub const FRAME_BYTES: usize = HEADER_BYTES + 16;

/// A request to read.
pub fn encode_read(id: u16, address: u64, count: usize) -> Vec<u8> {
    frame(id, command::DMA_READ, address, count, 0)
}

/// A request to write at most [`CHUNK_BYTES_MAX`] bytes.
pub fn encode_write(id: u16, address: u64, data: &[u8]) -> Vec<u8> {
    let mut message = frame(id, command::DMA_WRITE, address, data.len(), data.len());
    message.extend_from_slice(data);
    message
}

fn frame(id: u16, command: u16, address: u64, count: usize, data_bytes: usize) -> Vec<u8> {
    let size_bytes = FRAME_BYTES + data_bytes;
    let mut message = Vec::with_capacity(size_bytes);
    message.extend_from_slice(bytemuck::bytes_of(&Header::command(id, command, size_bytes as u32)));
    message.extend_from_slice(&address.to_ne_bytes());
    message.extend_from_slice(&(count as u64).to_ne_bytes());
    message
}

/// The data in the payload (all after the header) of the reply to a read of `count` bytes; `None` if
/// it is not a reply to that.
pub fn decode_read_reply(payload: &[u8], count: usize) -> Option<&[u8]> {
    let (frame, data) = payload.split_at_checked(FRAME_BYTES - HEADER_BYTES)?;
    let told: [u8; 8] = frame[8..].try_into().ok()?;
    (data.len() == count && u64::from_ne_bytes(told) == count as u64).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_has_its_data_at_byte_32() {
        let message = encode_write(0x8001, 0x1234_5678_9abc, &[7, 8, 9]);
        assert_eq!(message.len(), 35);
        assert_eq!(message[4..8], 35u32.to_ne_bytes());
        assert_eq!(message[16..24], 0x1234_5678_9abc_u64.to_ne_bytes());
        assert_eq!(message[24..32], 3u64.to_ne_bytes());
        assert_eq!(message[32..], [7, 8, 9]);
    }

    #[test]
    fn replies_of_another_size_or_layout_are_none() {
        let mut payload = [[0u8; 8], 4u64.to_ne_bytes()].concat();
        payload.extend([1, 2, 3, 4]);
        assert_eq!(decode_read_reply(&payload, 4), Some(&[1, 2, 3, 4][..]));
        for bytes in 0..payload.len() {
            assert_eq!(decode_read_reply(&payload[..bytes], 4), None);
        }
        assert_eq!(decode_read_reply(&payload, 5), None);
        // A 32-bit count, data at 28, four bytes of padding.
        payload[12..].copy_from_slice(&[1, 2, 3, 4, 0, 0, 0, 0]);
        assert_eq!(decode_read_reply(&payload, 4), None);
    }
}
