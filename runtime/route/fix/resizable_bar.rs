//! A BAR that shows less of the memory than it could.

use peervram_backends::PciAddress;
use peervram_backends::topology::Topology;

use super::{Fix, FixKind, Needs, rebind};

/// Resizes the largest BAR of a device that can be larger.
pub(super) fn resize(topology: &Topology, address: PciAddress) -> Option<Fix> {
    let place = topology.place(address)?;
    let config = place.config.known().filter(|config| !config.is_all_ones())?;
    let bars = config.resizable_bars().found()?;
    let bar = bars.iter().max_by_key(|bar| bar.sizes_bytes.last())?;
    let &largest_bytes = bar.sizes_bytes.last().filter(|&&largest| largest > bar.now_bytes)?;
    let mebi = |bytes: u64| bytes >> 20;
    let sizes: Vec<String> = bar.sizes_bytes.iter().map(|&bytes| mebi(bytes).to_string()).collect();
    // The number that the file takes is the power of two of mebibytes (`pci_rebar_bytes_to_size`).
    let number = mebi(largest_bytes).ilog2();
    let file = format!("/sys/bus/pci/devices/{address}/resource{}_resize", bar.index);
    Some(Fix {
        kind: FixKind::ResizeBar,
        what: format!(
            "BAR {} of {address} shows {} MiB and could show {} (it can have {} MiB). No driver may be bound while \
             it changes, vfio-pci neither. Where there is no room: \"Above 4G Decoding\" and \"Re-Size BAR Support\" \
             in the firmware",
            bar.index,
            mebi(bar.now_bytes),
            mebi(largest_bytes),
            sizes.join(", "),
        ),
        commands: rebind(topology, address, &[format!("echo {number} > {file}")]),
        price: "the device loses its driver for a moment, and other BARs below the same bridge may move; until the \
                next boot"
            .into(),
        needs: Needs::Rebinding,
        then: None,
        groups: None,
    })
}
