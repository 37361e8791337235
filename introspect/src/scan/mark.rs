//! The marker: which objects can be reached from the roots.
//!
//! It knows nothing of Linux: objects are [`Block`]s of an [`Index`], their memory comes from [`Contents`], and what
//! is special about an object (kmemleak's scan areas, `vm_struct`s) is told by [`Special`]. A word reaches the object
//! it points into ([`Index::find`]); words of an object that was reached count in turn. References of an object to
//! itself need no rule here: an object is read only after something else has reached it.
//!
//! Several threads can read what was reached ([`Marker::share`]), each what it reaches itself, until another has nothing to do
//! and gets a part of that ([`Shared`]). They share one byte for each object. That an object is marked may be seen too late,
//! which costs a second look; who marks it is decided by one atomic instruction, so that each is read once, and the same are
//! reached as by one thread.

use super::edges::Edges;
use super::index::{Block, Hit, Index};
use super::memo::{Fresh, Memo, Remembered};
use super::reader::{Heap, MARKED, NO_SCAN, OBJECT, Reader, SPECIAL, TYPED, areas, visit};
use super::typed::Shape;
use super::words::candidates;
use crate::arch::Vectors;
use crate::memory::PAGE_SHIFT;
use rustc_hash::FxHashMap;
use std::ops::Range;
use std::panic;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Lends the memory of objects, to several threads.
pub trait Contents: Sync {
    /// Calls `visit` with the memory at `va`, piece by piece in ascending order, and each piece's address; every piece
    /// but the last is a multiple of 8 bytes long. Memory that cannot be read is left out. `va` is a multiple of 8. An
    /// object that has a copy for each CPU is all its copies, one after the other, each at the object's address.
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(u64, &'a [u8]));

    /// Memory that is lent as a whole, with the address of its first byte: [`Contents::pieces`] lends what lies in it in
    /// one piece.
    fn whole(&self) -> Vec<(u64, &[u8])> {
        Vec::new()
    }
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
    /// False: nothing is told, and in no order.
    const LISTENS: bool = true;

    /// Until the next call, what is reached from outside of objects is reached from here.
    fn enter(&mut self, _origin: Origin) {}

    /// `object` was reached by a word of the object in slot `from`, or from outside of objects.
    fn reached(&mut self, _object: Hit, _from: Option<u32>) {}
}

impl Witness for () {
    const LISTENS: bool = false;
}

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

/// Objects at one distance that are worth being put in order.
const ORDERED_FROM: usize = 512;
/// In so many parts of the heap.
const PARTS: usize = 1024;
/// What one of several threads takes at a time: so many objects, or bytes of roots.
const SHARE: usize = 128;
/// See [`SHARE`].
const ROOT_SHARE: usize = 64 << 10;

/// Objects that several threads read.
struct Shared {
    left: Mutex<Left>,
    changed: Condvar,
    /// [`Left::waiting`], for a look without the lock.
    waiting: AtomicUsize,
}

struct Left {
    /// Objects that nobody reads yet.
    parts: Vec<Vec<u32>>,
    /// Threads that wait for some.
    waiting: usize,
    /// All threads.
    threads: usize,
}

impl Shared {
    /// So many threads will share `objects`.
    fn new(threads: usize, objects: &[u32]) -> Self {
        let parts = objects.chunks(objects.len().div_ceil(threads).max(1)).map(<[u32]>::to_vec).collect();
        let left = Mutex::new(Left { parts, waiting: 0, threads });
        Self { left, changed: Condvar::new(), waiting: AtomicUsize::new(0) }
    }

    fn left(&self) -> MutexGuard<'_, Left> {
        // Each change is whole.
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Some that nobody reads yet, as soon as there are; None when there will be none, for all others wait, too.
    fn take(&self) -> Option<Vec<u32>> {
        let mut left = self.left();
        left.waiting += 1;
        while left.parts.is_empty() && left.waiting < left.threads {
            self.waiting.store(left.waiting, Relaxed);
            left = self.changed.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
        let part = left.parts.pop();
        if part.is_some() {
            left.waiting -= 1;
        }
        self.waiting.store(left.waiting, Relaxed);
        self.changed.notify_all();
        part
    }

    /// True when a thread waits.
    fn is_wanted(&self) -> bool {
        self.waiting.load(Relaxed) > 0
    }

    /// Gives the second half of those from `from` on away, if it is worth it.
    fn give(&self, objects: &mut Vec<u32>, from: usize) {
        let half = (objects.len() - from) / 2;
        if half >= SHARE / 4 {
            let given = objects.split_off(objects.len() - half);
            self.left().parts.push(given);
            self.changed.notify_one();
        }
    }
}

/// Tells the others of a thread that ends early that it will give nothing any more.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.left().threads -= 1;
            self.0.changed.notify_all();
        }
    }
}

