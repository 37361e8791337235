//! Heaps for tests of the scan: objects, and what their memory holds.

use super::super::index::Block;
use super::super::mark::Contents;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Where the synthetic direct map and vmalloc space lie.
pub(in crate::scan) const DIRECT: u64 = 0xffff_8880_0000_0000;
pub(in crate::scan) const VMALLOC: u64 = 0xffff_c900_0000_0000;
const PAGES: u64 = 12;
pub(in crate::scan) const SPACE: u64 = PAGES * 4096;

/// Two pieces of memory, and a copy of what is at each of [`COPIED`] for each CPU; all lent in pieces of a page as scattered
/// frames would be.
pub(in crate::scan) struct Flat {
    pub(in crate::scan) direct: Vec<u8>,
    pub(in crate::scan) vmalloc: Vec<u8>,
    pub(in crate::scan) copies: [[Vec<u8>; CPUS]; COPIED.len()],
    /// What is in the direct map is lent as a whole, too.
    pub(in crate::scan) whole: bool,
}

impl Flat {
    pub(super) fn new() -> Self {
        let space = || vec![0; SPACE as usize];
        let copies = std::array::from_fn(|_| std::array::from_fn(|_| vec![0; COPY as usize]));
        Self { direct: space(), vmalloc: space(), copies, whole: false }
    }

    /// All that is at an address, and where in it the address is.
    fn memory(&self, va: u64) -> (&[Vec<u8>], usize) {
        let copied = COPIED.iter().zip(&self.copies).map(|(&start, copies)| (start, &copies[..]));
        let single = [(DIRECT, &self.direct), (VMALLOC, &self.vmalloc)];
        let mut all = copied.chain(single.map(|(start, memory)| (start, std::slice::from_ref(memory))));
        let (start, copies) =
            all.find(|(start, copies)| va.wrapping_sub(*start) < copies[0].len() as u64).expect("memory");
        (copies, (va - start) as usize)
    }

    /// Writes a word, of per-CPU memory into the copy of some CPU.
    pub(in crate::scan) fn put(&mut self, va: u64, word: u64) {
        let within = |start: u64, memory: &[u8]| va.wrapping_sub(start) < memory.len() as u64;
        let copied = COPIED.iter().zip(&mut self.copies);
        let copied = copied.map(|(&start, copies)| (start, &mut copies[word as usize / 8 % CPUS]));
        let mut all = copied.chain([(DIRECT, &mut self.direct), (VMALLOC, &mut self.vmalloc)]);
        let (start, memory) = all.find(|(start, memory)| within(*start, memory)).expect("memory");
        memory[(va - start) as usize..][..8].copy_from_slice(&word.to_le_bytes());
    }

    /// The word at an address, of each copy.
    pub(super) fn words(&self, va: u64) -> impl Iterator<Item = u64> {
        let (copies, at) = self.memory(va);
        copies.iter().map(move |copy| u64::from_le_bytes(copy[at..at + 8].try_into().unwrap()))
    }

    /// So many copies there are of what is at an address.
    pub(in crate::scan) fn copies(&self, va: u64) -> u64 {
        self.memory(va).0.len() as u64
    }
}

impl Contents for Flat {
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(u64, &'a [u8])) {
        let (copies, start) = self.memory(va);
        for copy in copies {
            let (mut at, end) = (start, start + len as usize);
            while at < end {
                let next = (at / 4096 * 4096 + 4096).min(end);
                visit(va + (at - start) as u64, &copy[at..next]);
                at = next;
            }
        }
    }

    fn whole(&self) -> Vec<(u64, &[u8])> {
        // The last page apart, so that objects lie in both, or in pieces.
        let (most, last) = self.direct.split_at(self.direct.len() - 4096);
        let both = vec![(DIRECT, most), (DIRECT + most.len() as u64, last)];
        if self.whole { both } else { Vec::new() }
    }
}

/// Where per-CPU cookies lie: in the first chunk, and in others.
pub(super) const COOKIES: [u64; 2] = [0x3_b000, 0x607f_c000_0000];

/// Where per-CPU objects lie: at x86-64's cookies, and at arm64's, which are like addresses.
pub(super) const COPIED: [u64; 4] = [COOKIES[0], COOKIES[1], 0xffff_8000_8200_0000, 0xffff_fda6_c000_0000];
const CPUS: usize = 3;
/// Size of a copy.
const COPY: u64 = 3 * 4096;

