//! `vmstat` and `meminfo`: the memory management's own counters.

use super::{Cell, Column, Role, Table};
use crate::linux::counters::Counter;
use crate::linux::totals::Totals;
use crate::memory::PAGE_SIZE;

/// kB of a page.
const PAGE_KB: i64 = (PAGE_SIZE >> 10) as i64;
/// Pages of a huge page.
const HUGE_PAGE: i64 = 512;
/// Counters of huge pages that are kept in pages (`vmstat_item_print_in_thp`, include/linux/mmzone.h).
const OF_HUGE_PAGES: [&str; 5] = [
    "nr_shmem_hugepages",
    "nr_shmem_pmdmapped",
    "nr_file_hugepages",
    "nr_file_pmdmapped",
    "nr_anon_transparent_hugepages",
];
/// Counters of sectors that are shown in kB (`vmstat_start`, mm/vmstat.c).
const OF_SECTORS: [&str; 2] = ["pgpgin", "pgpgout"];

/// One row per counter, in the order and the units of /proc/vmstat.
pub fn vmstat(counters: &[Counter]) -> Table {
    let mut table = Table::new(vec![Column::new("name", Role::Key), Column::new("value", Role::Amount)], 1);
    for Counter { name, value } in counters {
        let unit = match name.as_str() {
            name if OF_HUGE_PAGES.contains(&name) => HUGE_PAGE,
            name if OF_SECTORS.contains(&name) => 2,
            _ => 1,
        };
        table.rows.push(vec![name.as_str().into(), Cell::Number(value / unit)]);
    }
    table
}

/// One row per line of /proc/meminfo that can be worked out on this kernel, in kB and in the file's order.
pub fn meminfo(counters: &[Counter], totals: &Totals) -> Table {
    let mut table = Table::new(vec![Column::new("name", Role::Key), Column::new("kB", Role::Amount)], 1);
    let counters = Levels(counters);
    for (name, pages) in lines(&counters, totals) {
        if let Some(pages) = pages {
            table.rows.push(vec![name.into(), Cell::Number(pages.saturating_mul(PAGE_KB))]);
        }
        // The one counter that is not in pages.
        if let ("SUnreclaim", Some(kb)) = (name, counters.get("nr_kernel_stack")) {
            table.rows.push(vec!["KernelStack".into(), Cell::Number(kb)]);
        }
    }
    table
}

/// Label and pages, None for what this kernel does not count (`meminfo_proc_show`, fs/proc/meminfo.c).
fn lines(counters: &Levels<'_>, totals: &Totals) -> Vec<(&'static str, Option<i64>)> {
    let level = |name| counters.get(name);
    let mut lines = vec![
        ("MemTotal", totals.ram),
        ("MemFree", level("nr_free_pages")),
        ("MemAvailable", counters.available(totals)),
        ("Buffers", totals.buffers),
        ("Cached", counters.cached(totals)),
        ("SwapCached", Some(counters.swap_cache())),
        ("Active", counters.sum(["nr_active_anon", "nr_active_file"])),
        ("Inactive", counters.sum(["nr_inactive_anon", "nr_inactive_file"])),
        ("Active(anon)", level("nr_active_anon")),
        ("Inactive(anon)", level("nr_inactive_anon")),
        ("Active(file)", level("nr_active_file")),
        ("Inactive(file)", level("nr_inactive_file")),
        ("Unevictable", level("nr_unevictable")),
        ("Mlocked", level("nr_mlock")),
        ("SwapTotal", totals.swap),
        ("SwapFree", totals.swap_free),
    ];
    lines.extend([
        ("Dirty", level("nr_dirty")),
        ("Writeback", level("nr_writeback")),
        ("AnonPages", level("nr_anon_pages")),
        ("Mapped", level("nr_mapped")),
        ("Shmem", level("nr_shmem")),
        ("KReclaimable", counters.sum(["nr_slab_reclaimable", "nr_kernel_misc_reclaimable"])),
        ("Slab", counters.sum(["nr_slab_reclaimable", "nr_slab_unreclaimable"])),
        ("SReclaimable", level("nr_slab_reclaimable")),
        ("SUnreclaim", level("nr_slab_unreclaimable")),
        ("PageTables", level("nr_page_table_pages")),
        ("SecPageTables", level("nr_sec_page_table_pages")),
        ("Bounce", level("nr_bounce")),
        ("WritebackTmp", level("nr_writeback_temp")),
        ("CommitLimit", totals.commit_limit),
        ("Committed_AS", totals.committed),
        // Later kernels count it by node.
        ("VmallocUsed", totals.vmalloc.or_else(|| level("nr_vmalloc"))),
        ("Percpu", totals.percpu),
        ("HardwareCorrupted", totals.poisoned),
        ("AnonHugePages", level("nr_anon_transparent_hugepages")),
        ("ShmemHugePages", level("nr_shmem_hugepages")),
        ("ShmemPmdMapped", level("nr_shmem_pmdmapped")),
        ("FileHugePages", level("nr_file_hugepages")),
        ("FilePmdMapped", level("nr_file_pmdmapped")),
        ("Unaccepted", level("nr_unaccepted")),
        ("Hugetlb", totals.huge),
    ]);
    lines
}

