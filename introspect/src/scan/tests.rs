//! The marker's fast paths against naive twins, on synthetic heaps.

mod heaps;

use super::graph::{Standing, classify};
use super::index::{ASK, Block, Index, NO_SLOT};
use super::mark::{Contents, Marker, Origin, Special, Witness};
use super::path::{link, root_link};
use super::trail::Trail;
use super::typed::Shape;
use super::words::{Windows, candidates};
use super::{HEAD_BYTES, fingerprint};
use crate::arch::Vectors;
use crate::instructions;
use heaps::{COOKIES, COPIED, OTHERS, VMALLOC, any_blocks};
pub(super) use heaps::{DIRECT, Flat, SPACE, edges, heap, plant};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

fn naive_find(blocks: &[Block], word: u64) -> Option<Block> {
    let last = blocks.iter().filter(|b| b.start <= word).max_by_key(|b| b.start)?;
    let (offset, is_cookie, is_small) = (word - last.start, last.start < 1 << 63, last.start < 1 << 32);
    let is_member = offset.is_multiple_of(4) && !is_small;
    (offset < last.size && !(is_cookie && offset >= 4 && !is_member)).then_some(*last)
}

pub(super) fn index(blocks: &[Block]) -> (Index, Vec<u32>) {
    Index::new(blocks, &(DIRECT..DIRECT + SPACE))
}

#[test]
fn areas_of_what_is_special_stay_as_they_are() {
    let [first, second, third] = [0, 64, 128].map(|at| Block { start: DIRECT + at, size: 64 });
    let blocks = [first, second, third];
    let (index, slots) = index(&blocks);
    let mut memory = Flat::new();
    memory.put(first.start, second.start);
    memory.put(first.start + 8, third.start);
    let areas = |area: std::ops::Range<u64>| std::iter::once(area).collect::<Vec<_>>();
    let reached = |special: Option<Special>| {
        let mut marker = Marker::new(&index, &memory, &slots, ());
        if let Some(special) = special {
            marker.set_special(first.start, special);
        }
        marker.set_areas(first.start, areas(8..16));
        marker.set_gray(first.start);
        marker.run();
        [second, third].map(|block| marker.is_reached(block.start))
    };
    assert_eq!(reached(None), [false, true]);
    assert_eq!(reached(Some(Special { areas: Some(areas(0..8)), ..Special::default() })), [true, false]);
    assert_eq!(reached(Some(Special { weak: Some(0), ..Special::default() })), [true, true]);
}

#[test]
fn an_empty_object_at_the_start_of_the_last_page_is_found_nowhere() {
    let blocks = [Block { start: DIRECT, size: 8 }, Block { start: DIRECT + 8 * 4096, size: 0 }];
    let (index, slots) = index(&blocks);
    assert_eq!(slots.len(), 2);
    assert_eq!(index.find(DIRECT + 8 * 4096), None);
    assert_eq!(index.find(DIRECT + 7).map(|hit| hit.block), Some(blocks[0]));
}

