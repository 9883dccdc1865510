//! Tables of what tests found: cells as they were said, printed with aligned columns.

use std::fmt::{self, Display, Formatter};

use peervram_programs::UNBROKEN;

use crate::vm::wire::Cell;

/// The cell of a test that did not get that far, or did not run.
const NOTHING: &str = "-";

/// One table. Rows and columns are in the order in which they were named first.
pub(crate) struct Table<'a> {
    name: &'a str,
    rows: Vec<&'a str>,
    columns: Vec<&'a str>,
    cells: Vec<&'a Cell>,
}

/// The tables that cells are of, in the order in which they were named first.
pub(crate) fn all(cells: &[Cell]) -> Vec<Table<'_>> {
    let mut tables: Vec<Table> = Vec::new();
    for cell in cells {
        let known = tables.iter().position(|table| table.name == cell.table);
        let place = known.unwrap_or_else(|| {
            tables.push(Table {
                name: &cell.table,
                rows: Vec::new(),
                columns: Vec::new(),
                cells: Vec::new(),
            });
            tables.len() - 1
        });
        let table = &mut tables[place];
        for (names, name) in [(&mut table.rows, &cell.row), (&mut table.columns, &cell.column)] {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        table.cells.push(cell);
    }
    tables
}

impl Table<'_> {
    /// What was said last for a place.
    fn text(&self, row: &str, column: &str) -> &str {
        let said = self.cells.iter().rev().find(|cell| cell.row == row && cell.column == column);
        said.map_or(NOTHING, |cell| &cell.text)
    }
}

impl Display for Table<'_> {
    fn fmt(&self, formatter: &mut Formatter) -> fmt::Result {
        let head: Vec<&str> = std::iter::once(self.name).chain(self.columns.iter().copied()).collect();
        let mut table = peervram_programs::Table::new(&head).without_rule().indented(2);
        for &row in &self.rows {
            let texts = self.columns.iter().map(|column| self.text(row, column));
            table.row(std::iter::once(row).chain(texts).map(str::to_owned));
        }
        let mut text = Vec::new();
        table.print(&mut text, UNBROKEN).map_err(|_| fmt::Error)?;
        formatter.write_str(&String::from_utf8_lossy(&text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(table: &str, row: &str, column: &str, text: &str) -> Cell {
        let [table, row, column, text] = [table, row, column, text].map(str::to_owned);
        Cell { table, row, column, text }
    }

    #[test]
    fn columns_are_aligned_and_gaps_are_seen() {
        let cells = [
            cell("revoke", "reset", "virtio-gpu", "right bytes"),
            cell("other", "a", "b", "c"),
            cell("revoke", "memory off", "lavapipe", "said too soon"),
            cell("revoke", "memory off", "lavapipe", "détaché"),
        ];
        let tables: Vec<String> = all(&cells).iter().map(ToString::to_string).collect();
        assert_eq!(
            tables,
            [
                "  revoke      virtio-gpu   lavapipe\n  \
                   reset       right bytes  -\n  \
                   memory off  -            détaché\n",
                "  other  b\n  a      c\n",
            ]
        );
    }
}
