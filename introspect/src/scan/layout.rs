//! Which words of a page count.

use super::index::Page;
use super::mark::Contents;
use super::reader::{COPIED, Heap, NO_SCAN, OBJECT, SPECIAL, TYPED};
use super::words::GROUP;
use crate::arch::Lanes;
use crate::memory::PAGE_SIZE;

const WORDS: usize = PAGE_SIZE as usize / 8;
const PARTS: usize = WORDS / 64;
const GROUPS: usize = WORDS / GROUP;

/// A bit for each word of a page.
#[derive(Clone, Copy, Default)]
struct Bits([u64; PARTS]);

impl Bits {
    /// Those of each group of words.
    #[inline(always)]
    fn groups(self) -> [u8; GROUPS] {
        let mut groups = [0; GROUPS];
        let parts = groups.as_chunks_mut::<8>().0.iter_mut();
        parts.zip(self.0).for_each(|(bytes, bits)| *bytes = bits.to_le_bytes());
        groups
    }
}

/// See the module.
pub(super) struct Layout {
    /// All words of plain objects: of those whose words count, all, or those of their types.
    plain: [u8; GROUPS],
    /// Those of them that count.
    holds: [u8; GROUPS],
    /// The first words of objects.
    firsts: [u8; GROUPS],
    /// Number of those of plain objects.
    pub words: u64,
}

impl Layout {
    /// Of a page.
    #[inline(always)]
    pub fn of<C: Contents>(heap: &Heap<'_, C>, page: &Page<'_>) -> Self {
        let (mut plain, mut holds, mut firsts) = (Bits::default(), Bits::default(), Bits::default());
        page.objects(
            #[inline(always)]
            |slot, start, end| {
                let state = heap.state(slot);
                if state & (OBJECT | NO_SCAN | SPECIAL | COPIED) != OBJECT {
                    return;
                }
                let shape = heap.shape_of(slot).filter(|_| state & TYPED != 0);
                // Of the words as a whole: what has a shape is aligned.
                let (first, end) = ((start + 7) >> 3, end as i64 / 8);
                if (0..end).contains(&first) {
                    firsts.0[(first / 64) as usize] |= 1 << (first % 64);
                }
                let mut at = first.max(0);
                while at < end {
                    let part = (at / 64) as usize;
                    let begin = part as i64 * 64;
                    let here = u64::MAX << (at % 64) & u64::MAX >> (64 - (end - begin).min(64));
                    plain.0[part] |= here;
                    holds.0[part] |= here & shape.map_or(u64::MAX, |shape| shape.words_from(begin - first));
                    at = begin + 64;
                }
            },
        );
        let words = plain.0.iter().map(|bits| u64::from(bits.count_ones())).sum();
        Self { plain: plain.groups(), holds: holds.groups(), firsts: firsts.groups(), words }
    }

    /// The groups from the one with a number on.
    #[inline(always)]
    pub fn groups(&self, from: usize) -> impl Iterator<Item = Group> {
        let masks = self.plain[from..].iter().zip(&self.holds[from..]).zip(&self.firsts[from..]);
        masks.map(|((&plain, &holds), &firsts)| Group { plain, holds, firsts })
    }

    /// One group.
    #[inline(always)]
    pub fn group(&self, number: usize) -> Group {
        Group { plain: self.plain[number], holds: self.holds[number], firsts: self.firsts[number] }
    }
}

/// A group of words: a bit for each.
pub(super) struct Group {
    /// [`Layout::plain`].
    plain: u8,
    /// [`Layout::holds`].
    holds: u8,
    /// [`Layout::firsts`].
    firsts: u8,
}

impl Group {
    /// Those of its words, the first of which is at an address, that have a bit and count; but not those of empty lists, which
    /// point to themselves. Also those that would count if they could hold a pointer.
    #[inline(always)]
    pub fn take(&self, lanes: Lanes, address: u64, words: &[u64; GROUP], bits: u8) -> (u8, u8) {
        let (own, before) = lanes.same(words, address).unwrap_or_else(
            #[inline(always)]
            || same(words, address),
        );
        let others = bits & !(own | before & !self.firsts);
        (others & self.holds, others & self.plain & !self.holds)
    }
}

/// [`Lanes::same`] of every processor.
#[inline(always)]
fn same(words: &[u64; GROUP], address: u64) -> (u8, u8) {
    (0..GROUP).rev().fold((0, 0), |(own, before), word| {
        let distance = words[word].wrapping_sub(address + 8 * word as u64);
        (own << 1 | u8::from(distance == 0), before << 1 | u8::from(distance == 8_u64.wrapping_neg()))
    })
}

