//! The kernel's list of host bridges that forward peer-to-peer requests, as data.
//!
//! `pci_p2pdma_whitelist` in `drivers/pci/p2pdma.c`. A host bridge is known by the first device on its
//! root bus. Kernels before 6.19 export no VFIO dma-bufs, so that their lists do not matter here.
//!
//! What was read, and what differs:
//!
//! | release | the list | the rule around it |
//! |---|---|---|
//! | a tree after 6.19, of the time of 7.0 | without Intel's accelerators, without NVIDIA's CPUs | the same |
//! | 7.1.3 | Intel's accelerators are new ("PCI/P2PDMA: Add Intel QAT, DSA, IAA devices to whitelist", upstream in 7.2, taken over by 7.1.3) | not read |
//! | 7.2.6, 7.2.12 | the same | the same |
//! | 7.3.4 | NVIDIA's CPUs are new | the same |
//!
//! A distribution may take rows over into older kernels, which nothing shows from outside: there the kernel
//! may allow what is predicted to be refused.

/// A release of Linux: 7.3.4.
pub type Release = (u32, u32, u32);

/// The first release whose VFIO exports dma-bufs.
const FIRST: Release = (6, 19, 0);

/// Intel's accelerators, each the first device of a root bus of its own.
const ACCELERATORS: Release = (7, 1, 3);

/// NVIDIA's CPUs.
const NVIDIA_CPUS: Release = (7, 3, 0);

const INTEL: u16 = 0x8086;
const GOOGLE: u16 = 0x1ae0;
const NVIDIA: u16 = 0x10de;

/// A row of the kernel's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostBridge {
    /// The vendor of the first device on the root bus.
    pub vendor_id: u16,
    /// Its device id; none for all of the vendor.
    pub device_id: Option<u16>,
    /// Whether both devices must be below this same host bridge (`REQ_SAME_HOST_BRIDGE`).
    pub same_host_bridge: bool,
    /// What it is, in the kernel's words.
    pub what: &'static str,
    /// The first release that has the row; the first that matters here if it is older.
    pub since: Release,
}

const LIST: [HostBridge; 25] = [
    HostBridge { same_host_bridge: true, ..intel(0x3c00, "Intel Xeon E5/Core i7") },
    HostBridge { same_host_bridge: true, ..intel(0x3c01, "Intel Xeon E5/Core i7") },
    HostBridge { same_host_bridge: true, ..intel(0x2f00, "Intel Xeon E7 v3/Xeon E5 v3/Core i7") },
    HostBridge { same_host_bridge: true, ..intel(0x2f01, "Intel Xeon E7 v3/Xeon E5 v3/Core i7") },
    intel(0x2030, "Intel Skylake-E"),
    intel(0x2031, "Intel Skylake-E"),
    intel(0x2032, "Intel Skylake-E"),
    intel(0x2033, "Intel Skylake-E"),
    intel(0x2020, "Intel Skylake-E"),
    intel(0x09a2, "Intel Skylake-E"),
    accelerator(0x0b25, "Intel DSA, Sapphire Rapids"),
    accelerator(0x0cfe, "Intel IAX, Sapphire Rapids"),
    accelerator(0x11fb, "Intel DSA, Granite Rapids D"),
    accelerator(0x1212, "Intel DSA, Diamond Rapids"),
    accelerator(0x1216, "Intel IAA, Diamond Rapids"),
    accelerator(0x4940, "Intel QAT 4xxx"),
    accelerator(0x4942, "Intel QAT 401xx"),
    accelerator(0x4944, "Intel QAT 402xx"),
    accelerator(0x4946, "Intel QAT 420xx"),
    accelerator(0x4948, "Intel QAT 6xxx"),
    HostBridge { vendor_id: GOOGLE, device_id: None, ..intel(0, "Google SoC") },
    nvidia(0x2f95),
    nvidia(0x2f96),
    nvidia(0x2f97),
    nvidia(0x2f98),
];

const fn intel(device_id: u16, what: &'static str) -> HostBridge {
    HostBridge { vendor_id: INTEL, device_id: Some(device_id), same_host_bridge: false, what, since: FIRST }
}

