//! `kmem`: memory by use and slab caches in the layout of the crash utility's `kmem -i` and `kmem -s`.

use super::counters::Levels;
use super::slabs::usage;
use super::{Cell, Column, Role, Table};
use crate::linux::counters::Counter;
use crate::linux::slab::SlabMap;
use crate::linux::totals::Totals;
use crate::memory::PAGE_SIZE;
use std::fmt::Write;

/// Rows of `kmem -i`, what each is a part of, and whether a blank line is above.
const ROWS: [(&str, &str, bool); 14] = [
    ("TOTAL MEM", "", false),
    ("FREE", "TOTAL MEM", false),
    ("USED", "TOTAL MEM", false),
    ("SHARED", "TOTAL MEM", false),
    ("BUFFERS", "TOTAL MEM", false),
    ("CACHED", "TOTAL MEM", false),
    ("SLAB", "TOTAL MEM", false),
    ("TOTAL HUGE", "", true),
    ("HUGE FREE", "TOTAL HUGE", false),
    ("TOTAL SWAP", "", true),
    ("SWAP USED", "TOTAL SWAP", false),
    ("SWAP FREE", "TOTAL SWAP", false),
    ("COMMIT LIMIT", "", true),
    ("COMMITTED", "COMMIT LIMIT", false),
];

/// One row per line of crash's `kmem -i`, in pages; those that cannot be worked out on this kernel are left out.
/// `shared` are the pages with several users.
pub fn info(counters: &[Counter], totals: &Totals, shared: Option<i64>) -> Table {
    let counters = Levels(counters);
    let less =
        |all: Option<i64>, part: Option<i64>| all.zip(part).map(|(all, part)| all.saturating_sub(part));
    let free = counters.get("nr_free_pages");
    let amounts = [
        totals.ram,
        free,
        less(totals.ram, free),
        shared,
        totals.buffers,
        counters.cached(totals),
        counters.sum(["nr_slab_reclaimable", "nr_slab_unreclaimable"]),
        totals.huge,
        totals.huge_free,
        totals.swap,
        less(totals.swap, totals.swap_free),
        totals.swap_free,
        totals.commit_limit,
        totals.committed,
    ];
    let mut table = Table::new(vec![Column::new("name", Role::Key), Column::new("pages", Role::Amount)], 1);
    for ((name, _, _), pages) in ROWS.into_iter().zip(amounts) {
        table.rows.extend(pages.map(|pages| vec![name.into(), Cell::Number(pages)]));
    }
    table
}

/// [`info`], or the difference of two, as crash prints it. A difference has no percentages: the whole changes, too.
pub fn info_text(table: &Table) -> String {
    let amounts: Vec<(&str, i64)> = table
        .rows
        .iter()
        .filter_map(|row| match &row[..] {
            [Cell::Text(name), Cell::Number(pages)] => Some((name.as_str(), *pages)),
            _ => None,
        })
        .collect();
    let amount = |name: &str| amounts.iter().find(|(found, _)| *found == name).map(|&(_, pages)| pages);
    let heading = if table.signed { "" } else { "  PERCENTAGE" };
    let mut text = format!("{:>13}  {:>9}  {:>11}{heading}\n", "", "PAGES", "TOTAL");
    for &(name, pages) in &amounts {
        let (_, whole, gap) = ROWS.into_iter().find(|row| row.0 == name).unwrap_or_default();
        if gap && !table.signed {
            text.push('\n');
        }
        let _ = if table.signed {
            let sign = if pages < 0 { "-" } else { "+" };
            let size = format!("{sign}{}", size(pages));
            writeln!(text, "{name:>13}  {pages:>+9}  {size:>11}")
        } else {
            let share = match whole {
                "" => "   ----".to_owned(),
                whole => {
                    let share = percent(pages, amount(whole));
                    format!("{share:>4}% of {}", whole.replace("COMMIT", "TOTAL"))
                }
            };
            writeln!(text, "{name:>13}  {pages:>9}  {:>11}  {share}", size(pages))
        };
    }
    text
}

fn percent(part: i64, whole: Option<i64>) -> i64 {
    let whole = whole.filter(|&whole| whole > 0);
    whole.map_or(0, |whole| part.saturating_mul(100) / whole)
}

/// Pages as an amount, without its sign, in crash's units.
fn size(pages: i64) -> String {
    let bytes = pages.unsigned_abs().saturating_mul(PAGE_SIZE);
    let scaled = |shift: u32| bytes as f64 / (1_u64 << shift) as f64;
    match bytes {
        0 => "0".to_owned(),
        1..0x10_0000 => format!("{} KB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{:.1} MB", scaled(20)),
        _ => format!("{:.1} GB", scaled(30)),
    }
}

