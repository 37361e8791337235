//! Every guest page frame and what the kernel uses it for, from `struct page` and the free lists.

use super::Linux;
use super::lookup::Lookup;
pub use super::page_structs::MAX_ORDER;
use super::page_structs::{Kind, PageStructs};
use super::read::{le64, physical_end};
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, Pa, PhysicalMemory, Va};
use std::ops::Range;

/// Pages of orders 0 to `PAGE_ALLOC_COSTLY_ORDER` have per-CPU lists by order and migrate type; lists behind them
/// hold huge pages (`order_to_pindex`, mm/page_alloc.c).
const SMALL_ORDERS: u64 = 4;
/// Order of a huge page (2 MiB).
const HUGE_ORDER: u64 = 9;
/// Most memory nodes of any configuration (`MAX_NUMNODES`).
const MAX_NODES: u64 = 1024;

/// What a page frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Use {
    /// No `struct page` (or none initialised yet), or a hole in RAM.
    None,
    /// In the buddy lists or a per-CPU page list.
    Free,
    /// Slab page (head or tail).
    Slab,
    /// Anonymous or file-backed user memory, page cache, anything on an LRU or with a mapping.
    User,
    /// Page table.
    PageTable,
    /// Reserved at boot: kernel image, memblock allocations, firmware.
    Reserved,
    /// Kernel text or read-only data, which hold no references to heap objects. (Data that became read-only after
    /// initialisation lies in such frames too and does: it is one of [`Linux::static_roots`].)
    Text,
    /// Anything else in use: page-allocator memory of the kernel (vmalloc backing, large kmalloc, raw pages).
    Kernel,
}

/// So many uses there are.
pub const USES: usize = Use::Kernel as usize + 1;

/// Use of every frame.
#[derive(Debug, Clone, Default)]
pub struct PageMap {
    /// Indexed by frame number.
    pub uses: Vec<Use>,
}

impl PageMap {
    /// Use of a frame.
    pub fn get(&self, frame: u64) -> Use {
        usize::try_from(frame).ok().and_then(|f| self.uses.get(f)).copied().unwrap_or(Use::None)
    }

    fn fill(&mut self, first: u64, frames: u64, to: Use) {
        let len = self.uses.len();
        let clamp = |frame: u64| usize::try_from(frame).unwrap_or(usize::MAX).min(len);
        self.uses[clamp(first)..clamp(first.saturating_add(frames))].fill(to);
    }
}

/// Offsets and addresses this room needs.
pub(super) struct Layout {
    nodes: Nodes,
    node_zones: u64,
    zone_size: u64,
    zones: u64,
    per_cpu_pageset: u64,
    lists: u64,
    list_count: u64,
    migrate_types: u64,
    /// Kernel text and read-only data, run-time addresses.
    read_only: Vec<Range<Va>>,
}

enum Nodes {
    /// An array of pointers, and how many there are.
    Many {
        array: Va,
        count: Option<Va>,
    },
    One(Va),
}

impl Layout {
    pub fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        let nodes = match lookup.symbol_if_any("node_data") {
            Some(array) => Nodes::Many { array, count: lookup.symbol_if_any("nr_node_ids") },
            None => Nodes::One(lookup.symbol("contig_page_data")?),
        };
        let range = |start, end| Some(lookup.symbol_if_any(start)?..lookup.symbol_if_any(end)?);
        let lists = lookup.field("per_cpu_pages", "lists")?;
        Ok(Self {
            nodes,
            node_zones: lookup.offset("pglist_data", "node_zones")?,
            zone_size: lookup.size_of("zone")?,
            zones: lookup.enumerator("__MAX_NR_ZONES")?.min(16),
            per_cpu_pageset: lookup.offset("zone", "per_cpu_pageset")?,
            lists: lists.offset,
            list_count: lists.size / 16,
            migrate_types: lookup.enumerator("MIGRATE_PCPTYPES")?.max(1),
            read_only: [range("_stext", "_etext"), range("__start_rodata", "__end_rodata")]
                .into_iter()
                .flatten()
                .collect(),
        })
    }
}

impl Linux {
    /// Classifies all frames.
    ///
    /// # Errors
    /// Page tables or free lists that are damaged, with the address.
    pub fn page_map(&self, memory: &impl FrozenMemory) -> Result<PageMap, MemoryError> {
        let structs = self.page_structs(memory)?;
        let frames = physical_end(memory) >> PAGE_SHIFT;
        let mut map = PageMap { uses: vec![Use::None; frames as usize] };
        let mut free_until = 0;
        for (frame, page) in structs.iter() {
            // The entries inside a free block are whatever their last users left.
            if frame < free_until {
                continue;
            }
            if self.pages.is(self.pages.buddy, page) {
                let order = le64(page, self.pages.private);
                if order > MAX_ORDER {
                    let va = structs.base + frame * structs.size;
                    return Err(MemoryError::Corrupt { va, what: "a free block has an impossible order" });
                }
                free_until = frame + (1 << order);
                map.fill(frame, 1 << order, Use::Free);
            } else {
                let to = self.frame_use(&structs, &map, frame, page);
                map.fill(frame, 1, to);
            }
        }
        self.mark_per_cpu_lists(memory, &structs, &mut map)?;
        self.mark_read_only(memory, &mut map)?;
        Ok(map)
    }

