//! Blocks of the page allocator, by address.
//!
//! They never overlap, and unlike other objects they can be cut: `alloc_pages_exact` gives the end of its block back at
//! once, and `split_page` lets each page go on its own. A block that was cut is one object still, as long as its pages
//! are neighbours: who asked for four pages in a row may keep the address of the first only.

use super::record::Record;
use crate::memory::Va;
use std::collections::BTreeMap;

/// See the module.
#[derive(Default)]
pub(super) struct Blocks {
    /// Sizes and records.
    by_start: BTreeMap<Va, (u64, Record)>,
}

impl Blocks {
    /// Enters a block; true when one or more that met it had to go.
    pub fn insert(&mut self, start: Va, size: u64, record: Record) -> bool {
        let met = self.remove(start, size);
        self.by_start.insert(start, (size, record));
        met
    }

    /// Takes a range out of the blocks that it meets; true when it met one.
    pub fn remove(&mut self, start: Va, size: u64) -> bool {
        let end = Va(start.0.saturating_add(size));
        let mut met = false;
        while let Some((&from, &(size, record))) = self.by_start.range(..end).next_back() {
            let to = from + size;
            if to <= start {
                break;
            }
            met = true;
            self.by_start.remove(&from);
            if from < start {
                self.by_start.insert(from, (start - from, record));
            }
            if to > end {
                self.by_start.insert(end, (to - end, record));
            }
        }
        met
    }

    /// Size and record of the block that starts at `start`.
    pub fn get(&self, start: Va) -> Option<(u64, &Record)> {
        self.by_start.get(&start).map(|(size, record)| (*size, record))
    }

    /// The block that starts at `start`.
    pub fn get_mut(&mut self, start: Va) -> Option<&mut Record> {
        self.by_start.get_mut(&start).map(|(_, record)| record)
    }

    /// The block that `va` is in.
    pub fn containing(&self, va: Va) -> Option<(Va, u64, &Record)> {
        let (&start, (size, record)) = self.by_start.range(..=va).next_back()?;
        (va - start < *size).then_some((start, *size, record))
    }

    /// All, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (Va, u64, &Record)> {
        self.by_start.iter().map(|(&start, (size, record))| (start, *size, record))
    }

    /// Bytes of host memory, but for the nodes' unused places.
    pub fn memory(&self) -> usize {
        self.by_start.len() * size_of::<(Va, u64, Record)>()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AllocEvent, Backtrace, Kind, Registry};
    use super::*;
    use proptest::prelude::*;

    const BASE: Va = Va(0xffff_8880_0000_0000);

    fn registry(blocks: &[(u64, u64)]) -> Registry {
        let mut registry = Registry::default();
        for &(page, pages) in blocks {
            alloc(&mut registry, page, pages);
        }
        registry
    }

    fn alloc(registry: &mut Registry, page: u64, pages: u64) {
        registry.alloc(&AllocEvent {
            address: BASE + page * 4096,
            size: pages * 4096,
            kind: Kind::Page,
            cache: Va(0),
            comm: [0; 16],
            pid: 1,
            jiffies: 0,
            stack: Backtrace::Frames(&[Va(page)]),
        });
    }

    fn left(registry: &Registry) -> Vec<(u64, u64)> {
        registry.blocks().map(|o| ((o.address - BASE) / 4096, o.size / 4096)).collect()
    }

    #[test]
    fn what_is_given_back_is_cut_out() {
        let mut registry = registry(&[(0, 8), (8, 4), (16, 1)]);
        registry.free_pages(BASE + 5 * 4096, 3 * 4096);
        assert_eq!(left(&registry), [(0, 5), (8, 4), (16, 1)], "the end");
        registry.free_pages(BASE + 2 * 4096, 4096);
        assert_eq!(left(&registry), [(0, 2), (3, 2), (8, 4), (16, 1)], "the middle");
        registry.free_pages(BASE + 4 * 4096, 13 * 4096);
        assert_eq!(left(&registry), [(0, 2), (3, 1)], "several");
        assert_eq!(registry.counters.frees, 3);
        registry.free_pages(BASE + 100 * 4096, 4096);
        assert_eq!((registry.counters.frees, registry.counters.unknown_frees), (3, 0), "memory of the boot");
        let part = registry.block_with(BASE + 3 * 4096 + 7).unwrap();
        assert_eq!(registry.stacks.get(part.stack), [Va(0)], "a part has its block's backtrace");
    }

    #[test]
    fn a_block_may_have_the_address_of_what_lies_in_it() {
        let mut registry = registry(&[(0, 1)]);
        let slab = AllocEvent {
            address: BASE,
            size: 64,
            kind: Kind::Slab,
            cache: Va(7),
            comm: [0; 16],
            pid: 1,
            jiffies: 0,
            stack: Backtrace::Frames(&[]),
        };
        registry.alloc(&slab);
        assert_eq!(registry.counters.overwrites, 0);
        assert_eq!(registry.get(BASE).unwrap().kind, Kind::Slab);
        assert_eq!(registry.containing(BASE + 100).unwrap().kind, Kind::Page);
        registry.free(BASE);
        assert_eq!(registry.get(BASE).unwrap().kind, Kind::Page);
        assert_eq!((registry.len(), left(&registry)), (0, vec![(0, 1)]));
    }

    proptest! {
        /// Against a map of pages.
        #[test]
        fn blocks_are_the_pages_not_given_back(events in prop::collection::vec((any::<bool>(), 0..64_u64, 1..9_u64), 1..80)) {
            let mut registry = Registry::default();
            let mut pages = [None; 80];
            for (number, (comes, page, count)) in events.into_iter().enumerate() {
                let range = page as usize..(page + count) as usize;
                if comes {
                    alloc(&mut registry, page, count);
                    pages[range].fill(Some(number));
                } else {
                    registry.free_pages(BASE + page * 4096, count * 4096);
                    pages[range].fill(None);
                }
                for (page, owner) in pages.iter().enumerate() {
                    let block = registry.block_with(BASE + page as u64 * 4096);
                    prop_assert_eq!(block.map(|b| b.sequence), owner.map(|n| n as u64 + 1));
                }
            }
        }
    }
}
