//! The marker: which objects can be reached from the roots.
//!
//! It knows nothing of Linux: objects are [`Block`]s of an [`Index`], their memory comes from [`Contents`], and what
//! is special about an object (kmemleak's scan areas, `vm_struct`s) is told by [`Special`]. A word reaches the object
//! it points into ([`Index::find`]); words of an object that was reached count in turn. References of an object to
//! itself need no rule here: an object is read only after something else has reached it.

use super::index::{Block, Hit, Index};
use super::words::candidates;
use rustc_hash::FxHashMap;
use std::ops::Range;

/// Lends the memory of objects.
pub trait Contents {
    /// Calls `visit` with the memory at `va`, piece by piece in ascending order; every piece but the last is a
    /// multiple of 8 bytes long. Memory that cannot be read is left out. `va` is a multiple of 8. An object that has a
    /// copy for each CPU is all its copies, one after the other.
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(&'a [u8]));
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

/// Candidate words collected before they are looked up together, so that the processor overlaps the misses.
const STAGE: usize = 64;

/// One marking run over one frozen heap.
pub struct Marker<'a, C> {
    index: &'a Index,
    contents: &'a C,
    /// One byte per slot.
    state: Vec<u8>,
    specials: FxHashMap<u32, Special>,
    work: Vec<Hit>,
    stage: Vec<u64>,
    /// Bytes read so far.
    pub bytes: u64,
}

impl<'a, C: Contents> Marker<'a, C> {
    /// A marker with nothing reached. `slots` are the taken ones.
    pub fn new(index: &'a Index, contents: &'a C, slots: &[u32]) -> Self {
        let mut state = vec![0; index.slots()];
        for &slot in slots {
            state[slot as usize] = OBJECT;
        }
        let stage = Vec::with_capacity(STAGE);
        Self { index, contents, state, specials: FxHashMap::default(), work: Vec::new(), stage, bytes: 0 }
    }

    /// Says what is special about the object that starts at `va`; ignored when none does.
    pub fn set_special(&mut self, va: u64, special: Special) {
        if let Some(hit) = self.object_at(va) {
            self.state[hit.slot as usize] |= SPECIAL;
            self.specials.insert(hit.slot, special);
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
            self.reach(hit);
        }
    }

    /// Reads root memory that starts at an aligned address; returns how many of its words are references.
    pub fn root(&mut self, bytes: &[u8]) -> u64 {
        self.read(bytes, None)
    }

    /// One root word, as a register is; true when it is a reference.
    pub fn root_word(&mut self, word: u64) -> bool {
        self.resolve(word, None)
    }

    /// Reads everything reached but not yet read.
    pub fn run(&mut self) {
        while let Some(hit) = self.work.pop() {
            if self.state[hit.slot as usize] & SPECIAL != 0 {
                self.read_special(hit);
            } else {
                self.read_block(hit, 0..hit.block.size);
            }
        }
    }

    /// True when the object that starts at `va` was reached (or there is none).
    pub fn is_reached(&self, va: u64) -> bool {
        self.object_at(va).is_none_or(|hit| self.state[hit.slot as usize] & MARKED != 0)
    }

    /// Calls `found` with every object that the contents of the object at `va` refer to, itself excluded, by the same
    /// rules as marking. An object may come more than once.
    pub fn references(&self, va: u64, mut found: impl FnMut(Block)) {
        let Some(hit) = self.object_at(va) else { return };
        if self.state[hit.slot as usize] & NO_SCAN != 0 {
            return;
        }
        let special = self.specials.get(&hit.slot);
        let areas = areas(hit.block, special);
        let weak = special.and_then(|s| s.weak).map(|offset| offset..offset + 8);
        let mut refer = |target: Hit| {
            if self.state[target.slot as usize] & OBJECT != 0 && target.slot != hit.slot {
                found(target.block);
            }
        };
        for area in areas.into_iter().chain(weak.clone()) {
            self.visit(hit.block, area.clone(), |bytes| {
                candidates(bytes, self.index.windows(), |_, word| {
                    let Some(target) = self.index.find(word) else { return };
                    refer(target);
                    let stands_for = self.specials.get(&target.slot).and_then(|s| s.stands_for);
                    let surplus = target.slot != hit.slot && weak.as_ref() != Some(&area);
                    if let Some(other) = stands_for.filter(|_| surplus).and_then(|va| self.index.find(va)) {
                        refer(other);
                    }
                });
            });
        }
    }

    fn object_at(&self, va: u64) -> Option<Hit> {
        let hit = self.index.find(va)?;
        (hit.block.start == va && self.state[hit.slot as usize] & OBJECT != 0).then_some(hit)
    }

    fn read_special(&mut self, hit: Hit) {
        let special = self.specials.get(&hit.slot);
        let weak = special.and_then(|s| s.weak);
        for area in areas(hit.block, special) {
            self.read_block(hit, area);
        }
        if let Some(offset) = weak {
            let mut word = None;
            self.visit(hit.block, offset..offset + 8, |bytes| word = bytes.first_chunk().copied());
            if let Some(target) = word.and_then(|w| self.index.find(u64::from_le_bytes(w))) {
                self.reach(target);
            }
        }
    }

    fn read_block(&mut self, hit: Hit, area: Range<u64>) {
        let contents = self.contents;
        visit(contents, hit.block, area, |bytes| {
            self.read(bytes, Some(hit.slot));
        });
    }

    fn visit(&self, block: Block, area: Range<u64>, read: impl FnMut(&'a [u8])) {
        visit(self.contents, block, area, read);
    }

    fn read(&mut self, bytes: &[u8], source: Option<u32>) -> u64 {
        self.bytes += bytes.len() as u64;
        let mut references = 0;
        let mut stage = std::mem::take(&mut self.stage);
        candidates(bytes, self.index.windows(), |_, word| {
            stage.push(word);
            if stage.len() == STAGE {
                references += self.resolve_all(&stage, source);
                stage.clear();
            }
        });
        references += self.resolve_all(&stage, source);
        stage.clear();
        self.stage = stage;
        references
    }

    fn resolve_all(&mut self, words: &[u64], source: Option<u32>) -> u64 {
        words.iter().map(|&w| u64::from(self.resolve(w, source))).sum()
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
                self.reach(other);
            }
        }
        if state & MARKED == 0 {
            self.reach(hit);
        }
        true
    }

    #[inline]
    fn reach(&mut self, hit: Hit) {
        let state = &mut self.state[hit.slot as usize];
        if *state & (OBJECT | MARKED) != OBJECT {
            return;
        }
        *state |= MARKED;
        if *state & NO_SCAN == 0 {
            self.work.push(hit);
        }
    }
}

/// The parts of an object that are read.
fn areas(block: Block, special: Option<&Special>) -> Vec<Range<u64>> {
    match special.and_then(|s| s.areas.as_ref()) {
        Some(areas) => areas.clone(),
        None => std::iter::once(0..block.size).collect(),
    }
}

/// Lends the aligned words of `area` (bytes from the start of `block`), cut to the block.
fn visit<'a>(contents: &'a impl Contents, block: Block, area: Range<u64>, mut read: impl FnMut(&'a [u8])) {
    let start = block.start.saturating_add(area.start).next_multiple_of(8);
    let end = block.start.saturating_add(area.end.min(block.size));
    if start < end {
        contents.pieces(start, end - start, &mut read);
    }
}
