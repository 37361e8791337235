//! The inner loops of the marker: reading objects, looking words up, marking what they reach. Each thread has a [`Reader`];
//! all share a [`Heap`].

use super::index::{ASK, Block, Hit, Index, NO_SLOT};
use super::mark::{Contents, Special, Witness};
use super::typed::Shape;
use super::words::candidates;
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
/// Objects whose memory is asked for before the first of them is read.
const AHEAD: usize = 8;
/// Bytes of each that are: behind them the processor has noticed by itself.
const TOUCHED: u64 = 1024;
/// Bytes that come from memory together.
const LINE: usize = 64;
/// What stands for an object's slot where a word was read outside of objects.
const OUTSIDE: u32 = u32::MAX;

/// What all threads of a run look at.
pub(super) struct Heap<'a, C> {
    pub index: &'a Index,
    pub contents: &'a C,
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
    /// Words to be looked up, and the slots of the objects they were read from.
    pub stage: Vec<(u64, u32)>,
    /// Words looked up.
    pub candidates: u64,
    /// Those that are references.
    pub references: u64,
    pub bytes: u64,
    pub dropped: u64,
}

impl<'a, C: Contents> Heap<'a, C> {
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
        for batch in objects.chunks(AHEAD) {
            let mut touched = 0;
            for Hit { block, .. } in batch {
                visit(heap.contents, *block, 0..TOUCHED, |_, bytes| {
                    touched ^= bytes.iter().step_by(LINE).fold(0, |all, byte| all ^ byte);
                });
            }
            // None of these loads waits for another, and reading on does not wait for them.
            std::hint::black_box(touched);
            batch.iter().for_each(|&hit| self.read_reached(heap, witness, hit));
        }
    }

    #[inline]
    fn read_reached<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W, hit: Hit) {
        if heap.state(hit.slot) & (SPECIAL | TYPED) == 0 {
            self.read_block(heap, witness, hit, 0..hit.block.size);
        } else if let Some(shape) = heap.shape(hit.slot) {
            self.read_typed(heap, witness, hit, shape);
        } else {
            self.read_special(heap, witness, hit);
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
            candidates(bytes, heap.index.windows(), |offset, word| {
                if heap.index.is_inside(word, hit.block) {
                    return;
                }
                if !shape.holds(at + offset as u64) {
                    let mut others = 0;
                    heap.targets(word, Some(hit.slot), false, |t| others += u64::from(t.slot != hit.slot));
                    self.dropped += others;
                    return;
                }
                self.put(heap, witness, word, hit.slot);
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
        match object {
            Some(Hit { slot, block }) => candidates(bytes, heap.index.windows(), |_, word| {
                // Lists that are empty, and locks that nobody waits for: the object is marked already.
                if !heap.index.is_inside(word, block) {
                    self.put(heap, witness, word, slot);
                }
            }),
            None => candidates(bytes, heap.index.windows(), |_, word| self.put(heap, witness, word, OUTSIDE)),
        }
    }

    #[inline(always)]
    fn put<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W, word: u64, source: u32) {
        self.stage.push((word, source));
        if self.stage.len() == STAGE {
            self.resolve_all(heap, witness);
        }
    }

    /// Looks all collected words up.
    pub fn resolve_all<C: Contents, W: Witness>(&mut self, heap: &Heap<'_, C>, witness: &mut W) {
        let mut stage = std::mem::take(&mut self.stage);
        let slots = heap.index.quick_slots::<STAGE>(&stage);
        // A pass of its own: its misses overlap, too.
        let states = slots.map(|slot| heap.state.get(slot as usize).map_or(0, |state| state.load(Relaxed)));
        for ((&(word, source), slot), state) in stage.iter().zip(slots).zip(states) {
            let is_done = state & (OBJECT | MARKED | SPECIAL) == OBJECT | MARKED;
            let of = (source != OUTSIDE).then_some(source);
            let nothing = slot == NO_SLOT || slot != ASK && state & OBJECT == 0;
            let is_reference = is_done || !nothing && self.resolve(heap, witness, word, of);
            self.references += u64::from(is_reference);
        }
        self.candidates += stage.len() as u64;
        stage.clear();
        self.stage = stage;
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
