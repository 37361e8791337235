//! The inner loops of the marker: reading objects, looking words up, marking what they reach. Each thread has a [`Reader`];
//! all share a [`Heap`].

use super::index::{ASK, Block, Hit, Index};
use super::mark::{Contents, Special, Witness};
use super::typed::Shape;
use super::words::{GROUP, candidates, groups};
use crate::arch::{Lanes, prefetch, widest};
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

/// Candidate words collected, from one object or several, before they are looked up together.
const STAGE: usize = 64;
/// So many objects ahead of the one that is read memory is asked for.
const AHEAD: usize = 8;
/// Bytes of each that are: behind them the processor has noticed by itself.
const ASKED: usize = 1024;
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
}

/// What one thread collects.
#[derive(Default)]
pub(super) struct Reader {
    /// Reached and not yet read.
    pub work: Vec<Hit>,
    /// Words to be looked up.
    stage: Stage,
    /// Words looked up.
    pub candidates: u64,
    /// Those that are references.
    pub references: u64,
    pub bytes: u64,
    pub dropped: u64,
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
    /// Takes the words that have a bit; true when what it has must be looked up now. All are written and those that count
    /// stay, because a processor guesses badly which these are.
    #[inline(always)]
    fn take(&mut self, lanes: Lanes, words: &[u64; GROUP], bits: u8, source: u32) -> bool {
        if let Some(place) = self.words[self.len..].first_chunk_mut::<GROUP>()
            && lanes.compress(words, bits, place).is_none()
        {
            let mut count = 0;
            for (i, word) in words.iter().enumerate() {
                place[count % GROUP] = *word;
                count += usize::from(bits >> i & 1);
            }
        }
        self.sources[self.len..][..GROUP].fill(source);
        self.len += bits.count_ones() as usize;
        self.len >= STAGE
    }
}

impl<'a, C: Contents> Heap<'a, C> {
    /// The memory of an object, if it is aligned and lent as a whole.
    #[inline(always)]
    fn whole(&self, block: Block) -> Option<&'a [u8]> {
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

    /// Which words of the object in a slot count; None for all, or those of [`Special`].
    pub fn shape(&self, slot: u32) -> Option<&'a Shape> {
        let shapes = self.shapes;
        let typed = self.state(slot) & (SPECIAL | TYPED) == TYPED;
        let number = self.shape_of.get(slot as usize).filter(|_| typed)?;
        shapes.get(usize::from(*number)).map(|shape| &**shape)
    }
}

