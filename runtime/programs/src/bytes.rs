//! Numbers of bytes as people write them: `16 MiB`.

/// What a unit is short for, and the power of two that it is.
const UNITS: [(&str, u32); 5] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];

/// In the largest unit that leaves no fraction: `16 MiB`, `4 KiB`, `4097 B`.
pub fn in_words(bytes: u64) -> String {
    let fits = |&&(_, shift): &&(&str, u32)| bytes >= 1 << shift && bytes.is_multiple_of(1 << shift);
    let (unit, shift) = UNITS.iter().find(fits).unwrap_or(&UNITS[4]);
    format!("{} {unit}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_unit_without_a_fraction_is_taken() {
        let words =
            [(0, "0 B"), (100, "100 B"), (4097, "4097 B"), (12 << 10, "12 KiB"), (16 << 20, "16 MiB")];
        for (bytes, words) in words.into_iter().chain([(1536 << 20, "1536 MiB"), (1 << 40, "1 TiB")]) {
            assert_eq!(in_words(bytes), words);
        }
    }
}
