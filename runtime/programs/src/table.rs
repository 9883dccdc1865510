//! `Table`: rows of cells, in lines of a certain width.

use std::io::{self, Write};

use crate::text::lines;

/// Between two columns.
const GAP: usize = 2;
/// The width of a table whose lines are never broken.
pub const UNBROKEN: usize = usize::MAX;
/// A column is not made narrower than this.
const LEAST_WIDTH: usize = 8;

/// Rows of cells below a heading.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<usize>,
    has_rule: bool,
    indent: usize,
}

impl Table {
    /// A table without rows.
    pub fn new(heading: &[&str]) -> Self {
        let heading = heading.iter().map(|&cell| cell.to_owned()).collect();
        Self { rows: vec![heading], right: Vec::new(), has_rule: true, indent: 0 }
    }

    /// With figures in those columns: they stand at the right.
    pub fn with_figures_in(mut self, columns: impl IntoIterator<Item = usize>) -> Self {
        self.right.extend(columns);
        self
    }

    /// Without the line below the heading.
    pub fn without_rule(mut self) -> Self {
        self.has_rule = false;
        self
    }

    /// That many columns further in.
    pub fn indented(mut self, columns: usize) -> Self {
        self.indent = columns;
        self
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Prints it in lines of at most `width` columns: each column is as wide as its widest cell, and where that is too
    /// much, the widest ones have their words in several lines. Only a single word may stand out.
    pub fn print(&self, output: &mut impl Write, width: usize) -> io::Result<()> {
        let widths = self.widths(width.saturating_sub(self.indent));
        let indent = " ".repeat(self.indent);
        for (number, row) in self.rows.iter().enumerate() {
            let cells: Vec<Vec<String>> =
                row.iter().zip(&widths).map(|(cell, &width)| in_lines(cell, width)).collect();
            for line in 0..cells.iter().map(Vec::len).max().unwrap_or(0) {
                let mut text = indent.clone();
                for (column, (cell, &width)) in cells.iter().zip(&widths).enumerate() {
                    let part = cell.get(line).map_or("", String::as_str);
                    text += &match self.right.contains(&column) {
                        true => format!("{part:>width$}{:GAP$}", ""),
                        false => format!("{part:width$}{:GAP$}", ""),
                    };
                }
                writeln!(output, "{}", text.trim_end())?;
            }
            if number == 0 && self.has_rule {
                writeln!(output, "{indent}{}", "-".repeat(total(&widths)))?;
            }
        }
        Ok(())
    }

    fn widths(&self, most: usize) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column));
        let widest = |column: usize| cells(column).map(|cell| cell.chars().count()).max().unwrap_or(0);
        // Words stay whole, so that a column is as wide as its longest one.
        let word = |column: usize| {
            let words = cells(column).flat_map(|cell| cell.split_whitespace());
            words.map(|word| word.chars().count()).max().unwrap_or(0).max(LEAST_WIDTH)
        };
        let mut widths: Vec<usize> = (0..columns).map(widest).collect();
        let least: Vec<usize> = (0..columns).map(word).collect();
        while total(&widths) > most {
            let can_shrink = (0..columns).filter(|&column| widths[column] > least[column]);
            let Some(column) = can_shrink.max_by_key(|&column| widths[column]) else { break };
            widths[column] -= 1;
        }
        widths
    }
}

/// A cell that fits stays as it was written.
fn in_lines(cell: &str, width: usize) -> Vec<String> {
    if cell.chars().count() <= width { vec![cell.to_owned()] } else { lines(cell, width) }
}

fn total(widths: &[usize]) -> usize {
    widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(table: &Table, width: usize) -> String {
        let mut text = Vec::new();
        table.print(&mut text, width).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn what_fits_stands_in_one_line() {
        let mut table = Table::new(&["step", "check"]);
        table.row(["one".into(), "ok: equal".into()]);
        assert_eq!(printed(&table, 100), "step  check\n---------------\none   ok: equal\n");
    }

    #[test]
    fn figures_stand_at_the_right_and_a_rule_and_an_indent_are_choices() {
        let mut table = Table::new(&["what", "time"]).with_figures_in([1]).without_rule().indented(2);
        table.row(["a".into(), "1.5 ns".into()]);
        table.row(["b".into(), "12.5 ns".into()]);
        assert_eq!(printed(&table, UNBROKEN), "  what     time\n  a      1.5 ns\n  b     12.5 ns\n");
    }

    #[test]
    fn what_does_not_fit_is_broken_between_words_and_none_is_lost() {
        let mut table = Table::new(&["dma-buf", "attached", "held by"]);
        let long = |word: &str| (0..20).map(|number| format!("{word}{number}")).collect::<Vec<_>>().join(" ");
        table.row(["12345".into(), long("a"), long("holder-")]);
        for width in [60, 80, 100] {
            let text = printed(&table, width);
            assert!(text.lines().all(|line| line.chars().count() <= width), "{width}:\n{text}");
            for word in long("a").split(' ').chain(long("holder-").split(' ')) {
                assert!(text.split_whitespace().any(|seen| seen == word), "no {word} in\n{text}");
            }
            assert!(text.lines().nth(2).unwrap().starts_with("12345"), "{text}");
        }
        // A word that is too long stands out, and stays whole.
        let mut table = Table::new(&["file"]);
        table.row(["x".repeat(50)]);
        assert!(printed(&table, 40).contains(&"x".repeat(50)));
    }
}