/// Counters by name.
pub(super) struct Levels<'a>(pub &'a [Counter]);

impl Levels<'_> {
    /// A counter's value; None for one that this kernel does not have.
    pub fn get(&self, name: &str) -> Option<i64> {
        self.0.iter().find(|counter| counter.name == name).map(|counter| counter.value)
    }

    /// Two counters together.
    pub fn sum(&self, names: [&str; 2]) -> Option<i64> {
        let [a, b] = names.map(|name| self.get(name));
        a.zip(b).map(|(a, b)| a.saturating_add(b))
    }

    /// Page cache without that of block devices, which is buffers (`Cached` of /proc/meminfo).
    pub fn cached(&self, totals: &Totals) -> Option<i64> {
        let (file, buffers) = self.get("nr_file_pages").zip(totals.buffers)?;
        Some(file.saturating_sub(self.swap_cache()).saturating_sub(buffers).max(0))
    }

    /// Without CONFIG_SWAP there is no such counter.
    fn swap_cache(&self) -> i64 {
        self.get("nr_swapcached").unwrap_or(0)
    }

    /// What could be had without swapping, as the kernel estimates it (`si_mem_available`): free memory above the
    /// reserve, and of the page cache and of reclaimable memory all but what the watermarks keep, or half.
    fn available(&self, totals: &Totals) -> Option<i64> {
        let (reserve, low) = (totals.reserve?, totals.low_watermarks?);
        let most = |pages: i64| pages.saturating_sub((pages / 2).min(low));
        let cache = self.sum(["nr_active_file", "nr_inactive_file"])?;
        let reclaimable = self.sum(["nr_slab_reclaimable", "nr_kernel_misc_reclaimable"])?;
        let free = self.get("nr_free_pages")?.saturating_sub(reserve);
        Some(free.saturating_add(most(cache)).saturating_add(most(reclaimable)).max(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(values: &[(&str, i64)]) -> Vec<Counter> {
        values.iter().map(|&(name, value)| Counter { name: name.to_owned(), value }).collect()
    }

    #[test]
    fn counters_are_shown_in_the_files_units() {
        let values = [("nr_free_pages", 7), ("nr_file_hugepages", 1024), ("pgpgin", 9), ("pgfault", 11)];
        let text = "\
name               value
nr_free_pages          7
nr_file_hugepages      2
pgpgin                 4
pgfault               11
";
        assert_eq!(vmstat(&counters(&values)).text(), text);
    }

    #[test]
    fn lines_are_worked_out_where_their_parts_are_known() {
        let values = counters(&[
            ("nr_free_pages", 1000),
            ("nr_active_file", 300),
            ("nr_inactive_file", 100),
            ("nr_slab_reclaimable", 50),
            ("nr_slab_unreclaimable", 25),
            ("nr_kernel_misc_reclaimable", 10),
            ("nr_file_pages", 450),
            ("nr_kernel_stack", 96),
        ]);
        let totals = Totals {
            ram: Some(4000),
            buffers: Some(20),
            reserve: Some(500),
            low_watermarks: Some(40),
            ..Totals::default()
        };
        let shown = meminfo(&values, &totals);
        let kb = |name: &str| shown.rows.iter().find(|row| row[0] == name.into()).map(|row| row[1].clone());
        let pages = |pages: i64| Some(Cell::Number(4 * pages));
        assert_eq!(kb("MemTotal"), pages(4000));
        assert_eq!(kb("Cached"), pages(430));
        assert_eq!(kb("MemAvailable"), pages(500 + 360 + 30));
        assert_eq!((kb("Slab"), kb("KReclaimable")), (pages(75), pages(60)));
        assert_eq!(kb("KernelStack"), Some(Cell::Number(96)));
        // Parts of these are not counted here.
        for unknown in ["Active", "VmallocUsed", "Percpu", "AnonPages"] {
            assert_eq!(kb(unknown), None);
        }
        let bare = meminfo(&values, &Totals::default());
        assert!(!bare.text().contains("MemAvailable") && !bare.text().contains("\nCached"));
    }

    #[test]
    fn absurd_counters_overflow_nothing() {
        let values = ["nr_free_pages", "nr_active_file", "nr_inactive_file", "nr_slab_reclaimable"];
        for value in [i64::MAX, i64::MIN] {
            let mut all = counters(&values.map(|name| (name, value)));
            all.extend(counters(&[("nr_kernel_misc_reclaimable", value), ("nr_file_pages", value)]));
            let totals = Totals {
                buffers: Some(value),
                reserve: Some(value),
                low_watermarks: Some(value),
                ..Totals::default()
            };
            let _ = (vmstat(&all).text(), meminfo(&all, &totals).text());
        }
    }
}
