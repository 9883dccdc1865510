//! Deadlines, of timeouts of any length.

use std::time::{Duration, Instant};

/// As far ahead as anybody waits. The clock of Linux counts on for centuries after this.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The instant at which `timeout` is over, from now on. [`Duration::MAX`], and whatever else is longer than a
/// century, gives an instant a century ahead: `Instant::now() + timeout` would panic.
pub fn deadline_after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    #[test]
    fn any_timeout_has_a_deadline() {
        assert!(deadline_after(Duration::ZERO) <= Instant::now());
        assert!(deadline_after(Duration::MAX) > Instant::now() + Duration::from_secs(1 << 30));
    }

    /// What is added to a clock and is no constant may be [`Duration::MAX`], which panics.
    #[test]
    fn no_timeout_of_a_callers_is_added_to_a_clock() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut seen = 0;
        for folder in ["runtime", "backends/src", "nvgrace/src"] {
            for file in sources(&root.join(folder)) {
                let text = fs::read_to_string(&file).unwrap();
                seen += 1;
                for (number, line) in text.lines().enumerate() {
                    // This file's own addition is bounded, so it is left out.
                    if let Some(added) = added_to_a_clock(line)
                        && !file.ends_with("deadline.rs")
                    {
                        let is_constant = added.starts_with("Duration::from_")
                            || added.chars().take_while(|&c| c != ')').all(|c| !c.is_ascii_lowercase());
                        assert!(is_constant, "{}:{}: use deadline_after", file.display(), number + 1);
                    }
                }
            }
        }
        assert!(seen > 100, "only {seen} files were looked at");
    }

    /// What `line` adds to the present instant.
    fn added_to_a_clock(line: &str) -> Option<&str> {
        let code = line.split("//").next()?;
        ["now() + ", " now + ", "(now + "].iter().find_map(|clock| Some(code.split_once(clock)?.1))
    }

    fn sources(folder: &Path) -> Vec<std::path::PathBuf> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries
            .flat_map(|path| match path.is_dir() {
                // Build output is not source.
                true if path.ends_with("target") => Vec::new(),
                true => sources(&path),
                false => vec![path],
            })
            .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
            .collect()
    }

    #[test]
    fn an_addition_is_found() {
        assert_eq!(added_to_a_clock("let end = Instant::now() + timeout;"), Some("timeout;"));
        assert_eq!(added_to_a_clock("f(now + limit)"), Some("limit)"));
        assert_eq!(added_to_a_clock("// Instant::now() + timeout"), None);
    }
}
