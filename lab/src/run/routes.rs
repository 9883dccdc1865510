//! Routes between functions, shape by shape: what the kernel said, and how much of it had been predicted.
//!
//! A test of each machine for shapes says the rows, as cells of a table; here they are those of the whole run,
//! counted, and as a page of the documentation.
//!
//! Absent: the single pairs. One that was predicted wrongly is in the reason of the test that failed.

use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use crate::machines::shapes;
use crate::run::table;
use crate::vm::wire::Cell;

/// The table's name.
pub const TABLE: &str = "routes";

const CPU: &str = "CPU";
const LENDERS: &str = "lenders";
const CLIENTS: &str = "clients";
const PAIRS: &str = "pairs";
const BUS_ADDRESS: &str = "bus address";
const THROUGH_HOST_BRIDGE: &str = "through host bridge";
const NOT_SUPPORTED: &str = "not supported";
const RIGHT: &str = "right";

/// A shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The machine's name, a colon, and the setting's.
    pub shape: String,
    /// QEMU's name of the CPU.
    pub cpu: String,
    /// How many functions lend.
    pub lenders: usize,
    /// How many map: these, and the bridges.
    pub clients: usize,
    /// How many ordered pairs there are, each lender with itself among them.
    pub pairs: usize,
    /// Pairs for which the kernel gave the address of the BAR.
    pub bus_address: usize,
    /// Pairs for which it gave an IO virtual address.
    pub through_host_bridge: usize,
    /// Pairs for which it said `EINVAL`.
    pub not_supported: usize,
    /// Pairs for which that had been predicted.
    pub right: usize,
}

/// The shapes of a run, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Routes {
    /// How many shapes.
    pub shapes: usize,
    /// How many pairs in all of them.
    pub pairs: usize,
    /// For how many of these the kernel's answer had been predicted.
    pub right: usize,
    /// In how many shapes some pair is not supported.
    pub shapes_with_refusals: usize,
    /// Shape by shape.
    pub rows: Vec<Row>,
}

impl Row {
    /// Columns and texts.
    pub fn cells(&self) -> [(&'static str, String); 8] {
        [
            (CPU, self.cpu.clone()),
            (LENDERS, self.lenders.to_string()),
            (CLIENTS, self.clients.to_string()),
            (PAIRS, self.pairs.to_string()),
            (BUS_ADDRESS, self.bus_address.to_string()),
            (THROUGH_HOST_BRIDGE, self.through_host_bridge.to_string()),
            (NOT_SUPPORTED, self.not_supported.to_string()),
            (RIGHT, self.right.to_string()),
        ]
    }

    fn new(shape: &str, texts: &BTreeMap<&str, &str>) -> Result<Row> {
        let text = |column| {
            texts.get(column).copied().with_context(|| format!("nothing was said of {shape}'s {column}"))
        };
        let number = |column| -> Result<usize> {
            let text = text(column)?;
            text.parse().with_context(|| format!("{shape}'s {column} is {text:?}"))
        };
        Ok(Row {
            shape: shape.into(),
            cpu: text(CPU)?.into(),
            lenders: number(LENDERS)?,
            clients: number(CLIENTS)?,
            pairs: number(PAIRS)?,
            bus_address: number(BUS_ADDRESS)?,
            through_host_bridge: number(THROUGH_HOST_BRIDGE)?,
            not_supported: number(NOT_SUPPORTED)?,
            right: number(RIGHT)?,
        })
    }
}

impl Routes {
    /// What tests said; none if they said nothing of routes. A row that a dying guest left unfinished is an
    /// error.
    pub fn of<'a>(cells: impl IntoIterator<Item = &'a Cell>) -> Result<Option<Routes>> {
        let mut shapes: Vec<(&str, BTreeMap<&str, &str>)> = Vec::new();
        for cell in cells.into_iter().filter(|cell| cell.table == TABLE) {
            let known = shapes.iter().position(|(shape, _)| *shape == cell.row);
            let place = known.unwrap_or_else(|| {
                shapes.push((&cell.row, BTreeMap::new()));
                shapes.len() - 1
            });
            shapes[place].1.insert(&cell.column, &cell.text);
        }
        if shapes.is_empty() {
            return Ok(None);
        }
        let rows = shapes.iter().map(|(shape, texts)| Row::new(shape, texts));
        let rows: Vec<Row> = rows.collect::<Result<_>>()?;
        Ok(Some(Routes {
            shapes: rows.len(),
            pairs: rows.iter().map(|row| row.pairs).sum(),
            right: rows.iter().map(|row| row.right).sum(),
            shapes_with_refusals: rows.iter().filter(|row| row.not_supported > 0).count(),
            rows,
        }))
    }

