//! The marker: which objects can be reached from the roots.
//!
//! It knows nothing of Linux: objects are [`Block`]s of an [`Index`], their memory comes from [`Contents`], and what
//! is special about an object (kmemleak's scan areas, `vm_struct`s) is told by [`Special`]. A word reaches the object
//! it points into ([`Index::find`]); words of an object that was reached count in turn. References of an object to
//! itself need no rule here: an object is read only after something else has reached it.

use super::index::{ASK, Block, Hit, Index, NO_SLOT};
use super::typed::Shape;
use super::words::candidates;
use rustc_hash::FxHashMap;
use std::ops::Range;
use std::sync::Arc;

/// Lends the memory of objects.
pub trait Contents {
    /// Calls `visit` with the memory at `va`, piece by piece in ascending order, and each piece's address; every piece
    /// but the last is a multiple of 8 bytes long. Memory that cannot be read is left out. `va` is a multiple of 8. An
    /// object that has a copy for each CPU is all its copies, one after the other, each at the object's address.
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(u64, &'a [u8]));
}

/// What is not reached from an object, but marking begins there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Region of the roots, by its number.
    Region(usize),
    /// Registers of the CPU with this index.
    Register(usize),
    /// The object itself: it is gray.
    Gray,
    /// The object itself: it is too young to be reported.
    Young,
    /// The object itself: it is lost, and nothing lost outside its cycle refers to it.
    Lost,
}

/// Is told of every object when it is first reached. `()` does not listen, which costs nothing.
pub trait Witness {
    /// Until the next call, what is reached from outside of objects is reached from here.
    fn enter(&mut self, _origin: Origin) {}

    /// `object` was reached by a word of the object in slot `from`, or from outside of objects.
    fn reached(&mut self, _object: Hit, _from: Option<u32>) {}
}

impl Witness for () {}

/// A word that reaches an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    /// Where the word is, bytes from the start of its holder.
    pub offset: u64,
    /// The word.
    pub word: u64,
    /// What it reaches.
    pub target: Block,
}

impl Reference {
    /// Where in the target the word points; None when it points to what stands for the target.
    pub fn entry(&self) -> Option<u64> {
        self.word.checked_sub(self.target.start).filter(|&inside| inside < self.target.size)
    }
}

/// What makes an object different from plain memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Special {
    /// Only these parts, in bytes from the start, are read (kmemleak_scan_area); None: all of it.
    pub areas: Option<Vec<Range<u64>>>,
    /// A reference to this object also reaches the object at this address (kmemleak's excess reference:
    /// a `vm_struct` stands for its vmalloc block).
    pub stands_for: Option<u64>,
    /// The word at this offset reaches the object it points to, but not what that object stands for
    /// (`vmap_area.vm`, which every `vm_struct` has).
    pub weak: Option<u64>,
}

/// An object is here.
const OBJECT: u8 = 1;
/// Reached, or not to be looked for.
const MARKED: u8 = 2;
/// Has an entry in [`Marker::specials`].
const SPECIAL: u8 = 4;
/// Its contents hold no references.
const NO_SCAN: u8 = 8;
/// Has an entry in [`Marker::shape_of`].
const TYPED: u8 = 16;

/// Candidate words collected, from one object or several, before they are looked up together.
const STAGE: usize = 64;
/// Objects whose memory is asked for before the first of them is read.
const AHEAD: usize = 8;
/// Bytes of each that are: behind them the processor has noticed by itself.
const TOUCHED: u64 = 1024;
/// Objects at one distance that are worth being sorted.
const SORTED_FROM: usize = 64;
/// Bytes that come from memory together.
const LINE: usize = 64;
/// What stands for an object's slot where a word was read outside of objects.
const OUTSIDE: u32 = u32::MAX;

