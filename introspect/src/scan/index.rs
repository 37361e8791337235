//! From a word of guest memory to the object it points into: the frozen index of one scan.
//!
//! Objects are found through their page: a descriptor per page says where the first object starts and how far apart
//! they are, so that one multiplication gives the slot (what slab geometry would say, but taken from the objects
//! themselves, so that it needs nothing of the guest). An object that reaches into following pages is these pages'
//! `spill`. The pages are those of the direct map and of what else lies close together, as vmalloc blocks and
//! `struct page`s do ([`Area`]); what lies far from everything, and some thousand per-CPU allocations, is found by
//! binary search.
//!
//! Words are looked up in batches, too ([`Index::quick_slots`]): what a scan waits for is memory, and loads that do not
//! depend on each other are waited for together.
//!
//! A word belongs to the object with the greatest start at or below it, when it lies inside. Objects never overlap
//! unless a free was missed; then the later start wins.

mod page;

use super::words::Windows;
use crate::memory::{PAGE_SHIFT, PAGE_SIZE};
use page::Descriptor;
pub(super) use page::Page;
use std::ops::Range;

/// A piece of tracked memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Block {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Block {
    pub(super) fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }

    /// Whether `word` refers to it: it lies inside. A cookie is a number like others, so what lies in one's bytes must also be
    /// what a pointer to per-CPU memory is: the cookie with `percpu_ref`'s flags in its low bits, or, where cookies are no
    /// small numbers, a member's place. Sizes and counts are small numbers, and nobody is known to keep a member's only.
    pub(super) fn is_meant_by(&self, word: u64) -> bool {
        const FLAGS: u64 = 4;
        const ALIGNMENT: u64 = 4;
        let offset = word.wrapping_sub(self.start);
        let is_pointer = match self.start {
            KERNEL_HALF.. => true,
            FIRST_CHUNK.. => offset < FLAGS || offset.is_multiple_of(ALIGNMENT),
            _ => offset < FLAGS,
        };
        offset < self.size && is_pointer
    }
}

/// A word resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit {
    /// Slot number, below [`Index::slots`]. A slot may be empty: regular pages number their gaps too.
    pub slot: u32,
    /// The object that is there if the slot is taken.
    pub block: Block,
}

/// See the module description.
pub struct Index {
    /// The direct map, and others; what is not needed is empty.
    areas: [Area; AREAS],
    /// Descriptor number by page, area by area; the page's number here is its place.
    pages: Vec<u32>,
    /// Slot of the first object and place of each page in which one starts, ascending.
    firsts: Vec<(u32, u32)>,
    /// The first is [`Descriptor::NOTHING`], that with the number [`Descriptor::ELSEWHERE`] stands for all places outside.
    descriptors: Vec<Descriptor>,
    /// Objects that end in a later page than they start in, with their slots, by [`Descriptor::spill`]; the first is none.
    spills: Vec<(u32, Block)>,
    /// Objects of irregular pages.
    lists: Vec<Block>,
    /// Objects outside of all areas; their slots are numbered from `sparse_slot`.
    sparse: Vec<Block>,
    sparse_slot: u32,
    slots: u32,
    windows: Windows,
    /// Some objects overlap.
    overlap: bool,
}

impl Descriptor {
    /// Number of the one that knows nothing.
    const ELSEWHERE: u32 = 1;
}

/// Neighbouring pages.
#[derive(Clone, Copy, Default)]
struct Area {
    /// Number of the first.
    first: u64,
    /// How many.
    len: u64,
    /// Where they begin in [`Index::pages`].
    base: usize,
}

impl Area {
    /// Pages from the first that an address range meets to the last.
    fn of(range: &Range<u64>, base: usize) -> Self {
        let first = range.start >> PAGE_SHIFT;
        Self { first, len: range.end.div_ceil(PAGE_SIZE).saturating_sub(first), base }
    }
}

/// [`Index::quick_slots`]: no object.
pub const NO_SLOT: u32 = u32::MAX;
/// [`Index::quick_slots`]: [`Index::find`] knows.
pub const ASK: u32 = u32::MAX - 1;

