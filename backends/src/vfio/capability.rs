//! The list of capabilities in configuration space: where in it a capability lies. Pure.
//!
//! The list is the device's own, as VFIO shows it. It is walked as something that may be wrong: it ends,
//! goes in circles, or reads as all ones because the device is gone.

use crate::{Error, Kind, Result};

// include/uapi/linux/pci_regs.h
const PCI_STATUS: u64 = 0x06;
const PCI_STATUS_CAP_LIST: u16 = 1 << 4;
const PCI_CAPABILITY_LIST: u64 = 0x34;
/// The standard header: no capability begins inside it.
const PCI_STD_HEADER_SIZEOF: u8 = 0x40;
/// As many as have room in 192 bytes (drivers/pci/pci.c, PCI_FIND_CAP_TTL).
const CAPABILITIES_MAX: usize = 48;

/// The offset of the first capability `id`, or none. `read_word` reads two bytes of configuration space.
pub(super) fn find_capability(read_word: impl Fn(u64) -> Result<u16>, id: u8) -> Result<Option<u8>> {
    const TRIED: &str = "find a capability of a device";
    let status = read_word(PCI_STATUS)?;
    if status == u16::MAX {
        return Err(Error::new(Kind::Gone, TRIED, "its configuration reads as all ones")
            .next("the device is gone, or no longer answers: reset it, or rescan the bus"));
    }
    if status & PCI_STATUS_CAP_LIST == 0 {
        return Ok(None);
    }
    let [mut at, _] = read_word(PCI_CAPABILITY_LIST)?.to_le_bytes();
    // And once more, to see that the last of so many is the last.
    for _ in 0..=CAPABILITIES_MAX {
        // The low two bits are reserved, and to be masked.
        at &= !3;
        if at < PCI_STD_HEADER_SIZEOF {
            return Ok(None);
        }
        let [found, next] = read_word(at.into())?.to_le_bytes();
        match found {
            // As the kernel does: PCI_FIND_NEXT_CAP ends where a device stops answering.
            0xFF => return Ok(None),
            found if found == id => return Ok(Some(at)),
            _ => at = next,
        }
    }
    Err(Error::new(Kind::Unsupported, TRIED, "its list of capabilities has no end"))
}

/// What the above says of the kernel's header.
#[cfg(all(test, feature = "host"))]
pub(super) fn claims() -> [(&'static str, usize); 4] {
    [
        ("PCI_STATUS", PCI_STATUS as usize),
        ("PCI_STATUS_CAP_LIST", PCI_STATUS_CAP_LIST.into()),
        ("PCI_CAPABILITY_LIST", PCI_CAPABILITY_LIST as usize),
        ("PCI_STD_HEADER_SIZEOF", PCI_STD_HEADER_SIZEOF.into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A configuration space with `(offset, id, next)` in its list, the first of them at its head.
    fn space(capabilities: &[(u8, u8, u8)]) -> [u8; 256] {
        let mut bytes = [0; 256];
        bytes[PCI_STATUS as usize] = PCI_STATUS_CAP_LIST as u8;
        bytes[PCI_CAPABILITY_LIST as usize] = capabilities.first().map_or(0, |&(offset, ..)| offset);
        for &(offset, id, next) in capabilities {
            let at = usize::from(offset & !3);
            (bytes[at], bytes[at + 1]) = (id, next);
        }
        bytes
    }

    fn find(bytes: &[u8; 256], id: u8) -> Result<Option<u8>> {
        let read = |offset: u64| {
            let at = offset as usize;
            Ok(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
        };
        find_capability(read, id)
    }

    #[test]
    fn each_capability_of_a_list_is_found() {
        // The second pointer has its reserved bits set.
        let bytes = space(&[(0x40, 0x01, 0x53), (0x50, 0x10, 0x90), (0x90, 0x11, 0)]);
        assert_eq!(find(&bytes, 0x01).unwrap(), Some(0x40));
        assert_eq!(find(&bytes, 0x10).unwrap(), Some(0x50));
        assert_eq!(find(&bytes, 0x11).unwrap(), Some(0x90));
        assert_eq!(find(&bytes, 0x13).unwrap(), None);
    }

    #[test]
    fn a_list_that_fills_all_the_room_is_walked_to_its_end() {
        let list: Vec<(u8, u8, u8)> = (0x40_u8..=0xfc)
            .step_by(4)
            .map(|at| (at, if at == 0xfc { 0x01 } else { 0x09 }, at.wrapping_add(4)))
            .collect();
        assert_eq!(list.len(), CAPABILITIES_MAX);
        assert_eq!(find(&space(&list), 0x01).unwrap(), Some(0xfc));
        assert_eq!(find(&space(&list), 0x02).unwrap(), None);
    }

    #[test]
    fn the_first_of_two_is_found() {
        let bytes = space(&[(0x80, 0x01, 0x40), (0x40, 0x01, 0)]);
        assert_eq!(find(&bytes, 0x01).unwrap(), Some(0x80));
    }

    #[test]
    fn a_device_without_a_list_has_none() {
        let mut bytes = space(&[(0x40, 0x01, 0)]);
        bytes[PCI_STATUS as usize] = 0;
        assert_eq!(find(&bytes, 0x01).unwrap(), None);
        assert_eq!(find(&space(&[]), 0x01).unwrap(), None);
    }

    #[test]
    fn lists_in_circles_are_refused() {
        for list in [&[(0x40, 0x05, 0x40)][..], &[(0x40, 0x05, 0x60), (0x60, 0x11, 0x40)]] {
            assert_eq!(find(&space(list), 0x01).unwrap_err().kind(), Kind::Unsupported);
        }
    }

    #[test]
    fn a_list_that_leads_into_the_header_ends() {
        assert_eq!(find(&space(&[(0x40, 0x05, 0x10)]), 0x01).unwrap(), None);
    }

    #[test]
    fn a_device_that_is_gone_is_said_to_be() {
        assert_eq!(find(&[0xFF; 256], 0x01).unwrap_err().kind(), Kind::Gone);
        // The device went away while it was being read.
        let mut bytes = space(&[(0x40, 0x05, 0xFC)]);
        bytes[0xFC..].fill(0xFF);
        assert_eq!(find(&bytes, 0x01).unwrap(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 256), id: u8) {
            let bytes: [u8; 256] = bytes.try_into().unwrap();
            if let Ok(Some(at)) = find(&bytes, id) {
                prop_assert!(at >= PCI_STD_HEADER_SIZEOF && at % 4 == 0 && bytes[usize::from(at)] == id);
            }
        }
    }
}
