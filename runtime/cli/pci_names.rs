//! Names of PCI devices, from the machine's own `pci.ids` where it has one.

use std::fs;

/// Where distributions keep it: hwdata, pciutils.
const FILES: [&str; 2] = ["/usr/share/hwdata/pci.ids", "/usr/share/misc/pci.ids"];

/// The list, empty where the machine has none.
pub struct PciNames(String);

impl PciNames {
    pub fn load() -> Self {
        let read = FILES.iter().find_map(|path| fs::read(path).ok());
        Self(read.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default())
    }

    /// "Vendor Device", as much of it as is known.
    pub fn name(&self, vendor_id: u16, device_id: u16) -> Option<String> {
        let (vendor_prefix, device_prefix) = (format!("{vendor_id:04x}  "), format!("\t{device_id:04x}  "));
        let mut lines = self.0.lines();
        let vendor = lines.find_map(|line| line.strip_prefix(&vendor_prefix))?;
        let device = lines
            .take_while(|line| line.starts_with(['\t', '#']) || line.is_empty())
            .find_map(|line| line.strip_prefix(&device_prefix));
        Some(device.map_or_else(|| vendor.to_owned(), |device| format!("{vendor} {device}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_below_their_vendor() {
        let names = PciNames(
            "# list\n10de  NVIDIA\n\t2342  GH200\n\t\t10de 16eb  board\n1af4  Red Hat\n\t1110  ivshmem\n"
                .into(),
        );
        assert_eq!(names.name(0x10de, 0x2342).as_deref(), Some("NVIDIA GH200"));
        assert_eq!(names.name(0x1af4, 0x2342).as_deref(), Some("Red Hat"));
        assert_eq!(names.name(0x1af4, 0x1110).as_deref(), Some("Red Hat ivshmem"));
        assert_eq!(names.name(0x8086, 0x1110), None);
    }
}
