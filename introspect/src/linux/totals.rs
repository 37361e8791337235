//! Amounts of memory that have variables of their own beside the counters: what else /proc/meminfo needs.

use super::Linux;
use super::lookup::Lookup;
use super::page_structs::Kind;
use super::read::le32;
use crate::memory::{FrozenMemory, MemoryError, PAGE_SIZE, PhysicalMemory, Va};

/// More block devices and partitions than any guest has; a list beyond it is damage.
const MAX_DEVICES: usize = 1 << 20;
/// More sizes of huge pages than any kernel knows (`HUGE_MAX_HSTATE`).
const MAX_HUGE_SIZES: u64 = 8;

/// Amounts in pages. None where this kernel has no such variable, or none by this name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pages that the page allocator manages (`_totalram_pages`).
    pub ram: Option<i64>,
    /// Page cache of block devices (`nr_blockdev_pages`).
    pub buffers: Option<i64>,
    /// Swap space.
    pub swap: Option<i64>,
    /// Free swap space.
    pub swap_free: Option<i64>,
    /// Promised to processes (`vm_committed_as`).
    pub committed: Option<i64>,
    /// Backing of vmalloc areas (`nr_vmalloc_pages`).
    pub vmalloc: Option<i64>,
    /// Backing of per-CPU chunks (`pcpu_nr_pages`).
    pub percpu: Option<i64>,
    /// Taken out of use after memory errors.
    pub poisoned: Option<i64>,
    /// Kept back by the page allocator (`totalreserve_pages`).
    pub reserve: Option<i64>,
    /// Low watermarks of all zones together.
    pub low_watermarks: Option<i64>,
    /// In pools of huge pages (`hstates`).
    pub huge: Option<i64>,
    /// Free ones of these.
    pub huge_free: Option<i64>,
    /// What may be promised to processes where promises are kept (`vm_commit_limit`).
    pub commit_limit: Option<i64>,
}

impl Linux {
    /// See [`Totals`].
    ///
    /// # Errors
    /// A kernel without types, or memory or a list that is damaged, with its address.
    pub fn totals(&self, memory: &impl PhysicalMemory) -> anyhow::Result<Totals> {
        let lookup = self.lookup()?;
        let word = |name| self.variable(memory, &lookup, name);
        let populated = self.variable(memory, &lookup, "pcpu_nr_populated")?;
        let units = lookup.symbol_if_any("pcpu_nr_units").map(|va| self.read_u32(memory, va)).transpose()?;
        let (ram, swap) = (word("_totalram_pages")?, word("total_swap_pages")?);
        let huge = self.huge_pages(memory, &lookup)?;
        Ok(Totals {
            ram,
            buffers: self.block_device_pages(memory, &lookup)?,
            swap,
            swap_free: word("nr_swap_pages")?,
            committed: self.committed(memory, &lookup)?,
            vmalloc: word("nr_vmalloc_pages")?,
            percpu: populated.zip(units).map(|(pages, units)| pages.saturating_mul(units.into())),
            poisoned: word("num_poisoned_pages")?,
            reserve: word("totalreserve_pages")?,
            low_watermarks: self.low_watermarks(memory, &lookup)?,
            huge: huge.map(|(all, _)| all),
            huge_free: huge.map(|(_, free)| free),
            commit_limit: match ram {
                Some(ram) => {
                    let ram = ram.saturating_sub(huge.map_or(0, |(all, _)| all));
                    self.commit_limit(memory, &lookup, ram, swap.unwrap_or(0))?
                }
                None => None,
            },
        })
    }

    fn variable(
        &self,
        memory: &impl PhysicalMemory,
        lookup: &Lookup<'_>,
        name: &str,
    ) -> Result<Option<i64>, MemoryError> {
        let va = lookup.symbol_if_any(name);
        va.map(|va| Ok(self.read_u64(memory, va)?.cast_signed())).transpose()
    }

    /// Pages in the pools of huge pages, and free ones of them.
    fn huge_pages(
        &self,
        memory: &impl PhysicalMemory,
        lookup: &Lookup<'_>,
    ) -> Result<Option<(i64, i64)>, MemoryError> {
        let member = |name| lookup.offset("hstate", name).ok();
        let (Some(states), Some(count), Ok(size), Some(order), Some(all), Some(free)) = (
            lookup.symbol_if_any("hstates"),
            lookup.symbol_if_any("hugetlb_max_hstate"),
            lookup.size_of("hstate"),
            member("order"),
            member("nr_huge_pages"),
            member("free_huge_pages"),
        ) else {
            return Ok(None);
        };
        let mut sums = (0_i64, 0_i64);
        for n in 0..u64::from(self.read_u32(memory, count)?).min(MAX_HUGE_SIZES) {
            let state = states + n * size;
            let pages = 1_i64 << (self.read_u32(memory, state + order)? & 31);
            let amount = |at| Ok(self.read_u64(memory, state + at)?.cast_signed().saturating_mul(pages));
            sums = (sums.0.saturating_add(amount(all)?), sums.1.saturating_add(amount(free)?));
        }
        Ok(Some(sums))
    }

