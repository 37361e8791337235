//! The guest's `struct page` array (include/linux/mm_types.h), and what one entry says of its frame.

use super::Linux;
use super::lookup::Lookup;
use super::read::{le32, le64, physical_end};
use crate::arch::Leaf;
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, Pa, PhysicalMemory, Va};
use std::ops::{ControlFlow, Range};

/// Most orders a block of pages can have; real kernels stop at 10.
pub const MAX_ORDER: u64 = 20;

/// Slabs have 2^3 pages or fewer, but for those of objects larger than that (`slub_max_order`, mm/slub.c).
const MAX_SLAB_ORDER: u64 = 3;

/// Offsets inside `struct page` and the tests for the kinds of pages.
pub(super) struct Layout {
    /// Size of a `struct page`, bytes; divides the page size.
    pub size: u64,
    pub flags: u64,
    pub compound_head: u64,
    pub mapping: u64,
    pub page_type: u64,
    pub private: u64,
    /// Links of pages in the free lists.
    pub list: u64,
    pub slab: Kind,
    pub buddy: Kind,
    pub table: Kind,
    pub hugetlb: Kind,
    pub head: u64,
    pub reserved: u64,
    pub user: u64,
}

/// How a `struct page` says that the page is of some kind.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Any of these bits in `flags`.
    Flag(u64),
    /// Top byte of `page_type` (since 6.12).
    TypeByte(u32),
    /// A zero bit in `page_type` below the marker 0xf (until 6.10; `PageType` in page-flags.h).
    TypeBit(u32),
    /// `compound_dtor` of the first tail page (until 6.6): offset and value.
    Destructor(u64, u8),
    /// The kernel has no such pages.
    Never,
}

impl Layout {
    pub fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        let page = |member| lookup.offset("page", member);
        let size = lookup.size_of("page")?;
        anyhow::ensure!(
            size != 0 && PAGE_SIZE.is_multiple_of(size),
            "A struct page of {size} bytes does not divide a page"
        );
        let flag = |name| Ok::<u64, anyhow::Error>(1 << (lookup.enumerator(name)? & 63));
        let typed = |name, bit| match lookup.types.enumerator(name) {
            Some(value) => Kind::TypeByte(value as u32),
            None => Kind::TypeBit(bit),
        };
        let slab = match lookup.types.enumerator("PGTY_slab") {
            Some(value) => Kind::TypeByte(value as u32),
            None => Kind::Flag(flag("PG_slab")?),
        };
        let hugetlb =
            match (lookup.types.enumerator("PGTY_hugetlb"), lookup.types.enumerator("HUGETLB_PAGE_DTOR")) {
                (Some(value), _) => Kind::TypeByte(value as u32),
                (None, Some(value)) => Kind::Destructor(size + page("compound_dtor")?, value as u8),
                (None, None) => Kind::Never,
            };
        Ok(Self {
            size,
            flags: page("flags")?,
            compound_head: page("compound_head")?,
            mapping: page("mapping")?,
            page_type: page("page_type")?,
            private: page("private")?,
            list: page("lru")?,
            slab,
            buddy: typed("PGTY_buddy", 0x80),
            table: typed("PGTY_table", 0x200),
            hugetlb,
            head: flag("PG_head")?,
            reserved: flag("PG_reserved")?,
            user: flag("PG_lru")? | flag("PG_swapbacked")?,
        })
    }

    /// True when the page whose `struct page` starts `bytes` is of that kind.
    pub fn is(&self, kind: Kind, bytes: &[u8]) -> bool {
        let page_type = le32(bytes, self.page_type);
        match kind {
            Kind::Flag(mask) => le64(bytes, self.flags) & mask != 0,
            Kind::TypeByte(value) => page_type >> 24 == value,
            Kind::TypeBit(bit) => page_type & (0xf000_0000 | bit) == 0xf000_0000,
            Kind::Destructor(offset, value) => {
                le64(bytes, self.flags) & self.head != 0 && bytes.get(offset as usize) == Some(&value)
            }
            Kind::Never => false,
        }
    }

    /// Address of the head's `struct page` when this is a tail of a compound page (bit 0 of `compound_head`).
    pub fn tail_of(&self, bytes: &[u8]) -> Option<Va> {
        let word = le64(bytes, self.compound_head);
        (word & 1 != 0).then(|| Va(word - 1))
    }
}

/// A part of the array that is contiguous in guest physical memory.
#[derive(Debug, Clone, Copy)]
pub struct PageChunk<'m> {
    /// Frame number of the first entry.
    pub first_frame: u64,
    /// The entries.
    pub bytes: &'m [u8],
}

/// The `struct page` of every frame of RAM.
#[derive(Debug, Clone)]
pub struct PageStructs<'m> {
    /// Address of frame 0's entry, which need not be mapped.
    pub base: Va,
    /// Size of an entry, bytes.
    pub size: u64,
    /// Ascending and disjoint; frames that are in none have no `struct page`.
    pub chunks: Vec<PageChunk<'m>>,
}

/// Where frames and their `struct page`s are: turns the address of one into that of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagePlaces {
    /// Address of frame 0's `struct page`.
    pub structs: Va,
    /// Size of a `struct page`, bytes.
    pub size: u64,
    /// Address of frame 0 in the direct map.
    pub direct: Va,
    /// End of RAM.
    pub end: Pa,
}

impl PagePlaces {
    /// The frame whose `struct page` starts at `page`.
    pub fn pa(&self, page: Va) -> Option<Pa> {
        let offset = page.0.checked_sub(self.structs.0)?;
        let pa = Pa((offset / self.size).checked_mul(PAGE_SIZE)?);
        (offset.is_multiple_of(self.size) && pa < self.end).then_some(pa)
    }

