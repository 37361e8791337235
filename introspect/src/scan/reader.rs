//! The inner loops of the marker: following [`Edges`], reading what has none, marking what is reached. Each thread has a
//! [`Reader`]; all share a [`Heap`].

use super::edges::Edges;
use super::index::{Block, Hit, Index, NO_SLOT};
use super::mark::{Contents, Special, Witness};
use super::memo::{Found, Fresh, Piece, Remembered};
use super::typed::Shape;
use super::words::{GROUP, candidates, groups, inside, keep};
use crate::arch::{Lanes, Vectors, Wide};
use crate::memory::PAGE_SIZE;
use rustc_hash::FxHashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// An object is here.
pub(super) const OBJECT: u8 = 1;
/// Reached, or not to be looked for.
pub(super) const MARKED: u8 = 2;
/// Has an entry in [`Marker::specials`].
pub(super) const SPECIAL: u8 = 4;
/// Its contents hold no references.
pub(super) const NO_SCAN: u8 = 8;
/// Has an entry in [`Marker::shape_of`].
pub(super) const TYPED: u8 = 16;
/// There are several copies of it, one for each CPU; of such no edges are taken down.
pub(super) const COPIED: u8 = 32;

/// Candidate words collected, from one object or several, before they are looked up together.
const STAGE: usize = 64;
/// So many objects ahead of the one that is followed the place of its edges is asked for, and its edges.
const FAR: usize = 16;
/// See [`FAR`].
const NEAR: usize = 8;
/// So many bytes ahead of those that are read memory is asked for.
const AHEAD: usize = 1024;
/// What stands for an object's slot where a word was read outside of objects.
const OUTSIDE: u32 = u32::MAX;

/// What all threads of a run look at.
pub(super) struct Heap<'a, C> {
    pub index: &'a Index,
    pub contents: &'a C,
    /// [`Contents::whole`].
    pub whole: Vec<(u64, &'a [u8])>,
    /// One byte per slot.
    pub state: Vec<AtomicU8>,
    pub specials: FxHashMap<u32, Special>,
    pub shapes: &'a [Arc<Shape>],
    /// Numbers in `shapes` by slot; empty when there are none.
    pub shape_of: Vec<u8>,
    /// One thread marks.
    pub alone: bool,
    /// What is known of pages.
    pub remembered: Option<Remembered<'a>>,
    /// What the inner loops are made of.
    pub vectors: Vectors,
}

/// What one thread collects.
#[derive(Default)]
pub(super) struct Reader {
    /// Slots of what was reached and not yet read.
    pub work: Vec<u32>,
    /// Words to be looked up.
    stage: Stage,
    /// Slots that words point to, and those of the objects they were read from, to be looked at.
    arrivals: Arrivals,
    /// Words looked up.
    pub candidates: u64,
    /// Those that are references.
    pub references: u64,
    pub bytes: u64,
    pub dropped: u64,
    /// For the next scan.
    pub fresh: Fresh,
}

/// Words, and the slots of the objects they were read from.
struct Stage {
    words: [u64; STAGE + GROUP],
    sources: [u32; STAGE + GROUP],
    /// Below [`STAGE`].
    len: usize,
}

impl Default for Stage {
    fn default() -> Self {
        Self { words: [0; STAGE + GROUP], sources: [0; STAGE + GROUP], len: 0 }
    }
}

impl Stage {
    /// Takes the words that have a bit; true when what it has must be looked up now.
    #[inline(always)]
    fn take(&mut self, lanes: Lanes, words: &[u64; GROUP], bits: u8, source: u32) -> bool {
        keep(lanes, words, bits, &mut self.words[self.len..]);
        self.sources[self.len..][..GROUP].fill(source);
        self.len += bits.count_ones() as usize;
        self.len >= STAGE
    }
}

/// See [`Reader::arrivals`].
struct Arrivals {
    targets: [u32; STAGE + GROUP],
    sources: [u32; STAGE + GROUP],
    /// Below [`STAGE`].
    len: usize,
}

impl Default for Arrivals {
    fn default() -> Self {
        Self { targets: [NO_SLOT; STAGE + GROUP], sources: [0; STAGE + GROUP], len: 0 }
    }
}

