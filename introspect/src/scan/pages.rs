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
//! other.

use super::ScanInput;
use super::guest::{Extent, GuestMemory};
use super::index::Block;
use super::mark::{Contents, Marker, Special, Witness};
use crate::linux::PagePlaces;
use crate::linux::pages::{PageMap, Use};
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, Va};
use crate::registry::{Kind, Object};
use std::ops::Range;

/// Areas and stacks together map no frame more often than this, on average: of a damaged guest they could.
const MAX_MAPPED: u64 = 16;

/// See the module.
pub(super) struct Pages {
    /// Ascending.
    objects: Vec<Object>,
    /// None when there are no objects.
    places: Option<PagePlaces>,
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
        let mut blocks = input.registry.blocks().peekable();
        if blocks.peek().is_none() {
            return Ok(Self { objects: Vec::new(), places: None });
        }
        let mut others = input.linux.page_table_frames(input.memory)?;
        objects.iter().for_each(|&extent| fill(&mut others, extent));
        let mut left = (others.len() as u64).saturating_mul(MAX_MAPPED * PAGE_SIZE);
        let areas = input.linux.vmalloc_areas(input.memory)?.into_iter();
        let areas = areas.map(|area| area.start..area.start + area.size);
        let stacks = input.linux.tasks(input.memory)?.into_iter();
        for range in areas.chain(stacks.map(|task| task.stack..task.stack + task.stack_size)) {
            let va = range.start;
            for extent in guest.extents(range) {
                let what = "vmalloc areas and stacks are many times as large as RAM";
                left = left.checked_sub(extent.len).ok_or(MemoryError::Corrupt { va, what })?;
                fill(&mut others, extent);
            }
        }
        let places = input.linux.page_places(input.memory)?;
        let own = |frame: u64| uses.get(frame) == Use::Kernel && others.get(frame as usize) == Some(&false);
        let objects = blocks.filter(|block| frames_of(block, &places).all(own)).collect();
        Ok(Self { objects, places: Some(places) })
    }

    /// The objects, ascending.
    pub fn objects(&self) -> impl Iterator<Item = Object> + '_ {
        self.objects.iter().copied()
    }

    /// Their `struct page`s.
    pub fn structs(&self) -> impl Iterator<Item = Block> + '_ {
        self.objects.iter().filter_map(|object| self.structs_of(object))
    }

    /// Their memory.
    pub fn extents<M: FrozenMemory>(&self, guest: &GuestMemory<'_, M>) -> Vec<Extent> {
        self.objects
            .iter()
            .flat_map(|object| guest.extents(object.address..object.address + object.size))
            .collect()
    }

    /// Their frames, ascending and disjoint.
    pub fn frames(&self) -> Vec<Range<u64>> {
        let places = self.places.as_ref();
        self.objects.iter().filter_map(|object| Some(frames_of(object, places?))).collect()
    }

    /// Start addresses of the blocks that an object of any kind is for the marker.
    pub fn blocks_of(&self, object: &Object) -> impl Iterator<Item = u64> + use<> {
        let structs = self.structs_of(object).map(|block| block.start);
        std::iter::once(object.address.0).chain(structs)
    }

    /// Address of the object of which the marker has a block that starts at `start`.
    pub fn object_of(&self, start: Va) -> Va {
        self.places.and_then(|places| places.address(start)).unwrap_or(start)
    }

    /// Makes memory and `struct page`s of each object one.
    pub fn join<C: Contents, W: Witness>(&self, marker: &mut Marker<'_, C, W>) {
        for object in &self.objects {
            let Some(structs) = self.structs_of(object) else { continue };
            for (one, other) in [(object.address.0, structs.start), (structs.start, object.address.0)] {
                marker.set_special(one, Special { stands_for: Some(other), ..Special::default() });
            }
        }
    }

    fn structs_of(&self, object: &Object) -> Option<Block> {
        let places = self.places.filter(|_| object.kind == Kind::Page)?;
        let structs = places.structs_of(&(object.address..object.address + object.size));
        Some(Block { start: structs.start.0, size: structs.end - structs.start })
    }
}

fn frames_of(block: &Object, places: &PagePlaces) -> Range<u64> {
    let first = (block.address - places.direct) >> PAGE_SHIFT;
    first..first + (block.size >> PAGE_SHIFT)
}

/// Takes every frame that an extent meets.
fn fill(frames: &mut [bool], extent: Extent) {
    let clamp = |frame: u64| usize::try_from(frame).unwrap_or(usize::MAX).min(frames.len());
    let range = clamp(extent.start.0 >> PAGE_SHIFT)
        ..clamp((extent.start.0.saturating_add(extent.len)).div_ceil(PAGE_SIZE));
    frames[range].fill(true);
}