const fn accelerator(device_id: u16, what: &'static str) -> HostBridge {
    HostBridge { since: ACCELERATORS, ..intel(device_id, what) }
}

const fn nvidia(device_id: u16) -> HostBridge {
    HostBridge { vendor_id: NVIDIA, since: NVIDIA_CPUS, ..intel(device_id, "Nvidia CPU") }
}

/// The row of that device in the list of `release`.
pub fn listed(vendor_id: u16, device_id: u16, release: Release) -> Option<&'static HostBridge> {
    LIST.iter().find(|row| {
        row.vendor_id == vendor_id && row.device_id.is_none_or(|id| id == device_id) && row.since <= release
    })
}

/// Every release with which the list changed, the first one included.
pub fn list_releases() -> Vec<Release> {
    let mut releases: Vec<Release> = LIST.iter().map(|row| row.since).chain([FIRST]).collect();
    releases.sort_unstable();
    releases.dedup();
    releases
}

/// The row of that device in the newest list that is known here.
pub fn listed_at_last(vendor_id: u16, device_id: u16) -> Option<&'static HostBridge> {
    listed(vendor_id, device_id, (u32::MAX, 0, 0))
}

/// The release in a string like "7.3.4+deb13-amd64". A first candidate, "7.3-rc1", counts as 7.3.0.
pub fn parse_release(text: &str) -> Option<Release> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let mut numbers = text[..end].split('.');
    let (major, minor) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
    let patch = numbers.next().filter(|digits| !digits.is_empty());
    Some((major, minor, patch.map_or(Some(0), |digits| digits.parse().ok())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found() {
        let row = |vendor, device| listed(vendor, device, (7, 3, 4));
        for row in LIST {
            let alone = [0x3c00, 0x3c01, 0x2f00, 0x2f01].map(Some).contains(&row.device_id);
            assert_eq!(row.same_host_bridge, alone, "{row:x?}");
        }
        assert_eq!(row(INTEL, 0x3c00).unwrap().device_id, Some(0x3c00));
        assert_eq!(row(INTEL, 0x2030).unwrap().device_id, Some(0x2030));
        assert!(row(GOOGLE, 0x1234).is_some());
        assert!(row(NVIDIA, 0x2f98).is_some() && row(NVIDIA, 0x2f99).is_none());
        assert_eq!(row(INTEL, 0x29c0), None);
    }

    #[test]
    fn lists_grew_with_releases() {
        let has = |vendor, device, release| listed(vendor, device, release).is_some();
        for release in [(6, 19, 0), (7, 0, 14), (7, 1, 2)] {
            assert!(has(INTEL, 0x09a2, release) && has(GOOGLE, 0x1234, release), "{release:?}");
            assert!(!has(INTEL, 0x11fb, release) && !has(NVIDIA, 0x2f95, release), "{release:?}");
        }
        assert!(has(INTEL, 0x11fb, (7, 1, 3)) && has(INTEL, 0x4948, (7, 2, 0)));
        assert!(!has(NVIDIA, 0x2f95, (7, 2, 12)) && has(NVIDIA, 0x2f95, (7, 3, 0)));
        assert_eq!(list_releases(), [(6, 19, 0), (7, 1, 3), (7, 3, 0)]);
        assert_eq!(listed_at_last(NVIDIA, 0x2f95).unwrap().since, (7, 3, 0));
    }

    #[test]
    fn releases_are_read() {
        assert_eq!(parse_release("7.3.4+deb13-amd64"), Some((7, 3, 4)));
        assert_eq!(parse_release("6.19-rc1"), Some((6, 19, 0)));
        assert_eq!(parse_release("7.3"), Some((7, 3, 0)));
        assert_eq!(parse_release("7.3.4.5-custom"), Some((7, 3, 4)));
        for text in ["linux", "", "7", "7.", "7.x", "99999999999.1", "7.3.99999999999"] {
            assert_eq!(parse_release(text), None, "{text}");
        }
    }
}