    /// By ratio or by amount, whichever the guest's administrator set; `ram` is without huge pages (`vm_commit_limit`,
    /// mm/util.c).
    fn commit_limit(
        &self,
        memory: &impl PhysicalMemory,
        lookup: &Lookup<'_>,
        ram: i64,
        swap: i64,
    ) -> Result<Option<i64>, MemoryError> {
        let Some(ratio) = lookup.symbol_if_any("sysctl_overcommit_ratio") else { return Ok(None) };
        let kb = self.variable(memory, lookup, "sysctl_overcommit_kbytes")?.unwrap_or(0);
        let ratio = i64::from(self.read_u32(memory, ratio)?);
        let allowed = if kb != 0 { kb / (PAGE_SIZE as i64 >> 10) } else { ram.saturating_mul(ratio) / 100 };
        Ok(Some(allowed.saturating_add(swap)))
    }

    /// Pages that several users hold: used, with a reference count above one. As crash's `kmem -i` counts them.
    ///
    /// # Errors
    /// A kernel without types, or page tables that are damaged.
    pub fn shared_pages(&self, memory: &impl FrozenMemory) -> anyhow::Result<i64> {
        let count = self.lookup()?.offset("page", "_refcount")?;
        let layout = &self.pages;
        let shared = |page: &[u8]| {
            let unused = layout.tail_of(page).is_some()
                || layout.is(layout.buddy, page)
                || layout.is(Kind::Flag(layout.reserved), page);
            !unused && le32(page, count).cast_signed() > 1
        };
        Ok(self.page_structs(memory)?.iter().filter(|(_, page)| shared(page)).count() as i64)
    }

    /// Pages cached for every inode of the file system that block devices have their inodes in.
    fn block_device_pages(
        &self,
        memory: &impl PhysicalMemory,
        lookup: &Lookup<'_>,
    ) -> Result<Option<i64>, MemoryError> {
        let offset = |structure, member| lookup.offset(structure, member).ok();
        let (Some(variable), Some(inodes), Some(link), Some(mapping), Some(pages)) = (
            lookup.symbol_if_any("blockdev_superblock"),
            offset("super_block", "s_inodes"),
            offset("inode", "i_sb_list"),
            offset("inode", "i_mapping"),
            offset("address_space", "nrpages"),
        ) else {
            return Ok(None);
        };
        let superblock = self.read_va(memory, variable)?;
        if superblock == Va(0) {
            return Ok(Some(0));
        }
        let mut sum = 0_i64;
        for node in self.list(memory, superblock + inodes, MAX_DEVICES)? {
            let mapping = self.read_va(memory, node - link + mapping)?;
            sum = sum.saturating_add(self.read_u64(memory, mapping + pages)?.cast_signed());
        }
        Ok(Some(sum))
    }

    /// The counter and every CPU's part of it (`percpu_counter_sum_positive`).
    fn committed(
        &self,
        memory: &impl PhysicalMemory,
        lookup: &Lookup<'_>,
    ) -> Result<Option<i64>, MemoryError> {
        let (Some(counter), Ok(count)) =
            (lookup.symbol_if_any("vm_committed_as"), lookup.offset("percpu_counter", "count"))
        else {
            return Ok(None);
        };
        let mut sum = self.read_u64(memory, counter + count)?.cast_signed();
        // Kernels for one CPU have the count alone.
        if let Ok(parts) = lookup.offset("percpu_counter", "counters") {
            let parts = self.read_u64(memory, counter + parts)?;
            for cpu in 0..if parts == 0 { 0 } else { self.cpu_count(memory)? } {
                let part = self.read_u32(memory, self.percpu_base(memory, cpu)? + parts)?;
                sum = sum.wrapping_add(part.cast_signed().into());
            }
        }
        Ok(Some(sum.max(0)))
    }

    /// Where reclaim begins, boosts included (`low_wmark_pages`, include/linux/mmzone.h).
    fn low_watermarks(
        &self,
        memory: &impl PhysicalMemory,
        lookup: &Lookup<'_>,
    ) -> anyhow::Result<Option<i64>> {
        let member = |path| lookup.offset("zone", path).ok();
        let (Some(marks), Some(boost), Ok(low)) =
            (member("_watermark"), member("watermark_boost"), lookup.enumerator("WMARK_LOW"))
        else {
            return Ok(None);
        };
        let mut sum = 0_i64;
        for (_, zone) in self.populated_zones(memory, lookup)? {
            for at in [marks + 8 * (low & 7), boost] {
                sum = sum.saturating_add(self.read_u64(memory, zone + at)?.cast_signed());
            }
        }
        Ok(Some(sum))
    }
}
