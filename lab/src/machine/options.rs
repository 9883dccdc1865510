//! QEMU's arguments, and the model GPU's.

/// Arguments of pairs of an option and its value.
pub(crate) fn options(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs.iter().flat_map(|(option, value)| [option.to_string(), value.to_string()]).collect()
}
