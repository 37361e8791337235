//! Frames that hold page tables.
//!
//! `struct page` says so of some only: of the upper levels, and of all of the kernel's own, before 6.14 of none
//! (`pagetable_*_ctor`, include/linux/mm.h). So the tables are walked: the kernel's, and those of every process, whose
//! top-level tables hang in one list.

use super::Linux;
use super::read::physical_end;
use crate::arch::AddressSpace;
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, Pa};

impl Linux {
    /// True for each frame, by number, that is a page table of the kernel or of a process.
    ///
    /// # Errors
    /// A damaged list, or a table outside RAM.
    pub fn page_table_frames(&self, memory: &impl FrozenMemory) -> Result<Vec<bool>, MemoryError> {
        let mut frames = vec![false; (physical_end(memory) >> PAGE_SHIFT) as usize];
        let mut roots = vec![self.space.root];
        // arch/x86/mm/fault.c: linked through the struct pages.
        if let Some(head) = self.symbol("pgd_list") {
            let places = self.page_places(memory)?;
            for link in self.list(memory, head, frames.len())? {
                let page = link - self.pages.list;
                let what = "a page table's link is in no struct page";
                roots.push(places.pa(page).ok_or(MemoryError::Corrupt { va: page, what })?);
            }
        }
        // With page-table isolation the page behind a top-level table is that for user mode (arch/x86/mm/pti.c).
        let isolated = self.symbol("pti_init").is_some() || self.symbol("__pti_set_user_pgtbl").is_some();
        for root in roots {
            self.walk_tables(memory, root, &mut frames)?;
            if isolated && root.0 & PAGE_SIZE == 0 {
                self.walk_tables(memory, root + PAGE_SIZE, &mut frames)?;
            }
        }
        Ok(frames)
    }

    fn walk_tables(
        &self,
        memory: &impl FrozenMemory,
        root: Pa,
        frames: &mut [bool],
    ) -> Result<(), MemoryError> {
        let space = AddressSpace { root, ..self.space };
        space.tables(memory, |table| match frames.get_mut((table.0 >> PAGE_SHIFT) as usize) {
            Some(seen) => !std::mem::replace(seen, true),
            None => false,
        })
    }
}