/// One marking run over one frozen heap.
pub struct Marker<'a, C, W = ()> {
    index: &'a Index,
    contents: &'a C,
    /// One byte per slot.
    state: Vec<u8>,
    specials: FxHashMap<u32, Special>,
    shapes: &'a [Arc<Shape>],
    /// Numbers in `shapes` by slot; empty when there are none.
    shape_of: Vec<u8>,
    work: Vec<Hit>,
    /// Words to be looked up, and the slots of the objects they were read from.
    stage: Vec<(u64, u32)>,
    /// Bytes read so far.
    pub bytes: u64,
    /// Words that were looked up: those that lie where objects are.
    pub candidates: u64,
    /// Those of them that refer to an object.
    pub references: u64,
    /// Words that would have been references if they could hold a pointer.
    pub dropped: u64,
    /// Who is told.
    pub witness: W,
}

impl<'a, C: Contents, W: Witness> Marker<'a, C, W> {
    /// A marker with nothing reached. `slots` are the taken ones.
    pub fn new(index: &'a Index, contents: &'a C, slots: &[u32], witness: W) -> Self {
        let mut state = vec![0; index.slots()];
        for &slot in slots {
            state[slot as usize] = OBJECT;
        }
        let (specials, work, stage) = (FxHashMap::default(), Vec::new(), Vec::with_capacity(STAGE));
        let (shapes, shape_of) = (&[][..], Vec::new());
        Self {
            index,
            contents,
            state,
            specials,
            shapes,
            shape_of,
            work,
            stage,
            bytes: 0,
            candidates: 0,
            references: 0,
            dropped: 0,
            witness,
        }
    }

    /// Says what is special about the object that starts at `va`; ignored when none does.
    pub fn set_special(&mut self, va: u64, special: Special) {
        if let Some(hit) = self.object_at(va) {
            self.state[hit.slot as usize] |= SPECIAL;
            self.specials.insert(hit.slot, special);
        }
    }

    /// What [`Marker::set_shape`] chooses from.
    pub fn set_shapes(&mut self, shapes: &'a [Arc<Shape>]) {
        self.shapes = shapes;
        self.shape_of = if shapes.is_empty() { Vec::new() } else { vec![0; self.index.slots()] };
    }

    /// Of the object that starts at `va`, if it is aligned and not special, only the words that this shape holds count.
    pub fn set_shape(&mut self, va: u64, shape: u8) {
        if let Some(hit) = self.object_at(va).filter(|hit| hit.block.start.is_multiple_of(8)) {
            self.state[hit.slot as usize] |= TYPED;
            self.shape_of[hit.slot as usize] = shape;
        }
    }

    /// The contents of the object that starts at `va` are never read.
    pub fn set_no_scan(&mut self, va: u64) {
        if let Some(hit) = self.object_at(va) {
            self.state[hit.slot as usize] |= NO_SCAN;
        }
    }

    /// Takes the object that starts at `va` as reached without reading it.
    pub fn set_black(&mut self, va: u64) {
        if let Some(hit) = self.object_at(va) {
            self.state[hit.slot as usize] |= MARKED | NO_SCAN;
        }
    }

    /// Takes the object that starts at `va` as reached; [`Marker::run`] reads it.
    pub fn set_gray(&mut self, va: u64) {
        if let Some(hit) = self.object_at(va) {
            self.reach(hit, None);
        }
    }

    /// Reads root memory that starts at an aligned address; returns how many of its words are references.
    pub fn root(&mut self, bytes: &[u8]) -> u64 {
        self.read(bytes, OUTSIDE) + self.resolve_all()
    }

    /// One root word, as a register is; true when it is a reference.
    pub fn root_word(&mut self, word: u64) -> bool {
        self.resolve(word, None)
    }

    /// Reads everything reached but not yet read, nearest first: an object that fewer references separate from where the
    /// run began is read before all others, so that the witness sees shortest chains. Those at the same distance are
    /// read in the order of their addresses, as far as that pays: memory is read much faster so.
    pub fn run(&mut self) {
        while !self.work.is_empty() {
            let mut next = std::mem::take(&mut self.work);
            if next.len() > SORTED_FROM {
                next.sort_unstable_by_key(|hit| hit.slot);
            }
            for batch in next.chunks(AHEAD) {
                self.read_batch(batch);
            }
            self.resolve_all();
        }
    }

    /// True when the object that starts at `va` was reached (or there is none).
    pub fn is_reached(&self, va: u64) -> bool {
        self.object_at(va).is_none_or(|hit| self.state[hit.slot as usize] & MARKED != 0)
    }