/// The direct map, vmalloc space, `struct page`s, module space.
const AREAS: usize = 4;
/// A wider area, in pages, is none: it would take more memory than its objects are worth.
const WIDEST: u64 = 1 << 19;
/// Objects outside of the direct map are in different areas only when so much is between them.
const SPLIT: u64 = 1 << 30;
/// A page whose grid would have more slots than this per object is stored as a list: bounds the number of slots.
const MAX_GAPS: u64 = 16;
/// What is below is no kernel address, but the cookie of a per-CPU allocation: where `__per_cpu_start` is 0, cookies
/// are small numbers in the first chunk, and differences of two kernel addresses in the others.
const KERNEL_HALF: u64 = 1 << 63;
/// Cookies of the first chunk are below.
const FIRST_CHUNK: u64 = 1 << 32;

impl Index {
    /// Freezes `blocks`, at most 2^28 of them, sorted by start and no two with the same start. `direct` is the
    /// direct map's address range.
    ///
    /// Also returns the slot number of every block, in the order of `blocks`.
    pub fn new(blocks: &[Block], direct: &Range<u64>) -> (Self, Vec<u32>) {
        let mut index = Self {
            areas: [Area::default(); AREAS],
            pages: Vec::new(),
            firsts: Vec::new(),
            descriptors: vec![Descriptor::NOTHING, Descriptor::UNKNOWN],
            spills: vec![(NO_SLOT, Block { start: 0, size: 0 })],
            lists: Vec::new(),
            sparse: Vec::new(),
            sparse_slot: 0,
            slots: 0,
            windows: Windows::new([0..0, 0..0, 0..0, 0..0], [0..0, 0..0]),
            overlap: blocks.windows(2).any(|two| two[0].end() > two[1].start),
        };
        let parts = Parts::of(blocks, direct);
        let mut slots = vec![0; blocks.len()];
        let mut windows = [0..0, 0..0, 0..0, 0..0];
        let mut sparse: Vec<Range<usize>> = std::iter::once(0..parts.cookies).collect();
        for (number, part) in parts.areas.into_iter().enumerate() {
            let here = &blocks[part.clone()];
            let all = span(here);
            // What reaches into the direct map, or beyond it, does so because a free was missed.
            let end = if all.start < direct.start { direct.start } else { u64::MAX };
            let end = if number == 0 { direct.end } else { end };
            windows[number] = all.start..all.end.min(end);
            // An empty object at the start of a page still starts there.
            let last = here.last().map_or(0, |block| block.start.saturating_add(1));
            let area = Area::of(&(windows[number].start..windows[number].end.max(last)), index.pages.len());
            if number > 0 && area.len > WIDEST {
                sparse.push(part);
            } else {
                index.areas[number] = area;
                index.pages.resize(index.pages.len() + area.len as usize, 0);
                index.add_pages(area, here, &mut slots[part]);
            }
        }
        sparse.sort_unstable_by_key(|part| part.start);
        index.sparse_slot = index.slots;
        for part in sparse {
            index.sparse.extend(&blocks[part.clone()]);
            slots[part].iter_mut().zip(index.slots..).for_each(|(slot, number)| *slot = number);
            index.slots = index.sparse_slot + index.sparse.len() as u32;
        }
        let cookies = &blocks[..parts.cookies];
        let (first, others) = cookies.split_at(cookies.partition_point(|b| b.start < FIRST_CHUNK));
        index.windows = Windows::new(windows, [span(first), span(others)]);
        (index, slots)
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots as usize
    }

    /// Values outside which no word is a reference: addresses of the direct map's objects, of all others in three parts,
    /// and per-CPU cookies.
    #[inline]
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Start and length of the addresses that are this object's, and for sure no other's: what an object refers to there is
    /// marked already. Lists that are empty, and locks that nobody waits for, do so.
    #[inline]
    pub fn own(&self, block: Block) -> (u64, u64) {
        (block.start, if self.overlap { 0 } else { block.size })
    }