/// Has so many threads do this, this one among them.
fn on_all_threads(threads: usize, work: &(impl Fn() -> Reader + Sync)) -> Vec<Reader> {
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut readers = vec![work()];
        let joined =
            others.into_iter().map(|other| other.join().unwrap_or_else(|panic| panic::resume_unwind(panic)));
        readers.extend(joined);
        readers
    })
}

/// The same objects, in an order in which they are read fast, where that pays.
fn in_order(objects: Vec<u32>, slots: usize) -> Vec<u32> {
    if objects.len() >= ORDERED_FROM { in_parts(&objects, slots) } else { objects }
}

/// The same slots, those of each part of the heap together, which takes a third of the time that sorting does.
fn in_parts(objects: &[u32], slots: usize) -> Vec<u32> {
    let shift = slots.div_ceil(PARTS).next_power_of_two().trailing_zeros();
    let mut places = [0; PARTS + 1];
    objects.iter().for_each(|slot| places[(slot >> shift) as usize + 1] += 1);
    (0..PARTS).for_each(|part| places[part + 1] += places[part]);
    let mut ordered = vec![0; objects.len()];
    for &slot in objects {
        let place = &mut places[(slot >> shift) as usize];
        ordered[*place] = slot;
        *place += 1;
    }
    ordered
}

