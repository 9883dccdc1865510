//! Text broken into lines between its words.

use std::io::{self, Write};

/// Where the words begin beside a label.
const INDENT: usize = 11;

/// The words of `text` in lines of at most `width` columns. A word that is longer stays whole: paths and addresses are
/// there to be copied.
pub fn lines(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().expect("there is always a line");
        if !last.is_empty() && last.chars().count() + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else {
            if !last.is_empty() {
                last.push(' ');
            }
            last.push_str(word);
        }
    }
    lines
}

/// Prints words beside a label, in lines of at most `width` columns.
pub fn labelled(output: &mut impl Write, width: usize, label: &str, text: &str) -> io::Result<()> {
    let mut start = format!("{label:<INDENT$}");
    for line in lines(text, width.saturating_sub(start.chars().count())) {
        writeln!(output, "{}", format!("{start}{line}").trim_end())?;
        start = " ".repeat(INDENT);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_broken_between_and_not_within() {
        assert_eq!(lines("one two three", 7), ["one two", "three"]);
        assert_eq!(lines("a-word-longer-than-a-line b", 7), ["a-word-longer-than-a-line", "b"]);
        assert_eq!(lines("", 7), [""]);
        let mut printed = Vec::new();
        labelled(&mut printed, 80, "fix", &"word ".repeat(30)).unwrap();
        let printed = String::from_utf8(printed).unwrap();
        assert!(printed.lines().all(|line| line.len() <= 80), "{printed}");
        assert_eq!(printed.lines().count(), 3);
        assert!(printed.starts_with("fix        word"), "{printed}");
    }
}