proptest! {
    #[test]
    fn index_finds_what_a_search_finds(blocks in any_blocks(), words in proptest::collection::vec(0..SPACE, 60)) {
        let (index, slots) = index(&blocks);
        prop_assert_eq!(slots.iter().collect::<BTreeSet<_>>().len(), blocks.len());
        let near = blocks.iter().flat_map(|b| [b.start, b.start + b.size, b.start + b.size / 2])
            .flat_map(|w| [w.wrapping_sub(1), w, w + 1]);
        let bases = [DIRECT, VMALLOC, COOKIES[0], COOKIES[1], 0].into_iter().chain(OTHERS);
        let words = words.iter().flat_map(|o| bases.clone().map(move |base| base + o));
        for word in words.chain(near) {
            let mut quick = [0];
            index.quick_slots(&[word], &mut quick);
            let [quick] = quick;
            let slot = index.find(word).map_or(NO_SLOT, |hit| hit.slot);
            prop_assert!(quick == ASK || quick == slot, "word {:#x}: {} instead of {}", word, quick, slot);
            let found = index.find(word).filter(|h| slots.contains(&h.slot));
            prop_assert_eq!(found.map(|h| h.block), naive_find(&blocks, word), "word {:#x}", word);
            if let Some(hit) = found {
                let position = slots.iter().position(|&s| s == hit.slot).unwrap();
                prop_assert_eq!(blocks[position], hit.block);
                prop_assert!(index.windows().contain(word));
            }
        }
    }

    #[test]
    fn candidates_are_the_words_inside_the_windows(
        words in proptest::collection::vec(0..64u64, 0..50), tail in 0..8usize,
        [a, b, c, d] in [0..64u64, 0..64u64, 0..64u64, 0..64u64]
    ) {
        let windows = [a..(a + 3).min(64), 0..0, b..b + 9, 60..61];
        let cookies = [c..c + 2, d..d];
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.extend(vec![0; tail]);
        let expected: Vec<_> = words.iter().enumerate().map(|(i, &w)| (i * 8, w))
            .filter(|(_, w)| windows.iter().chain(&cookies).any(|r| r.contains(w))).collect();
        let windows = Windows::new(windows, cookies);
        for vectors in Vectors::all() {
            let mut found = Vec::new();
            candidates(vectors, &bytes, &windows, |offset, word| found.push((offset, word)));
            prop_assert_eq!(&found, &expected, "{:?}", vectors);
        }
    }

    #[test]
    fn marking_reaches_exactly_what_can_be_reached(
        blocks in heap(),
        edges in edges(),
        roots in proptest::collection::vec((any::<prop::sample::Index>(), 0..70u64), 0..4),
        no_scan in proptest::collection::vec(any::<prop::sample::Index>(), 0..3),
        area in (any::<prop::sample::Index>(), 0..8u64, 0..8u64),
        shapes in proptest::collection::vec(proptest::collection::vec(any::<bool>(), 0..300), 0..3),
        typed in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..20),
    ) {
        prop_assume!(!blocks.is_empty());
        let typed: BTreeMap<u64, usize> = typed.iter().filter(|_| !shapes.is_empty())
            .map(|(object, shape)| (object.get(&blocks).start, shape.index(shapes.len()))).collect();
        let known: Vec<Arc<Shape>> = shapes.iter().map(|words| Arc::new(Shape::new(words))).collect();
        let memory = plant(&blocks, &edges);
        let roots: Vec<u64> = roots.iter().map(|(to, inside)| to.get(&blocks).start + inside).collect();
        let no_scan: BTreeSet<u64> = no_scan.iter().map(|i| i.get(&blocks).start).collect();
        let area = (area.0.get(&blocks).start, area.1 * 8..(area.1 + area.2) * 8);
        let (index, slots) = index(&blocks);
        let bytes: Vec<u8> = roots.iter().flat_map(|w| w.to_le_bytes()).collect();
        let lent = Flat { whole: true, ..plant(&blocks, &edges) };
        let ways = Vectors::all().flat_map(|vectors| [(1, &memory), (3, &memory), (1, &lent)].map(|way| (vectors, way)));
        let markers: Vec<_> = ways.map(|(vectors, (threads, memory))| {
            let mut marker = Marker::new(&index, memory, &slots, ());
            marker.use_vectors(vectors);
            marker.share(threads, 0);
            no_scan.iter().for_each(|&va| marker.set_no_scan(va));
            marker.set_special(area.0, Special { areas: Some(vec![area.1.clone()]), ..Special::default() });
            marker.set_shapes(&known);
            typed.iter().for_each(|(&va, &shape)| marker.set_shape(va, shape as u8));
            let parts: Vec<&[u8]> = bytes.chunks(8).collect();
            let references = marker.roots(&parts);
            marker.run();
            prop_assert_eq!(references, roots.iter().filter(|&&w| naive_find(&blocks, w).is_some()).count() as u64);
            Ok((format!("{vectors:?}, {threads} threads, whole: {}", memory.whole), marker))
        }).collect::<Result<_, _>>()?;
        let alone = &markers[0].1;
        for (way, marker) in &markers {
            prop_assert_eq!((marker.bytes, marker.dropped), (alone.bytes, alone.dropped), "{}", way);
        }

        let mut reached = BTreeSet::new();
        let mut work: Vec<Block> = roots.iter().filter_map(|&w| naive_find(&blocks, w)).collect();
        let contents = |block: &Block| -> Vec<Block> {
            let scanned = |va: &u64| {
                let offset = va - block.start;
                if block.start == area.0 {
                    return area.1.contains(&offset);
                }
                let shape = typed.get(&block.start).filter(|_| block.start.is_multiple_of(8));
                shape.is_none_or(|&shape| shapes[shape].get(offset as usize / 8) == Some(&true))
            };
            if no_scan.contains(&block.start) {
                return Vec::new();
            }
            (block.start.next_multiple_of(8)..).step_by(8).take_while(|va| va + 8 <= block.start + block.size)
                .filter(scanned).flat_map(|va| memory.words(va)).filter_map(|word| naive_find(&blocks, word)).collect()
        };
        while let Some(block) = work.pop() {
            if reached.insert(block) {
                work.extend(contents(&block));
            }
        }
        for block in &blocks {
            for (way, marker) in &markers {
                prop_assert_eq!(marker.is_reached(block.start), reached.contains(block), "{:x?}: {}", block, way);
            }
            let mut found = BTreeSet::new();
            alone.references(block.start, |r| { found.insert(r.target); });
            let expected: BTreeSet<_> = contents(block).into_iter().filter(|b| b != block).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn the_trail_leads_by_a_shortest_way_to_everything_reached(
        blocks in heap(), edges in edges(), roots in proptest::collection::vec((any::<prop::sample::Index>(), 0..70u64), 0..4)
    ) {
        prop_assume!(!blocks.is_empty());
        let memory = plant(&blocks, &edges);
        let roots: Vec<u64> = roots.iter().map(|(to, inside)| to.get(&blocks).start + inside).collect();
        let (index, slots) = index(&blocks);
        let mut marker = Marker::new(&index, &memory, &slots, Trail::default());
        for (number, word) in roots.iter().enumerate() {
            marker.witness.enter(Origin::Region(number));
            marker.root(&word.to_le_bytes());
        }
        marker.run();
        let distances = distances(&blocks, &memory, &roots);
        for block in &blocks {
            let way = marker.slot(block.start).and_then(|slot| marker.witness.to(slot));
            prop_assert_eq!(way.as_ref().map(|(_, way)| way.len()), distances.get(block).copied(), "{:x?}", block);
            let Some((origin, way)) = way else { continue };
            prop_assert_eq!(way.last(), Some(block));
            let Origin::Region(number) = origin else { panic!("{origin:?}") };
            let root = root_link(&marker, &roots[number].to_le_bytes(), way[0]);
            prop_assert_eq!(root.map(|r| (r.offset, r.word)), Some((0, roots[number])));
            for pair in way.windows(2) {
                let reference = link(&marker, pair[0], pair[1]).expect("a word that refers to the next");
                prop_assert!(memory.words(pair[0].start + reference.offset).any(|word| word == reference.word));
                prop_assert_eq!(naive_find(&blocks, reference.word), Some(pair[1]));
                prop_assert_eq!(reference.entry(), Some(reference.word - pair[1].start));
            }
        }
    }

    #[test]
    fn graph_agrees_with_transitive_closure(
        sizes in proptest::collection::vec(1..100u64, 1..14),
        edges in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..30),
    ) {
        let n = sizes.len();
        let edges: Vec<_> = edges.iter().map(|(a, b)| (a.index(n) as u32, b.index(n) as u32)).collect();
        let standings = classify(&sizes, &edges);
        let mut reach = vec![vec![false; n]; n];
        (0..n).for_each(|i| reach[i][i] = true);
        for _ in 0..n {
            for &(a, b) in &edges {
                for row in &mut reach {
                    row[b as usize] |= row[a as usize];
                }
            }
        }
        let same = |i: usize, j: usize| reach[i][j] && reach[j][i];
        let direct = |i: usize| !edges.iter().any(|&(a, b)| b as usize == i && !same(i, a as usize))
            && !(0..n).any(|j| reach[j][i] && !reach[i][j]);
        for i in 0..n {
            // What is not reached from the direct ones any more when the cycle of i is taken out.
            let mut left: Vec<bool> = (0..n).map(|j| direct(j) && !same(i, j)).collect();
            for _ in 0..n {
                for &(a, b) in &edges {
                    let (a, b) = (a as usize, b as usize);
                    left[b] |= left[a] && !same(i, b);
                }
            }
            let retained = (0..n).filter(|&j| !left[j]).map(|j| sizes[j]).sum();
            let Standing { direct: d, component, retained: r } = standings[i];
            prop_assert_eq!((d, r), (direct(i), retained));
            for (j, other) in standings.iter().enumerate() {
                prop_assert_eq!(component == other.component, same(i, j));
            }
        }
    }
}

