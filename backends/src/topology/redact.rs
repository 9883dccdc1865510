//! A topology without what tells one machine from another of its kind, so that it can be shown to others.

use super::{Reading, Topology};

/// Parameters whose values decide about routes, or about which driver has a device: they stay. Those that end with a dot are
/// of a module.
const TELLING: [&str; 30] = [
    "amd_iommu",
    "amdgpu.",
    "efi",
    "i915.",
    "initcall_blacklist",
    "intel_iommu",
    "iommu",
    "iommu.",
    "iommufd.",
    "isolcpus",
    "kvm.",
    "kvm_amd.",
    "kvm_intel.",
    "mem",
    "memmap",
    "modprobe.blacklist",
    "module_blacklist",
    "nomodeset",
    "nouveau.",
    "nvidia.",
    "pci",
    "pcie_aspm",
    "pcie_ports",
    "rd.driver.blacklist",
    "rd.driver.pre",
    "swiotlb",
    "vfio.",
    "vfio_iommu_type1.",
    "vfio_pci.",
    "xe.",
];

/// What stands in the place of what was left out.
const LEFT_OUT: &str = "...";

impl Topology {
    /// The same machine, fit to be shown to others: without serial numbers of cards, without the boot's id, and with a command
    /// line of which only what decides about routes and drivers is left ([`redact_command_line`]).
    ///
    /// Every verdict and every fix is the same as before. Capabilities that only a vendor understands stay as they are:
    /// what is in those is not known.
    #[must_use]
    pub fn redacted(&self) -> Self {
        let mut topology = self.clone();
        if let Reading::Known(line) = &mut topology.command_line {
            *line = redact_command_line(line);
        }
        topology.boot_id = Reading::Unread("left out".into());
        for place in &mut topology.places {
            if let Reading::Known(config) = &mut place.config {
                config.forget_serial_number();
            }
        }
        topology
    }
}

/// A kernel's command line with the names of all parameters, and the values of those alone that decide about routes and
/// drivers: `root=... intel_iommu=on ...`. A word that is no known parameter is left out.
pub fn redact_command_line(line: &str) -> String {
    let word = |word: &str| -> String {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        // The kernel takes - and _ for the same in names of parameters (`parameqn` in kernel/params.c).
        let same = name.replace('-', "_");
        let tells = |known: &str| same == known || (known.ends_with('.') && same.starts_with(known));
        match (TELLING.iter().any(|known| tells(known)), value) {
            (true, _) => word.to_owned(),
            (false, Some(_)) => format!("{name}={LEFT_OUT}"),
            (false, None) => LEFT_OUT.to_owned(),
        }
    };
    let mut words: Vec<String> = line.split_whitespace().map(word).collect();
    // Several words in a row that were left out are one gap. A value in quotes may have had spaces.
    words.dedup_by(|next, before| next == LEFT_OUT && before == LEFT_OUT);
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::ConfigSpace;
    use super::*;

    #[test]
    fn a_command_line_keeps_what_decides_and_no_more() {
        let line = "BOOT_IMAGE=/vmlinuz root=UUID=1-2 ro quiet intel_iommu=on iommu=pt pci=disable_acs_redir=pci:8086:1 \
                    vfio-pci.ids=10de:2941 amdgpu.gttsize=8 user.password=\"a b\" nomodeset";
        assert_eq!(
            redact_command_line(line),
            "BOOT_IMAGE=... root=... ... intel_iommu=on iommu=pt pci=disable_acs_redir=pci:8086:1 \
             vfio-pci.ids=10de:2941 amdgpu.gttsize=8 user.password=... ... nomodeset"
        );
        assert_eq!(redact_command_line(""), "");
    }

    /// Vital product data at 0x40, and a serial number at 0x100, cut short after six of its eight bytes.
    #[test]
    fn serial_numbers_are_zeros_and_the_rest_stays() {
        let mut bytes = vec![0x55; 0x10a];
        bytes[0x06] = 0x10;
        bytes[0x34] = 0x40;
        bytes[0x40..0x42].copy_from_slice(&[0x03, 0x00]);
        bytes[0x100..0x104].copy_from_slice(&0x0001_0003_u32.to_le_bytes());
        let before = bytes.clone();
        let mut config = ConfigSpace::new(bytes, 4096).unwrap();
        config.forget_serial_number();
        for (at, (&byte, &was)) in config.bytes().iter().zip(&before).enumerate() {
            let is_number = (0x44..0x48).contains(&at) || (0x104..0x10a).contains(&at);
            assert_eq!(byte, if is_number { 0 } else { was }, "{at:#x}");
        }
    }
}