/// One marking run over one frozen heap.
pub struct Marker<'a, C, W = ()> {
    heap: Heap<'a, C>,
    /// Taken down when they are first followed.
    edges: Option<Edges>,
    reader: Reader,
    threads: usize,
    /// Fewer objects, or KiB of roots, are read by one thread.
    shared_from: usize,
    /// Bytes read so far.
    pub bytes: u64,
    /// Words that were looked up: those that lie where objects are. Without those of empty lists.
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
        let heap = Heap {
            index,
            contents,
            whole: contents.whole(),
            state: state.into_iter().map(AtomicU8::new).collect(),
            specials: FxHashMap::default(),
            shapes: &[],
            shape_of: Vec::new(),
            alone: true,
            remembered: None,
            vectors: Vectors::widest(),
        };
        Self {
            heap,
            edges: None,
            reader: Reader::default(),
            threads: 1,
            shared_from: 0,
            bytes: 0,
            candidates: 0,
            references: 0,
            dropped: 0,
            witness,
        }
    }

    /// Has `threads` threads read what is at one distance, where that is `from` objects, or KiB of roots, at least. Only
    /// for a witness that does not listen.
    pub fn share(&mut self, threads: usize, from: usize) {
        (self.threads, self.shared_from) = (if W::LISTENS { 1 } else { threads }, from);
        self.heap.alone = self.threads == 1;
    }

    /// Has the inner loops use these vectors instead of the widest.
    #[cfg(test)]
    pub(super) fn use_vectors(&mut self, vectors: Vectors) {
        self.heap.vectors = vectors;
    }

    /// Takes what is known of pages from `memo`. The memory that is lent as a whole begins at `base` with frame 0.
    pub(super) fn remember(&mut self, memo: &'a Memo, base: u64) {
        let frame = |va: u64| ((va - base) >> PAGE_SHIFT) as usize;
        let frames = self.heap.whole.iter().map(|&(va, bytes)| (frame(va), bytes)).collect();
        self.heap.remembered = Some(Remembered { memo, frames });
    }

    /// What is to be kept for the next scan.
    pub(super) fn fresh(&mut self) -> Fresh {
        let mut fresh = std::mem::take(&mut self.reader.fresh);
        fresh.join(self.edges.as_mut().map(|edges| std::mem::take(&mut edges.fresh)).unwrap_or_default());
        fresh
    }

    /// Says what is special about the object that starts at `va`; ignored when none does.
    pub fn set_special(&mut self, va: u64, special: Special) {
        if let Some(hit) = self.add_state(va, SPECIAL) {
            self.heap.specials.insert(hit.slot, special);
        }
    }

    /// Has only these parts of the object that starts at `va` read, unless it is known better already what of it is.
    pub fn set_areas(&mut self, va: u64, areas: Vec<Range<u64>>) {
        if let Some(hit) = self.add_state(va, SPECIAL) {
            self.heap.specials.entry(hit.slot).or_default().areas.get_or_insert(areas);
        }
    }

    /// What [`Marker::set_shape`] chooses from.
    pub fn set_shapes(&mut self, shapes: &'a [Arc<Shape>]) {
        self.heap.shapes = shapes;
        self.heap.shape_of = if shapes.is_empty() { Vec::new() } else { vec![0; self.heap.index.slots()] };
    }

    /// Of the object that starts at `va`, if it is aligned and not special, only the words that this shape holds count.
    pub fn set_shape(&mut self, va: u64, shape: u8) {
        if let Some(hit) = Some(va).filter(|va| va.is_multiple_of(8)).and_then(|va| self.add_state(va, TYPED))
        {
            self.heap.shape_of[hit.slot as usize] = shape;
        }
    }

    /// The contents of the object that starts at `va` are never read.
    pub fn set_no_scan(&mut self, va: u64) {
        self.add_state(va, NO_SCAN);
    }

    /// Takes the object that starts at `va` as reached without reading it.
    pub fn set_black(&mut self, va: u64) {
        self.add_state(va, MARKED | NO_SCAN);
    }

    /// Takes the object that starts at `va` as reached; [`Marker::run`] reads it.
    pub fn set_gray(&mut self, va: u64) {
        if let Some(hit) = self.heap.object_at(va) {
            self.reader.reach(&self.heap, &mut self.witness, hit.slot, None);
        }
    }

    /// Reads root memory in pieces that start at an aligned address; returns how many of its words are references.
    pub fn roots(&mut self, parts: &[&[u8]]) -> u64 {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        if self.threads > 1 && bytes >= self.shared_from << 10 {
            let shares: Vec<&[u8]> = parts.iter().flat_map(|part| part.chunks(ROOT_SHARE)).collect();
            self.together(&shares, 1, |reader, heap, shares| {
                shares.iter().for_each(|share| reader.read(heap, &mut (), share, None));
            });
        } else {
            let (reader, heap, witness) = (&mut self.reader, &self.heap, &mut self.witness);
            parts.iter().for_each(|part| reader.read(heap, witness, part, None));
            reader.resolve_all(heap, witness);
        }
        self.count()
    }

    /// The same of one piece.
    pub fn root(&mut self, bytes: &[u8]) -> u64 {
        self.roots(&[bytes])
    }

    /// One root word, as a register is; true when it is a reference.
    pub fn root_word(&mut self, word: u64) -> bool {
        self.reader.resolve(&self.heap, &mut self.witness, word)
    }

    /// Reads everything reached but not yet read, nearest first: an object that fewer references separate from where the
    /// run began is read before all others, so that the witness sees shortest chains. Those at the same distance are
    /// read part of the heap by part, where that pays: memory is read much faster so.
    pub fn run(&mut self) {
        let edges = match self.edges.take() {
            None if self.reader.work.is_empty() => return,
            None => self.take_down_edges(),
            Some(edges) => edges,
        };
        while !self.reader.work.is_empty() {
            let next = in_order(std::mem::take(&mut self.reader.work), self.heap.index.slots());
            if self.threads > 1 && next.len() >= self.shared_from {
                self.run_together(&edges, next);
            } else {
                self.reader.read_objects(&self.heap, &edges, &mut self.witness, &next);
                self.reader.resolve_all(&self.heap, &mut self.witness);
            }
        }
        self.edges = Some(edges);
        self.count();
    }

    fn take_down_edges(&mut self) -> Edges {
        let threads = if self.heap.index.slots() >= self.shared_from { self.threads } else { 1 };
        let edges = Edges::of(&self.heap, threads);
        self.bytes += edges.bytes;
        self.dropped += edges.dropped;
        edges
    }

    /// Has all threads read these objects, and everything that is reached from them.
    fn run_together(&mut self, edges: &Edges, objects: Vec<u32>) {
        let (heap, shared) = (&self.heap, Shared::new(self.threads, &objects));
        let work = || {
            let (_leaving, mut reader) = (Leaving(&shared), Reader::default());
            while let Some(mut objects) = shared.take() {
                let mut at = 0;
                while at < objects.len() {
                    let part = at..objects.len().min(at + SHARE);
                    at = part.end;
                    reader.read_objects(heap, edges, &mut (), &objects[part]);
                    if shared.is_wanted() {
                        shared.give(&mut objects, at);
                        shared.give(&mut reader.work, 0);
                    }
                    if at == objects.len() {
                        reader.resolve_all(heap, &mut ());
                        objects = in_order(std::mem::take(&mut reader.work), heap.index.slots());
                        at = 0;
                    }
                }
            }
            reader
        };
        let readers = on_all_threads(self.threads, &work);
        readers.into_iter().for_each(|reader| self.reader.add(reader));
    }

    /// Has all threads take `share` items at a time and read them.
    fn together<T: Sync>(
        &mut self,
        items: &[T],
        share: usize,
        read: impl Fn(&mut Reader, &Heap<'a, C>, &[T]) + Sync,
    ) {
        let (heap, next) = (&self.heap, AtomicUsize::new(0));
        let work = || {
            let mut reader = Reader::default();
            loop {
                let start = next.fetch_add(share, Relaxed).min(items.len());
                let end = items.len().min(start + share);
                if start == end {
                    break;
                }
                read(&mut reader, heap, &items[start..end]);
            }
            reader.resolve_all(heap, &mut ());
            reader
        };
        let readers = on_all_threads(self.threads, &work);
        readers.into_iter().for_each(|reader| self.reader.add(reader));
    }

    /// Takes over what was counted; returns how many words were references.
    fn count(&mut self) -> u64 {
        let references = std::mem::take(&mut self.reader.references);
        self.references += references;
        self.candidates += std::mem::take(&mut self.reader.candidates);
        self.bytes += std::mem::take(&mut self.reader.bytes);
        self.dropped += std::mem::take(&mut self.reader.dropped);
        references
    }

    /// Adds to the state of the object that starts at `va`.
    fn add_state(&mut self, va: u64, bits: u8) -> Option<Hit> {
        let hit = self.heap.object_at(va)?;
        *self.heap.state[hit.slot as usize].get_mut() |= bits;
        Some(hit)
    }

    /// True when the object that starts at `va` was reached (or there is none).
    pub fn is_reached(&self, va: u64) -> bool {
        self.heap.object_at(va).is_none_or(|hit| self.heap.state(hit.slot) & MARKED != 0)
    }

    /// Slot of the object that starts at `va`; None when none does, or when it has no bytes.
    pub fn slot(&self, va: u64) -> Option<u32> {
        self.heap.object_at(va).map(|hit| hit.slot)
    }

    /// Calls `found` with every reference in the contents of the object at `va`, those to itself excluded, by the same
    /// rules as marking.
    pub fn references(&self, va: u64, mut found: impl FnMut(Reference)) {
        let heap = &self.heap;
        let Some(hit) = heap.object_at(va) else { return };
        if heap.state(hit.slot) & NO_SCAN != 0 {
            return;
        }
        let special = heap.specials.get(&hit.slot);
        let shape = heap.shape(hit.slot);
        let weak = special.and_then(|s| s.weak).map(|offset| (offset..offset.saturating_add(8), false));
        let areas = areas(hit.block, special).into_iter().map(|area| (area, true));
        for (area, strong) in areas.chain(weak) {
            visit(heap.contents, hit.block, area, |at, bytes| {
                let at = at - hit.block.start;
                candidates(heap.vectors, bytes, heap.index.windows(), |offset, word| {
                    let offset = at + offset as u64;
                    if shape.is_some_and(|shape| !shape.holds(offset)) {
                        return;
                    }
                    heap.targets(word, Some(hit.slot), strong, |target| {
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
        candidates(self.heap.vectors, bytes, self.heap.index.windows(), |offset, word| {
            let offset = offset as u64;
            self.heap.targets(word, None, true, |t| found(Reference { offset, word, target: t.block }));
        });
    }
}
