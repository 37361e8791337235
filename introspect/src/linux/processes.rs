//! Processes' own memory: what their page tables map.

use super::Linux;
use super::lookup::Lookup;
use super::tasks::Task;
use crate::arch::{AddressSpace, MAX_ENTRIES};
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, Va};
use anyhow::Context;
use rustc_hash::FxHashSet;
use std::ops::ControlFlow;

/// Most pages mapped in all processes together: 64 GiB. A damaged table can map huge pages for ever.
const MAX_MAPPINGS: usize = 16 << 20;
/// Bits behind the point of a proportional share, as the kernel has it (`PSS_SHIFT`, fs/proc/task_mmu.c), so that sums
/// round alike.
const SHARE_SHIFT: u32 = 12;

/// Offsets this room needs.
pub(super) struct Layout {
    pub mm: u64,
    pub pgd: u64,
    total_vm: u64,
}

impl Layout {
    /// None on a kernel whose types do not have them.
    pub fn new(lookup: &Lookup<'_>) -> Option<Self> {
        let offset = |structure, member| lookup.types.offset(structure, member);
        Some(Self {
            mm: offset("task_struct", "mm")?,
            pgd: offset("mm_struct", "pgd")?,
            total_vm: offset("mm_struct", "total_vm")?,
        })
    }
}

/// A process's memory, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its first thread.
    pub task: Task,
    /// Address space in use, mapped or not.
    pub vss: u64,
    /// Pages mapped.
    pub rss: u64,
    /// The same, each page divided among those who map it.
    pub pss: u64,
    /// Pages that nobody else maps.
    pub uss: u64,
}

/// What may still be looked at, in all processes together.
struct Left {
    /// Pages mapped.
    pages: usize,
    /// Entries of page tables.
    entries: u64,
}

impl Linux {
    /// The memory of every process; kernel threads have none. `tasks` as [`Linux::tasks`] has them: of the tasks that share
    /// an address space the first stands for all.
    ///
    /// Pages that the kernel does not count are left out as /proc/PID/smaps does: those of devices and of the kernel itself
    /// (the page of zeros, the clock of the vDSO), which are marked in the page tables.
    ///
    /// # Errors
    /// A kernel without the types, or damaged page tables, with an address.
    pub fn processes(&self, memory: &impl FrozenMemory, tasks: &[Task]) -> anyhow::Result<Vec<Process>> {
        let layout = self
            .processes
            .as_ref()
            .context("The kernel's BTF does not describe processes' address spaces")?;
        let frames = memory.ranges().last().map_or(0, |r| (r.start.0 + r.len) >> PAGE_SHIFT);
        let mut mapped = vec![0_u32; usize::try_from(frames).unwrap_or(0)];
        let mut seen = FxHashSet::default();
        let mut spaces = Vec::new();
        let mut left = Left { pages: MAX_MAPPINGS, entries: MAX_ENTRIES };
        for task in tasks {
            let mm = self.read_va(memory, task.va + layout.mm)?;
            if mm == Va(0) || !seen.insert(mm) {
                continue;
            }
            let vss = self.read_u64(memory, mm + layout.total_vm)?.saturating_mul(PAGE_SIZE);
            let pages = self.user_pages(memory, mm, layout, &mut left)?;
            for &frame in &pages {
                if let Some(count) = mapped.get_mut(frame as usize) {
                    *count += 1;
                }
            }
            spaces.push((task, vss, pages));
        }
        let counted = |(task, vss, pages): (&Task, u64, Vec<u32>)| {
            let counts = || pages.iter().filter_map(|&frame| mapped.get(frame as usize)).filter(|n| **n > 0);
            let shares: u64 = counts().map(|&n| (PAGE_SIZE << SHARE_SHIFT) / u64::from(n)).sum();
            Process {
                task: task.clone(),
                vss,
                rss: counts().count() as u64 * PAGE_SIZE,
                pss: shares >> SHARE_SHIFT,
                uss: counts().filter(|n| **n == 1).count() as u64 * PAGE_SIZE,
            }
        };
        Ok(spaces.into_iter().map(counted).collect())
    }

    /// Frame numbers of the pages that an address space maps for user code, as often as it maps them.
    fn user_pages(
        &self,
        memory: &impl FrozenMemory,
        mm: Va,
        layout: &Layout,
        left: &mut Left,
    ) -> Result<Vec<u32>, MemoryError> {
        let pgd = self.read_va(memory, mm + layout.pgd)?;
        let space = AddressSpace { root: self.translate(memory, pgd)?, ..self.space };
        let mut pages = Vec::new();
        let mut full = false;
        let Left { pages: left, entries } = left;
        space.leaves_within(memory, Va(0), space.user_bytes(), entries, |leaf| {
            if leaf.special {
                return ControlFlow::Continue(());
            }
            let (first, count) = (leaf.pa.0 >> PAGE_SHIFT, leaf.size >> PAGE_SHIFT);
            full = count as usize > *left;
            if full {
                return ControlFlow::Break(());
            }
            *left -= count as usize;
            // Frames beyond what a number holds are no RAM.
            pages.extend((first..first + count).filter_map(|frame| u32::try_from(frame).ok()));
            ControlFlow::Continue(())
        })?;
        if full {
            return Err(MemoryError::Corrupt { va: mm, what: "page tables map more than 64 GiB" });
        }
        Ok(pages)
    }
}