/// More places than the index has areas: below the direct map, where `struct page`s are, and modules.
pub(super) const OTHERS: [u64; 3] = [0xffff_0000_0000_0000, 0xffff_ea00_0000_0000, 0xffff_ffff_c000_0000];

/// Any set of blocks, overlapping or not.
pub(super) fn any_blocks() -> impl Strategy<Value = Vec<Block>> {
    let other = proptest::sample::select(&OTHERS);
    let base = prop_oneof![6 => Just(DIRECT), 2 => Just(VMALLOC), 1 => other, 1 => Just(COOKIES[0]), 1 => Just(COOKIES[1])];
    let start = (base, prop_oneof![(0..SPACE / 8).prop_map(|o| o * 8), 0..SPACE]);
    let size = prop_oneof![0..200u64, Just(64), Just(4096), 0..3 * 4096u64];
    proptest::collection::vec((start, size), 0..60).prop_map(|blocks| {
        let unique: BTreeMap<u64, u64> =
            blocks.into_iter().map(|((b, o), s)| (b + o, s.min(SPACE - o))).collect();
        unique.into_iter().map(|(start, size)| Block { start, size }).collect()
    })
}

/// A heap as a kernel has it: pages cut into slots of one size of which some are taken, objects of several pages,
/// a page of mixed sizes, vmalloc blocks, per-CPU objects.
pub(in crate::scan) fn heap() -> impl Strategy<Value = Vec<Block>> {
    let stride = prop_oneof![Just(8u64), Just(64), Just(96), Just(192), Just(1024), Just(2112)];
    let slab = (stride, 0..8u64, proptest::collection::vec(any::<bool>(), 1024));
    let large = (1..4 * 4096u64).prop_map(|size| (4096, size));
    let slabs = slab.prop_map(|(stride, slack, taken)| {
        let slots = (0..2 * 4096 / stride).filter(|&i| taken[i as usize]);
        let size = stride - slack.min(stride - 1);
        (2 * 4096, slots.map(|i| (i * stride, size)).collect::<Vec<_>>())
    });
    let run = prop_oneof![3 => slabs, 1 => large.prop_map(|(_, size)| (4 * 4096, vec![(0, size)]))];
    let areas = proptest::collection::vec(1..2 * 4096u64, 0..4);
    (proptest::collection::vec(run, 1..4), areas, percpu()).prop_map(|(runs, areas, percpu)| {
        let (mut blocks, mut at) = (percpu, DIRECT);
        for (len, objects) in runs {
            blocks.extend(objects.iter().map(|(o, size)| Block { start: at + o, size: *size }));
            at += len;
        }
        let areas = areas.iter().enumerate();
        blocks.extend(areas.map(|(i, &size)| Block { start: VMALLOC + i as u64 * 3 * 4096, size }));
        blocks.sort_unstable();
        blocks
    })
}

/// Per-CPU objects, close together as the kernel's allocator has them.
fn percpu() -> impl Strategy<Value = Vec<Block>> {
    let size = prop_oneof![4 => (1..40u64).prop_map(|n| n * 4), 1 => Just(1 << 10), 1 => 1..2 * 4096u64];
    proptest::collection::vec((0..COPIED.len(), 0..8u64, size), 0..30).prop_map(|objects| {
        let (mut blocks, mut ends) = (Vec::new(), [0; COPIED.len()]);
        for (place, gap, size) in objects {
            let start = (ends[place] + gap * 4).next_multiple_of(if size < 8 { 4 } else { 8 });
            if start + size <= COPY {
                blocks.push(Block { start: COPIED[place] + start, size });
                ends[place] = start + size;
            }
        }
        blocks
    })
}

/// A reference: from an object, to an object, which word of the one, where in the other.
type Edge = (prop::sample::Index, prop::sample::Index, u64, u64);

pub(in crate::scan) fn edges() -> impl Strategy<Value = Vec<Edge>> {
    let object = any::<prop::sample::Index>;
    proptest::collection::vec((object(), object(), 0..600u64, 0..70u64), 0..80)
}

/// Memory with these references in it.
pub(in crate::scan) fn plant(blocks: &[Block], edges: &[Edge]) -> Flat {
    let mut memory = Flat::new();
    for (from, to, word, inside) in edges {
        let (from, to) = (from.get(blocks), to.get(blocks));
        let first = from.start.next_multiple_of(8);
        let words = (from.start + from.size).saturating_sub(first) / 8;
        if words > 0 {
            memory.put(first + word % words * 8, to.start + inside);
        }
    }
    memory
}
