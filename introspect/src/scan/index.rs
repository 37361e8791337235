//! From a word of guest memory to the object it points into: the frozen index of one scan.
//!
//! Objects in the direct map are found through their page: a descriptor per page says where the first object
//! starts and how far apart they are, so that one multiplication gives the slot (what slab geometry would say,
//! but taken from the objects themselves, so that it needs nothing of the guest). Everything else, a few hundred
//! vmalloc blocks and some thousand per-CPU allocations, is found by binary search. An object that reaches into
//! following pages is these pages' `spill`.
//!
//! Words are looked up in batches, too ([`Index::quick_slots`]): what a scan waits for is memory, and loads that do not
//! depend on each other are waited for together.
//!
//! A word belongs to the object with the greatest start at or below it, when it lies inside. Objects never overlap
//! unless a free was missed; then the later start wins.

use super::words::Windows;
use crate::memory::{PAGE_SHIFT, PAGE_SIZE};
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
    fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
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
    /// Page number of `pages[0]`.
    first_page: u64,
    /// Descriptor number by page.
    pages: Vec<u32>,
    /// The first is [`Descriptor::NOTHING`].
    descriptors: Vec<Descriptor>,
    /// Objects that end in a later page than they start in, with their slots; numbered from 1 in [`Descriptor::spill`].
    spills: Vec<(u32, Block)>,
    /// Objects of irregular pages, and outside the direct map.
    lists: Vec<Block>,
    /// Where the objects outside the direct map begin in `lists`; their slots are numbered from `sparse_slot`.
    sparse: usize,
    sparse_slot: u32,
    slots: u32,
    windows: Windows,
    /// Some objects overlap.
    overlap: bool,
}

/// One page of the direct map that holds (a part of) an object: 24 bytes, so that the descriptors of a heap of
/// gigabytes stay in the processor's caches.
#[derive(Clone, Copy)]
struct Descriptor {
    /// Slot number of the first object that starts here.
    base: u32,
    /// Regular page: size of every object. Irregular page: index of its first object in [`Index::lists`].
    size: u32,
    /// ceil(2^32 / distance between starts); 0 for an irregular page.
    reciprocal: u32,
    /// Offset of the first start; [`PAGE_SIZE`] when none starts here.
    first: u16,
    /// Distance between starts, bytes.
    stride: u16,
    /// Number of slots.
    count: u16,
    /// Object that started in an earlier page and ends here or later; 0: none.
    spill: u32,
}

/// [`Index::quick_slots`]: no object.
pub const NO_SLOT: u32 = u32::MAX;
/// [`Index::quick_slots`]: [`Index::find`] knows.
pub const ASK: u32 = u32::MAX - 1;