impl<'a, C: Contents> Heap<'a, C> {
    /// The memory of an object, or a part of a page, if it is aligned and lent as a whole.
    #[inline(always)]
    pub fn whole(&self, block: Block) -> Option<&'a [u8]> {
        let (at, bytes) = self.whole.iter().find_map(|&(start, bytes)| {
            let at = block.start.wrapping_sub(start);
            (at < bytes.len() as u64).then_some((at as usize, bytes))
        })?;
        let len = usize::try_from(block.size).ok()?;
        bytes[at..].get(..len).filter(|_| block.start.is_multiple_of(8))
    }

    #[inline]
    pub fn state(&self, slot: u32) -> u8 {
        self.state[slot as usize].load(Relaxed)
    }

    pub fn object_at(&self, va: u64) -> Option<Hit> {
        let hit = self.index.find(va)?;
        (hit.block.start == va && self.state(hit.slot) & OBJECT != 0).then_some(hit)
    }

    /// What `word`, read from the object in slot `source`, reaches. Not `strong`: without what its target stands for.
    pub fn targets(&self, word: u64, source: Option<u32>, strong: bool, mut found: impl FnMut(Hit)) {
        let is_object = |hit: &Hit| self.state(hit.slot) & OBJECT != 0;
        let Some(target) = self.index.find(word).filter(is_object) else { return };
        found(target);
        if strong && source != Some(target.slot) {
            let stands_for = self.specials.get(&target.slot).and_then(|s| s.stands_for);
            if let Some(other) = stands_for.and_then(|va| self.index.find(va)).filter(is_object) {
                found(other);
            }
        }
    }

    /// References that a word of the object in slot `source` would be if it could hold a pointer.
    pub fn dropped(&self, word: u64, source: u32) -> u64 {
        let mut others = 0;
        self.targets(word, Some(source), false, |target| others += u64::from(target.slot != source));
        others
    }

    /// Which words of the object in a slot count; None for all, or those of [`Special`].
    pub fn shape(&self, slot: u32) -> Option<&'a Shape> {
        let is_typed = self.state(slot) & (SPECIAL | TYPED) == TYPED;
        self.shape_of(slot).filter(|_| is_typed)
    }

    #[inline(always)]
    pub fn shape_of(&self, slot: u32) -> Option<&'a Shape> {
        let shapes = self.shapes;
        shapes.get(usize::from(*self.shape_of.get(slot as usize)?)).map(|shape| &**shape)
    }
}

