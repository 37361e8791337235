//! Pages as the page allocator is handed them: on a list, in an array, in a `struct folio_batch`.

use super::Linux;
use super::lookup::Lookup;
use crate::memory::{MemoryError, PhysicalMemory, Va};

/// Most pages of one call: `alloc_pages_bulk` is asked for a vmalloc block's (100 at a time) or a page pool's, and lists
/// to be freed have been isolated from an LRU (mm/vmscan.c, 32 at a time) or are a huge mapping's.
const MAX_PAGES: usize = 1 << 18;
/// More than any kernel's `PAGEVEC_SIZE` (31 since 6.9).
const MAX_BATCH: u64 = 256;

/// Offsets in `struct folio_batch` (include/linux/pagevec.h); None on kernels without.
pub(super) struct Layout {
    pub(super) batch: Option<Batch>,
    /// Of the word whose low byte is the order of a large folio (`_flags_1`, 6.6 and newer).
    pub(super) order: Option<u64>,
}

pub(super) struct Batch {
    pub count: u64,
    pub folios: u64,
}

impl Layout {
    pub fn new(lookup: &Lookup<'_>) -> Self {
        let batch = |member| lookup.offset("folio_batch", member).ok();
        let batch = batch("nr").zip(batch("folios")).map(|(count, folios)| Batch { count, folios });
        let order = lookup.offset("folio", "_flags_1").ok();
        Self { batch, order }
    }
}

impl Linux {
    /// True when `alloc_pages_bulk` has a list, or NULL, as its fifth argument, before the array: until 6.13.
    pub fn bulk_has_list(&self) -> bool {
        let types = self.kernel.types.as_ref();
        let parameters = types.and_then(|types| types.parameters("alloc_pages_bulk_noprof"));
        parameters.is_none_or(|parameters| parameters.len() > 5)
    }

    /// The `struct page`s on the list at `head`.
    ///
    /// # Errors
    /// A damaged list, or one that is longer than any.
    pub fn pages_on_list(&self, memory: &impl PhysicalMemory, head: Va) -> Result<Vec<Va>, MemoryError> {
        let links = self.list(memory, head, MAX_PAGES)?;
        Ok(links.into_iter().map(|link| link - self.pages.list).collect())
    }

    /// The first `count` `struct page`s of the array at `array`; empty places are left out.
    ///
    /// # Errors
    /// The array is not in RAM.
    pub fn pages_in_array(
        &self,
        memory: &impl PhysicalMemory,
        array: Va,
        count: u64,
    ) -> Result<Vec<Va>, MemoryError> {
        let count = count.min(MAX_PAGES as u64);
        let pages = (0..count).map(|index| self.read_va(memory, array + index * 8));
        pages.filter(|page| *page != Ok(Va(0))).collect()
    }

    /// The first `struct page` of each block in the `struct folio_batch` at `batch`, and the block's order.
    ///
    /// # Errors
    /// It is not in RAM, or the kernel has no such structure.
    pub fn pages_in_batch(
        &self,
        memory: &impl PhysicalMemory,
        batch: Va,
    ) -> Result<Vec<(Va, u64)>, MemoryError> {
        let missing = MemoryError::Corrupt { va: batch, what: "the kernel has no struct folio_batch" };
        let layout = self.page_lists.batch.as_ref().ok_or(missing)?;
        let mut count = [0];
        self.read(memory, batch + layout.count, &mut count)?;
        let folios =
            self.pages_in_array(memory, batch + layout.folios, u64::from(count[0]).min(MAX_BATCH))?;
        folios.into_iter().map(|folio| Ok((folio, self.folio_order(memory, folio)?))).collect()
    }

    /// log2 of the number of pages of a folio: kept in the first tail page's `flags`, when the head says that there are
    /// any (`folio_order`, include/linux/mm.h).
    fn folio_order(&self, memory: &impl PhysicalMemory, folio: Va) -> Result<u64, MemoryError> {
        let is_large = self.read_u64(memory, folio + self.pages.flags)? & self.pages.head != 0;
        match self.page_lists.order.filter(|_| is_large) {
            Some(offset) => Ok(self.read_u64(memory, folio + offset)? & 0xff),
            None => Ok(0),
        }
    }
}
