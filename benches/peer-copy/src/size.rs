//! `Size`: bytes as people write them, 4K to 1G.

use std::fmt;
use std::str::FromStr;

use peervram_programs::bytes;

/// The largest that anybody asks for by accident.
const MOST_BYTES: u64 = 1 << 40;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    /// Reads `4096`, `4K`, `4KiB`, `64M`, `1G`; a multiple of 4096, as pages are.
    fn from_str(text: &str) -> Result<Size, String> {
        let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(end);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            _ => return Err(format!("{text:?} is no size; write 4K, 64M or 1G")),
        };
        let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no size; write 4K, 64M or 1G"))?;
        let bytes = number.checked_mul(1 << shift).filter(|&bytes| bytes <= MOST_BYTES);
        match bytes {
            Some(bytes) if bytes > 0 && bytes.is_multiple_of(4096) => Ok(Size(bytes)),
            _ => Err(format!("{text:?} is not a multiple of 4 KiB up to 1 TiB")),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.pad(&bytes::in_words(self.0))
    }
}

/// The usual sizes: 4 KiB to 1 GiB, in steps of four.
pub fn usual(most: Size) -> Vec<Size> {
    (0..10).map(|step| Size(4096 << (2 * step))).filter(|&size| size <= most).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        let bytes = |text: &str| text.parse().map(|Size(bytes)| bytes);
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("4K"), Ok(4096));
        assert_eq!(bytes("64 MiB"), Ok(64 << 20));
        assert_eq!(bytes("1g"), Ok(1 << 30));
        assert_eq!(Size(64 << 20).to_string(), "64 MiB");
        assert_eq!(Size(1 << 30).to_string(), "1 GiB");
        assert_eq!(Size(12 << 10).to_string(), "12 KiB");
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "0", "K", "4T", "-4K", "100", "1.5M", "9999999999G", "2000G"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_usual_sizes_are_4_kib_to_1_gib() {
        let all = usual(Size(1 << 30));
        assert_eq!((all.first(), all.last()), (Some(&Size(4 << 10)), Some(&Size(1 << 30))));
        assert_eq!(usual(Size(20 << 10)), [Size(4 << 10), Size(16 << 10)]);
    }
}
