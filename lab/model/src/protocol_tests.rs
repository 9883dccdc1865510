//! The decoder, by example and by random bytes.

use super::*;
use proptest::prelude::*;

#[test]
fn an_error_reply_never_says_zero() {
    let header = Header::command(7, command::DMA_MAP, 48);
    let reply = header.error_reply(Errno::INVAL);
    assert_eq!((reply.id, reply.flags, reply.error, reply.size_bytes), (7, 0x21, 22, 16));
    assert_eq!(Header { error: 0, ..reply }.errno(), Some(Errno::IO));
}

#[test]
fn a_window_at_the_end_of_the_address_space_is_legal_and_one_byte_more_is_not() {
    let map = |address: u64, size: u64| {
        let mut payload = [32u32, 3].map(u32::to_ne_bytes).concat();
        payload.extend([0, address, size].map(u64::to_ne_bytes).concat());
        Request::decode(command::DMA_MAP, &payload, 0).map(|_| ())
    };
    assert_eq!(map(u64::MAX - 4095, 4096), Ok(()));
    assert_eq!(map(u64::MAX - 4095, 4097), Err(Errno::OVERFLOW));
    assert_eq!(map(0, 0), Err(Errno::INVAL));
}

#[test]
fn counts_are_checked_before_anything_is_allocated() {
    let mut payload = 0u64.to_ne_bytes().to_vec();
    payload.extend([0, u32::MAX].map(u32::to_ne_bytes).concat());
    assert_eq!(Request::decode(command::REGION_READ, &payload, 0), Err(Errno::TOOBIG));
    assert_eq!(Request::decode(command::REGION_WRITE, &payload, 0), Err(Errno::TOOBIG));
}

proptest! {
    #[test]
    fn any_bytes_are_a_request_or_an_errno(
        command in 0u16..24,
        payload in proptest::collection::vec(any::<u8>(), 0..96),
        fds in 0usize..20,
    ) {
        match Request::decode(command, &payload, fds) {
            Ok(Request::DmaMap(map)) => prop_assert!(map.address.checked_add(map.size_bytes - 1).is_some()),
            Ok(Request::RegionRead { count, .. }) => prop_assert!(count <= DATA_BYTES_MAX),
            Ok(Request::SetIrqs(set)) => prop_assert!(set.start.checked_add(set.count).is_some()),
            Ok(_) => {}
            Err(errno) => prop_assert!(errno.raw_os_error() > 0),
        }
    }
}