impl Reader {
    /// Follows what objects that were reached refer to; of that some may still have to be looked at.
    pub fn read_objects<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        edges: &Edges,
        witness: &mut W,
        objects: &[u32],
    ) {
        for (number, &slot) in objects.iter().enumerate() {
            objects.get(number + FAR).into_iter().for_each(|&later| edges.ask_where(later));
            objects.get(number + NEAR).into_iter().for_each(|&next| edges.ask_what(next));
            match edges.from(slot).filter(|_| heap.state(slot) & (SPECIAL | COPIED) == 0) {
                Some(targets) => self.follow(heap, witness, targets, slot),
                None => {
                    let block = heap.index.block_of(slot);
                    block.into_iter().for_each(|block| self.read_pieces(heap, witness, Hit { slot, block }));
                }
            }
        }
    }

    #[inline(always)]
    fn follow<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        targets: &[u32],
        source: u32,
    ) {
        for some in targets.chunks(GROUP) {
            let place = &mut self.arrivals.targets[self.arrivals.len..][..GROUP];
            match some.first_chunk::<GROUP>() {
                Some(all) => place.copy_from_slice(all),
                None => place.iter_mut().zip(some).for_each(|(place, target)| *place = *target),
            }
            self.arrivals.sources[self.arrivals.len..][..GROUP].fill(source);
            self.arrivals.len += some.len();
            if self.arrivals.len >= STAGE {
                self.arrive(heap, witness);
            }
        }
    }

    /// Reads an object of which no edges were taken down.
    fn read_pieces<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W, hit: Hit) {
        if heap.state(hit.slot) & SPECIAL != 0 {
            self.read_special(heap, witness, hit);
        } else if let Some(shape) = heap.shape(hit.slot) {
            self.read_typed(heap, witness, hit, shape);
        } else {
            self.read_block(heap, witness, hit, 0..hit.block.size);
        }
    }

    fn read_typed<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        hit: Hit,
        shape: &Shape,
    ) {
        visit(heap.contents, hit.block, 0..hit.block.size, |at, bytes| {
            self.bytes += bytes.len() as u64;
            let at = at - hit.block.start;
            candidates(heap.vectors, bytes, heap.index.windows(), |offset, word| {
                let (start, len) = heap.index.own(hit.block);
                if word.wrapping_sub(start) < len {
                    return;
                }
                if shape.holds(at + offset as u64) {
                    self.put(heap, witness, word, hit.slot);
                } else {
                    self.dropped += heap.dropped(word, hit.slot);
                }
            });
        });
    }

    fn read_special<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W, hit: Hit) {
        let special = heap.specials.get(&hit.slot);
        let weak = special.and_then(|s| s.weak);
        for area in areas(hit.block, special) {
            self.read_block(heap, witness, hit, area);
        }
        if let Some(offset) = weak {
            let mut word = None;
            let area = offset..offset.saturating_add(8);
            visit(heap.contents, hit.block, area, |_, bytes| word = bytes.first_chunk().copied());
            if let Some(target) = word.and_then(|w| heap.index.find(u64::from_le_bytes(w))) {
                self.reach(heap, witness, target.slot, Some(hit.slot));
            }
        }
    }

    fn read_block<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        hit: Hit,
        area: Range<u64>,
    ) {
        visit(heap.contents, hit.block, area, |_, bytes| self.read(heap, witness, bytes, Some(hit)));
    }

    /// Collects the candidates of `bytes`, which are an object's, or roots.
    pub fn read<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        bytes: &[u8],
        object: Option<Hit>,
    ) {
        let (source, own) = object.map_or((OUTSIDE, (0, 0)), |hit| (hit.slot, heap.index.own(hit.block)));
        if let Some(remembered) = &heap.remembered {
            return self.recall(heap, witness, remembered, bytes, (source, own));
        }
        self.bytes += bytes.len() as u64;
        let own = Wide::new(own.0, own.1);
        heap.vectors.run(
            #[inline(always)]
            |lanes| {
                groups(
                    lanes,
                    (bytes, bytes.get(AHEAD..).unwrap_or_default()),
                    heap.index.windows(),
                    #[inline(always)]
                    |_, words, bits| {
                        let others = !inside(lanes, words, std::slice::from_ref(&own));
                        if self.stage.take(lanes, words, bits & others, source) {
                            self.resolve_all(heap, witness);
                        }
                    },
                );
            },
        );
    }

    /// The same with what is known of pages. What lies in `own`, which is a start and a length, is no candidate.
    fn recall<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        remembered: &Remembered<'_>,
        bytes: &[u8],
        (source, own): (u32, (u64, u64)),
    ) {
        let (mut found, windows) = (Found::default(), heap.index.windows());
        let mut rest = bytes;
        while !rest.is_empty() {
            let at = remembered.offset(rest);
            let (piece, others) = rest.split_at(rest.len().min(PAGE_SIZE as usize - at));
            let (fresh, part) = (&mut self.fresh, Piece { at: at as u64, bytes: piece, ahead: &[] });
            let read = heap.vectors.run(
                #[inline(always)]
                |lanes| found.look(lanes, windows, Some(remembered), fresh, part),
            );
            self.bytes += read;
            let others_own =
                found.words[..found.count].iter().filter(|word| word.wrapping_sub(own.0) >= own.1);
            others_own.for_each(|&word| self.put(heap, witness, word, source));
            rest = others;
        }
    }

    fn put<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W, word: u64, source: u32) {
        (self.stage.words[self.stage.len], self.stage.sources[self.stage.len]) = (word, source);
        self.stage.len += 1;
        if self.stage.len >= STAGE {
            self.resolve_all(heap, witness);
        }
    }

    /// Looks all collected words up, and at what they point to.
    pub fn resolve_all<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W) {
        self.arrive(heap, witness);
        let len = std::mem::take(&mut self.stage.len);
        heap.index.slots_of(&self.stage.words[..len], &mut self.arrivals.targets[..len]);
        self.arrivals.sources[..len].copy_from_slice(&self.stage.sources[..len]);
        self.arrivals.len = len;
        self.arrive(heap, witness);
    }

    /// Looks at all that words point to.
    #[inline(never)]
    fn arrive<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W) {
        let len = std::mem::take(&mut self.arrivals.len);
        // What is new, or special, is written without a branch, as in `keep`, and the misses overlap.
        let (mut closer, mut count, mut references) = ([0; STAGE + GROUP], 0, 0);
        for (number, &target) in self.arrivals.targets[..len].iter().enumerate() {
            let state = heap.state.get(target as usize).map_or(0, |state| state.load(Relaxed));
            closer[count] = number as u8;
            references += u64::from(state & OBJECT != 0);
            let is_done = state & (MARKED | SPECIAL) == MARKED;
            count += usize::from((state & OBJECT != 0) & !is_done);
        }
        self.references += references;
        self.candidates += len as u64;
        for &number in &closer[..count] {
            let number = usize::from(number);
            let (target, source) = (self.arrivals.targets[number], self.arrivals.sources[number]);
            self.arrive_at(heap, witness, target, (source != OUTSIDE).then_some(source));
        }
    }

    /// One root word; true when it is a reference.
    pub fn resolve<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        word: u64,
    ) -> bool {
        let hit = heap.index.find(word).filter(|hit| heap.state(hit.slot) & OBJECT != 0);
        hit.into_iter().for_each(|hit| self.arrive_at(heap, witness, hit.slot, None));
        hit.is_some()
    }

    /// Reaches the object in a slot, by a word of the object in slot `source`.
    #[inline]
    fn arrive_at<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        target: u32,
        source: Option<u32>,
    ) {
        if heap.state(target) & SPECIAL != 0 && source != Some(target) {
            let stands_for = heap.specials.get(&target).and_then(|s| s.stands_for);
            if let Some(other) = stands_for.and_then(|va| heap.index.find(va)) {
                self.reach(heap, witness, other.slot, source);
            }
        }
        self.reach(heap, witness, target, source);
    }

    #[inline]
    pub fn reach<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        slot: u32,
        source: Option<u32>,
    ) {
        let state = &heap.state[slot as usize];
        let is_new = |state: u8| state & (OBJECT | MARKED) == OBJECT;
        let mut before = state.load(Relaxed);
        if !is_new(before) {
            return;
        }
        if heap.alone {
            state.store(before | MARKED, Relaxed);
        } else {
            // Of several threads one finds it unmarked.
            before = state.fetch_or(MARKED, Relaxed);
            if !is_new(before) {
                return;
            }
        }
        if before & NO_SCAN == 0 {
            self.work.push(slot);
        }
        if W::LISTENS
            && let Some(block) = heap.index.block_of(slot)
        {
            witness.reached(Hit { slot, block }, source);
        }
    }

    /// Takes over what another thread has collected.
    pub fn add(&mut self, other: Self) {
        self.work.extend(other.work);
        self.candidates += other.candidates;
        self.references += other.references;
        self.bytes += other.bytes;
        self.dropped += other.dropped;
        self.fresh.join(other.fresh);
    }
}

/// The parts of an object that are read.
pub(super) fn areas(block: Block, special: Option<&Special>) -> Vec<Range<u64>> {
    match special.and_then(|s| s.areas.as_ref()) {
        Some(areas) => areas.clone(),
        None => std::iter::once(0..block.size).collect(),
    }
}

/// Lends the aligned words of `area` (bytes from the start of `block`), cut to the block, with their addresses.
pub(super) fn visit<'a>(
    contents: &'a impl Contents,
    block: Block,
    area: Range<u64>,
    mut read: impl FnMut(u64, &'a [u8]),
) {
    let start = block.start.saturating_add(area.start).checked_next_multiple_of(8);
    let end = block.start.saturating_add(area.end.min(block.size));
    if let Some(start) = start.filter(|&start| start < end) {
        contents.pieces(start, end - start, &mut read);
    }
}
