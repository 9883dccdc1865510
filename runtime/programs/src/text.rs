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

/// The same, and a word that is longer is broken as well: no line is longer than `width`.
pub fn lines_within(text: &str, width: usize) -> Vec<String> {
    let mut pieces = Vec::new();
    for word in text.split_whitespace() {
        let letters: Vec<char> = word.chars().collect();
        pieces.extend(letters.chunks(width.max(1)).map(|piece| piece.iter().collect::<String>()));
    }
    lines(&pieces.join(" "), width)
}

/// Prints words behind `first`, and further lines below the first word, in lines of at most `width` columns.
pub fn behind(output: &mut impl Write, width: usize, first: &str, text: &str) -> io::Result<()> {
    let indent = first.chars().count();
    let mut start = first.to_owned();
    for line in lines(text, width.saturating_sub(indent)) {
        writeln!(output, "{}", format!("{start}{line}").trim_end())?;
        start = " ".repeat(indent);
    }
    Ok(())
}

/// Prints words beside a label, in lines of at most `width` columns.
pub fn labelled(output: &mut impl Write, width: usize, label: &str, text: &str) -> io::Result<()> {
    behind(output, width, &format!("{label:<INDENT$}"), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_broken_between_and_not_within() {
        assert_eq!(lines("one two three", 7), ["one two", "three"]);
        assert_eq!(lines("a-word-longer-than-a-line b", 7), ["a-word-longer-than-a-line", "b"]);
        assert_eq!(lines("", 7), [""]);
        assert_eq!(lines_within("ab cdefgh i", 4), ["ab", "cdef", "gh i"]);
        assert_eq!(lines_within("", 4), [""]);
        let mut printed = Vec::new();
        labelled(&mut printed, 80, "fix", &"word ".repeat(30)).unwrap();
        let printed = String::from_utf8(printed).unwrap();
        assert!(printed.lines().all(|line| line.len() <= 80), "{printed}");
        assert_eq!(printed.lines().count(), 3);
        assert!(printed.starts_with("fix        word"), "{printed}");
    }
}