/// One row per slab cache, largest first: address, size of its objects, objects really allocated, room for objects,
/// slabs, and bytes of its largest slab.
pub fn slabs(map: &SlabMap) -> Table {
    let columns = vec![
        Column::new("cache", Role::Key),
        Column::new("objsize", Role::Fact),
        Column::new("allocated", Role::Amount),
        Column::new("total", Role::Amount),
        Column::new("slabs", Role::Amount),
        Column::new("ssize", Role::Fact),
        Column::new("name", Role::Key),
    ];
    let mut table = Table::new(columns, 2);
    let mut caches: Vec<_> = map.caches.iter().zip(usage(map)).collect();
    caches.sort_by_key(|(_, usage)| std::cmp::Reverse(usage.bytes));
    for (cache, usage) in caches {
        table.rows.push(vec![
            Cell::Text(format!("{:016x}", cache.va.0)),
            cache.object_size.into(),
            usage.active.into(),
            usage.total.into(),
            usage.slabs.into(),
            usage.largest.into(),
            cache.name.as_str().into(),
        ]);
    }
    table
}

/// Keeps the rows of [`slabs`] of caches with this name.
pub fn only(table: &mut Table, name: &str) {
    table.rows.retain(|row| row.last().is_some_and(|cell| *cell == name.into()));
}

/// [`slabs`], or the difference of two, as crash prints it.
pub fn slabs_text(table: &Table) -> String {
    let mut text = "CACHE             OBJSIZE  ALLOCATED     TOTAL  SLABS  SSIZE  NAME\n".to_owned();
    for row in &table.rows {
        let [Cell::Text(cache), Cell::Number(objsize), amounts @ .., Cell::Number(ssize), Cell::Text(name)] =
            &row[..]
        else {
            continue;
        };
        let _ = write!(text, "{cache}  {objsize:>7}");
        for (cell, width) in amounts.iter().zip([9, 8, 5]) {
            let _ = match cell {
                Cell::Number(amount) if table.signed => write!(text, "  {amount:>+width$}"),
                Cell::Number(amount) => write!(text, "  {amount:>width$}"),
                _ => Ok(()),
            };
        }
        // Escaped: a module chooses it.
        let _ = writeln!(text, "  {:>5}  {}", format!("{}k", ssize >> 10), name.escape_debug());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::slabs::tests::{cache, page};
    use super::*;

    #[test]
    fn memory_by_use_is_laid_out_as_crash_does() {
        let values = [("nr_free_pages", 1000), ("nr_file_pages", 450), ("nr_slab_reclaimable", 50)];
        let mut counters: Vec<Counter> =
            values.iter().map(|&(name, value)| Counter { name: name.to_owned(), value }).collect();
        let totals = Totals {
            ram: Some(4000),
            buffers: Some(20),
            swap: Some(0),
            swap_free: Some(0),
            committed: Some(300_000),
            commit_limit: Some(2000),
            ..Totals::default()
        };
        let before = info(&counters, &totals, Some(7));
        let text = "
                   PAGES        TOTAL  PERCENTAGE
    TOTAL MEM       4000      15.6 MB     ----
         FREE       1000       3.9 MB    25% of TOTAL MEM
         USED       3000      11.7 MB    75% of TOTAL MEM
       SHARED          7        28 KB     0% of TOTAL MEM
      BUFFERS         20        80 KB     0% of TOTAL MEM
       CACHED        430       1.7 MB    10% of TOTAL MEM

   TOTAL SWAP          0            0     ----
    SWAP USED          0            0     0% of TOTAL SWAP
    SWAP FREE          0            0     0% of TOTAL SWAP

 COMMIT LIMIT       2000       7.8 MB     ----
    COMMITTED     300000       1.1 GB  15000% of TOTAL LIMIT
";
        assert_eq!(format!("\n{}", info_text(&before)), text);
        counters[0].value -= 10;
        let change = info(&counters, &totals, Some(7)).since(&before);
        let text = "                   PAGES        TOTAL
         USED        +10       +40 KB
         FREE        -10       -40 KB
";
        assert_eq!(info_text(&change), text);
    }

    #[test]
    fn caches_are_laid_out_as_crash_does() {
        let map = SlabMap {
            caches: vec![cache("empty", 64), cache("large", 4096)],
            pages: vec![page(1, 8, 0x7f, false)],
            damaged: vec![],
        };
        let mut all = slabs(&map);
        let text = "\
CACHE             OBJSIZE  ALLOCATED     TOTAL  SLABS  SSIZE  NAME
0000000000000000     4090          7         8      1    32k  large
0000000000000000       58          0         0      0     0k  empty
";
        assert_eq!(slabs_text(&all), text);
        let before = slabs(&SlabMap { pages: vec![page(1, 8, 1, false)], ..map });
        only(&mut all, "large");
        let text = "\
CACHE             OBJSIZE  ALLOCATED     TOTAL  SLABS  SSIZE  NAME
0000000000000000     4090         +6        +0     +0    32k  large
";
        assert_eq!(slabs_text(&all.since(&before)), text);
    }

    #[test]
    fn absurd_amounts_overflow_nothing() {
        for value in [i64::MAX, i64::MIN] {
            let counters = [Counter { name: "nr_free_pages".to_owned(), value }];
            let totals =
                Totals { ram: Some(value), swap: Some(-1), swap_free: Some(value), ..Totals::default() };
            let all = info(&counters, &totals, Some(value));
            let _ = (info_text(&all), info_text(&all.since(&info(&[], &Totals::default(), None))));
        }
    }
}
