//! Blocks of pages that are objects of their own.
//!
//! The page allocator serves everybody. A block is an object for scans when the kernel's own code asked for it and has it
//! to itself: not for slabs, a large kmalloc, user memory, page cache, page tables, stacks, or anything mapped in vmalloc
//! space. The guest's own metadata say so, at the scan; what the trace adds is where the block's borders are, and who
//! asked. All other pages are treated as if nobody had tracked them. (That a block is a large kmalloc's only the trace of
//! slabs knows: without it, it is a block of pages.)
//!
//! The kernel refers to a block by its address in the direct map or by its `struct page`, in which it also links pages
//! to lists. So for the marker a block is two objects, its memory and its `struct page`s, each of which stands for the
//! other. A large kmalloc is such a block, too, whether pages are tracked or not: were its `struct page`s roots, then what
//! their last users left in them could hold it.

use super::ScanInput;
use super::guest::{Extent, GuestMemory};
use super::index::Block;
use super::mark::{Contents, Marker, Special, Witness};
use super::roots::{near, without};
use crate::linux::PagePlaces;
use crate::linux::pages::{PageMap, Use};
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, Va};
use crate::registry::{Kind, Object};
use std::ops::Range;

/// Areas and stacks together map no frame more often than this, on average: of a damaged guest they could.
const MAX_MAPPED: u64 = 16;

/// See the module.
pub(super) struct Pages {
    /// Blocks of the page allocator, ascending.
    objects: Vec<Object>,
    /// Every large kmalloc, ascending; where a free was missed they may overlap.
    large: Vec<Object>,
    /// Parts of `struct page`s of either that are left out, ascending ([`Linux::left_freelist`]).
    left: Vec<Range<Va>>,
    places: PagePlaces,
}

impl Pages {
    /// Picks them out of all blocks. `objects` is the memory of tracked objects that have whole pages.
    ///
    /// # Errors
    /// A structure of the guest that is damaged, with its address.
    pub fn collect<M: FrozenMemory>(
        input: &ScanInput<'_, M>,
        guest: &GuestMemory<'_, M>,
        uses: &PageMap,
        objects: &[Extent],
    ) -> Result<Self, MemoryError> {
        let places = input.linux.page_places(input.memory)?;
        let mut large: Vec<Object> = input.registry.others().filter(|o| o.kind == Kind::Large).collect();
        large.retain(|object| places.structs_of(&memory_of(object)).is_some());
        large.sort_unstable_by_key(|object| object.address);
        let mut pages = Self { objects: Vec::new(), large, left: Vec::new(), places };
        if input.registry.blocks().next().is_some() {
            let others = others(input, guest, objects)?;
            let own =
                |frame: u64| uses.get(frame) == Use::Kernel && others.get(frame as usize) == Some(&false);
            let has_own = |block: &Object| pages.frames_of(block).is_some_and(|mut frames| frames.all(own));
            pages.objects = input.registry.blocks().filter(has_own).collect();
        }
        let structs = input.linux.page_structs(input.memory)?;
        let left = |frame| input.linux.left_freelist(&structs, places.direct, frame);
        pages.left = pages.frames().into_iter().flatten().filter_map(left).collect();
        Ok(pages)
    }

