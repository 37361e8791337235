//! Pages in which `kfree_rcu` collects what is to be freed (`struct kvfree_rcu_bulk_data`; kernel/rcu/tree.c, since 6.14
//! mm/slab_common.c).
//!
//! Each is an array of pointers to objects that nobody uses any more, up to a count; behind it, and in the pages that a CPU
//! keeps for next time, are those of objects that were freed long ago, whose memory may be in use again.

use super::Linux;
use super::lookup::Lookup;
use crate::memory::{MemoryError, PAGE_SIZE, PhysicalMemory, Va};

/// Most pages of one CPU; a page has 500 objects.
const MAX_PAGES: usize = 1 << 16;

/// Where each CPU has its pages; None on kernels that collect them otherwise.
pub(super) struct Layout {
    /// `krc`, each CPU's `struct kfree_rcu_cpu`.
    percpu: u64,
    /// Heads of lists of pages in it, and where such a page has the link to the next.
    lists: Vec<(u64, u64)>,
}

impl Layout {
    pub fn new(lookup: &Lookup<'_>) -> Option<Self> {
        let types = lookup.types;
        let percpu = lookup.percpu_if_any("krc")?;
        // What is kept is linked by its first word (`struct llist_node`).
        let mut lists = vec![(types.offset("kfree_rcu_cpu", "bkvcache")?, 0)];
        let mut add = |head: Option<(u64, u64)>, size: u64, link: u64| {
            let heads =
                head.into_iter().flat_map(|(offset, bytes)| (offset..offset + bytes).step_by(size as usize));
            lists.extend(heads.map(|head| (head, link)));
        };
        let array =
            |structure, member| types.field(structure, member).map(|field| (field.offset, field.size));
        // A `list_head` since 6.4, a pointer before.
        let (new, old) =
            (types.offset("kvfree_rcu_bulk_data", "list"), types.offset("kvfree_rcu_bulk_data", "next"));
        let (size, link, waiting, being_freed) = match (new, old) {
            (Some(link), _) => (16, link, "bulk_head", "bulk_head_free"),
            (None, link) => (8, link?, "bkvhead", "bkvhead_free"),
        };
        add(array("kfree_rcu_cpu", waiting), size, link);
        let work = types.size_of("kfree_rcu_cpu_work").filter(|&size| size > 0);
        if let Some((start, bytes)) = array("kfree_rcu_cpu", "krw_arr") {
            for at in (start..start + bytes).step_by(work? as usize) {
                let heads = array("kfree_rcu_cpu_work", being_freed);
                add(heads.map(|(offset, bytes)| (at + offset, bytes)), size, link);
            }
        }
        Some(Self { percpu, lists })
    }
}

impl Linux {
    /// All such pages.
    ///
    /// # Errors
    /// A damaged list, with an address.
    pub fn rcu_free_pages(&self, memory: &impl PhysicalMemory) -> Result<Vec<Va>, MemoryError> {
        let mut pages = Vec::new();
        let Some(layout) = &self.rcu_free else { return Ok(pages) };
        for cpu in 0..self.cpu_count(memory)? {
            let krc = self.percpu_base(memory, cpu)? + layout.percpu;
            let most = pages.len() + MAX_PAGES;
            for &(head, link) in &layout.lists {
                let head = krc + head;
                let mut next = self.read_va(memory, head)?;
                // Lists end at nothing or at a head: while one is handed on, that of another list.
                while next != Va(0) && next.0.wrapping_sub(link).is_multiple_of(PAGE_SIZE) {
                    let page = Va(next.0.wrapping_sub(link));
                    if pages.len() == most {
                        return Err(MemoryError::Corrupt {
                            va: head,
                            what: "too many pages wait for kfree_rcu",
                        });
                    }
                    pages.push(page);
                    next = self.read_va(memory, next)?;
                }
            }
        }
        Ok(pages)
    }
}