#[test]
fn what_two_share_neither_retains() {
    // 0 and 1 are lost, share 2, and 2 keeps 3; 0 keeps 4 and 5, a cycle.
    let standings = classify(&[1, 2, 4, 8, 16, 32], &[(0, 2), (1, 2), (2, 3), (0, 4), (4, 5), (5, 4)]);
    let retained: Vec<u64> = standings.iter().map(|standing| standing.retained).collect();
    assert_eq!(retained, [49, 2, 12, 8, 48, 48]);
}

#[test]
fn a_long_chain_with_short_cuts_takes_no_square_of_its_length() {
    const LENGTH: u32 = 200_000;
    let next = (0..LENGTH - 1).map(|n| (n, n + 1));
    let shortcuts = (0..LENGTH - 2).map(|n| (n / 2, n + 2));
    let standings = classify(&vec![1; LENGTH as usize], &next.chain(shortcuts).collect::<Vec<_>>());
    assert_eq!((standings[0].direct, standings[0].retained), (true, LENGTH.into()));
    assert!(standings[1..].iter().all(|standing| !standing.direct));
}

/// By object, how many objects there are on a shortest way to it: rounds over all references until none is new.
fn distances(blocks: &[Block], memory: &Flat, roots: &[u64]) -> BTreeMap<Block, usize> {
    let mut found: BTreeMap<Block, usize> = BTreeMap::new();
    let mut next: BTreeSet<Block> = roots.iter().filter_map(|&w| naive_find(blocks, w)).collect();
    for distance in 1.. {
        next.retain(|block| !found.contains_key(block));
        if next.is_empty() {
            break;
        }
        found.extend(next.iter().map(|&block| (block, distance)));
        let words = next.iter().flat_map(|b| {
            let words = (b.start.next_multiple_of(8)..).step_by(8);
            words.take_while(move |va| va + 8 <= b.start + b.size)
        });
        next = words.flat_map(|va| memory.words(va)).filter_map(|word| naive_find(blocks, word)).collect();
    }
    found
}

