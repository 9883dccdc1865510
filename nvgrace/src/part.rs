//! `Part`: which GPU it is, by its PCI id.

/// NVIDIA's PCI vendor id.
pub(crate) const NVIDIA: u16 = 0x10de;

/// A GPU of the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Part {
    /// Its PCI device id; the vendor is NVIDIA.
    pub device_id: u16,
    /// What it is called.
    pub name: &'static str,
}

/// The GPUs that the kernel's driver takes by itself: `nvgrace_gpu_vfio_pci_table`, Linux 7.3.
pub const PARTS: &[Part] = &[
    Part { device_id: 0x2342, name: "GH200 120GB" },
    Part { device_id: 0x2345, name: "GH200 480GB" },
    Part { device_id: 0x2348, name: "GH200" },
    Part { device_id: 0x2941, name: "GB200" },
    Part { device_id: 0x31c2, name: "GB300" },
];

impl Part {
    /// The one with those ids. None says little: the kernel's table grows, and whoever sets `driver_override`
    /// binds what they like.
    pub fn of(vendor_id: u16, device_id: u16) -> Option<Self> {
        let is_it = |part: &&Part| vendor_id == NVIDIA && part.device_id == device_id;
        PARTS.iter().find(is_it).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_by_both_ids() {
        assert_eq!(Part::of(0x10de, 0x2941).unwrap().name, "GB200");
        assert_eq!(Part::of(0x1234, 0x2941), None);
        assert_eq!(Part::of(0x10de, 0x2330), None, "an H100 with a PCIe connector is another family");
    }

    #[test]
    fn each_part_is_listed_once() {
        for (at, part) in PARTS.iter().enumerate() {
            assert!(PARTS[at + 1..].iter().all(|other| other.device_id != part.device_id), "{part:?}");
        }
    }
}
