//! Rows and columns as the console shows them: aligned text, JSON, and the difference of two.

use rustc_hash::FxHashMap;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::cmp::Reverse;
use std::fmt::Write;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Names the row: rows with equal keys are the same thing at two times.
    Key,
    /// Belongs to the row and is no amount: shown, never subtracted.
    Fact,
    /// An amount, of which differences make sense.
    Amount,
}

/// A column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Heading, and member name in JSON.
    pub name: Cow<'static, str>,
    /// What it holds.
    pub role: Role,
}

impl Column {
    /// A column with a fixed name.
    pub const fn new(name: &'static str, role: Role) -> Self {
        Self { name: Cow::Borrowed(name), role }
    }
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Cell {
    /// A name.
    Text(String),
    /// A number, in the unit that the column's name or its documentation says.
    Number(i64),
    /// Nothing, where others have a number: a dash, and null in JSON.
    Absent,
}

impl From<u64> for Cell {
    fn from(number: u64) -> Self {
        Self::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl Cell {
    fn plain(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(number) => number.to_string(),
            Self::Absent => "-".to_owned(),
        }
    }

    fn number(&self) -> i64 {
        match self {
            Self::Number(number) => *number,
            Self::Text(_) | Self::Absent => 0,
        }
    }
}

/// See the module. Every row has as many cells as there are columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Headings.
    pub columns: Vec<Column>,
    /// Index of the amount that matters most: differences are sorted by it.
    pub weight: usize,
    /// Rows.
    pub rows: Vec<Vec<Cell>>,
    /// Amounts are changes, shown with their sign.
    pub signed: bool,
    /// Rows left out at the end.
    pub omitted: usize,
}

impl Table {
    /// An empty table.
    pub fn new(columns: Vec<Column>, weight: usize) -> Self {
        Self { columns, weight, rows: Vec::new(), signed: false, omitted: 0 }
    }

    /// Largest weight first; of equal weight, by the first cells.
    pub fn sort(&mut self) {
        let weight = self.weight;
        self.rows.sort_by_cached_key(|row| {
            let names: Vec<String> = row.iter().map(Cell::plain).collect();
            (Reverse(row[weight].number()), names)
        });
    }

    /// Keeps the first `rows` rows and counts the others.
    pub fn truncate(&mut self, rows: usize) {
        self.omitted += self.rows.len().saturating_sub(rows);
        self.rows.truncate(rows);
    }

    /// What changed since `before`, a table of the same kind: rows whose amounts differ, largest growth first. Rows
    /// with equal keys count together.
    pub fn since(&self, before: &Table) -> Table {
        let mut changes: FxHashMap<Vec<Cell>, Vec<Cell>> = FxHashMap::default();
        for (table, sign) in [(self, 1), (before, -1)] {
            for row in &table.rows {
                let zeroed = || self.zip(row).map(|(c, cell)| zeroed(c.role, cell)).collect();
                let change = changes.entry(self.key(row)).or_insert_with(zeroed);
                for ((column, cell), sum) in self.zip(row).zip(change) {
                    if let (Role::Amount, Cell::Number(sum)) = (column.role, sum) {
                        *sum = sum.saturating_add(cell.number().saturating_mul(sign));
                    }
                }
            }
        }
        let changed = |row: &Vec<Cell>| self.zip(row).any(|(c, v)| c.role == Role::Amount && v.number() != 0);
        let rows = changes.into_values().filter(changed).collect();
        let mut table =
            Table { columns: self.columns.clone(), weight: self.weight, rows, signed: true, omitted: 0 };
        table.sort();
        table
    }