/// A `vm_struct`-like object standing for a block, and the `vmap_area` that always refers to it.
fn vmalloc_heap() -> (Vec<Block>, Flat) {
    let blocks = [(DIRECT, 64), (DIRECT + 64, 64), (DIRECT + 128, 64), (VMALLOC, 8192)];
    let blocks: Vec<Block> = blocks.into_iter().map(|(start, size)| Block { start, size }).collect();
    let mut memory = Flat::new();
    memory.put(DIRECT, VMALLOC); // va_start: outside the scan area
    memory.put(DIRECT + 56, DIRECT + 64); // vmap_area.vm
    memory.put(DIRECT + 64 + 8, VMALLOC); // vm_struct.addr
    memory.put(DIRECT + 64 + 16, DIRECT + 64); // the vm_struct refers to itself
    (blocks, memory)
}

fn mark_vmalloc(memory: &Flat, blocks: &[Block], root: u64) -> (bool, bool) {
    let (index, slots) = index(blocks);
    let mut marker = Marker::new(&index, memory, &slots, ());
    marker.set_special(
        DIRECT,
        Special { areas: Some(vec![16..24, 24..56]), weak: Some(56), ..Special::default() },
    );
    marker.set_special(
        DIRECT + 64,
        Special { areas: Some(vec![0..8, 16..64]), stands_for: Some(VMALLOC), ..Special::default() },
    );
    marker.root_word(DIRECT + 20);
    marker.root_word(root);
    marker.run();
    assert!(marker.is_reached(DIRECT));
    (marker.is_reached(DIRECT + 64), marker.is_reached(VMALLOC))
}

#[test]
fn vmalloc_block_needs_more_than_its_own_descriptors() {
    let (blocks, memory) = vmalloc_heap();
    assert_eq!(mark_vmalloc(&memory, &blocks, 0), (true, false));
    assert_eq!(mark_vmalloc(&memory, &blocks, VMALLOC + 8191), (true, true));
    assert_eq!(mark_vmalloc(&memory, &blocks, VMALLOC + 8192), (true, false));
}

