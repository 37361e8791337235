//! What the index knows of one page.

use super::{ASK, Block, Hit, Index, NO_SLOT, find_in_list};
use crate::memory::PAGE_SIZE;
use std::ops::Range;

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

    /// Number of the grid's place that an offset in a regular page lies in, and where in that.
    #[inline(always)]
    fn place(&self, offset: u64) -> (u64, u64) {
        let distance = offset.wrapping_sub(u64::from(self.first));
        let number = distance.wrapping_mul(u64::from(self.reciprocal)) >> 32;
        (number, distance.wrapping_sub(number * u64::from(self.stride)))
    }

    /// See [`super::Index::quick_slots`].
    #[inline]
    pub fn quick_slot(&self, word: u64) -> u32 {
        let offset = word & (PAGE_SIZE - 1);
        let (number, inside) = self.place(offset);
        let here = (inside < u64::from(self.size)) & (number < u64::from(self.count));
        let behind = offset >= u64::from(self.first);
        // Of what lies before the first start only the object that reaches over from an earlier page can have it.
        let elsewhere = (self.reciprocal == 0) | (!behind & (self.spill != 0));
        match (elsewhere, here & behind) {
            (true, _) => ASK,
            (false, true) => self.base + number as u32,
            (false, false) => NO_SLOT,
        }
    }

    /// The object of a regular page that all of the word at an offset lies in. The offset is not below [`Descriptor::first`].
    #[inline(always)]
    pub fn holder(&self, offset: u64) -> Holder {
        let (number, inside) = self.place(offset);
        let size = u64::from(self.size);
        let here = (inside + 8 <= size) & (number < u64::from(self.count));
        Holder { slot: if here { self.base + number as u32 } else { NO_SLOT }, inside, size }
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

/// The object that a word lies in.
#[derive(Clone, Copy)]
pub(in crate::scan) struct Holder {
    /// [`NO_SLOT`] where there is none.
    pub slot: u32,
    /// Where in the object the word is.
    pub inside: u64,
    /// Of the object.
    pub size: u64,
}

impl Holder {
    /// No object.
    pub const NONE: Self = Self { slot: NO_SLOT, inside: 0, size: 0 };
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
    pub fn spill(&self) -> Option<(u32, Block)> {
        self.index.spills.get((self.descriptor.spill as usize).checked_sub(1)?).copied()
    }

    /// Slots of the objects that start in it.
    pub fn slots(&self) -> Range<u32> {
        self.descriptor.base..self.descriptor.base + u32::from(self.descriptor.count)
    }

    /// Offset of the first object that starts in it.
    pub fn first(&self) -> u64 {
        u64::from(self.descriptor.first)
    }

    /// From the first of its bytes that an object may have to the last.
    pub fn span(&self) -> Range<u64> {
        let Descriptor { count, reciprocal, stride, size, .. } = self.descriptor;
        let start = if self.descriptor.spill == 0 { self.first() / 8 * 8 } else { 0 };
        let last = u64::from(count.max(1) - 1);
        let own = match (count, reciprocal) {
            (0, _) => 0,
            (_, 0) => self.index.lists[u64::from(size) as usize + last as usize].end() - self.address,
            _ => self.first() + last * u64::from(stride) + u64::from(size),
        };
        let spill = self.spill().map_or(0, |(_, block)| block.end() - self.address);
        start..own.max(spill).min(PAGE_SIZE)
    }

    /// How the objects that start in it lie; None where they do not on a grid.
    pub fn grid(&self) -> Option<&Descriptor> {
        Some(&self.descriptor).filter(|descriptor| descriptor.reciprocal != 0)
    }

    /// [`Descriptor::holder`] where there is no grid.
    pub fn listed(&self, offset: u64) -> Holder {
        let Descriptor { base, size, count, .. } = self.descriptor;
        let list = &self.index.lists[size as usize..size as usize + usize::from(count)];
        let word = self.address + offset;
        match find_in_list(list, base, word).filter(|hit| word + 8 <= hit.block.end()) {
            Some(Hit { slot, block }) => Holder { slot, inside: word - block.start, size: block.size },
            None => Holder::NONE,
        }
    }
}
