//! Text for a terminal of 80 columns: a label, and words broken into lines beside it.

use std::io::{self, Write};

/// What fits a terminal.
const COLUMNS: usize = 80;
/// Where the words begin.
const INDENT: usize = 11;

/// Prints words beside a label.
pub fn print(output: &mut impl Write, label: &str, text: &str) -> io::Result<()> {
    let mut start = format!("{label:<INDENT$}");
    for line in lines(text, COLUMNS - INDENT) {
        writeln!(output, "{}", format!("{start}{line}").trim_end())?;
        start = " ".repeat(INDENT);
    }
    Ok(())
}

/// Prints something to paste, in one line however long.
pub fn print_command(output: &mut impl Write, command: &str) -> io::Result<()> {
    writeln!(output, "{}  {command}", " ".repeat(INDENT))
}

fn lines(text: &str, width: usize) -> Vec<String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_broken_between_and_not_within() {
        assert_eq!(lines("one two three", 7), ["one two", "three"]);
        assert_eq!(lines("a-word-longer-than-a-line b", 7), ["a-word-longer-than-a-line", "b"]);
        let mut printed = Vec::new();
        print(&mut printed, "fix", &"word ".repeat(30)).unwrap();
        let printed = String::from_utf8(printed).unwrap();
        assert!(printed.lines().all(|line| line.len() <= COLUMNS), "{printed}");
        assert!(printed.starts_with("fix        word"), "{printed}");
    }
}