    /// Slot of the object that starts at `va`; None when none does, or when it has no bytes.
    pub fn slot(&self, va: u64) -> Option<u32> {
        self.object_at(va).map(|hit| hit.slot)
    }

    /// Calls `found` with every reference in the contents of the object at `va`, those to itself excluded, by the same
    /// rules as marking.
    pub fn references(&self, va: u64, mut found: impl FnMut(Reference)) {
        let Some(hit) = self.object_at(va) else { return };
        if self.state[hit.slot as usize] & NO_SCAN != 0 {
            return;
        }
        let special = self.specials.get(&hit.slot);
        let shape = self.shape(hit.slot);
        let weak = special.and_then(|s| s.weak).map(|offset| (offset..offset.saturating_add(8), false));
        let areas = areas(hit.block, special).into_iter().map(|area| (area, true));
        for (area, strong) in areas.chain(weak) {
            visit(self.contents, hit.block, area, |at, bytes| {
                let at = at - hit.block.start;
                candidates(bytes, self.index.windows(), |offset, word| {
                    let offset = at + offset as u64;
                    if shape.is_some_and(|shape| !shape.holds(offset)) {
                        return;
                    }
                    self.targets(word, Some(hit.slot), strong, |target| {
                        if target.slot != hit.slot {
                            found(Reference { offset, word, target: target.block });
                        }
                    });
                });
            });
        }
    }

    /// The same for root memory that starts at an aligned address.
    pub fn root_references(&self, bytes: &[u8], mut found: impl FnMut(Reference)) {
        candidates(bytes, self.index.windows(), |offset, word| {
            let offset = offset as u64;
            self.targets(word, None, true, |t| found(Reference { offset, word, target: t.block }));
        });
    }

    /// What `word`, read from the object in slot `source`, reaches. Not `strong`: without what its target stands for.
    fn targets(&self, word: u64, source: Option<u32>, strong: bool, mut found: impl FnMut(Hit)) {
        let is_object = |hit: &Hit| self.state[hit.slot as usize] & OBJECT != 0;
        let Some(target) = self.index.find(word).filter(is_object) else { return };
        found(target);
        if strong && source != Some(target.slot) {
            let stands_for = self.specials.get(&target.slot).and_then(|s| s.stands_for);
            if let Some(other) = stands_for.and_then(|va| self.index.find(va)).filter(is_object) {
                found(other);
            }
        }
    }

    fn object_at(&self, va: u64) -> Option<Hit> {
        let hit = self.index.find(va)?;
        (hit.block.start == va && self.state[hit.slot as usize] & OBJECT != 0).then_some(hit)
    }

    /// Reads objects that were reached; of what they refer to some may still have to be looked up.
    fn read_batch(&mut self, batch: &[Hit]) {
        let mut touched = 0;
        for Hit { block, .. } in batch {
            visit(self.contents, *block, 0..TOUCHED, |_, bytes| {
                touched ^= bytes.iter().step_by(LINE).fold(0, |all, byte| all ^ byte);
            });
        }
        // None of these loads waits for another, and reading on does not wait for them.
        std::hint::black_box(touched);
        batch.iter().for_each(|&hit| self.read_reached(hit));
    }

    #[inline]
    fn read_reached(&mut self, hit: Hit) {
        if self.state[hit.slot as usize] & (SPECIAL | TYPED) == 0 {
            self.read_block(hit, 0..hit.block.size);
        } else if let Some(shape) = self.shape(hit.slot) {
            self.read_typed(hit, shape);
        } else {
            self.read_special(hit);
        }
    }