    /// The object `word` points into, if the slot is taken.
    #[inline]
    pub fn find(&self, word: u64) -> Option<Hit> {
        match self.pages.get(self.place(word)) {
            Some(&number) => self.find_in_page(&self.descriptors[number as usize], word),
            None => find_in_list(&self.sparse, self.sparse_slot, word),
        }
    }

    /// Where in `pages` the page of `word` is; beyond their end when it is in no area.
    #[inline(always)]
    fn place(&self, word: u64) -> usize {
        let page = word >> PAGE_SHIFT;
        self.areas.iter().fold(usize::MAX, |place, area| {
            // Below the first page the subtraction wraps and the number is out of range.
            let number = page.wrapping_sub(area.first);
            if number < area.len { area.base + number as usize } else { place }
        })
    }

    /// The slots that [`Index::find`] would give for words, where that is quickly said: [`NO_SLOT`] for no object, [`ASK`]
    /// where it is not.
    #[inline(always)]
    pub fn quick_slots(&self, words: &[u64], slots: &mut [u32]) {
        // Passes without a branch that depends on what was loaded: the misses of each overlap.
        for (slot, &word) in slots.iter_mut().zip(words) {
            *slot = self.place(word) as u32;
        }
        let elsewhere = Descriptor::ELSEWHERE;
        for slot in slots.iter_mut() {
            *slot = self.pages.get(*slot as usize).copied().unwrap_or(elsewhere);
        }
        for (slot, &word) in slots.iter_mut().zip(words) {
            *slot = self.descriptors[*slot as usize].quick_slot(word, &self.spills);
        }
    }

    /// Places of pages, cut into parts of about `most` pages that no object reaches over the ends of.
    pub(super) fn parts(&self, most: usize) -> Vec<Range<usize>> {
        let (mut parts, mut start) = (Vec::new(), 0);
        while start < self.pages.len() {
            let spills = |place: &usize| self.descriptors[self.pages[*place] as usize].spill != 0;
            let end = (start.saturating_add(most)..self.pages.len()).find(|place| !spills(place));
            parts.push(start..end.unwrap_or(self.pages.len()));
            start = parts[parts.len() - 1].end;
        }
        parts
    }

