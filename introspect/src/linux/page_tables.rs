//! Frames that hold page tables.
//!
//! `struct page` says so of some only: of the upper levels, and of all of the kernel's own, before 6.14 of none
//! (`pagetable_*_ctor`, include/linux/mm.h). So the tables are walked: the kernel's, and those of every process, whose
//! top-level tables hang in one list.

use super::Linux;
use super::read::physical_end;
use crate::arch::AddressSpace;
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, Pa};

impl Linux {
    /// True for each frame, by number, that is a page table of the kernel or of a process.
    ///
    /// # Errors
    /// A damaged list.
    pub fn page_table_frames(&self, memory: &impl FrozenMemory) -> Result<Vec<bool>, MemoryError> {
        let mut frames = vec![false; (physical_end(memory) >> PAGE_SHIFT) as usize];
        for root in self.page_table_roots(memory)? {
            self.walk_tables(memory, root, &mut frames);
        }
        Ok(frames)
    }

    fn walk_tables(&self, memory: &impl FrozenMemory, root: Pa, frames: &mut [bool]) {
        let space = AddressSpace { root, ..self.space };
        space.tables(memory, |table| match frames.get_mut((table.0 >> PAGE_SHIFT) as usize) {
            Some(seen) => !std::mem::replace(seen, true),
            None => false,
        });
    }
}
