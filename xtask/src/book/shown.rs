//! `Shown`: a command as a page of the book shows it, read out of Markdown.
//!
//! Commands stand in blocks: fenced ones marked `sh`, and indented ones, in which a line counts that begins with a
//! program of [`PROGRAMS`]. What a line says of its command, after three spaces or more or after ` #`, is no part
//! of it. A `\` at the end goes on in the next line.

/// What commands in an indented block begin with; the rest of such blocks is output.
const PROGRAMS: &[&str] =
    &["cargo", "echo", "modprobe", "peer-copy", "peervram", "setpci", "sudo", "valgrind"];

/// A command on a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The page, from the project's folder on: "docs/routes.md".
    pub page: String,
    /// The line that it begins in.
    pub line: usize,
    /// What a shell is to read.
    pub command: String,
}

impl Shown {
    /// The words of it, without `sudo`.
    pub fn words(&self) -> Vec<&str> {
        let words = self.command.split_whitespace();
        words.skip_while(|word| *word == "sudo").collect()
    }
}

/// A block of a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// What it is marked as: "sh", "rust,no_run", "text"; nothing for indented ones.
    pub mark: String,
    /// The number of its first line.
    pub line: usize,
    /// Its lines.
    pub lines: Vec<String>,
}

/// The commands of a page.
pub fn commands(page: &str, text: &str) -> Vec<Shown> {
    let mut commands = Vec::new();
    for block in blocks(text) {
        let is_shell = block.mark == "sh";
        if !is_shell && !block.mark.is_empty() {
            continue;
        }
        let mut lines = block.lines.iter().enumerate();
        while let Some((number, line)) = lines.next() {
            let mut command = bare(line).to_owned();
            while let Some(begun) = command.strip_suffix('\\') {
                let Some((_, next)) = lines.next() else { break };
                command = format!("{}{}", begun, bare(next.trim_start()));
            }
            let first = command.split_whitespace().next().unwrap_or("");
            if !first.is_empty() && (is_shell || PROGRAMS.contains(&first)) {
                commands.push(Shown { page: page.into(), line: block.line + number, command });
            }
        }
    }
    commands
}

/// The fenced and the indented blocks of a page.
pub fn blocks(text: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let begin = |mark: &str, line| Block { mark: mark.into(), line, lines: Vec::new() };
    // The one that is being read.
    let mut open: Option<(Block, Kind)> = None;
    // Indented text is a block only after an empty line: below a list's item it is the item's.
    let mut after_empty = true;
    for (number, line) in (1..).zip(text.lines()) {
        let is_empty = line.trim().is_empty();
        open = match (open, line.strip_prefix("```"), line.strip_prefix("    ")) {
            (Some((block, Kind::Fenced)), Some(_), _) => {
                blocks.push(block);
                None
            }
            (Some((mut block, Kind::Fenced)), None, _) => {
                block.lines.push(line.into());
                Some((block, Kind::Fenced))
            }
            (indented, Some(mark), _) => {
                blocks.extend(indented.map(|(block, _)| block));
                // A fence without a mark is output.
                let mark = if mark.is_empty() { "text" } else { mark };
                Some((begin(mark, number + 1), Kind::Fenced))
            }
            (Some((mut block, Kind::Indented)), None, Some(code)) => {
                block.lines.push(code.into());
                Some((block, Kind::Indented))
            }
            (None, None, Some(code)) if after_empty && !is_empty => {
                let mut block = begin("", number);
                block.lines.push(code.into());
                Some((block, Kind::Indented))
            }
            (indented, None, _) => {
                blocks.extend(indented.map(|(block, _)| block));
                None
            }
        };
        after_empty = is_empty;
    }
    blocks.extend(open.map(|(block, _)| block));
    blocks
}

#[derive(Clone, Copy)]
enum Kind {
    Fenced,
    Indented,
}

/// A line without what it says of its command.
fn bare(line: &str) -> &str {
    let ends = [line.find("   "), line.find(" #"), line.find("  //")];
    let end = ends.into_iter().flatten().min().unwrap_or(line.len());
    line[..end].trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# A page\n\n    peervram doctor      anybody\n    and what it says\n\n```sh\ncd ..   # up\n\
        cargo run --one \\\n    --two\n```\n\n- an item\n    peervram reset 01:00.0\n\n```\npeervram devices\n```\n\n\
        ```text\ncargo run\n```\n";

    #[test]
    fn commands_are_what_a_shell_is_to_read() {
        let commands = commands("a.md", PAGE);
        let seen: Vec<_> = commands.iter().map(|shown| (shown.line, shown.command.as_str())).collect();
        assert_eq!(seen, [(3, "peervram doctor"), (7, "cd .."), (8, "cargo run --one --two")]);
        assert!(commands.iter().all(|shown| shown.page == "a.md"));
    }

    #[test]
    fn sudo_is_no_word_of_the_command() {
        let shown = Shown { page: String::new(), line: 1, command: "sudo peervram route a b".into() };
        assert_eq!(shown.words(), ["peervram", "route", "a", "b"]);
    }

    #[test]
    fn blocks_keep_their_marks_and_lines() {
        let blocks = blocks(PAGE);
        let seen: Vec<_> =
            blocks.iter().map(|block| (block.mark.as_str(), block.line, block.lines.len())).collect();
        assert_eq!(seen, [("", 3, 2), ("sh", 7, 3), ("text", 16, 1), ("text", 20, 1)]);
    }
}
