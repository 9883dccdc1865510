//! What `/proc/PID/fd`, `/proc/PID/fdinfo` and `/proc/PID/maps` say of one open file.

use std::path::Path;

use crate::PciAddress;

/// What a link of `/proc/PID/fd`, or the last column of `/proc/PID/maps`, names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum File {
    /// A dma-buf (`dmabuffs_dname`), whatever it is called.
    DmaBuf,
    /// A VFIO device opened through its group (`vfio_device_open_file`); which one, the link does not say.
    VfioOfGroup,
    /// A VFIO device's own character device: `vfio0`.
    VfioCdev(String),
    /// An IOMMU group, by its number: `/dev/vfio/26`, or `/dev/vfio/noiommu-26` where no IOMMU is behind it.
    VfioGroup(u32),
    /// A DRM node: `card0`, `renderD128`.
    DrmNode(String),
    /// An iommufd, which imports dma-bufs for the DMA of VFIO devices.
    Iommufd,
}

impl File {
    /// Nothing for files that hold no memory of devices.
    pub(super) fn named(link: &str) -> Option<Self> {
        // What proc appends to the path of a node that is gone: a device whose driver is being unbound.
        let link = link.strip_suffix(" (deleted)").unwrap_or(link);
        let below = |folder: &str| link.strip_prefix(folder).filter(|name| !name.contains('/'));
        if link.starts_with("/dmabuf:") {
            Some(Self::DmaBuf)
        } else if link == "anon_inode:[vfio-device]" {
            Some(Self::VfioOfGroup)
        } else if let Some(name) = below("/dev/vfio/devices/") {
            Some(Self::VfioCdev(name.to_owned()))
        } else if let Some(name) = below("/dev/vfio/") {
            // The container, `/dev/vfio/vfio`, is no group.
            name.strip_prefix("noiommu-").unwrap_or(name).parse().ok().map(Self::VfioGroup)
        } else if let Some(name) = below("/dev/dri/") {
            Some(Self::DrmNode(name.to_owned()))
        } else if link == "/dev/iommu" {
            Some(Self::Iommufd)
        } else {
            None
        }
    }
}

/// The fdinfo of a dma-buf (`dma_buf_show_fdinfo`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DmaBufInfo {
    pub inode: u64,
    pub size_bytes: u64,
    pub references: u64,
    pub exporter_name: String,
    pub name: Option<String>,
}

impl DmaBufInfo {
    /// Nothing if the text is not that of a dma-buf.
    pub(super) fn parse(fdinfo: &str) -> Option<Self> {
        Some(Self {
            inode: value(fdinfo, "ino:")?.parse().ok()?,
            size_bytes: value(fdinfo, "size:")?.parse().ok()?,
            references: value(fdinfo, "count:")?.parse().ok()?,
            exporter_name: value(fdinfo, "exp_name:")?.to_owned(),
            name: value(fdinfo, "name:").map(str::to_owned),
        })
    }
}

const VFIO_DEVICE: &str = "vfio-device-syspath:";

/// Whether the fdinfo of a VFIO device names it (`vfio_device_show_fdinfo`).
pub(super) fn names_vfio_device(fdinfo: &str) -> bool {
    value(fdinfo, VFIO_DEVICE).is_some()
}

/// Which PCI function the fdinfo of a VFIO device is of, if any: a mediated device is none.
pub(super) fn vfio_function(fdinfo: &str) -> Option<PciAddress> {
    function_at(Path::new(value(fdinfo, VFIO_DEVICE)?))
}

/// The PCI function that a path in sysfs leads to.
pub(super) fn function_at(path: &Path) -> Option<PciAddress> {
    function_named(path.file_name()?.to_str()?)
}

/// The PCI function that the kernel calls so, always with its domain.
pub(super) fn function_named(name: &str) -> Option<PciAddress> {
    let address: PciAddress = name.parse().ok()?;
    (address.to_string() == name).then_some(address)
}

/// The first one counts: a dma-buf's name comes last and may contain line breaks.
fn value<'text>(fdinfo: &'text str, key: &str) -> Option<&'text str> {
    fdinfo.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

