//! `buddyinfo`: free memory by zone and by order of its blocks.

use super::{Cell, Column, Role, Table};
use crate::linux::zones::Zone;

/// One row per zone, as in /proc/buddyinfo: its free blocks of each order, and behind them how many pages these are.
pub fn blocks(zones: &[Zone]) -> Table {
    let orders = zones.iter().map(|zone| zone.free.len()).max().unwrap_or(0);
    let mut table = table(&["node", "zone"], orders);
    for zone in zones {
        let names = [Cell::Number(zone.node.into()), zone.name.as_str().into()];
        table.rows.push(row(names, &zone.free, orders));
    }
    table
}

/// One row per zone and migrate type that has free blocks there, as in the first part of /proc/pagetypeinfo.
pub fn blocks_by_type(zones: &[Zone]) -> Table {
    let types = || zones.iter().flat_map(|zone| zone.free_by_type.iter().map(move |ty| (zone, ty)));
    let orders = types().map(|(_, (_, free))| free.len()).max().unwrap_or(0);
    let mut table = table(&["node", "zone", "type"], orders);
    for (zone, (ty, free)) in types().filter(|(_, (_, free))| free.iter().any(|&blocks| blocks != 0)) {
        let names = [Cell::Number(zone.node.into()), zone.name.as_str().into(), ty.as_str().into()];
        table.rows.push(row(names, free, orders));
    }
    table
}

fn table(names: &[&'static str], orders: usize) -> Table {
    let mut columns: Vec<Column> = names.iter().map(|&name| Column::new(name, Role::Key)).collect();
    columns.extend((0..orders).map(|n| Column { name: n.to_string().into(), role: Role::Amount }));
    columns.push(Column::new("pages", Role::Amount));
    let weight = columns.len() - 1;
    Table::new(columns, weight)
}

fn row(names: impl IntoIterator<Item = Cell>, free: &[u64], orders: usize) -> Vec<Cell> {
    let blocks = (0..orders).map(|order| free.get(order).copied().unwrap_or(0));
    let pages = blocks.clone().zip(0..).map(|(blocks, order)| blocks.saturating_mul(1 << order));
    let pages = pages.fold(0, u64::saturating_add);
    names.into_iter().chain(blocks.map(Cell::from)).chain([pages.into()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_shown_by_zone_and_by_type() {
        let zone = |node, name: &str, free: &[u64], unmovable: &[u64]| Zone {
            node,
            name: name.to_owned(),
            free: free.to_vec(),
            free_by_type: vec![
                ("Unmovable".to_owned(), unmovable.to_vec()),
                ("Movable".to_owned(), vec![0; 3]),
            ],
        };
        let zones =
            [zone(0, "DMA", &[1, 0, 2], &[1, 0, 2]), zone(1, "Normal", &[10, 3, u64::MAX], &[0, 0, 0])];
        let text = "\
node  zone     0  1                    2                pages
   0  DMA      1  0                    2                    9
   1  Normal  10  3  9223372036854775807  9223372036854775807
";
        assert_eq!(blocks(&zones).text(), text);
        let text = "\
node  zone  type       0  1  2  pages
   0  DMA   Unmovable  1  0  2      9
";
        assert_eq!(blocks_by_type(&zones).text(), text);
        let later = [zone(0, "DMA", &[1, 2, 2], &[]), zone(1, "Normal", &[10, 3, u64::MAX], &[])];
        let text = "node  zone   0   1   2  pages\n   0  DMA   +0  +2  +0     +4\n";
        assert_eq!(blocks(&later).since(&blocks(&zones)).text(), text);
        assert_eq!(blocks(&[]).text(), "node  zone  pages\n");
    }
}
