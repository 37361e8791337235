//! What one scan leaves for the next: the words of each page that may be references. Of a page that was not written since,
//! they are still the same, and it need not be read again.
//!
//! They are kept whatever the page was used for, so that it may be used for something else; and all that lie in wider ranges
//! than those in which objects lay, so that objects may come and go.

use super::words::{GROUP, Windows, groups, keep};
use crate::arch::Lanes;
use crate::memory::{PAGE_SHIFT, PAGE_SIZE};
use std::ops::Range;

/// Words of a page, and what vectors write behind them.
const WORDS: usize = PAGE_SIZE as usize / 8 + GROUP;

/// See the module.
#[derive(Default)]
pub struct Memo {
    windows: Windows,
    /// By frame.
    pages: Vec<Kept>,
    words: Vec<u64>,
    /// Where in its page each is.
    offsets: Vec<u16>,
    /// So many of them no page has any more.
    stale: usize,
}

/// The words of one page.
#[derive(Clone, Copy, Default)]
struct Kept {
    start: u32,
    len: u16,
    known: bool,
}

/// Frames that were written, a bit for each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written(Vec<u64>);

impl Written {
    /// Adds neighbouring frames.
    pub fn add(&mut self, frames: Range<usize>) {
        self.0.resize(self.0.len().max(frames.end.div_ceil(64)), 0);
        frames.for_each(|frame| self.0[frame / 64] |= 1 << (frame % 64));
    }

    /// Number of frames.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|bits| u64::from(bits.count_ones())).sum()
    }

    /// The frames, ascending.
    fn frames(&self) -> impl Iterator<Item = usize> + '_ {
        let bits = |word: u64| (0..64).filter(move |bit| word >> bit & 1 != 0);
        self.0
            .iter()
            .enumerate()
            .flat_map(move |(number, &word)| bits(word).map(move |bit| number * 64 + bit))
    }
}

impl Memo {
    /// Makes it good for a scan whose references lie in `windows`, of a machine in which no page was written but those of
    /// `written`; None: nobody knows. True when something is left of it.
    pub(super) fn prepare(&mut self, windows: &Windows, written: Option<&Written>) -> bool {
        let Some(written) = written.filter(|_| self.windows.cover(windows)) else {
            *self = Self { windows: windows.wider(), ..Self::default() };
            return false;
        };
        for frame in written.frames() {
            if let Some(page) = self.pages.get_mut(frame) {
                self.stale += usize::from(page.len);
                *page = Kept::default();
            }
        }
        true
    }

    /// Adds what a scan has read.
    pub(super) fn keep(&mut self, fresh: Fresh) {
        let mut start = self.words.len();
        // Does not truncate: 2^32 candidates would be 32 GiB of nothing but pointers.
        for &(frame, len) in &fresh.pages {
            if self.pages.len() <= frame {
                self.pages.resize(frame + 1, Kept::default());
            }
            self.stale += usize::from(self.pages[frame].len);
            self.pages[frame] = Kept { start: start as u32, len, known: true };
            start += usize::from(len);
        }
        self.words.extend(fresh.words);
        self.offsets.extend(fresh.offsets);
        if self.stale > self.words.len() / 2 {
            self.compact();
        }
    }

    fn compact(&mut self) {
        let len = self.words.len() - self.stale;
        let (mut words, mut offsets) = (Vec::with_capacity(len), Vec::with_capacity(len));
        for page in &mut self.pages {
            let range = page.range();
            page.start = words.len() as u32;
            words.extend_from_slice(&self.words[range.clone()]);
            offsets.extend_from_slice(&self.offsets[range]);
        }
        (self.words, self.offsets, self.stale) = (words, offsets, 0);
    }

    /// Words of a page and their offsets in it; None when they are not known.
    #[inline]
    fn page(&self, frame: usize) -> Option<(&[u64], &[u16])> {
        let page = self.pages.get(frame).filter(|page| page.known)?;
        Some((&self.words[page.range()], &self.offsets[page.range()]))
    }
}

impl Kept {
    fn range(self) -> Range<usize> {
        self.start as usize..self.start as usize + usize::from(self.len)
    }
}