    /// Its direct-map address.
    pub fn address(&self, page: Va) -> Option<Va> {
        self.pa(page).map(|pa| self.direct + pa.0)
    }

    /// The direct-map address of a block of `size` bytes; None when it is not in RAM as a whole.
    pub fn block(&self, page: Va, size: u64) -> Option<Va> {
        let pa = self.pa(page)?;
        let inside = pa.0.checked_add(size).is_some_and(|end| end <= self.end.0);
        let address = self.direct.0.checked_add(pa.0)?;
        (inside && address.checked_add(size).is_some()).then_some(Va(address))
    }

    /// The `struct page`s of a block of frames in the direct map; None when it is not in RAM as a whole.
    pub fn structs_of(&self, block: &Range<Va>) -> Option<Range<Va>> {
        let in_ram = self.direct <= block.start
            && block.start <= block.end
            && block.end.0.checked_sub(self.direct.0)? <= self.end.0;
        let place = |va: Va| self.structs + ((va - self.direct) >> PAGE_SHIFT) * self.size;
        in_ram.then(|| place(block.start)..place(block.end))
    }
}

impl<'m> PageStructs<'m> {
    /// A frame's entry, and all behind it in the same chunk.
    pub fn from(&self, frame: u64) -> Option<&'m [u8]> {
        let next = self.chunks.partition_point(|c| c.first_frame <= frame);
        let chunk = self.chunks[..next].last()?;
        let offset = usize::try_from((frame - chunk.first_frame).checked_mul(self.size)?).ok()?;
        chunk.bytes.get(offset..).filter(|b| b.len() as u64 >= self.size)
    }

    /// Every frame with its entry, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &'m [u8])> {
        let size = self.size as usize;
        self.chunks.iter().flat_map(move |c| (c.first_frame..).zip(c.bytes.chunks_exact(size)))
    }

    /// Frame of the entry at `va`.
    pub fn frame(&self, va: Va) -> u64 {
        (va - self.base) / self.size
    }
}

impl Linux {
    /// The `struct page` array, as far as it describes RAM.
    ///
    /// # Errors
    /// The page tables are not in RAM. A part that is not mapped is left out instead.
    pub fn page_structs<'m>(&self, memory: &'m impl FrozenMemory) -> Result<PageStructs<'m>, MemoryError> {
        let (base, size) = (self.page_structs_base(memory)?, self.pages.size);
        let mut structs = PageStructs { base, size, chunks: Vec::new() };
        for range in memory.ranges() {
            let first = range.start.0 >> PAGE_SHIFT;
            let frames = range.len >> PAGE_SHIFT;
            let mut result = Ok(());
            self.space.leaves(memory, base + first * size, frames * size, |leaf| {
                result = add_chunk(&mut structs, memory, leaf, first..first + frames);
                if result.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            result?;
        }
        Ok(structs)
    }

    /// Where in a frame's entry the free list of the slab that the frame was part of still is: the allocator does not
    /// clear it, and of most later uses none writes there (`page->index`). A slab's free list leads into the slab itself,
    /// which is how it is told from what else may be there. `direct` is where the direct map starts.
    pub fn left_freelist(&self, structs: &PageStructs<'_>, direct: Va, frame: u64) -> Option<Range<Va>> {
        let slab = Va(le64(structs.from(frame)?, self.slab.freelist)).0.checked_sub(direct.0)?;
        let block = |frame: u64| frame >> MAX_SLAB_ORDER;
        let at = structs.base + frame * structs.size + self.slab.freelist;
        (block(slab >> PAGE_SHIFT) == block(frame)).then(|| at..at + 8)
    }

    /// Where in a slab's entry the link to the next one is that waits for a grace period: a slab of a cache with
    /// `SLAB_TYPESAFE_BY_RCU` waits in the same list as all that was given to `call_rcu`, so that what was queued behind it
    /// hangs from there. None for a slab in use.
    pub fn rcu_link(&self, structs: &PageStructs<'_>, frame: u64) -> Option<Range<Va>> {
        let late = &self.slab.late;
        let waits = late.text.contains(&Va(le64(structs.from(frame)?, late.head + late.func)));
        let at = structs.base + frame * structs.size + late.head;
        waits.then(|| at..at + 8)
    }

    /// True for the first frame of a compound page, such as a large kmalloc's.
    pub fn is_compound(&self, structs: &PageStructs<'_>, frame: u64) -> bool {
        structs.from(frame).is_some_and(|page| le64(page, self.pages.flags) & self.pages.head != 0)
    }

    /// Where frames and their `struct page`s are.
    ///
    /// # Errors
    /// As [`Linux::page_structs_base`] and [`Linux::direct_map_base`].
    pub fn page_places(&self, memory: &impl PhysicalMemory) -> Result<PagePlaces, MemoryError> {
        Ok(PagePlaces {
            structs: self.page_structs_base(memory)?,
            size: self.pages.size,
            direct: self.direct_map_base(memory)?,
            end: Pa(physical_end(memory)),
        })
    }
}

/// Adds the entries of `frames` that lie in `leaf`.
fn add_chunk<'m>(
    structs: &mut PageStructs<'m>,
    memory: &'m impl FrozenMemory,
    leaf: Leaf,
    frames: Range<u64>,
) -> Result<(), MemoryError> {
    let start = leaf.va.max(structs.base + frames.start * structs.size);
    let end = (leaf.va + leaf.size).min(structs.base + frames.end * structs.size);
    let bytes = memory.slice(leaf.pa + (start - leaf.va), (end - start) as usize)?;
    structs.chunks.push(PageChunk { first_frame: structs.frame(start), bytes });
    Ok(())
}