#[test]
fn second_reference_to_a_vm_struct_keeps_its_block() {
    let (blocks, mut memory) = vmalloc_heap();
    assert_eq!(mark_vmalloc(&memory, &blocks, DIRECT + 64), (true, true));
    memory.put(DIRECT + 128 + 24, DIRECT + 64);
    assert_eq!(mark_vmalloc(&memory, &blocks, DIRECT + 128), (true, true));
}

#[test]
fn a_chain_goes_through_what_stands_for_an_object() {
    let (blocks, mut memory) = vmalloc_heap();
    memory.put(DIRECT + 128 + 24, DIRECT + 64);
    let (index, slots) = index(&blocks);
    let mut marker = Marker::new(&index, &memory, &slots, Trail::default());
    let special = Special { areas: Some(vec![0..8, 16..64]), stands_for: Some(VMALLOC), weak: None };
    marker.set_special(DIRECT + 64, special);
    marker.witness.enter(Origin::Register(1));
    marker.root_word(DIRECT + 130);
    marker.run();
    let slot = marker.slot(VMALLOC).expect("the area");
    assert_eq!(marker.witness.to(slot), Some((Origin::Register(1), vec![blocks[2], blocks[3]])));
    let reference = link(&marker, blocks[2], blocks[3]).expect("the word");
    assert_eq!((reference.offset, reference.word, reference.entry()), (24, DIRECT + 64, None));
}

#[test]
fn chains_begin_at_gray_objects_and_never_at_black_ones() {
    let blocks = [0, 64, 128, 192].map(|at| Block { start: DIRECT + at, size: 64 });
    let mut memory = Flat::new();
    memory.put(DIRECT + 8, DIRECT + 64);
    memory.put(DIRECT + 128, DIRECT + 192);
    let (index, slots) = index(&blocks);
    let mut marker = Marker::new(&index, &memory, &slots, Trail::default());
    marker.set_black(DIRECT + 128);
    marker.witness.enter(Origin::Gray);
    marker.set_gray(DIRECT);
    marker.run();
    let ways: Vec<_> = slots.iter().map(|&slot| marker.witness.to(slot)).collect();
    let gray = |way: &[Block]| Some((Origin::Gray, way.to_vec()));
    assert_eq!(ways, [gray(&blocks[..1]), gray(&blocks[..2]), None, None]);
    assert!(marker.is_reached(DIRECT + 128) && !marker.is_reached(DIRECT + 192));
}

/// Enough objects that several threads find the same ones at the same time, over and over.
#[test]
fn several_threads_mark_each_object_once() {
    let blocks: Vec<Block> = (0..SPACE / 16).map(|n| Block { start: DIRECT + n * 16, size: 16 }).collect();
    let mut memory = Flat::new();
    let mut number = 1_u64;
    for block in &blocks {
        for word in [0, 8] {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            memory.put(block.start + word, blocks[(number >> 33) as usize % (blocks.len() / 2)].start);
        }
    }
    let (index, slots) = index(&blocks);
    let roots: Vec<u8> = blocks[..40].iter().flat_map(|block| block.start.to_le_bytes()).collect();
    let mark = |threads| {
        let mut marker = Marker::new(&index, &memory, &slots, ());
        marker.share(threads, 0);
        let references = marker.roots(&[&roots]);
        marker.run();
        let reached: Vec<bool> = blocks.iter().map(|block| marker.is_reached(block.start)).collect();
        (references, marker.bytes, reached)
    };
    let alone = mark(1);
    let count = alone.2.iter().filter(|&&reached| reached).count() as u64;
    assert_eq!((alone.0, alone.1), (40, 320 + 16 * blocks.len() as u64));
    assert!(count > 1000 && count <= blocks.len() as u64 / 2, "{count}");
    (0..50).for_each(|_| assert_eq!(mark(4), alone));
}