impl Reader {
    /// Reads objects that were reached; of what they refer to some may still have to be looked up.
    pub fn read_objects<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        objects: &[Hit],
    ) {
        widest(
            #[inline(always)]
            |lanes| self.read_all(lanes, heap, witness, objects),
        );
    }

    #[inline(always)]
    fn read_all<C: Contents, W: Witness>(
        &mut self,
        lanes: Lanes,
        heap: &Heap<'_, C>,
        witness: &mut W,
        objects: &[Hit],
    ) {
        let ask = |hit: &Hit| {
            if let Some(bytes) = heap.whole(hit.block) {
                prefetch(&bytes[..bytes.len().min(ASKED)]);
            }
        };
        objects.iter().take(AHEAD).for_each(ask);
        for (number, &hit) in objects.iter().enumerate() {
            objects.get(number + AHEAD).into_iter().for_each(ask);
            let shape = heap.shape(hit.slot);
            match heap.whole(hit.block).filter(|_| heap.state(hit.slot) & SPECIAL == 0) {
                Some(bytes) => self.read_whole(lanes, heap, witness, bytes, hit, shape),
                None => self.read_pieces(heap, witness, hit, shape),
            }
        }
    }

    /// Reads an object without special rules, whose memory is `bytes`.
    #[inline(always)]
    fn read_whole<C: Contents, W: Witness>(
        &mut self,
        lanes: Lanes,
        heap: &Heap<'_, C>,
        witness: &mut W,
        bytes: &[u8],
        hit: Hit,
        shape: Option<&Shape>,
    ) {
        self.bytes += bytes.len() as u64;
        let own = heap.index.own(hit.block);
        groups(
            lanes,
            bytes,
            heap.index.windows(),
            own,
            #[inline(always)]
            |number, words, bits| {
                let held = shape.map_or(u8::MAX, |shape| shape.group(number));
                if bits & !held != 0 {
                    let others = words.iter().enumerate().filter(|&(i, _)| (bits & !held) >> i & 1 != 0);
                    others.for_each(|(_, &word)| self.drop_word(heap, word, hit));
                }
                if self.stage.take(lanes, words, bits & held, hit.slot) {
                    self.resolve_all(heap, witness);
                }
            },
        );
    }

    /// Reads an object that is special or lies in pieces.
    fn read_pieces<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        hit: Hit,
        shape: Option<&Shape>,
    ) {
        if heap.state(hit.slot) & SPECIAL != 0 {
            self.read_special(heap, witness, hit);
        } else if let Some(shape) = shape {
            self.read_typed(heap, witness, hit, shape);
        } else {
            self.read_block(heap, witness, hit, 0..hit.block.size);
        }
    }

    /// Counts a word of an object that would be a reference if it were a pointer.
    fn drop_word<C: Contents>(&mut self, heap: &Heap<'_, C>, word: u64, hit: Hit) {
        let mut others = 0;
        heap.targets(word, Some(hit.slot), false, |t| others += u64::from(t.slot != hit.slot));
        self.dropped += others;
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
            candidates(bytes, heap.index.windows(), |offset, word| {
                let (start, len) = heap.index.own(hit.block);
                if word.wrapping_sub(start) < len {
                    return;
                }
                if shape.holds(at + offset as u64) {
                    self.put(heap, witness, word, hit.slot);
                } else {
                    self.drop_word(heap, word, hit);
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
                self.reach(heap, witness, target, Some(hit.slot));
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
        self.bytes += bytes.len() as u64;
        let (source, own) = object.map_or((OUTSIDE, (0, 0)), |hit| (hit.slot, heap.index.own(hit.block)));
        widest(
            #[inline(always)]
            |lanes| {
                groups(
                    lanes,
                    bytes,
                    heap.index.windows(),
                    own,
                    #[inline(always)]
                    |_, words, bits| {
                        if self.stage.take(lanes, words, bits, source) {
                            self.resolve_all(heap, witness);
                        }
                    },
                );
            },
        );
    }

    fn put<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W, word: u64, source: u32) {
        (self.stage.words[self.stage.len], self.stage.sources[self.stage.len]) = (word, source);
        self.stage.len += 1;
        if self.stage.len >= STAGE {
            self.resolve_all(heap, witness);
        }
    }

    /// Looks all collected words up.
    #[inline(never)]
    pub fn resolve_all<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W) {
        let len = std::mem::take(&mut self.stage.len);
        let mut slots = [0; STAGE + GROUP];
        heap.index.quick_slots(&self.stage.words[..len], &mut slots[..len]);
        // A pass of its own: its misses overlap, too. Which words are to be looked at more closely is written without a
        // branch, as in `Stage::take`.
        let (mut closer, mut count, mut done) = ([0; STAGE + GROUP], 0, 0);
        for (number, &slot) in slots[..len].iter().enumerate() {
            let state = heap.state.get(slot as usize).map_or(0, |state| state.load(Relaxed));
            let is_done = state & (OBJECT | MARKED | SPECIAL) == OBJECT | MARKED;
            let is_nothing = (slot != ASK) & (state & OBJECT == 0);
            done += u64::from(is_done);
            closer[count] = number as u8;
            count += usize::from(!is_done & !is_nothing);
        }
        self.references += done;
        self.candidates += len as u64;
        for &number in &closer[..count] {
            let number = usize::from(number);
            let (word, source) = (self.stage.words[number], self.stage.sources[number]);
            let source = (source != OUTSIDE).then_some(source);
            self.references += u64::from(self.resolve(heap, witness, word, source));
        }
    }

    /// Reaches what `word` points into; `source` is the object it was read from.
    #[inline]
    pub fn resolve<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        word: u64,
        source: Option<u32>,
    ) -> bool {
        let Some(hit) = heap.index.find(word) else { return false };
        let state = heap.state(hit.slot);
        if state & OBJECT == 0 {
            return false;
        }
        if state & SPECIAL != 0 && source != Some(hit.slot) {
            let stands_for = heap.specials.get(&hit.slot).and_then(|s| s.stands_for);
            if let Some(other) = stands_for.and_then(|va| heap.index.find(va)) {
                self.reach(heap, witness, other, source);
            }
        }
        if state & MARKED == 0 {
            self.reach(heap, witness, hit, source);
        }
        true
    }

    #[inline]
    pub fn reach<C: Contents, W: Witness>(
        &mut self,
        heap: &Heap<'_, C>,
        witness: &mut W,
        hit: Hit,
        source: Option<u32>,
    ) {
        let state = &heap.state[hit.slot as usize];
        let is_new = |state: u8| state & (OBJECT | MARKED) == OBJECT;
        if !is_new(state.load(Relaxed)) {
            return;
        }
        // Of several threads one finds it unmarked.
        let before = state.fetch_or(MARKED, Relaxed);
        if !is_new(before) {
            return;
        }
        if before & NO_SCAN == 0 {
            self.work.push(hit);
        }
        witness.reached(hit, source);
    }

    /// Takes over what another thread has collected.
    pub fn add(&mut self, other: Self) {
        self.work.extend(other.work);
        self.candidates += other.candidates;
        self.references += other.references;
        self.bytes += other.bytes;
        self.dropped += other.dropped;
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