    /// A line to count on.
    pub fn summary(&self) -> String {
        let Routes { shapes, pairs, right, shapes_with_refusals, .. } = self;
        format!(
            "{shapes} shapes ({shapes_with_refusals} with pairs that are not supported), {pairs} pairs, {right} right"
        )
    }

    /// The rows of the page.
    pub fn page_rows(&self) -> Vec<String> {
        let row = |row: &Row| {
            let texts = row.cells().map(|(_, text)| text);
            format!("| {} | {} |", row.shape, texts.join(" | "))
        };
        self.rows.iter().map(row).collect()
    }

    /// The page of the documentation.
    pub fn page(&self) -> String {
        let columns = [CPU, LENDERS, CLIENTS, PAIRS, BUS_ADDRESS, THROUGH_HOST_BRIDGE, NOT_SUPPORTED, RIGHT];
        let mut page = format!(
            "# Routes: prediction and kernel\n\n\
             Written by `cargo xtask routes`; [lab.md](lab.md#shapes) says what a shape is.\n\n\
             Every function of a shape lends memory to every function and bridge of it: what `Topology::expected_map_type` \
             predicts, and what Linux {} says to an importer that maps. \"Right\" counts the pairs for which both are \
             the same.\n\n\
             **{}**\n\n\
             | shape | {} |\n|---|---|{}\n",
            shapes::KERNEL,
            self.summary(),
            columns.join(" | "),
            "--:|".repeat(columns.len() - 1),
        );
        for row in self.page_rows() {
            page += &row;
            page.push('\n');
        }
        page += "\n## The machines\n\n| machine | is | kernel's parameters |\n|---|---|---|\n";
        for machine in shapes::MACHINES {
            let parameters = machine.shape.map_or("", |shape| shape.parameters);
            let parameters = if parameters.is_empty() { String::new() } else { format!("`{parameters}`") };
            page += &format!("| {} | {} | {parameters} |\n", machine.name, machine.about);
        }
        page
    }
}

impl Display for Routes {
    fn fmt(&self, formatter: &mut Formatter) -> fmt::Result {
        let cell = |row: &Row, (column, text): (&str, String)| Cell {
            table: TABLE.into(),
            row: row.shape.clone(),
            column: column.into(),
            text,
        };
        let of_row = |row: &Row| row.cells().map(|said| cell(row, said));
        let cells: Vec<Cell> = self.rows.iter().flat_map(of_row).collect();
        table::all(&cells).iter().try_for_each(|table| write!(formatter, "{table}"))?;
        writeln!(formatter, "\n{}", self.summary())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(shape: &str, not_supported: usize, right: usize) -> Row {
        Row {
            shape: shape.into(),
            cpu: "EPYC".into(),
            lenders: 2,
            clients: 2,
            pairs: 4,
            bus_address: 4 - not_supported,
            through_host_bridge: 0,
            not_supported,
            right,
        }
    }

    fn cells(rows: &[Row]) -> Vec<Cell> {
        let cell = |row: &Row, (column, text): (&str, String)| Cell {
            table: TABLE.into(),
            row: row.shape.clone(),
            column: column.into(),
            text,
        };
        rows.iter().flat_map(|row| row.cells().map(|said| cell(row, said))).collect()
    }

    #[test]
    fn rows_survive_the_table_and_are_counted() {
        let rows = [row("a: off", 0, 4), row("b: off", 2, 3)];
        let routes = Routes::of(&cells(&rows)).unwrap().unwrap();
        assert_eq!(routes.rows, rows);
        assert_eq!(routes.summary(), "2 shapes (1 with pairs that are not supported), 8 pairs, 7 right");
        assert!(
            routes
                .to_string()
                .ends_with("\n\n2 shapes (1 with pairs that are not supported), 8 pairs, 7 right\n")
        );
        assert!(routes.page().contains("\n| b: off | EPYC | 2 | 2 | 4 | 2 | 0 | 2 | 3 |\n"));
    }

    #[test]
    fn nothing_said_is_no_table_and_half_a_row_is_an_error() {
        assert_eq!(Routes::of(&[]).unwrap(), None);
        let mut half = cells(&[row("a: off", 0, 4)]);
        half.pop();
        assert!(format!("{:#}", Routes::of(&half).unwrap_err()).contains("a: off's right"));
    }
}
