//! The IOMMU between the importer and the host bridge.

use peervram_backends::PciAddress;
use peervram_backends::topology::{MapType, SEVERAL_RANGES, Topology};

use super::super::Route;
use super::{Fix, FixKind, Needs, on_the_command_line};

/// Through an IOMMU that translates, only the first of several ranges arrives, where the kernel has the fault
/// [`SEVERAL_RANGES`].
pub(super) fn passthrough(topology: &Topology, route: &Route, client: PciAddress) -> Option<Fix> {
    let place = topology.place(client)?;
    let is_translated = place.iommu_domain.as_deref().is_some_and(|domain| domain.starts_with("DMA"));
    if !topology.has_fault(&SEVERAL_RANGES)
        || route.map_type() != Some(MapType::ThroughHostBridge)
        || !is_translated
    {
        return None;
    }
    Some(Fix {
        kind: FixKind::Passthrough,
        what: "To import several ranges as one buffer: the kernel maps only the first of them through an IOMMU and a \
               host bridge. Export one range, or add to the kernel's command line"
            .into(),
        commands: on_the_command_line("iommu=pt"),
        price: "devices of kernel drivers reach all memory, not only what they were given; those of VFIO stay \
                confined"
            .into(),
        needs: Needs::Reboot,
        then: Some(MapType::ThroughHostBridge),
        groups: None,
    })
}
