//! What every plain object refers to, taken down before marking: memory is read in the order of its addresses, page by
//! page, which the processor is fast at: it knows what comes next, and all words of a page are told from each other by a few
//! masks ([`Layout`]) instead of one by one. What was looked up in batches is then followed in any order.
//!
//! Plain objects are those of the index's areas whose words all count, or those that a [`Shape`](super::typed::Shape)
//! holds. What is special, has a copy for each CPU, or lies outside of all areas, is some thousand objects, and read when it
//! is reached.

use super::index::{NO_SLOT, Page};
use super::layout::{Group, Layout, Taken};
use super::mark::Contents;
use super::memo::{Found, Fresh, Piece};
use super::reader::{COPIED, Heap};
use super::words::{GROUP, LINE, keep, load};
use crate::arch::{Lanes, prefetch};
use crate::memory::PAGE_SIZE;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::thread;

/// Words of a page, and what vectors write behind them.
const WORDS: usize = PAGE_SIZE as usize / 8 + GROUP;
/// Words that are looked up together.
const TOGETHER: usize = 512;
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
        let ends: Vec<AtomicU32> = (0..heap.state.len()).map(|_| AtomicU32::new(0)).collect();
        let mut sweeps = sweep(heap, &ends, threads);
        let mut edges = Self::default();
        edges.begins.reserve_exact(ends.len() + 1);
        edges.begins.push(0);
        for sweep in &mut sweeps {
            edges.bytes += sweep.bytes;
            edges.dropped += sweep.dropped;
            edges.fresh.join(std::mem::take(&mut sweep.fresh));
        }
        if let [all] = &mut sweeps[..] {
            let targets = std::mem::take(&mut all.targets);
            all.parts.iter().for_each(|part| edges.add(&ends, part, part.targets.start));
            return Self { targets, ..edges };
        }
        let parts =
            sweeps.iter().flat_map(|sweep| sweep.parts.iter().map(move |part| (part, &sweep.targets)));
        let mut parts: Vec<(&Part, &Vec<u32>)> = parts.collect();
        parts.sort_unstable_by_key(|(part, _)| part.number);
        for (part, targets) in parts {
            edges.add(&ends, part, edges.targets.len() as u32);
            edges.targets.extend_from_slice(&targets[part.targets.start as usize..part.targets.end as usize]);
        }
        edges
    }

    /// Takes over where the references of each object of a part are; those of the first begin at `first`.
    fn add(&mut self, ends: &[AtomicU32], part: &Part, first: u32) {
        // Of an object without words nothing was said: its references end where those before do.
        let (own, mut end) = (ends.get(self.begins.len() - 1..part.slots as usize), part.targets.start);
        self.begins.extend(own.unwrap_or_default().iter().map(|own| {
            end = end.max(own.load(Relaxed));
            first + (end - part.targets.start)
        }));
    }

    /// Asks for the memory that says where the edges of a slot are.
    #[inline(always)]
    pub fn ask_where(&self, slot: u32) {
        self.begins.get(slot as usize).into_iter().for_each(prefetch);
    }

    /// Asks for the first edges of a slot.
    #[inline(always)]
    pub fn ask_what(&self, slot: u32) {
        let begin = self.begins.get(slot as usize).and_then(|&begin| self.targets.get(begin as usize));
        begin.into_iter().for_each(prefetch);
    }

    /// What the object in a slot refers to; None when there are no edges of such.
    #[inline(always)]
    pub fn from(&self, slot: u32) -> Option<&[u32]> {
        let two = self.begins.get(slot as usize..slot as usize + 2)?;
        self.targets.get(two[0] as usize..two[1] as usize)
    }
}

/// Reads the heap part by part, by several threads.
fn sweep<'a, C: Contents>(heap: &Heap<'_, C>, ends: &'a [AtomicU32], threads: usize) -> Vec<Sweep<'a>> {
    let parts = heap.index.parts(if threads > 1 { SHARE } else { usize::MAX });
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut sweep, mut found) = (Sweep::new(ends), Box::default());
        loop {
            let number = next.fetch_add(1, Relaxed);
            let Some(part) = parts.get(number) else { return sweep };
            sweep.read(heap, number, part.clone(), &mut found);
        }
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        let others = others.into_iter().map(|other| other.join());
        let others = others.map(|other| other.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        std::iter::once(own).chain(others).collect()
    })
}

/// One thread on its way through memory.
struct Sweep<'a> {
    /// How many references there were when the last one of an object was seen. An object is read by one thread.
    ends: &'a [AtomicU32],
    /// Words of objects that are to be looked up.
    words: Box<[u64; TOGETHER + WORDS]>,
    /// So many.
    len: usize,
    targets: Vec<u32>,
    parts: Vec<Part>,
    bytes: u64,
    dropped: u64,
    fresh: Fresh,
}

/// A part of the heap that was read.
struct Part {
    number: usize,
    /// Behind the last slot whose object was read.
    slots: u32,
    /// Where its references are.
    targets: Range<u32>,
}

impl<'a> Sweep<'a> {
    fn new(ends: &'a [AtomicU32]) -> Self {
        Self {
            ends,
            words: Box::new([0; TOGETHER + WORDS]),
            len: 0,
            targets: Vec::new(),
            parts: Vec::new(),
            bytes: 0,
            dropped: 0,
            fresh: Fresh::default(),
        }
    }

