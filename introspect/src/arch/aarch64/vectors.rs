//! Every arm64 processor has vectors of 128 bits: code is compiled once.

use std::arch::asm;

/// A range of addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wide {
    start: u64,
    len: u64,
}

impl Wide {
    /// From its start and length.
    pub fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }

    /// Start and length.
    #[inline(always)]
    pub fn both(&self) -> (u64, u64) {
        (self.start, self.len)
    }
}

/// What the code that has it is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lanes(());

impl Lanes {
    /// All of these are made of instructions, which cost less than a branch around them.
    #[inline(always)]
    pub fn are_wide(self) -> bool {
        false
    }

    /// A bit for each of the words that lies in one of the ranges; None where no instruction of this processor is made for
    /// that.
    #[inline(always)]
    pub fn inside(self, _words: &[u64; 8], _ranges: &[Wide]) -> Option<u8> {
        None
    }

    /// Bits for those of the words, the first of which is at an address, that are their own addresses, and for those that are
    /// that of the word before; None as above.
    #[inline(always)]
    pub fn same(self, _words: &[u64; 8], _address: u64) -> Option<(u8, u8)> {
        None
    }

    /// Writes those of the words that have a bit, in order, and whatever behind them; None as above.
    #[inline(always)]
    pub fn compress(self, _words: &[u64; 8], _bits: u8, _to: &mut [u64; 8]) -> Option<()> {
        None
    }
}

/// Vectors that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vectors(());

impl Vectors {
    /// All of this processor, the widest last.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> {
        std::iter::once(Self::widest())
    }

    /// The widest of this processor.
    pub fn widest() -> Self {
        Self(())
    }

    /// Does `work` with them. Whatever is inlined into `work` is compiled for them.
    #[inline]
    pub fn run<R>(self, work: impl FnOnce(Lanes) -> R) -> R {
        work(Lanes(()))
    }
}

/// Asks for memory that is read soon, or for its start.
#[inline(always)]
pub fn prefetch<T>(item: &T) {
    // SAFETY: the instruction has no effect that a program sees.
    unsafe {
        let at = std::ptr::from_ref(item);
        asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, readonly, preserves_flags));
    }
}