/// Which words of a page were taken: a bit for each word of a group.
pub(super) struct Taken([u8; GROUPS]);

impl Taken {
    /// None.
    pub const NONE: Self = Self([0; GROUPS]);

    /// Those of each group from the one with a number on.
    #[inline(always)]
    pub fn groups(&mut self, from: usize) -> &mut [u8] {
        &mut self.0[from..]
    }

    /// Counts them.
    #[inline(always)]
    pub fn ranks(&self) -> Ranks {
        let parts = self.0.as_chunks::<8>().0;
        let mut ranks = Ranks { taken: [0; PARTS], counts: [0; PARTS + 1] };
        for (part, bytes) in parts.iter().enumerate() {
            ranks.taken[part] = u64::from_le_bytes(*bytes);
            ranks.counts[part + 1] = ranks.counts[part] + ranks.taken[part].count_ones();
        }
        ranks
    }
}

/// See [`Taken::ranks`].
pub(super) struct Ranks {
    taken: [u64; PARTS],
    /// In all parts before.
    counts: [u32; PARTS + 1],
}

impl Ranks {
    /// So many of the words before that with a number were taken.
    #[inline(always)]
    pub fn before(&self, word: u64) -> u32 {
        let part = (word / 64) as usize;
        match self.taken.get(part) {
            Some(bits) => self.counts[part] + (bits & !(u64::MAX << (word % 64))).count_ones(),
            None => self.counts[PARTS],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::index::Block;
    use super::super::mark::Marker;
    use super::super::tests::{DIRECT, Flat, index, plant};
    use super::super::typed::Shape;
    use super::*;
    use crate::arch::Vectors;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn masks_say_what_words_one_by_one_would(
            words in proptest::array::uniform8(prop_oneof![Just(0), Just(8), Just(16), Just(48), Just(56), any::<u64>()]),
            taken in proptest::array::uniform32(any::<u16>()), word in 0..600_u64,
            shape in proptest::collection::vec(any::<bool>(), 0..300), from in -200..400_i64,
        ) {
            let bit = |bits: u8, number: usize| bits >> number & 1 != 0;
            for vectors in Vectors::all() {
                let found = vectors.run(|lanes| lanes.same(&words, 0).unwrap_or_else(|| same(&words, 0)));
                for (number, &word) in words.iter().enumerate() {
                    let here = 8 * number as u64;
                    prop_assert_eq!(bit(found.0, number), word == here);
                    prop_assert_eq!(bit(found.1, number), word == here.wrapping_sub(8));
                }
            }
            let bytes: Vec<u8> = taken.iter().flat_map(|two| two.to_le_bytes()).collect();
            let ranks = Taken(bytes.clone().try_into().expect("64 bytes")).ranks();
            let before = (0..word.min(WORDS as u64)).filter(|&word| bit(bytes[word as usize / 8], word as usize % 8)).count();
            prop_assert_eq!(ranks.before(word) as usize, before);
            let (bits, shape) = (Shape::new(&shape).words_from(from), &shape);
            for number in 0..64 {
                let holds = usize::try_from(from + number).is_ok_and(|n| shape.get(n) == Some(&true));
                prop_assert_eq!(bits >> number & 1 != 0, holds);
            }
        }
    }

    /// What scans take time for: as many look-ups as there are references.
    #[test]
    fn empty_lists_and_words_that_hold_no_pointer_are_not_looked_up() {
        let blocks: Vec<Block> = (0..64).map(|n| Block { start: DIRECT + n * 64, size: 64 }).collect();
        let mut memory = Flat { whole: true, ..plant(&blocks, &[]) };
        for pair in blocks.windows(2) {
            let [this, next] = [pair[0].start, pair[1].start];
            memory.put(this, next);
            // The head of an empty list, and a number that looks like an address.
            [8, 16].into_iter().for_each(|at| memory.put(this + at, this + 8));
            memory.put(this + 24, DIRECT + 8 * 4096);
            memory.put(next + 32, next + 24);
        }
        // The first word of an object is no list's when it points to the word before.
        memory.put(blocks[63].start, blocks[62].start + 56);
        let (index, slots) = index(&blocks);
        for vectors in Vectors::all() {
            let mut marker = Marker::new(&index, &memory, &slots, ());
            marker.use_vectors(vectors);
            marker.root(&blocks[0].start.to_le_bytes());
            marker.run();
            assert!(blocks.iter().all(|block| marker.is_reached(block.start)), "{vectors:?}");
            assert_eq!((marker.candidates, marker.references), (1 + 63 + 1, 65), "{vectors:?}");
            assert_eq!(marker.bytes, 8 + 64 * 64, "{vectors:?}");
        }
    }
}