/// What one thread of a scan has read, to be kept.
#[derive(Default)]
pub(super) struct Fresh {
    /// Frames, and how many words of each.
    pages: Vec<(usize, u16)>,
    words: Vec<u64>,
    offsets: Vec<u16>,
}

/// How a scan uses a memo.
pub(super) struct Remembered<'a> {
    pub memo: &'a Memo,
    /// Memory that is lent as a whole, with the number of its first frame.
    pub frames: Vec<(usize, &'a [u8])>,
}

impl<'a> Remembered<'a> {
    /// Offset of the first of some bytes in its page.
    pub fn offset(&self, bytes: &[u8]) -> usize {
        self.place(bytes).map_or(0, |(_, _, at)| at) % PAGE_SIZE as usize
    }

    /// The frame that bytes, which are in one page, are in, and that page.
    fn frame(&self, bytes: &[u8]) -> Option<(usize, &'a [u8; PAGE_SIZE as usize])> {
        let (first, all, at) = self.place(bytes)?;
        let page = all.get(at & !(PAGE_SIZE as usize - 1)..)?.first_chunk()?;
        Some((first + (at >> PAGE_SHIFT), page))
    }

    /// The memory lent as a whole that bytes are in, with its first frame, and where in it they begin.
    fn place(&self, bytes: &[u8]) -> Option<(usize, &'a [u8], usize)> {
        self.frames.iter().find_map(|&(first, all)| {
            let at = (bytes.as_ptr() as usize).checked_sub(all.as_ptr() as usize)?;
            (at < all.len()).then_some((first, all, at))
        })
    }
}

/// A part of a page.
#[derive(Clone, Copy)]
pub(super) struct Piece<'b> {
    /// Where in the page it begins.
    pub at: u64,
    pub bytes: &'b [u8],
    /// What is read next.
    pub ahead: &'b [u8],
}

/// The candidates of a part of a page, and where in the page they are.
pub(super) struct Found {
    pub words: [u64; WORDS],
    pub offsets: [u64; WORDS],
    pub count: usize,
}

impl Default for Found {
    fn default() -> Self {
        Self { words: [0; WORDS], offsets: [0; WORDS], count: 0 }
    }
}

impl Found {
    /// Reads a part of a page that begins at an offset in it, or remembers it. Returns how many bytes were read.
    #[inline(always)]
    pub fn look(
        &mut self,
        lanes: Lanes,
        windows: &Windows,
        remembered: Option<&Remembered<'_>>,
        fresh: &mut Fresh,
        piece: Piece<'_>,
    ) -> u64 {
        let known = remembered.and_then(|r| Some((r.memo, r.frame(piece.bytes)?)));
        let Some((memo, (frame, page))) = known else {
            self.collect(lanes, windows, piece);
            return piece.bytes.len() as u64;
        };
        let part = piece.at..piece.at + piece.bytes.len() as u64;
        if let Some((words, offsets)) = memo.page(frame) {
            self.select(windows, part, words.iter().copied().zip(offsets.iter().map(|&o| u64::from(o))));
            return 0;
        }
        self.collect(lanes, &memo.windows, Piece { at: 0, bytes: page, ..piece });
        fresh.add(frame, self);
        let Self { words, offsets, count } = *self;
        self.select(windows, part, words[..count].iter().copied().zip(offsets));
        PAGE_SIZE
    }

    #[inline(always)]
    fn collect(&mut self, lanes: Lanes, windows: &Windows, piece: Piece<'_>) {
        self.count = 0;
        groups(
            lanes,
            (piece.bytes, piece.ahead),
            windows,
            #[inline(always)]
            |number, words, bits| {
                let first = piece.at + (number * GROUP * 8) as u64;
                let offsets = std::array::from_fn(|word| first + word as u64 * 8);
                keep(lanes, words, bits, &mut self.words[self.count..]);
                keep(lanes, &offsets, bits, &mut self.offsets[self.count..]);
                self.count += bits.count_ones() as usize;
            },
        );
    }