/// Of per-CPU objects whose cookies are kernel addresses, in one page and in two, each copy has references of its own.
#[test]
fn what_any_cpus_copy_refers_to_is_reached() {
    let at = |offset| Block { start: COPIED[2] + offset, size: 64 };
    let copied = [at(0), at(64), at(4096 - 32)];
    let targets: Vec<Block> = (0..9).map(|n| Block { start: DIRECT + n * 64, size: 64 }).collect();
    let blocks = [&copied[..], &targets].concat();
    let mut memory = Flat::new();
    // Each in the copy of another CPU, but at the same place.
    for (number, target) in targets.iter().enumerate() {
        memory.put(copied[number / 3].start + 40, target.start);
    }
    let (index, slots) = index(&blocks);
    for vectors in Vectors::all() {
        for (from, object) in copied.iter().enumerate() {
            let mut marker = Marker::new(&index, &memory, &slots, ());
            marker.use_vectors(vectors);
            marker.root_word(object.start);
            marker.run();
            let reached = |target: &Block| marker.is_reached(target.start);
            let found: Vec<usize> = (0..9).filter(|&number| reached(&targets[number])).collect();
            assert_eq!(found, (from * 3..from * 3 + 3).collect::<Vec<_>>(), "{vectors:?}");
        }
    }
}

/// Objects that overlap because a free was missed: the later one is found through the earlier one's own words, too.
#[test]
fn an_object_in_another_is_reached_from_its_contents() {
    let blocks = [Block { start: DIRECT, size: 128 }, Block { start: DIRECT + 64, size: 32 }];
    let mut memory = Flat::new();
    memory.put(DIRECT + 8, DIRECT + 72);
    let (index, slots) = index(&blocks);
    let mut marker = Marker::new(&index, &memory, &slots, ());
    marker.root_word(DIRECT);
    marker.run();
    assert!(marker.is_reached(DIRECT + 64));
}

/// Lends a buffer that starts at address 0, in pieces of 16 bytes.
struct Buffer(Vec<u8>);

impl Contents for Buffer {
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(u64, &'a [u8])) {
        let pieces = self.0[va as usize..(va + len) as usize].chunks(16);
        (va..).step_by(16).zip(pieces).for_each(|(va, piece)| visit(va, piece));
    }
}

/// lib/crc32.c, `crc32_le` with a start value of 0, bit by bit (polynomial 0xedb88320, reflected).
fn kernel_crc32(bytes: &[u8]) -> u32 {
    let bit = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    bytes.iter().fold(0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| bit(crc)))
}

#[test]
fn checksum_is_the_kernels_and_the_head_is_short() {
    let buffer = Buffer((0..100).map(|i: u8| i.wrapping_mul(37)).collect());
    for (start, size) in [(0, 100), (8, 40), (3, 77), (96, 4), (40, 0)] {
        let (head, checksum) = fingerprint(&buffer, Block { start, size });
        let bytes = &buffer.0[start as usize..(start + size) as usize];
        assert_eq!(head, &bytes[..bytes.len().min(HEAD_BYTES)]);
        assert_eq!(checksum, kernel_crc32(bytes), "{start} {size}");
    }
}

/// A chain of objects of 64 bytes of which each refers to four, in as much memory as they need.
struct Chain(Vec<u8>);

impl Contents for Chain {
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(u64, &'a [u8])) {
        let at = (va - DIRECT) as usize;
        visit(va, &self.0[at..at + len as usize]);
    }
}

fn mark_chain(objects: u64) {
    let blocks: Vec<Block> = (0..objects).map(|n| Block { start: DIRECT + n * 64, size: 64 }).collect();
    let mut words = Vec::new();
    for n in 0..objects {
        words.extend((1..=4).map(|step| blocks[((n + step * step) % objects) as usize].start));
        words.extend([0, 17, n, u64::MAX]);
    }
    let memory = Chain(words.iter().flat_map(|word| word.to_le_bytes()).collect());
    let (index, slots) = Index::new(&blocks, &(DIRECT..DIRECT + objects * 64));
    let mut marker = Marker::new(&index, &memory, &slots, ());
    marker.root_word(DIRECT);
    marker.run();
    assert_eq!(marker.bytes, objects * 64);
}

/// With freezing the index, and making the heap, in the profile of tests, which optimises little: 4,700 when this was written.
#[test]
fn marking_an_object_takes_few_instructions() {
    let name = "scan::tests::marking_an_object_takes_few_instructions";
    if let Some(instructions) = instructions::per_item(name, 5_000, mark_chain) {
        println!("{instructions:.0} instructions");
        assert!((100.0..8000.0).contains(&instructions), "{instructions} instructions for an object");
    }
}