    /// The pages at some places in which objects are.
    pub(super) fn pages(&self, places: Range<usize>) -> impl Iterator<Item = Page<'_>> {
        let used = places.filter(|&place| self.pages[place] != 0);
        used.map(|place| Page {
            index: self,
            address: self.address(place),
            descriptor: self.descriptors[self.pages[place] as usize],
        })
    }

    /// Some objects overlap, so that a page does not say all that a word of it is a part of.
    pub(super) fn overlaps(&self) -> bool {
        self.overlap
    }

    /// The object that a slot is for, if it is taken.
    pub(super) fn block_of(&self, slot: u32) -> Option<Block> {
        if let Some(number) = slot.checked_sub(self.sparse_slot) {
            return self.sparse.get(number as usize).copied();
        }
        let (base, place) =
            self.firsts[self.firsts.partition_point(|&(base, _)| base <= slot).checked_sub(1)?];
        let page = self.descriptors[self.pages[place as usize] as usize];
        let number = u64::from(slot - base);
        if page.reciprocal == 0 {
            return self.lists.get(page.size as usize + number as usize).copied();
        }
        let start = self.address(place as usize) + u64::from(page.first) + number * u64::from(page.stride);
        Some(Block { start, size: u64::from(page.size) })
    }

    /// Address of the page at a place.
    fn address(&self, place: usize) -> u64 {
        let area = self.areas.iter().find(|area| place.wrapping_sub(area.base) < area.len as usize);
        area.map_or(0, |area| area.first + (place - area.base) as u64) << PAGE_SHIFT
    }

    /// The slots that [`Index::find`] gives for words; [`NO_SLOT`] for no object.
    #[inline(always)]
    pub(super) fn slots_of(&self, words: &[u64], slots: &mut [u32]) {
        self.quick_slots(words, slots);
        for (slot, &word) in slots.iter_mut().zip(words).filter(|(slot, _)| **slot == ASK) {
            *slot = self.find(word).map_or(NO_SLOT, |hit| hit.slot);
        }
    }

    #[inline]
    fn find_in_page(&self, page: &Descriptor, word: u64) -> Option<Hit> {
        let offset = (word & (PAGE_SIZE - 1)) as u16;
        if offset < page.first {
            let (slot, block) = self.spills[page.spill as usize];
            return (word < block.end()).then_some(Hit { slot, block });
        }
        if page.reciprocal == 0 {
            let list = &self.lists[page.size as usize..page.size as usize + usize::from(page.count)];
            return find_in_list(list, page.base, word);
        }
        let distance = u64::from(offset - page.first);
        let number = (distance * u64::from(page.reciprocal)) >> 32;
        let inside = distance - number * u64::from(page.stride);
        if inside >= u64::from(page.size) || number >= u64::from(page.count) {
            return None;
        }
        let block = Block { start: word - inside, size: u64::from(page.size) };
        Some(Hit { slot: page.base + number as u32, block })
    }

    /// Enters an area's objects page by page, and their slots in `slots`.
    fn add_pages(&mut self, area: Area, blocks: &[Block], slots: &mut [u32]) {
        let (mut rest, mut slots) = (blocks, slots);
        while let Some(first) = rest.first() {
            let page = (first.start >> PAGE_SHIFT) - area.first;
            let page_of = |block: &Block| (block.start >> PAGE_SHIFT) - area.first;
            let count = rest.iter().take_while(|&block| page_of(block) == page).count();
            let (here, later) = rest.split_at(count);
            let spill = self.take_spill(area, page);
            let descriptor = self.describe(here, spill);
            self.firsts.push((descriptor.base, (area.base as u64 + page) as u32));
            let (own, others) = slots.split_at_mut(count);
            own.iter_mut().zip(here).for_each(|(slot, block)| *slot = descriptor.slot_of(block, here));
            self.set_page(area, page, descriptor);
            let next_start = later.first().map_or(u64::MAX, page_of);
            self.spread(area, &here[count - 1], own[count - 1], page + 1, next_start);
            (rest, slots) = (later, others);
        }
    }

    /// Enters an object in the pages from `page` on that it reaches into, up to and with the page `until`, in
    /// which the next object starts.
    fn spread(&mut self, area: Area, block: &Block, slot: u32, page: u64, until: u64) {
        let last = (block.end().saturating_sub(1) >> PAGE_SHIFT).saturating_sub(area.first);
        let pages = page..=last.min(until).min(area.len.saturating_sub(1));
        if pages.is_empty() {
            return;
        }
        let spill = self.spills.len() as u32;
        self.spills.push((slot, *block));
        for page in pages {
            self.set_page(area, page, Descriptor { spill, ..Descriptor::EMPTY });
        }
    }

    /// The spill entered for `page` when the last object before it was.
    fn take_spill(&self, area: Area, page: u64) -> u32 {
        let number = self.pages[area.base + page as usize];
        self.descriptors[number as usize].spill
    }

    fn set_page(&mut self, area: Area, page: u64, descriptor: Descriptor) {
        let place = &mut self.pages[area.base + page as usize];
        if *place == 0 {
            *place = self.descriptors.len() as u32;
            self.descriptors.push(descriptor);
        } else {
            self.descriptors[*place as usize] = descriptor;
        }
    }

    /// Describes the page in which all of `here` start: as regular when they lie on a grid.
    fn describe(&mut self, here: &[Block], spill: u32) -> Descriptor {
        let first = here[0].start & (PAGE_SIZE - 1);
        let size = here[0].size;
        let stride = match here.len() {
            1 => PAGE_SIZE,
            _ => here.windows(2).map(|w| w[1].start - w[0].start).fold(0, gcd).max(1),
        };
        let count = (here[here.len() - 1].start - here[0].start) / stride + 1;
        let grid = here.iter().all(|b| b.size == size)
            && stride > 1
            && (size <= stride || here.len() == 1)
            && u32::try_from(size).is_ok()
            && count <= here.len() as u64 * MAX_GAPS;
        let place = Descriptor { base: self.slots, first: first as u16, spill, ..Descriptor::EMPTY };
        let descriptor = if grid {
            Descriptor {
                size: size as u32,
                reciprocal: (1u64 << 32).div_ceil(stride) as u32,
                stride: stride as u16,
                count: count as u16,
                ..place
            }
        } else {
            self.lists.extend(here);
            let list = (self.lists.len() - here.len()) as u32;
            Descriptor { size: list, count: here.len() as u16, ..place }
        };
        self.slots += u32::from(descriptor.count);
        descriptor
    }
}