    /// Reads the pages at some places.
    fn read<C: Contents>(
        &mut self,
        heap: &Heap<'_, C>,
        number: usize,
        places: Range<usize>,
        found: &mut Found,
    ) {
        let start = self.targets.len() as u32;
        let slots = heap.vectors.run(
            #[inline(always)]
            |lanes| self.read_pages(lanes, heap, places, found),
        );
        self.parts.push(Part { number, slots, targets: start..self.targets.len() as u32 });
    }

    /// Returns what is behind their last slot.
    #[inline(always)]
    fn read_pages<C: Contents>(
        &mut self,
        lanes: Lanes,
        heap: &Heap<'_, C>,
        places: Range<usize>,
        found: &mut Found,
    ) -> u32 {
        let (mut slots, mut pieces) = (0, Vec::new());
        let mut pages = heap.index.pages(places).peekable();
        while let Some(page) = pages.next() {
            slots = slots.max(page.slots_end());
            let layout = Layout::of(heap, &page);
            if layout.words == 0 {
                continue;
            }
            lend(heap, &page, &mut pieces);
            if pieces.is_empty() {
                continue;
            }
            let first = (self.targets.len() + self.len) as u32;
            let ahead = pages.peek().and_then(|next| heap.whole(next.span())).unwrap_or_default();
            self.bytes += if heap.remembered.is_some() { 0 } else { layout.words * 8 };
            let mut taken = Taken::NONE;
            for (at, bytes) in pieces.drain(..) {
                let piece = Piece { at: at - page.address, bytes, ahead };
                self.read_piece(lanes, heap, (page.address, &layout, &mut taken), piece, found);
                if self.len >= TOGETHER {
                    self.resolve(heap);
                }
            }
            let ranks = taken.ranks();
            page.objects(|slot, _, end| {
                self.ends[slot as usize].store(first + ranks.before(end / 8), Relaxed);
            });
        }
        self.resolve(heap);
        slots
    }

    /// Takes those words of a part of the page at an address that are in plain objects, are not those of empty lists, and can
    /// hold a pointer.
    #[inline(always)]
    fn read_piece<C: Contents>(
        &mut self,
        lanes: Lanes,
        heap: &Heap<'_, C>,
        (page, layout, taken): (u64, &Layout, &mut Taken),
        piece: Piece<'_>,
        found: &mut Found,
    ) {
        let windows = heap.index.windows();
        if let Some(remembered) = &heap.remembered {
            self.bytes += found.look(lanes, windows, Some(remembered), &mut self.fresh, piece);
            found.grouped(
                #[inline(always)]
                |number, words, bits| {
                    let address = page + (number * LINE) as u64;
                    taken.groups(number)[0] |=
                        self.take(lanes, heap, layout.group(number), address, words, bits);
                },
            );
            return;
        }
        let first = piece.at as usize / LINE;
        let (lines, ahead) = (piece.bytes.as_chunks::<LINE>().0, piece.ahead.as_chunks::<LINE>().0);
        let groups = lines.iter().zip(layout.groups(first)).zip(taken.groups(first));
        for (number, ((line, group), taken)) in groups.enumerate() {
            // The processor reads ahead by itself, but not over the end of a page.
            ahead.get(number).into_iter().for_each(prefetch);
            let (words, address) = (load(line), page + piece.at + (number * LINE) as u64);
            let bits = windows.bits(lanes, &words);
            if bits != 0 || lanes.are_wide() {
                *taken = self.take(lanes, heap, group, address, &words, bits);
            }
        }
    }

    /// Takes those of a group's words, the first of which is at an address, that have a bit and count. Returns a bit for each.
    #[inline(always)]
    fn take<C: Contents>(
        &mut self,
        lanes: Lanes,
        heap: &Heap<'_, C>,
        group: Group,
        address: u64,
        words: &[u64; GROUP],
        bits: u8,
    ) -> u8 {
        let (counts, dropped) = group.take(lanes, address, words, bits);
        keep(lanes, words, counts, &mut self.words[self.len..]);
        self.len += counts.count_ones() as usize;
        if dropped != 0 {
            self.dropped += dropped_of(heap, address, *words, dropped);
        }
        counts
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

/// Takes what a page's objects lie in, piece by piece; nothing where there are several copies of it, whose references would not
/// come object by object: its objects are [`COPIED`].
#[inline(always)]
fn lend<'h, C: Contents>(heap: &Heap<'h, C>, page: &Page<'_>, pieces: &mut Vec<(u64, &'h [u8])>) {
    let span = page.span();
    if let Some(bytes) = heap.whole(span) {
        return pieces.push((span.start, bytes));
    }
    heap.contents.pieces(span.start, span.size, &mut |at, bytes| pieces.push((at, bytes)));
    let again = |two: &[(u64, &[u8])]| two[1].0 < two[0].0 + two[0].1.len() as u64;
    if pieces.windows(2).any(again) {
        page.objects(|slot, _, _| _ = heap.state[slot as usize].fetch_or(COPIED, Relaxed));
        pieces.clear();
    }
}

/// References that the words with a bit of a group at an address would be if they could hold a pointer.
#[cold]
fn dropped_of<C: Contents>(heap: &Heap<'_, C>, at: u64, words: [u64; GROUP], bits: u8) -> u64 {
    let with_bit = (0..GROUP).filter(|word| bits >> word & 1 != 0);
    let source = |word: usize| heap.index.find(at + 8 * word as u64).map_or(NO_SLOT, |hit| hit.slot);
    with_bit.map(|word| heap.dropped(words[word], source(word))).sum()
}
