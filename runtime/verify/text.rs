//! Text in a certificate: short, and without control characters.

/// The longest text: the kernel's longest command line is 4096 bytes, and paths and messages are shorter.
pub(crate) const MOST_TEXT_BYTES: usize = 8 << 10;

/// Whether a certificate may have it: a file can hold anything.
pub(crate) fn fits(text: &str) -> bool {
    text.len() <= MOST_TEXT_BYTES && !text.chars().any(char::is_control)
}

/// The text as a certificate may have it: others' names and messages can be anything.
pub(crate) fn clean(text: &str) -> String {
    let mut kept = String::new();
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if kept.len() + c.len_utf8() > MOST_TEXT_BYTES {
            break;
        }
        kept.push(c);
    }
    kept
}
