//! What the index knows of one page.

use super::super::words::LINE;
use super::{ASK, Block, Index, NO_SLOT};
use crate::memory::PAGE_SIZE;

const NOTHING_STARTS: u16 = PAGE_SIZE as u16;

/// One page that holds (a part of) an object: 24 bytes, so that the descriptors of a heap of
/// gigabytes stay in the processor's caches.
#[derive(Clone, Copy)]
pub(in crate::scan) struct Descriptor {
    /// Slot number of the first object that starts here.
    pub base: u32,
    /// Regular page: size of every object. Irregular page: index of its first object in [`super::Index::lists`].
    pub size: u32,
    /// ceil(2^32 / distance between starts); 0 for an irregular page.
    pub reciprocal: u32,
    /// Offset of the first start; [`PAGE_SIZE`] when none starts here.
    pub first: u16,
    /// Distance between starts, bytes.
    pub stride: u16,
    /// Number of slots.
    pub count: u16,
    /// Object that started in an earlier page and ends here or later; 0: none.
    pub spill: u32,
}

impl Descriptor {
    pub const EMPTY: Self =
        Self { base: 0, size: 0, reciprocal: 0, first: NOTHING_STARTS, stride: 0, count: 0, spill: 0 };

    /// A page with nothing in it.
    pub const NOTHING: Self = Self { first: 0, reciprocal: 1, ..Self::EMPTY };

    /// A page of which [`super::Index::find`] knows.
    pub const UNKNOWN: Self = Self { first: 0, ..Self::EMPTY };

    /// Number of the grid's place that an offset in a regular page lies in, and where in that.
    #[inline(always)]
    fn place(&self, offset: u64) -> (u64, u64) {
        let distance = offset.wrapping_sub(u64::from(self.first));
        let number = distance.wrapping_mul(u64::from(self.reciprocal)) >> 32;
        (number, distance.wrapping_sub(number * u64::from(self.stride)))
    }

    /// See [`super::Index::quick_slots`]. The `spills` are [`super::Index::spills`].
    #[inline]
    pub fn quick_slot(&self, word: u64, spills: &[(u32, Block)]) -> u32 {
        let offset = word & (PAGE_SIZE - 1);
        let (number, inside) = self.place(offset);
        let here = (inside < u64::from(self.size)) & (number < u64::from(self.count));
        // What lies before the first start only the object can have that reaches over from an earlier page.
        let (spill, block) = spills[self.spill as usize];
        let before = slot_if(word.wrapping_sub(block.start) < block.size, spill);
        let behind = slot_if(here, self.base.wrapping_add(number as u32));
        let behind = if self.reciprocal == 0 { ASK } else { behind };
        if offset < u64::from(self.first) { before } else { behind }
    }

    /// Slot of `block`, one of the blocks `here` that start in this page.
    pub fn slot_of(&self, block: &Block, here: &[Block]) -> u32 {
        let number = match self.reciprocal {
            0 => here.partition_point(|b| b.start < block.start),
            _ => ((block.start - here[0].start) / u64::from(self.stride)) as usize,
        };
        self.base + number as u32
    }
}

/// The slot, or [`NO_SLOT`]: without a branch, which the processor would guess badly.
#[inline(always)]
fn slot_if(is: bool, slot: u32) -> u32 {
    slot | (u32::from(!is) * NO_SLOT)
}

/// A page in which objects are, for who reads it from its start to its end.
pub(in crate::scan) struct Page<'i> {
    pub(super) index: &'i Index,
    /// Of its first byte.
    pub address: u64,
    pub(super) descriptor: Descriptor,
}

impl Page<'_> {
    /// The object that reaches into it from an earlier page.
    #[inline]
    fn spill(&self) -> Option<&(u32, Block)> {
        Some(&self.index.spills[self.descriptor.spill as usize]).filter(|_| self.descriptor.spill != 0)
    }

    /// Behind the slots of all objects in it.
    pub fn slots_end(&self) -> u32 {
        self.descriptor.base + u32::from(self.descriptor.count)
    }

    /// Calls `found` with the slot of each object in it, if the slot is taken, ascending; where it starts, which may be before
    /// the page; and where in the page it ends.
    #[inline(always)]
    pub fn objects(&self, mut found: impl FnMut(u32, i64, u64)) {
        let start = |block: &Block| block.start.wrapping_sub(self.address) as i64;
        let end = |block: &Block| block.end().saturating_sub(self.address).min(PAGE_SIZE);
        self.spill().into_iter().for_each(|(slot, block)| found(*slot, start(block), end(block)));
        let Descriptor { base, size, count, first, stride, reciprocal, .. } = self.descriptor;
        if reciprocal == 0 {
            let list = &self.index.lists[size as usize..size as usize + usize::from(count)];
            (base..).zip(list).for_each(|(slot, block)| found(slot, start(block), end(block)));
        } else {
            for number in 0..u32::from(count) {
                let start = u64::from(u32::from(first) + number * u32::from(stride));
                found(base + number, start as i64, (start + u64::from(size)).min(PAGE_SIZE));
            }
        }
    }

    /// The part of it from the first byte that an object may have to the last, in whole groups of words.
    pub fn span(&self) -> Block {
        let (mut start, mut end) = (PAGE_SIZE, 0);
        if let Some((_, block)) = self.spill() {
            (start, end) = (0, block.end() - self.address);
        }
        let Descriptor { count, reciprocal, stride, size, .. } = self.descriptor;
        let first = u64::from(self.descriptor.first);
        if count > 0 {
            let last = u64::from(count - 1);
            start = start.min(first / LINE as u64 * LINE as u64);
            end = end.max(match reciprocal {
                0 => self.index.lists[u64::from(size) as usize + last as usize].end() - self.address,
                _ => first + last * u64::from(stride) + u64::from(size),
            });
        }
        let end = end.min(PAGE_SIZE).next_multiple_of(LINE as u64);
        Block { start: self.address + start, size: end.saturating_sub(start) }
    }
}
