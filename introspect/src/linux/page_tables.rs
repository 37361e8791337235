//! Frames that hold page tables.
//!
//! `struct page` says so of some only: of the upper levels, and of all of the kernel's own, before 6.14 of none
//! (`pagetable_*_ctor`, include/linux/mm.h). So the tables are walked: the kernel's, and those of every process, whose
//! top-level tables hang in one list.

use super::Linux;
use super::read::physical_end;
use crate::arch::AddressSpace;
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, Pa};

/// Where `X86_FEATURE_PTI` is in the array of features, bytes, and its bit (arch/x86/include/asm/cpufeatures.h).
const PTI: (u64, u32) = (7 * 4, 1 << 11);

impl Linux {
    /// True for each frame, by number, that is a page table of the kernel or of a process.
    ///
    /// # Errors
    /// A damaged list.
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
        let isolated = self.isolates_page_tables(memory)?;
        for root in roots {
            self.walk_tables(memory, root, &mut frames);
            if isolated && root.0 & PAGE_SIZE == 0 {
                self.walk_tables(memory, root + PAGE_SIZE, &mut frames);
            }
        }
        Ok(frames)
    }

    /// True when the page behind each top-level table is that for user mode (arch/x86/mm/pti.c).
    fn isolates_page_tables(&self, memory: &impl FrozenMemory) -> Result<bool, MemoryError> {
        let types = self.kernel.types.as_ref();
        let features = types.and_then(|types| types.offset("cpuinfo_x86", "x86_capability"));
        match self.symbol("boot_cpu_data").zip(features) {
            Some((data, features)) => Ok(self.read_u32(memory, data + features + PTI.0)? & PTI.1 != 0),
            None => Ok(false),
        }
    }

    fn walk_tables(&self, memory: &impl FrozenMemory, root: Pa, frames: &mut [bool]) {
        let space = AddressSpace { root, ..self.space };
        space.tables(memory, |table| match frames.get_mut((table.0 >> PAGE_SHIFT) as usize) {
            Some(seen) => !std::mem::replace(seen, true),
            None => false,
        });
    }
}
