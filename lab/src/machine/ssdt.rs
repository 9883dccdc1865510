//! A secondary table of the firmware (SSDT): what it says of devices that the machine's own table has.
//!
//! ```text
//! Scope (\_SB.PCI0.S10.S00) {
//!     Name (_DSD, Package () { ToUUID ("daffd814-..."), Package () { Package () { "name", 0x40000000 }, .. } })
//! }
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{Name, Package, Path, Scope, Uuid};
use acpi_tables::sdt::Sdt;

/// Says that what follows are names and values (ACPI, `_DSD` Device Properties UUID).
const DEVICE_PROPERTIES: &str = "daffd814-6eba-4d8c-8a91-bc9bbf4aa301";

const HEADER_BYTES: u32 = 36;
/// From this one on a table's integers have 64 bits, if those of the machine's own table have.
const REVISION: u8 = 2;

/// What the firmware says of one device.
pub struct Properties {
    /// The device, each name of four letters: `\_SB_.PCI0.S10_.S00_`.
    pub path: String,
    /// Names and numbers.
    pub integers: Vec<(&'static str, u64)>,
}

/// The table, header and all.
pub fn table(devices: &[Properties]) -> Vec<u8> {
    let mut table = Sdt::new(*b"SSDT", HEADER_BYTES, REVISION, *b"PEERVR", *b"COHERENT", 1);
    for device in devices {
        let pairs: Vec<Package<'_>> =
            device.integers.iter().map(|(name, value)| Package::new(vec![name, value])).collect();
        let pairs = Package::new(pairs.iter().map(|pair| pair as &dyn Aml).collect());
        let uuid = Uuid::new(DEVICE_PROPERTIES);
        let name = Name::new(Path::new("_DSD"), &Package::new(vec![&uuid, &pairs]));
        let mut bytes = Vec::new();
        Scope::new(Path::new(&device.path), vec![&name]).to_aml_bytes(&mut bytes);
        table.append_slice(&bytes);
    }
    table.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_its_length_and_its_sum() {
        let one = Properties { path: "\\_SB_.PCI0.S10_.S00_".into(), integers: vec![("a", 0x4000_0000)] };
        let bytes = table(&[one]);
        assert_eq!(&bytes[..4], b"SSDT");
        assert_eq!(bytes[4..8], (bytes.len() as u32).to_le_bytes());
        assert_eq!(bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let number = [0x0c, 0, 0, 0, 0x40];
        assert!(bytes.windows(5).any(|window| window == number), "no 32-bit number in {bytes:x?}");
    }
}
