//! `PciId`: what a PCI function calls itself.

use serde::{Deserialize, Serialize};

/// A PCI function's vendor and device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciId {
    /// The vendor.
    pub vendor: u16,
    /// The vendor's number for the device.
    pub device: u16,
}

impl PciId {
    /// QEMU's `ivshmem-plain`.
    pub const SHARED_MEMORY: PciId = PciId { vendor: 0x1af4, device: 0x1110 };
    /// What a model GPU calls itself where nobody looks for another one.
    pub const MODEL: PciId = PciId { vendor: 0x1234, device: 0x5047 };
    /// A modern virtio GPU.
    pub(super) const VIRTIO_GPU: PciId = PciId { vendor: 0x1af4, device: 0x1050 };
    /// QEMU's NVMe controller.
    pub(super) const CARD: PciId = PciId { vendor: 0x1b36, device: 0x0010 };
    /// Intel's 82576, QEMU's igb.
    pub(super) const NETWORK_CARD: PciId = PciId { vendor: 0x8086, device: 0x10c9 };
}

impl std::fmt::Display for PciId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "{:04x}:{:04x}", self.vendor, self.device)
    }
}
