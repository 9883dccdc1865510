//! How much of the host's memory copies may take. Their bytes lie there, what is read back does, and so does the memory of
//! lenders and importers that are the host: four times the largest copy, at most half of what is free.

use std::fs;

/// The largest copy that leaves the host enough, or no limit where nothing is known.
pub fn largest_copy_bytes() -> u64 {
    fs::read_to_string("/proc/meminfo").ok().and_then(|text| largest_of(&text)).unwrap_or(u64::MAX)
}

fn largest_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024 / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eighth_of_what_is_free_is_the_largest() {
        let text = "MemTotal:  2097152 kB\nMemAvailable:     1048576 kB\n";
        assert_eq!(largest_of(text), Some(128 << 20));
        assert_eq!(largest_of("MemTotal: 1 kB"), None);
    }
}