/// A page whose grid would have more slots than this per object is stored as a list: bounds the number of slots.
const MAX_GAPS: u64 = 16;
const NOTHING_STARTS: u16 = PAGE_SIZE as u16;
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
        let inside = blocks.partition_point(|b| b.start < direct.start)
            ..blocks.partition_point(|b| b.start < direct.end);
        let mapped = &blocks[inside.clone()];
        let window = span(mapped);
        let first_page = window.start >> PAGE_SHIFT;
        // An empty object at the start of a page still starts there.
        let last_start = mapped.last().map_or(first_page, |b| (b.start >> PAGE_SHIFT) + 1);
        let last_page = window.end.min(direct.end).div_ceil(PAGE_SIZE).max(last_start);
        let mut index = Self {
            first_page,
            pages: vec![0; last_page.saturating_sub(first_page) as usize],
            descriptors: vec![Descriptor::NOTHING],
            spills: Vec::new(),
            lists: Vec::new(),
            sparse: 0,
            sparse_slot: 0,
            slots: 0,
            windows: Windows::new([0..0, 0..0, 0..0], [0..0, 0..0]),
            overlap: blocks.windows(2).any(|two| two[0].end() > two[1].start),
        };
        let mut slots = Vec::with_capacity(blocks.len());
        let outside = [&blocks[..inside.start], &blocks[inside.end..]];
        let mapped_slots = index.add_pages(mapped);
        index.sparse = index.lists.len();
        index.sparse_slot = index.slots;
        index.lists.extend(outside.concat());
        index.slots += (index.lists.len() - index.sparse) as u32;
        let sparse = &index.lists[index.sparse..];
        let (cookies, addresses) = sparse.split_at(sparse.partition_point(|b| b.start < KERNEL_HALF));
        let [low, high] = split_at_gap(addresses).map(span);
        let (first, others) = cookies.split_at(cookies.partition_point(|b| b.start < FIRST_CHUNK));
        index.windows =
            Windows::new([window.start..window.end.min(direct.end), low, high], [span(first), span(others)]);
        slots.extend(index.sparse_slot..index.sparse_slot + inside.start as u32);
        slots.extend(mapped_slots);
        slots.extend(index.sparse_slot + inside.start as u32..index.slots);
        (index, slots)
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots as usize
    }

    /// Values outside which no word is a reference: addresses of the direct map's objects, of all others in two parts,
    /// and per-CPU cookies.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// True for a word that points into this object, and for sure into no other.
    #[inline]
    pub fn is_inside(&self, word: u64, block: Block) -> bool {
        word.wrapping_sub(block.start) < block.size && !self.overlap
    }

    /// The object `word` points into, if the slot is taken.
    #[inline]
    pub fn find(&self, word: u64) -> Option<Hit> {
        // Below the first page the subtraction wraps and the number is out of range.
        let page = (word >> PAGE_SHIFT).wrapping_sub(self.first_page);
        match self.pages.get(page as usize) {
            Some(&number) => self.find_in_page(&self.descriptors[number as usize], word),
            None => self.find_sparse(word),
        }
    }

    /// The slots that [`Index::find`] would give for `N` words or fewer, where that is quickly said: [`NO_SLOT`] for no
    /// object, [`ASK`] where it is not.
    #[inline]
    pub fn quick_slots<const N: usize>(&self, words: &[(u64, u32)]) -> [u32; N] {
        const OUTSIDE: u32 = u32::MAX;
        let mut slots = [0; N];
        // Two passes without a branch that depends on what was loaded: the misses of each overlap.
        for (slot, (word, _)) in slots.iter_mut().zip(words) {
            let page = (word >> PAGE_SHIFT).wrapping_sub(self.first_page);
            *slot = self.pages.get(page as usize).copied().unwrap_or(OUTSIDE);
        }
        for (slot, (word, _)) in slots.iter_mut().zip(words) {
            *slot = match self.descriptors.get(*slot as usize) {
                Some(page) => page.quick_slot(*word),
                None => ASK,
            };
        }
        slots
    }

    #[inline]
    fn find_in_page(&self, page: &Descriptor, word: u64) -> Option<Hit> {
        let offset = (word & (PAGE_SIZE - 1)) as u16;
        if offset < page.first {
            let &(slot, block) = self.spills.get((page.spill as usize).checked_sub(1)?)?;
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

    fn find_sparse(&self, word: u64) -> Option<Hit> {
        find_in_list(&self.lists[self.sparse..], self.sparse_slot, word)
    }

    /// Enters the direct map's objects page by page; returns their slots.
    fn add_pages(&mut self, blocks: &[Block]) -> Vec<u32> {
        let mut slots = Vec::with_capacity(blocks.len());
        let mut rest = blocks;
        while let Some(first) = rest.first() {
            let page = first.start >> PAGE_SHIFT;
            let (here, later) = rest.split_at(rest.partition_point(|b| b.start >> PAGE_SHIFT == page));
            let spill = self.take_spill(page);
            let descriptor = self.describe(here, spill);
            slots.extend(here.iter().map(|b| descriptor.slot_of(b, here)));
            self.set_page(page, descriptor);
            let last = &here[here.len() - 1];
            let next_start = later.first().map_or(u64::MAX, |b| b.start >> PAGE_SHIFT);
            self.spread(last, slots[slots.len() - 1], page + 1, next_start);
            rest = later;
        }
        slots
    }

    /// Enters an object in the pages from `page` on that it reaches into, up to and with the page `until`, in
    /// which the next object starts.
    fn spread(&mut self, block: &Block, slot: u32, page: u64, until: u64) {
        let last = block.end().saturating_sub(1) >> PAGE_SHIFT;
        let end = self.first_page + self.pages.len() as u64;
        let pages = page..=last.min(until).min(end.saturating_sub(1));
        if pages.is_empty() {
            return;
        }
        self.spills.push((slot, *block));
        let spill = self.spills.len() as u32;
        for page in pages {
            self.set_page(page, Descriptor { spill, ..Descriptor::EMPTY });
        }
    }

    /// The spill entered for `page` when the last object before it was.
    fn take_spill(&self, page: u64) -> u32 {
        let number = self.pages[(page - self.first_page) as usize];
        self.descriptors[number as usize].spill
    }

    fn set_page(&mut self, page: u64, descriptor: Descriptor) {
        let place = &mut self.pages[(page - self.first_page) as usize];
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

impl Descriptor {
    const EMPTY: Self =
        Self { base: 0, size: 0, reciprocal: 0, first: NOTHING_STARTS, stride: 0, count: 0, spill: 0 };

    /// A page with nothing in it.
    const NOTHING: Self = Self { first: 0, reciprocal: 1, ..Self::EMPTY };

    /// See [`Index::quick_slots`].
    #[inline]
    fn quick_slot(&self, word: u64) -> u32 {
        let distance = (word & (PAGE_SIZE - 1)).wrapping_sub(u64::from(self.first));
        let number = distance.wrapping_mul(u64::from(self.reciprocal)) >> 32;
        let inside = distance.wrapping_sub(number * u64::from(self.stride));
        let here = (inside < u64::from(self.size)) & (number < u64::from(self.count));
        // Of what lies before the first start only the object that reaches over from an earlier page can have it.
        let elsewhere = (self.reciprocal == 0) | ((distance >= PAGE_SIZE) & (self.spill != 0));
        match (elsewhere, here & (distance < PAGE_SIZE)) {
            (true, _) => ASK,
            (false, true) => self.base + number as u32,
            (false, false) => NO_SLOT,
        }
    }

    /// Slot of `block`, one of the blocks `here` that start in this page.
    fn slot_of(&self, block: &Block, here: &[Block]) -> u32 {
        let number = match self.reciprocal {
            0 => here.partition_point(|b| b.start < block.start),
            _ => ((block.start - here[0].start) / u64::from(self.stride)) as usize,
        };
        self.base + number as u32
    }
}

/// Binary search in objects sorted by start, whose slots count up from `base`.
fn find_in_list(list: &[Block], base: u32, word: u64) -> Option<Hit> {
    let number = list.partition_point(|b| b.start <= word).checked_sub(1)?;
    let block = list[number];
    (word < block.end()).then_some(Hit { slot: base + number as u32, block })
}

/// From the first start to the last end.
fn span(blocks: &[Block]) -> Range<u64> {
    match blocks {
        [] => 0..0,
        [first, ..] => first.start..blocks.iter().map(Block::end).max().unwrap_or(first.start),
    }
}

/// Splits sorted objects at the widest gap between their starts: vmalloc space and module space lie on different
/// sides of the kernel image, to which more words point than to anything else.
fn split_at_gap(blocks: &[Block]) -> [&[Block]; 2] {
    let gaps = blocks.windows(2).map(|w| w[1].start - w[0].start).enumerate();
    let widest = gaps.max_by_key(|&(_, gap)| gap).map_or(0, |(i, _)| i + 1);
    let (low, high) = blocks.split_at(widest);
    [low, high]
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