    /// Headings and rows; numbers to the right, names to the left.
    pub fn text(&self) -> String {
        let shown: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| self.zip(row).map(|(c, cell)| self.shown(cell, c.role)).collect())
            .collect();
        let width = |at: usize| {
            let cells = shown.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count());
            cells.max().unwrap_or(0).max(self.columns[at].name.chars().count())
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let numeric = |at: usize| {
            let is_text = |row: &Vec<Cell>| matches!(row.get(at), Some(Cell::Text(_)));
            !self.rows.iter().any(is_text)
        };
        let mut text = String::new();
        let headings = self.columns.iter().map(|c| c.name.as_ref().to_owned()).collect();
        for line in std::iter::once(&headings).chain(&shown) {
            let mut out = String::new();
            for (at, cell) in line.iter().enumerate() {
                let gap = if at == 0 { "" } else { "  " };
                let _ = match numeric(at) {
                    true => write!(out, "{gap}{cell:>width$}", width = widths[at]),
                    false => write!(out, "{gap}{cell:<width$}", width = widths[at]),
                };
            }
            text.push_str(out.trim_end());
            text.push('\n');
        }
        if self.omitted > 0 {
            let _ = writeln!(text, "# and {} more", self.omitted);
        }
        text
    }

    /// One object per row, with the columns' names.
    pub fn json(&self) -> Value {
        let row = |row: &Vec<Cell>| {
            let members = self.zip(row).map(|(column, cell)| {
                let value = match cell {
                    Cell::Text(text) => Value::from(text.as_str()),
                    Cell::Number(number) => Value::from(*number),
                    Cell::Absent => Value::Null,
                };
                (column.name.clone().into_owned(), value)
            });
            Value::Object(members.collect::<Map<_, _>>())
        };
        Value::Array(self.rows.iter().map(row).collect())
    }

    fn zip<'a>(&'a self, row: &'a [Cell]) -> impl Iterator<Item = (&'a Column, &'a Cell)> {
        self.columns.iter().zip(row)
    }

    fn key(&self, row: &[Cell]) -> Vec<Cell> {
        self.zip(row).filter(|(c, _)| c.role == Role::Key).map(|(_, cell)| cell.clone()).collect()
    }

    fn shown(&self, cell: &Cell, role: Role) -> String {
        match cell {
            Cell::Number(number) if self.signed && role == Role::Amount => format!("{number:+}"),
            cell => cell.plain(),
        }
    }
}

fn zeroed(role: Role, cell: &Cell) -> Cell {
    if role == Role::Amount { Cell::Number(0) } else { cell.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn table(rows: &[(&str, u64, u64)]) -> Table {
        let columns = vec![
            Column::new("name", Role::Key),
            Column::new("size", Role::Fact),
            Column::new("bytes", Role::Amount),
        ];
        let mut table = Table::new(columns, 2);
        table.rows = rows.iter().map(|&(n, s, b)| vec![n.into(), s.into(), b.into()]).collect();
        table
    }

    #[test]
    fn columns_are_aligned_below_their_headings() {
        let mut two = table(&[("a", 8, 5), ("kmalloc-8", 16, 12345)]);
        two.sort();
        assert_eq!(two.text(), "name       size  bytes\nkmalloc-8    16  12345\na             8      5\n");
        two.truncate(1);
        assert_eq!(two.text(), "name       size  bytes\nkmalloc-8    16  12345\n# and 1 more\n");
        assert_eq!(table(&[]).text(), "name  size  bytes\n");
        assert_eq!(two.json(), json!([{ "name": "kmalloc-8", "size": 16, "bytes": 12345 }]));
    }

    #[test]
    fn a_difference_has_what_changed_came_and_went() {
        let before = table(&[("same", 8, 5), ("gone", 8, 7), ("less", 8, 9), ("more", 8, 1)]);
        let after =
            table(&[("same", 8, 5), ("less", 8, 8), ("new", 32, 3), ("more", 8, 90), ("more", 8, 10)]);
        let text =
            "name  size  bytes\nmore     8    +99\nnew     32     +3\nless     8     -1\ngone     8     -7\n";
        assert_eq!(after.since(&before).text(), text);
        assert!(after.since(&after).rows.is_empty());
    }
}
