//! What every plain object refers to, taken down before marking: memory is read in the order of its addresses, page by
//! page, which is as fast as it can be read. To read objects in the order in which they are reached takes several times as
//! long, as the processor cannot know what comes next.
//!
//! Plain objects are those of the index's areas whose words all count, or those that a [`Shape`](super::typed::Shape)
//! holds. What is special, or lies outside of all areas, is some thousand objects, and read when it is reached.

use super::index::{Block, Holder, NO_SLOT, Page};
use super::mark::Contents;
use super::memo::{Found, Fresh};
use super::reader::{Heap, NO_SCAN, OBJECT, SPECIAL, TYPED};
use crate::arch::{Lanes, prefetch, widest};
use crate::memory::PAGE_SIZE;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::thread;

/// Words of a page.
const WORDS: usize = PAGE_SIZE as usize / 8;
/// Words that are looked up together.
const TOGETHER: usize = 512;
/// Bytes of a page that are asked for while the one before is read.
const ASKED: u64 = 1024;
/// Pages that one of several threads takes at a time.
const SHARE: usize = 1024;

/// See the module.
#[derive(Default)]
pub(super) struct Edges {
    /// By slot where its object's references begin in `targets`; they end where those of the next one do.
    begins: Vec<u32>,
    /// Slots, or [`NO_SLOT`] for a word that lies where objects are and points into none.
    targets: Vec<u32>,
    /// Bytes read.
    pub bytes: u64,
    /// Words that would have been references if they could hold a pointer.
    pub dropped: u64,
    /// For the next scan.
    pub fresh: Fresh,
}

impl Edges {
    /// Reads all plain objects of a heap; none where objects overlap, which says that a free was missed.
    pub fn of<C: Contents>(heap: &Heap<'_, C>, threads: usize) -> Self {
        if heap.index.overlaps() {
            return Self::default();
        }
        let ends: Vec<AtomicU32> = (0..=heap.state.len()).map(|_| AtomicU32::new(0)).collect();
        let sweeps = if threads > 1 { in_shares(heap, &ends, threads) } else { alone(heap, &ends) };
        let mut edges = Self::default();
        edges.begins.reserve_exact(ends.len());
        edges.begins.push(0);
        for sweep in sweeps {
            edges.bytes += sweep.bytes;
            edges.dropped += sweep.dropped;
            edges.fresh.join(sweep.fresh);
            // Of an object without references nothing was said: they end where those before do.
            let (first, mut end) = (edges.targets.len() as u32, 0);
            let own = ends.get(edges.begins.len() - 1..sweep.slots as usize).unwrap_or_default();
            edges.begins.extend(own.iter().map(|own| {
                end = end.max(own.load(Relaxed));
                first + end
            }));
            if edges.targets.is_empty() {
                edges.targets = sweep.targets;
            } else {
                edges.targets.extend(sweep.targets);
            }
        }
        edges
    }

    /// Asks for the memory that says where the edges of a slot are.
    #[inline(always)]
    pub fn ask_where(&self, slot: u32) {
        self.begins.get(slot as usize).into_iter().for_each(|begin| prefetch(std::slice::from_ref(begin)));
    }

    /// Asks for the first edges of a slot.
    #[inline(always)]
    pub fn ask_what(&self, slot: u32) {
        let begin = self.begins.get(slot as usize).and_then(|&begin| self.targets.get(begin as usize));
        begin.into_iter().for_each(|edge| prefetch(std::slice::from_ref(edge)));
    }

    /// What the object in a slot refers to; None when there are no edges of such.
    #[inline(always)]
    pub fn from(&self, slot: u32) -> Option<&[u32]> {
        let two = self.begins.get(slot as usize..slot as usize + 2)?;
        self.targets.get(two[0] as usize..two[1] as usize)
    }
}

/// The whole heap, by this thread.
fn alone<'a, C: Contents>(heap: &Heap<'_, C>, ends: &'a [AtomicU32]) -> Vec<Sweep<'a>> {
    let mut sweep = Sweep::new(ends);
    heap.index.parts(usize::MAX).into_iter().for_each(|part| sweep.read(heap, part));
    vec![sweep]
}

/// Part by part, by several threads.
fn in_shares<'a, C: Contents>(heap: &Heap<'_, C>, ends: &'a [AtomicU32], threads: usize) -> Vec<Sweep<'a>> {
    let (parts, next) = (heap.index.parts(SHARE), AtomicUsize::new(0));
    let work = || {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Relaxed);
            let Some(part) = parts.get(number) else { return done };
            let mut sweep = Sweep::new(ends);
            sweep.read(heap, part.clone());
            done.push((number, sweep));
        }
    };
    let mut sweeps = thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut sweeps = work();
        for other in others {
            sweeps.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        sweeps
    });
    sweeps.sort_unstable_by_key(|(number, _)| *number);
    sweeps.into_iter().map(|(_, sweep)| sweep).collect()
}

/// One thread on its way through memory.
struct Sweep<'a> {
    /// How many references there were when the last one of an object was seen. An object is read by one thread. The last
    /// stands for no object.
    ends: &'a [AtomicU32],
    /// Words of objects that are to be looked up.
    words: Box<[u64; TOGETHER + WORDS]>,
    /// So many.
    len: usize,
    targets: Vec<u32>,
    /// Behind the last slot whose object was read.
    slots: u32,
    bytes: u64,
    dropped: u64,
    fresh: Fresh,
}