    /// Direct-map address of a frame.
    ///
    /// # Errors
    /// As [`Linux::direct_map_base`].
    pub fn direct_map(&self, memory: &impl FrozenMemory, pa: Pa) -> Result<Va, MemoryError> {
        Ok(self.direct_map_base(memory)? + pa.0)
    }

    /// Use of a frame that is not in a free block. Reference counts say nothing here: the frames behind the first of
    /// a block that is not compound have none and are in use.
    fn frame_use(&self, structs: &PageStructs<'_>, map: &PageMap, frame: u64, page: &[u8]) -> Use {
        let layout = &self.pages;
        if let Some(head) = layout.tail_of(page).map(|va| structs.frame(va)) {
            // Members of a tail mean other things than a head's: it has the head's use.
            let is_head = |page: &[u8]| le64(page, layout.flags) & layout.head != 0;
            if head < frame && structs.from(head).is_some_and(is_head) {
                return map.get(head);
            }
        }
        let is = |kind| layout.is(kind, structs.from(frame).unwrap_or(page));
        // Slab first: the pages of the KFENCE pool are reserved and slabs.
        if is(layout.slab) {
            Use::Slab
        } else if is(Kind::Flag(layout.reserved)) {
            Use::Reserved
        } else if is(layout.table) {
            Use::PageTable
        } else if is(Kind::Flag(layout.user)) || is(layout.hugetlb) || le64(page, layout.mapping) != 0 {
            Use::User
        } else if page.iter().all(|&byte| byte == 0) {
            // Not initialised yet (CONFIG_DEFERRED_STRUCT_PAGE_INIT): nobody can have the page.
            Use::None
        } else {
            Use::Kernel
        }
    }

    /// Pages freed to a CPU's own lists look like used ones in all but their list.
    fn mark_per_cpu_lists(
        &self,
        memory: &impl PhysicalMemory,
        structs: &PageStructs<'_>,
        map: &mut PageMap,
    ) -> Result<(), MemoryError> {
        let layout = &self.zones;
        // A page is on one list: of all together, also where damaged zones or CPUs share them.
        let mut left = map.uses.len();
        for node in self.nodes(memory)? {
            for zone in self.zones_of(node) {
                let pagesets = self.read_va(memory, zone + layout.per_cpu_pageset)?;
                // Zones without pages keep the shared boot page set or none.
                if pagesets == Va(0) {
                    continue;
                }
                for cpu in 0..self.cpu_count(memory)? {
                    let pageset = self.percpu_base(memory, cpu)? + pagesets.0;
                    self.mark_pageset(memory, structs, map, pageset + layout.lists, &mut left)?;
                }
            }
        }
        Ok(())
    }

    fn mark_pageset(
        &self,
        memory: &impl PhysicalMemory,
        structs: &PageStructs<'_>,
        map: &mut PageMap,
        lists: Va,
        left: &mut usize,
    ) -> Result<(), MemoryError> {
        for index in 0..self.zones.list_count {
            let head = lists + 16 * index;
            let order = match index / self.zones.migrate_types {
                order if order < SMALL_ORDERS => order,
                _ => HUGE_ORDER,
            };
            let links = self.list(memory, head, *left)?;
            *left -= links.len();
            for link in links {
                let page = link - self.pages.list;
                map.fill(structs.frame(page), 1 << order, Use::Free);
            }
        }
        Ok(())
    }

    /// `zone` of every zone of a node, unused ones among them.
    pub(super) fn zones_of(&self, node: Va) -> impl Iterator<Item = Va> + use<> {
        let Layout { node_zones, zone_size, zones, .. } = self.zones;
        (0..zones).map(move |zone| node + node_zones + zone * zone_size)
    }

    /// `pglist_data` of every memory node.
    pub(super) fn nodes(&self, memory: &impl PhysicalMemory) -> Result<Vec<Va>, MemoryError> {
        match self.zones.nodes {
            Nodes::One(node) => Ok(vec![node]),
            Nodes::Many { array, count } => {
                let count = match count {
                    Some(va) => u64::from(self.read_u32(memory, va)?).min(MAX_NODES),
                    None => 1,
                };
                let mut nodes = Vec::new();
                for i in 0..count {
                    let node = self.read_va(memory, array + 8 * i)?;
                    if node != Va(0) {
                        nodes.push(node);
                    }
                }
                Ok(nodes)
            }
        }
    }

    /// Text and read-only data; the parts given back to the page allocator at boot keep their new use.
    fn mark_read_only(&self, memory: &impl PhysicalMemory, map: &mut PageMap) -> Result<(), MemoryError> {
        for range in &self.zones.read_only {
            let first = self.translate(memory, range.start)?.0 >> PAGE_SHIFT;
            let frames = (range.end - range.start) >> PAGE_SHIFT;
            for frame in first..first + frames {
                if map.get(frame) == Use::Reserved {
                    map.fill(frame, 1, Use::Text);
                }
            }
        }
        Ok(())
    }
}
