//! A writer for the archive that Linux unpacks as its first file system (cpio, "newc").
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst. The archive stays
//! uncompressed: reading it is cheap for QEMU, unpacking it is dear for an emulated CPU.

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// An archive under construction.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder; its parent must be there already.
    pub fn folder(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, &[]);
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, REGULAR | permissions, content);
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("an initramfs file is below 4 GiB");
        let name_size = path.len() as u32 + 1;
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, user, group, links, time, size, 4 device numbers, name size, check
        for field in [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_contents_are_aligned() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.file("bin/sh", 0o755, b"#!");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..14], b"07070100000001");
        // 110 bytes of header and "bin\0" are 114, padded to 116.
        assert_eq!(&bytes[116..122], b"070701");
        let content = bytes.windows(2).position(|pair| pair == b"#!").unwrap();
        assert_eq!(content % 4, 0);
        assert!(bytes.windows(11).any(|name| name == b"TRAILER!!!\0"));
    }

    #[test]
    fn the_size_is_in_the_header() {
        let mut archive = Archive::default();
        let content: Vec<u8> = (0..300_u32).map(|at| (at * 7) as u8).collect();
        archive.file("a", 0o644, &content);
        let bytes = archive.finish();
        assert_eq!(&bytes[54..62], b"0000012c");
        // 110 bytes of header and "a\0" are 112.
        assert_eq!(bytes[112..412], content);
    }
}