    /// The objects, ascending.
    pub fn objects(&self) -> impl Iterator<Item = Object> + '_ {
        self.objects.iter().copied()
    }

    /// The `struct page`s of the objects, and of every large kmalloc.
    pub fn structs(&self) -> impl Iterator<Item = Block> + '_ {
        self.all().filter_map(|object| self.structs_of(object))
    }

    /// The objects' memory.
    pub fn extents<M: FrozenMemory>(&self, guest: &GuestMemory<'_, M>) -> Vec<Extent> {
        self.objects
            .iter()
            .flat_map(|object| guest.extents(object.address..object.address + object.size))
            .collect()
    }

    /// Frames whose `struct page`s are among [`Pages::structs`], ascending and disjoint.
    pub fn frames(&self) -> Vec<Range<u64>> {
        let mut frames: Vec<Range<u64>> = self.all().filter_map(|object| self.frames_of(object)).collect();
        frames.sort_unstable_by_key(|range| range.start);
        frames.dedup_by(|next, last| {
            let meet = next.start <= last.end;
            last.end = if meet { last.end.max(next.end) } else { last.end };
            meet
        });
        frames
    }

    /// Start addresses of the blocks that an object of any kind is for the marker.
    pub fn blocks_of(&self, object: &Object) -> impl Iterator<Item = u64> + use<> {
        let structs = self.structs_of(object).map(|block| block.start);
        std::iter::once(object.address.0).chain(structs)
    }

    /// Address of the object of which the marker has a block that starts at `start`.
    pub fn object_of(&self, start: Va) -> Va {
        self.places.address(start).unwrap_or(start)
    }

    /// Makes memory and `struct page`s of each object one.
    pub fn join<C: Contents, W: Witness>(&self, marker: &mut Marker<'_, C, W>) {
        for object in self.all() {
            let Some(structs) = self.structs_of(object) else { continue };
            let memory = Special { stands_for: Some(structs.start), ..Special::default() };
            marker.set_special(object.address.0, memory);
            let areas = self.areas(&structs);
            marker.set_special(
                structs.start,
                Special { areas, stands_for: Some(object.address.0), ..Special::default() },
            );
        }
    }

    /// The parts of some `struct page`s that are read, bytes from their start; None for all.
    fn areas(&self, structs: &Block) -> Option<Vec<Range<u64>>> {
        let (start, end) = (Va(structs.start), Va(structs.start) + structs.size);
        let left = near(&self.left, start, structs.size);
        let parts = || without(start..end, left).into_iter().map(|part| part.start - start..part.end - start);
        (!left.is_empty()).then(|| parts().collect())
    }

    fn all(&self) -> impl Iterator<Item = &Object> {
        self.objects.iter().chain(&self.large)
    }

    fn structs_of(&self, object: &Object) -> Option<Block> {
        let structs = structs_of(&self.places, object)?;
        Some(Block { start: structs.start.0, size: structs.end - structs.start })
    }

    fn frames_of(&self, block: &Object) -> Option<Range<u64>> {
        let memory = memory_of(block);
        structs_of(&self.places, block)?;
        let frame = |va: Va| (va - self.places.direct) >> PAGE_SHIFT;
        Some(frame(memory.start)..frame(memory.end))
    }
}

/// The `struct page`s by which an object can be referred to; None when it has none.
pub(super) fn structs_of(places: &PagePlaces, object: &Object) -> Option<Range<Va>> {
    matches!(object.kind, Kind::Page | Kind::Large).then(|| places.structs_of(&memory_of(object))).flatten()
}

/// The pages that an object has as a whole: of a large kmalloc up to the power of two that the page allocator gave.
pub(super) fn memory_of(object: &Object) -> Range<Va> {
    let size = match object.kind {
        Kind::Vmalloc => object.size.checked_next_multiple_of(PAGE_SIZE),
        Kind::Large => object.size.max(PAGE_SIZE).checked_next_power_of_two(),
        _ => None,
    };
    object.address..Va(object.address.0.saturating_add(size.unwrap_or(object.size)))
}

/// True for each frame that belongs to page tables, to the `objects`, to areas of the vmalloc space or to stacks.
fn others<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    guest: &GuestMemory<'_, M>,
    objects: &[Extent],
) -> Result<Vec<bool>, MemoryError> {
    let mut others = input.linux.page_table_frames(input.memory)?;
    objects.iter().for_each(|&extent| fill(&mut others, extent));
    let mut left = (others.len() as u64).saturating_mul(MAX_MAPPED * PAGE_SIZE);
    let areas = input.linux.vmalloc_areas(input.memory)?.into_iter();
    let areas = areas.map(|area| area.start..area.start + area.size);
    let stacks = input.linux.tasks(input.memory)?.into_iter();
    for range in areas.chain(stacks.map(|task| task.stack_range())) {
        let va = range.start;
        for extent in guest.extents(range) {
            let what = "vmalloc areas and stacks are many times as large as RAM";
            left = left.checked_sub(extent.len).ok_or(MemoryError::Corrupt { va, what })?;
            fill(&mut others, extent);
        }
    }
    Ok(others)
}

/// Takes every frame that an extent meets.
fn fill(frames: &mut [bool], extent: Extent) {
    let clamp = |frame: u64| usize::try_from(frame).unwrap_or(usize::MAX).min(frames.len());
    let range = clamp(extent.start.0 >> PAGE_SHIFT)
        ..clamp((extent.start.0.saturating_add(extent.len)).div_ceil(PAGE_SIZE));
    frames[range].fill(true);
}