    /// Calls `found` with each group of words of the page that has some of them, its number in the page, and a bit for each.
    #[inline(always)]
    pub fn grouped(&self, mut found: impl FnMut(usize, &[u64; GROUP], u8)) {
        let (mut number, mut words, mut bits) = (0, [0; GROUP], 0);
        for (&word, &offset) in self.words[..self.count].iter().zip(&self.offsets) {
            let place = offset as usize / 8;
            if place / GROUP != number && bits != 0 {
                found(number, &words, std::mem::take(&mut bits));
            }
            number = place / GROUP;
            words[place % GROUP] = word;
            bits |= 1 << (place % GROUP);
        }
        if bits != 0 {
            found(number, &words, bits);
        }
    }

    /// Takes those of a page's words that lie in a part of it, and in the `windows`.
    #[inline(always)]
    fn select(&mut self, windows: &Windows, part: Range<u64>, words: impl Iterator<Item = (u64, u64)>) {
        self.count = 0;
        for (word, offset) in words {
            (self.words[self.count], self.offsets[self.count]) = (word, offset);
            self.count +=
                usize::from(part.start <= offset && offset + 8 <= part.end && windows.contain(word));
        }
    }
}

impl Fresh {
    fn add(&mut self, frame: usize, found: &Found) {
        self.pages.push((frame, found.count as u16));
        self.words.extend_from_slice(&found.words[..found.count]);
        self.offsets.extend(found.offsets[..found.count].iter().map(|&offset| offset as u16));
    }

    /// Takes over what another thread has read.
    pub fn join(&mut self, other: Self) {
        self.pages.extend(other.pages);
        self.words.extend(other.words);
        self.offsets.extend(other.offsets);
    }
}

#[cfg(test)]
mod tests {
    use super::super::index::Block;
    use super::super::mark::{Marker, Special};
    use super::super::tests::{DIRECT, Flat, SPACE, edges, heap, index, plant};
    use super::super::typed::Shape;
    use super::super::words::LINE;
    use super::*;
    use crate::arch::Vectors;
    use proptest::prelude::*;
    use std::sync::Arc;

    const PAGES: usize = SPACE as usize / PAGE_SIZE as usize;

    /// What a marking run finds.
    #[derive(Debug, PartialEq, Eq)]
    struct Outcome {
        reached: Vec<bool>,
        references: u64,
        no_object: u64,
        dropped: u64,
    }

    /// Marks from the last page, and from words outside of all memory; every third object is of one type, and one special. Also
    /// returns how many bytes were read, and how many pages are new to the memo.
    fn mark(
        (blocks, memory, roots): (&[Block], &Flat, &[u8]),
        (threads, vectors): (usize, Vectors),
        kept: Option<(&mut Memo, Option<&Written>)>,
    ) -> (Outcome, u64, usize) {
        let (index, slots) = index(blocks);
        let shapes = [Arc::new(Shape::new(&[true, false, true, true, false]))];
        let mut kept = kept;
        if let Some((memo, written)) = &mut kept {
            memo.prepare(index.windows(), *written);
        }
        let mut marker = Marker::new(&index, memory, &slots, ());
        if let Some((memo, _)) = &kept {
            marker.remember(memo, DIRECT);
        }
        marker.use_vectors(vectors);
        marker.share(threads, 0);
        marker.set_shapes(&shapes);
        blocks.iter().step_by(3).for_each(|block| marker.set_shape(block.start, 0));
        if let Some(block) = blocks.get(1) {
            let areas = Some(std::iter::once(0..block.size / 2).collect());
            marker.set_special(block.start, Special { areas, ..Special::default() });
        }
        let page = &memory.direct[(PAGES - 1) * PAGE_SIZE as usize..];
        let references = marker.roots(&[&page[8..2000], roots]);
        marker.run();
        let outcome = Outcome {
            reached: blocks.iter().map(|block| marker.is_reached(block.start)).collect(),
            references,
            no_object: marker.candidates - marker.references,
            dropped: marker.dropped,
        };
        let (bytes, fresh) = (marker.bytes, marker.fresh());
        drop(marker);
        let pages = fresh.pages.len();
        if let Some((memo, _)) = kept {
            memo.keep(fresh);
        }
        (outcome, bytes, pages)
    }