impl<'a> Sweep<'a> {
    fn new(ends: &'a [AtomicU32]) -> Self {
        Self {
            ends,
            words: Box::new([0; TOGETHER + WORDS]),
            len: 0,
            targets: Vec::new(),
            slots: 0,
            bytes: 0,
            dropped: 0,
            fresh: Fresh::default(),
        }
    }

    /// Reads the pages at some places.
    fn read<C: Contents>(&mut self, heap: &Heap<'_, C>, places: Range<usize>) {
        widest(
            #[inline(always)]
            |lanes| self.read_pages(lanes, heap, places),
        );
    }

    #[inline(always)]
    fn read_pages<C: Contents>(&mut self, lanes: Lanes, heap: &Heap<'_, C>, places: Range<usize>) {
        let mut found = Found::default();
        let mut pages = heap.index.pages(places).peekable();
        while let Some(page) = pages.next() {
            pages.peek().into_iter().for_each(|next| ask(heap, next));
            self.slots = self.slots.max(page.slots().end);
            let is_read = |slot: u32| is_plain(heap.state(slot));
            if !page.spill().is_some_and(|(slot, _)| is_read(slot)) && !page.slots().any(is_read) {
                continue;
            }
            let Range { start, end } = page.span();
            let block = Block { start: page.address + start, size: end - start };
            if let Some(bytes) = heap.whole(block) {
                self.read_page(lanes, heap, &page, start, bytes, &mut found);
            } else {
                heap.contents.pieces(block.start, block.size, &mut |at, bytes| {
                    self.read_page(lanes, heap, &page, at - page.address, bytes, &mut found);
                });
            }
        }
        self.resolve(heap);
    }

    /// Reads a part of a page that begins at an offset.
    #[inline(always)]
    fn read_page<C: Contents>(
        &mut self,
        lanes: Lanes,
        heap: &Heap<'_, C>,
        page: &Page<'_>,
        at: u64,
        bytes: &[u8],
        found: &mut Found,
    ) {
        let (windows, remembered) = (heap.index.windows(), heap.remembered.as_ref());
        self.bytes += found.look(lanes, windows, remembered, &mut self.fresh, (at, bytes));
        let first = found.offsets[..found.count].partition_point(|&offset| offset < page.first());
        let (spill, start) = (page.spill(), page.address);
        self.hold(heap, found, start, 0..first, |offset| spilled(start + offset, spill));
        match page.grid() {
            Some(grid) => self.hold(heap, found, start, first..found.count, |offset| grid.holder(offset)),
            None => self.hold(heap, found, start, first..found.count, |offset| page.listed(offset)),
        }
        if self.len >= TOGETHER {
            self.resolve(heap);
        }
    }

    /// Takes those of some candidates of the page at an address that are in plain objects, do not point into the very same, as
    /// those of empty lists do, and can hold a pointer. `holder` says of an offset where it belongs.
    #[inline(always)]
    fn hold<C: Contents>(
        &mut self,
        heap: &Heap<'_, C>,
        found: &Found,
        page: u64,
        some: Range<usize>,
        holder: impl Fn(u64) -> Holder,
    ) {
        let none = self.ends.len() - 1;
        for (&word, &offset) in found.words[some.clone()].iter().zip(&found.offsets[some]) {
            let Holder { slot, inside, size } = holder(offset);
            if word.wrapping_sub(page + offset - inside) < size {
                continue;
            }
            let state = heap.state.get(slot as usize).map_or(0, |state| state.load(Relaxed));
            let mut counts = is_plain(state);
            if state & TYPED != 0 && counts {
                counts = heap.holds(slot, inside);
                self.dropped += if counts { 0 } else { heap.dropped(word, slot) };
            }
            self.words[self.len] = word;
            self.len += usize::from(counts);
            self.ends[(slot as usize).min(none)].store((self.targets.len() + self.len) as u32, Relaxed);
        }
    }

    /// Looks all collected words up.
    #[inline(always)]
    fn resolve<C: Contents>(&mut self, heap: &Heap<'_, C>) {
        let first = self.targets.len();
        let words = &self.words[..std::mem::take(&mut self.len)];
        self.targets.resize(first + words.len(), NO_SLOT);
        heap.index.slots_of(words, &mut self.targets[first..]);
    }
}

/// Asks for the start of a page: behind it the processor has noticed by itself.
#[inline(always)]
fn ask<C: Contents>(heap: &Heap<'_, C>, page: &Page<'_>) {
    let Range { start, end } = page.span();
    let block = Block { start: page.address + start, size: (end - start).min(ASKED) };
    heap.whole(block).into_iter().for_each(prefetch);
}

/// The object's words count, all or those of its type.
#[inline(always)]
fn is_plain(state: u8) -> bool {
    state & (OBJECT | NO_SCAN | SPECIAL) == OBJECT
}

/// Where a word of the object belongs that reaches into its page from an earlier one.
fn spilled(word: u64, spill: Option<(u32, Block)>) -> Holder {
    match spill.filter(|(_, block)| word + 8 <= block.end()) {
        Some((slot, block)) => Holder { slot, inside: word - block.start, size: block.size },
        None => Holder::NONE,
    }
}
