//! `/sys/kernel/debug/dma_buf/bufinfo`: every dma-buf of the machine, with the devices attached to it.
//!
//! The format is that of `dma_buf_debug_show` (`drivers/dma-buf/dma-buf.c`):
//!
//! ```text
//! Dma-buf Objects:
//! size     flags     mode      count     exp_name  ino       name
//! 16777216 00080002  00080007  00000003  vfio_pci_core  00000007  peervram 0000:01:00.0
//!     write fence:12:3 virtio_gpu ... unsignalled
//!     Attached Devices:
//!     0000:02:00.0
//! Total 1 devices attached
//! ```
//!
//! A debug file has no format to rely on, and a buffer's name is whatever its owner wrote, with line
//! breaks if it likes: what does not look like a row, or like a name below one, is passed over. Whoever may
//! make dma-bufs can so write rows that are none: what is read here tells people, and decides nothing.

use super::Attached;

/// One dma-buf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub size_bytes: u64,
    /// How many references its file has: descriptors, importers, mappings, messages in sockets.
    pub references: u64,
    pub exporter_name: String,
    pub inode: u64,
    pub name: Option<String>,
    pub attached: Vec<Attached>,
}

/// Reads all of it.
pub(super) fn parse(text: &str) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    // Below "Attached Devices:" each line is a name, until the total.
    let mut is_list = false;
    for line in text.lines() {
        if let Some(row) = parse_row(line) {
            rows.push(row);
            is_list = false;
        } else if line.trim() == "Attached Devices:" {
            is_list = true;
        } else if line.starts_with("Total ") {
            is_list = false;
        } else if let (true, Some(name), Some(row)) = (is_list, line.strip_prefix('\t'), rows.last_mut()) {
            row.attached.push(Attached::named(name.trim()));
        }
    }
    rows
}

/// "%08zu\t%08x\t%08x\t%08ld\t%s\t%08llu\t%s": size, flags, mode, count, exporter, inode, name.
fn parse_row(line: &str) -> Option<Row> {
    let mut cells = line.splitn(7, '\t');
    let mut cell = || cells.next();
    let size_bytes = cell()?.parse().ok()?;
    for _flags_then_mode in 0..2 {
        u32::from_str_radix(cell()?, 16).ok()?;
    }
    let references = cell()?.parse().ok()?;
    let exporter_name = cell()?.to_owned();
    let inode = cell()?.parse().ok()?;
    let name = Some(cell()?).filter(|&name| name != "<none>").map(str::to_owned);
    Some(Row { size_bytes, references, exporter_name, inode, name, attached: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REAL: &str = "\nDma-buf Objects:\n\
        size    \tflags   \tmode    \tcount   \texp_name\tino     \tname\n\
        16777216\t00000002\t00080007\t00000004\tvfio_pci_core\t00000007\tpeervram 0000:01:00.0\n\
        \tkernel fence:71:2 virtio_gpu controlq unsignalled\n\
        \tread fence:9:1   signalled\n\
        \tAttached Devices:\n\
        \t0000:02:00.0\n\
        \tiommu\n\
        Total 2 devices attached\n\n\
        00004096\t00000002\t00080007\t00000001\tudmabuf\t00000009\t<none>\n\
        \tAttached Devices:\n\
        Total 0 devices attached\n\n\n\
        Total 2 objects, 16781312 bytes\n";

    #[test]
    fn buffers_and_their_attached_devices_are_read() {
        let rows = parse(REAL);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].size_bytes, 16 << 20);
        assert_eq!((rows[0].inode, rows[0].references), (7, 4));
        assert_eq!(rows[0].exporter_name, "vfio_pci_core");
        assert_eq!(rows[0].name.as_deref(), Some("peervram 0000:01:00.0"));
        let attached = [Attached::Pci("0000:02:00.0".parse().unwrap()), Attached::Other("iommu".into())];
        assert_eq!(rows[0].attached, attached, "fences are no devices");
        assert_eq!((rows[1].name.as_deref(), rows[1].attached.len()), (None, 0));
    }

    #[test]
    fn a_name_with_line_breaks_spoils_no_other_buffer() {
        let spoilt = REAL.replace("<none>", "x\nTotal 0\n\tAttached Devices:\n\tme");
        let rows = parse(&spoilt);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0], parse(REAL)[0]);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in r"(?s).{0,200}", lines in proptest::collection::vec(r"[0-9a-f\t :.A-Z]{0,60}", 0..20)) {
            parse(&text);
            parse(&lines.join("\n"));
        }

        #[test]
        fn any_cut_of_the_file_is_survived(at in 0..REAL.len()) {
            prop_assert!(parse(&REAL[..at]).len() <= 2);
        }
    }
}