/// Binary search in objects sorted by start, whose slots count up from `base`.
fn find_in_list(list: &[Block], base: u32, word: u64) -> Option<Hit> {
    let number = list.partition_point(|b| b.start <= word).checked_sub(1)?;
    let block = list[number];
    block.is_meant_by(word).then_some(Hit { slot: base + number as u32, block })
}

/// From the first start to the last end.
fn span(blocks: &[Block]) -> Range<u64> {
    match blocks {
        [] => 0..0,
        [first, ..] => first.start..blocks.iter().map(Block::end).max().unwrap_or(first.start),
    }
}

/// Numbers of sorted objects that are found in different ways.
struct Parts {
    /// So many are cookies, the first.
    cookies: usize,
    /// The direct map's, and others.
    areas: [Range<usize>; AREAS],
}

impl Parts {
    /// What is not in the direct map is split where it leaves the widest gaps: vmalloc space, `struct page`s and module
    /// space lie on different sides of what more words point to than to anything else.
    fn of(blocks: &[Block], direct: &Range<u64>) -> Self {
        let cookies = blocks.partition_point(|b| b.start < KERNEL_HALF);
        let mapped = blocks.partition_point(|b| b.start < direct.start).max(cookies)
            ..blocks.partition_point(|b| b.start < direct.end).max(cookies);
        let outside = [cookies..mapped.start, mapped.end..blocks.len()];
        let mut gaps = Vec::new();
        for part in &outside {
            let mut end = 0;
            for number in part.clone() {
                let gap = blocks[number].start.checked_sub(end).filter(|&gap| gap >= SPLIT);
                gaps.extend(gap.filter(|_| number > part.start).map(|gap| (gap, number)));
                end = end.max(blocks[number].end());
            }
        }
        gaps.sort_unstable();
        let mut used = outside.iter().filter(|part| !part.is_empty()).count();
        let gaps = &gaps[gaps.len().saturating_sub(AREAS - 1 - used)..];
        let mut areas = [mapped, 0..0, 0..0, 0..0];
        used = 0;
        for part in outside.into_iter().filter(|part| !part.is_empty()) {
            let mut cuts: Vec<usize> = gaps.iter().map(|&(_, n)| n).filter(|n| part.contains(n)).collect();
            cuts.extend([part.start, part.end]);
            cuts.sort_unstable();
            for two in cuts.windows(2) {
                used += 1;
                areas[used] = two[0]..two[1];
            }
        }
        Self { cookies, areas }
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_points_somewhere_into_per_cpu_memory_is_no_cookie() {
        let starts = [1 << 20, 0x7fff_c000_0000, 0xffff_8880_0000_0000];
        let [small, block, other] = starts.map(|start| Block { start, size: 24 });
        let (index, _) = Index::new(&[small, block, other], &(other.start..other.start + PAGE_SIZE));
        let found = |start: u64, offset: u64| index.find(start + offset).is_some();
        // With percpu_ref's flags, and, where that is no small number, at members of 8 and 4 bytes.
        assert!((0..24).all(|offset| found(small.start, offset) == (offset < 4)));
        assert!([0, 1, 3, 8, 12, 20].into_iter().all(|offset| found(block.start, offset)));
        assert!(![9, 10, 15, 22, 24].into_iter().any(|offset| found(block.start, offset)));
        assert!((0..24).all(|offset| found(other.start, offset)));
    }
}