    /// Which words of the object in a slot count; None for all, or those of [`Special`].
    fn shape(&self, slot: u32) -> Option<&'a Shape> {
        let shapes = self.shapes;
        let typed = self.state[slot as usize] & (SPECIAL | TYPED) == TYPED;
        let number = self.shape_of.get(slot as usize).filter(|_| typed)?;
        shapes.get(usize::from(*number)).map(|shape| &**shape)
    }

    fn read_typed(&mut self, hit: Hit, shape: &Shape) {
        let (index, contents) = (self.index, self.contents);
        visit(contents, hit.block, 0..hit.block.size, |at, bytes| {
            self.bytes += bytes.len() as u64;
            let at = at - hit.block.start;
            candidates(bytes, index.windows(), |offset, word| {
                if !shape.holds(at + offset as u64) {
                    let mut others = 0;
                    self.targets(word, Some(hit.slot), false, |t| others += u64::from(t.slot != hit.slot));
                    self.dropped += others;
                    return;
                }
                self.stage.push((word, hit.slot));
                if self.stage.len() == STAGE {
                    self.resolve_all();
                }
            });
        });
    }

    fn read_special(&mut self, hit: Hit) {
        let special = self.specials.get(&hit.slot);
        let weak = special.and_then(|s| s.weak);
        for area in areas(hit.block, special) {
            self.read_block(hit, area);
        }
        if let Some(offset) = weak {
            let mut word = None;
            let area = offset..offset.saturating_add(8);
            visit(self.contents, hit.block, area, |_, bytes| word = bytes.first_chunk().copied());
            if let Some(target) = word.and_then(|w| self.index.find(u64::from_le_bytes(w))) {
                self.reach(target, Some(hit.slot));
            }
        }
    }

    fn read_block(&mut self, hit: Hit, area: Range<u64>) {
        let contents = self.contents;
        visit(contents, hit.block, area, |_, bytes| {
            self.read(bytes, hit.slot);
        });
    }

    /// Collects the candidates of `bytes`. Returns how many of those that were looked up on the way are references.
    fn read(&mut self, bytes: &[u8], source: u32) -> u64 {
        self.bytes += bytes.len() as u64;
        let mut references = 0;
        candidates(bytes, self.index.windows(), |_, word| {
            self.stage.push((word, source));
            if self.stage.len() == STAGE {
                references += self.resolve_all();
            }
        });
        references
    }

    /// Looks all collected words up; returns how many are references.
    fn resolve_all(&mut self) -> u64 {
        let mut stage = std::mem::take(&mut self.stage);
        let slots = self.index.quick_slots::<STAGE>(&stage);
        // A pass of its own: its misses overlap, too.
        let states = slots.map(|slot| self.state.get(slot as usize).copied().unwrap_or(0));
        let mut references = 0;
        for ((&(word, source), slot), state) in stage.iter().zip(slots).zip(states) {
            let is_done = state & (OBJECT | MARKED | SPECIAL) == OBJECT | MARKED;
            let source = (source != OUTSIDE).then_some(source);
            let nothing = slot == NO_SLOT || slot != ASK && state & OBJECT == 0;
            references += u64::from(is_done || !nothing && self.resolve(word, source));
        }
        self.candidates += stage.len() as u64;
        self.references += references;
        stage.clear();
        self.stage = stage;
        references
    }

    /// Reaches what `word` points into; `source` is the object it was read from.
    #[inline]
    fn resolve(&mut self, word: u64, source: Option<u32>) -> bool {
        let Some(hit) = self.index.find(word) else { return false };
        let state = self.state[hit.slot as usize];
        if state & OBJECT == 0 {
            return false;
        }
        if state & SPECIAL != 0 && source != Some(hit.slot) {
            let stands_for = self.specials.get(&hit.slot).and_then(|s| s.stands_for);
            if let Some(other) = stands_for.and_then(|va| self.index.find(va)) {
                self.reach(other, source);
            }
        }
        if state & MARKED == 0 {
            self.reach(hit, source);
        }
        true
    }

    #[inline]
    fn reach(&mut self, hit: Hit, source: Option<u32>) {
        let state = &mut self.state[hit.slot as usize];
        if *state & (OBJECT | MARKED) != OBJECT {
            return;
        }
        *state |= MARKED;
        if *state & NO_SCAN == 0 {
            self.work.push(hit);
        }
        self.witness.reached(hit, source);
    }
}

/// The parts of an object that are read.
fn areas(block: Block, special: Option<&Special>) -> Vec<Range<u64>> {
    match special.and_then(|s| s.areas.as_ref()) {
        Some(areas) => areas.clone(),
        None => std::iter::once(0..block.size).collect(),
    }
}

/// Lends the aligned words of `area` (bytes from the start of `block`), cut to the block, with their addresses.
fn visit<'a>(
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
