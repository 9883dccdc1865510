//! What the validation layers said of a program's calls of Vulkan. The program ended then, but it may have been a child of the
//! test's, and whoever reads the test's verdict wants the words.

use anyhow::{Context, Result};
use peervram_lab::validation::LOG_IN_GUEST;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// Enough for a message with the objects that it is about.
const LINES: usize = 25;

/// An empty log, which programs without root's rights can write, too.
pub fn begin() -> Result<()> {
    fs::write(LOG_IN_GUEST, "")
        .and_then(|()| fs::set_permissions(LOG_IN_GUEST, fs::Permissions::from_mode(0o666)))
        .with_context(|| format!("making {LOG_IN_GUEST}"))
}

/// The messages since; nothing where there are none.
pub fn messages() -> Option<String> {
    said(&fs::read_to_string(LOG_IN_GUEST).unwrap_or_default())
}

fn said(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).take(LINES).collect();
    (!lines.is_empty()).then(|| format!("the validation layers complain:\n{}", lines.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_log_says_nothing() {
        assert_eq!(said(""), None);
        assert_eq!(said("\n \n"), None);
        assert_eq!(
            said("\nVUID-1\n\n    Objects: 1\n").unwrap(),
            "the validation layers complain:\nVUID-1\n    Objects: 1"
        );
    }
}