    proptest! {
        /// Objects come and go and words are written between one scan and the next: reading only what was written finds the same.
        #[test]
        fn what_was_not_written_need_not_be_read_again(
            blocks in heap(), before in edges(),
            steps in proptest::collection::vec((edges(), 0..4_usize, any::<u64>()), 1..5),
            roots in proptest::collection::vec((any::<prop::sample::Index>(), 0..70u64), 0..4),
            threads in 1..4_usize, vectors in prop::sample::select(Vectors::all().collect::<Vec<_>>()),
        ) {
            prop_assume!(!blocks.is_empty());
            let roots: Vec<u8> = roots.iter().flat_map(|(to, inside)| (to.get(&blocks).start + inside).to_le_bytes()).collect();
            let mut memory = Flat { whole: true, ..plant(&blocks, &before) };
            let (mut memo, mut written) = (Memo::default(), None);
            for (later, step, present) in steps {
                let live: Vec<Block> = blocks.iter().enumerate()
                    .filter(|(n, _)| step == 0 || present >> (n % 64) & 1 != 0).map(|(_, block)| *block).collect();
                let (again, read, fresh) = mark((&live, &memory, &roots), (threads, vectors), Some((&mut memo, written.as_ref())));
                let (full, ..) = mark((&live, &memory, &roots), (1, vectors), None);
                prop_assert_eq!(again, full);
                // What lies elsewhere is lent in pieces that are in no frame here.
                let others = blocks.iter().filter(|block| !(DIRECT..DIRECT + SPACE).contains(&block.start))
                    .map(|block| memory.copies(block.start) * block.size.next_multiple_of(LINE as u64)).sum::<u64>();
                prop_assert!(fresh > 0 || read <= others + roots.len() as u64, "{read} bytes");
                let mut frames = Written::default();
                for (from, to, word, inside) in &later {
                    let (from, to) = (from.get(&blocks), to.get(&blocks));
                    let (first, words) = (from.start.next_multiple_of(8), from.size.saturating_sub(8) / 8);
                    if words > 0 {
                        let va = first + word % words * 8;
                        memory.put(va, if *inside == 0 { 0 } else { to.start + inside });
                        if (DIRECT..DIRECT + SPACE).contains(&va) {
                            let frame = ((va - DIRECT) >> PAGE_SHIFT) as usize;
                            frames.add(frame..frame + 1);
                        }
                    }
                }
                written = Some(frames);
            }
        }
    }

    #[test]
    fn a_memo_forgets_what_was_written_and_what_nobody_has_any_more() {
        let fresh = |pages: &[(usize, u16)]| {
            let count = pages.iter().map(|&(_, len)| u64::from(len)).sum();
            let words: Vec<u64> = (0..count).collect();
            Fresh {
                pages: pages.to_vec(),
                offsets: words.iter().map(|&word| word as u16 * 8).collect(),
                words,
            }
        };
        let windows = Windows::new([DIRECT..DIRECT + SPACE, 0..0, 0..0, 0..0], [0x1_d008..0x3_0000, 0..0]);
        let mut memo = Memo::default();
        assert!(!memo.prepare(&windows, Some(&Written::default())), "nothing is known yet");
        memo.keep(fresh(&[(3, 2), (70, 5)]));
        assert_eq!(memo.page(70).map(|(words, offsets)| (words[0], offsets[4])), Some((2, 48)));
        let mut written = Written::default();
        written.add(70..72);
        assert!(memo.prepare(&windows, Some(&written)));
        assert_eq!((memo.page(3).map(|(words, _)| words.len()), memo.page(70)), (Some(2), None));
        memo.keep(fresh(&[(70, 1)]));
        assert_eq!((memo.words.len(), memo.stale), (3, 0), "five of eight words were nobody's");
        assert_eq!(memo.page(70).map(|(words, _)| words.to_vec()), Some(vec![0]));
        // Within the same GiB more may come; a cookie may not be below the page.
        let moved =
            |start, cookie| Windows::new([start..start + 8, 0..0, 0..0, 0..0], [cookie..cookie + 8, 0..0]);
        assert!(memo.windows.cover(&moved(DIRECT + (1 << 30) - 8, 0x1_d000)));
        assert!(!memo.windows.cover(&moved(DIRECT + (1 << 30) - 7, 0x1_d000)));
        assert!(!memo.windows.cover(&moved(DIRECT, 0x1_cff8)));
        assert!(!memo.prepare(&moved(DIRECT, 8), Some(&written)));
        assert_eq!(memo.page(3), None);
        assert_eq!(written.count(), 2);
    }
}
