//! Amounts of memory that have variables of their own beside the counters: what else /proc/meminfo needs.

use super::Linux;
use super::lookup::Lookup;
use crate::memory::{MemoryError, PhysicalMemory, Va};

/// More block devices and partitions than any guest has; a list beyond it is damage.
const MAX_DEVICES: usize = 1 << 20;

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
        Ok(Totals {
            ram: word("_totalram_pages")?,
            buffers: self.block_device_pages(memory, &lookup)?,
            swap: word("total_swap_pages")?,
            swap_free: word("nr_swap_pages")?,
            committed: self.committed(memory, &lookup)?,
            vmalloc: word("nr_vmalloc_pages")?,
            percpu: populated.zip(units).map(|(pages, units)| pages.saturating_mul(units.into())),
            poisoned: word("num_poisoned_pages")?,
            reserve: word("totalreserve_pages")?,
            low_watermarks: self.low_watermarks(memory, &lookup)?,
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
