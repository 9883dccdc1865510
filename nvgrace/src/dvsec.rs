//! The capabilities that a vendor designates (DVSEC), in an extended configuration space. Pure.
//!
//! The list is walked as something that may be wrong: it ends, goes in circles, or reads as all ones, and then links to
//! where no header has room.

// include/uapi/linux/pci_regs.h
const PCI_CFG_SPACE_SIZE: usize = 0x100;
const PCI_EXT_CAP_ID_DVSEC: u32 = 0x23;
const PCI_DVSEC_HEADER1: usize = 0x4;
const PCI_DVSEC_HEADER2: usize = 0x8;

/// Where the capability of that vendor and id begins (`pci_find_dvsec_capability`).
pub(crate) fn find(config: &[u8], vendor_id: u16, id: u16) -> Option<usize> {
    let mut at = PCI_CFG_SPACE_SIZE;
    // Bounded by the number of capabilities that fit, so a cyclic list ends.
    for _ in 0..config.len() / 8 {
        let header = word(config, at)?;
        if header & 0xffff == PCI_EXT_CAP_ID_DVSEC {
            let found_vendor = word(config, at + PCI_DVSEC_HEADER1)? & 0xffff;
            let found_id = word(config, at + PCI_DVSEC_HEADER2)? & 0xffff;
            if found_vendor == u32::from(vendor_id) && found_id == u32::from(id) {
                return Some(at);
            }
        }
        at = header as usize >> 20;
        if at < PCI_CFG_SPACE_SIZE {
            return None;
        }
    }
    None
}

fn word(config: &[u8], at: usize) -> Option<u32> {
    config.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space(capabilities: &[(usize, u32, u16, u16, usize)]) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        for &(at, id, vendor, dvsec, next) in capabilities {
            bytes[at..at + 4].copy_from_slice(&(id | 1 << 16 | (next as u32) << 20).to_le_bytes());
            bytes[at + 4..at + 6].copy_from_slice(&vendor.to_le_bytes());
            bytes[at + 8..at + 10].copy_from_slice(&dvsec.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn one_of_several_is_found() {
        let bytes = space(&[
            (0x100, 0x23, 0x10de, 3, 0x140),
            (0x140, 0x15, 0x1e98, 0, 0x180),
            (0x180, 0x23, 0x1e98, 7, 0x1c0),
            (0x1c0, 0x23, 0x1e98, 0, 0),
        ]);
        assert_eq!(find(&bytes, 0x10de, 3), Some(0x100));
        assert_eq!(find(&bytes, 0x1e98, 0), Some(0x1c0));
        assert_eq!(find(&bytes, 0x1e98, 8), None);
    }

    #[test]
    fn what_is_no_list_has_none() {
        assert_eq!(find(&[0xff; 4096], 0x10de, 3), None);
        assert_eq!(find(&[0; 256], 0x10de, 3), None);
        assert_eq!(find(&space(&[(0x100, 0x15, 0, 0, 0x100)]), 0x10de, 3), None);
        assert_eq!(find(&space(&[(0x100, 0x15, 0, 0, 0xffc)]), 0x10de, 3), None);
        // What lies before the list is none of it, though it looks so.
        assert_eq!(find(&space(&[(0x100, 0x15, 0, 0, 0), (0, 0x23, 0x10de, 3, 0)]), 0x10de, 3), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            if let Some(at) = find(&bytes, 0x10de, 3) {
                prop_assert!(at >= PCI_CFG_SPACE_SIZE && at + 12 <= bytes.len());
            }
        }
    }
}