/// A mapping of a file that holds memory of devices, and the file's inode number.
pub(super) fn parse_maps(maps: &str) -> Vec<(File, u64)> {
    // "start-end perms offset major:minor inode   path"
    let parse = |line: &str| {
        let mut rest = line;
        let mut words = [""; 5];
        for word in &mut words {
            (*word, rest) = rest.trim_start().split_once(' ')?;
        }
        Some((File::named(rest.trim_start())?, words[4].parse().ok()?))
    };
    maps.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn links_are_told_apart() {
        for (link, file) in [
            ("/dmabuf:", Some(File::DmaBuf)),
            ("/dmabuf:peervram 0000:01:00.0", Some(File::DmaBuf)),
            ("anon_inode:[vfio-device]", Some(File::VfioOfGroup)),
            ("/dev/vfio/devices/vfio3", Some(File::VfioCdev("vfio3".into()))),
            ("/dev/vfio/devices/vfio3 (deleted)", Some(File::VfioCdev("vfio3".into()))),
            ("/dev/dri/renderD128", Some(File::DrmNode("renderD128".into()))),
            ("/dev/iommu", Some(File::Iommufd)),
            ("/dev/dri/by-path/pci-0000:01:00.0-card", None),
            ("/dev/vfio/26", Some(File::VfioGroup(26))),
            ("/dev/vfio/noiommu-3", Some(File::VfioGroup(3))),
            ("/dev/vfio/vfio", None),
            ("/elsewhere/dmabuf:", None),
            ("pipe:[12]", None),
            ("", None),
        ] {
            assert_eq!(File::named(link), file, "{link}");
        }
    }

    #[test]
    fn the_fdinfo_of_a_dma_buf_is_read() {
        let text = "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t7\nsize:\t16777216\ncount:\t2\n\
                    exp_name:\tvfio_pci_core\n";
        let info = DmaBufInfo::parse(text).unwrap();
        assert_eq!((info.inode, info.size_bytes, info.references), (7, 16 << 20, 2));
        assert_eq!((info.exporter_name.as_str(), info.name), ("vfio_pci_core", None));
        let named = DmaBufInfo::parse(&format!("{text}name:\tpeervram 0000:01:00.0\nino:\t8\n")).unwrap();
        assert_eq!(named.name.as_deref(), Some("peervram 0000:01:00.0"));
        assert_eq!(named.inode, 7, "a name cannot overrule what came before it");
        assert_eq!(DmaBufInfo::parse("pos:\t0\nino:\t7\n"), None);
    }

    #[test]
    fn the_fdinfo_of_a_vfio_device_names_its_function() {
        let of = |path: &str| vfio_function(&format!("pos:\t0\nino:\t1\nvfio-device-syspath: {path}\n"));
        assert_eq!(of("/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"), "0000:01:00.0".parse().ok());
        assert_eq!(of("/sys/devices/pci0000:00/0000:01:00.0/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"), None);
        assert_eq!(vfio_function("pos:\t0\n"), None);
    }

    #[test]
    fn mappings_are_read() {
        let text = "\
            55d0-55d1 r-xp 00000000 fe:00 1234                       /usr/bin/a program\n\
            7f00-7f10 rw-s 20000000000 00:0f 1061                    anon_inode:[vfio-device]\n\
            7f10-7f20 rw-s 20000000000 00:06 410                     /dev/vfio/devices/vfio0\n\
            7f20-7f30 rw-s 00000000 00:0d 9                          /dmabuf:\n\
            7f30-7f40 rw-p 00000000 00:00 0 \n\
            7f40-7f50 rw-p 00000000 00:00 0\n\
            7ffc-7ffd rw-p 00000000 00:00 0                          [stack]\n";
        let expected = [(File::VfioOfGroup, 1061), (File::VfioCdev("vfio0".into()), 410), (File::DmaBuf, 9)];
        assert_eq!(parse_maps(text), expected);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in r"(?s).{0,200}", lines in proptest::collection::vec(r"[a-z_]{1,12}:?[\t ][0-9a-f/.: ]{0,40}", 0..12)) {
            let lines = lines.join("\n");
            for text in [&text, &lines] {
                DmaBufInfo::parse(text);
                vfio_function(text);
                parse_maps(text);
                File::named(text);
            }
        }
    }
}
