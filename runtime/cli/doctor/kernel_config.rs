//! The options that a kernel was built with, as far as they matter here.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use flate2::read::GzDecoder;
use peervram::backends::topology::Reading;

/// Every option that the doctor looks at.
pub const OPTIONS: [&str; 11] = [
    "VFIO",
    "VFIO_PCI",
    "PCI_P2PDMA",
    "VFIO_PCI_DMABUF",
    "VFIO_GROUP",
    "VFIO_CONTAINER",
    "VFIO_DEVICE_CDEV",
    "IOMMUFD",
    "IOMMUFD_VFIO_CONTAINER",
    "UDMABUF",
    "NVGRACE_GPU_VFIO_PCI",
];

/// More than any kernel's options are long.
const MAX_BYTES: u64 = 16 << 20;

/// The options of the running kernel, where it or its package has left them.
pub fn read(root: &Path, release: &str) -> Reading<BTreeMap<String, String>> {
    let mut text = String::new();
    let own = File::open(root.join("proc/config.gz"))
        .and_then(|file| GzDecoder::new(file).take(MAX_BYTES).read_to_string(&mut text));
    if own.is_ok() {
        return Reading::Known(parse(&text));
    }
    let packaged = [format!("boot/config-{release}"), format!("lib/modules/{release}/config")];
    match packaged.iter().find_map(|path| fs::read_to_string(root.join(path)).ok()) {
        Some(text) => Reading::Known(parse(&text)),
        None => Reading::Unread(format!("neither /proc/config.gz nor /boot/config-{release} can be read")),
    }
}

/// What is `y` or `m`. Options that are off stand there as comments.
fn parse(text: &str) -> BTreeMap<String, String> {
    let option = |line: &str| {
        let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
        OPTIONS.contains(&name).then(|| (name.to_owned(), value.to_owned()))
    };
    text.lines().filter_map(option).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    const TEXT: &str = "# Automatically generated\nCONFIG_VFIO=m\n# CONFIG_IOMMUFD is not set\n\
                        CONFIG_PCI_P2PDMA=y\nCONFIG_LOCALVERSION=\"=CONFIG_UDMABUF=y\"\n";

    #[test]
    fn options_are_found_packed_or_in_boot() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(read(root.path(), "7.3.4"), Reading::Unread(why) if why.contains("config-7.3.4")));

        fs::create_dir(root.path().join("boot")).unwrap();
        fs::write(root.path().join("boot/config-7.3.4"), TEXT).unwrap();
        let options = read(root.path(), "7.3.4").known().unwrap().clone();
        assert_eq!(options.keys().map(String::as_str).collect::<Vec<_>>(), ["PCI_P2PDMA", "VFIO"]);
        assert_eq!(options["VFIO"], "m");

        fs::create_dir(root.path().join("proc")).unwrap();
        let file = File::create(root.path().join("proc/config.gz")).unwrap();
        let mut packed = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        packed.write_all(b"CONFIG_VFIO_PCI_DMABUF=y\n").unwrap();
        packed.finish().unwrap();
        assert!(read(root.path(), "7.3.4").known().unwrap().contains_key("VFIO_PCI_DMABUF"));
    }

    #[test]
    fn what_is_not_packed_is_not_read() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/config.gz"), "CONFIG_VFIO=y\n").unwrap();
        assert!(matches!(read(root.path(), "7.3.4"), Reading::Unread(_)));
    }
}
