//! Every arm64 processor has vectors of 128 bits: code is compiled once.

use std::arch::asm;

/// Bytes that come from memory together, or half as many.
const LINE: usize = 64;

/// What the code that has it is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lanes(());

impl Lanes {
    /// What every processor has.
    #[cfg(test)]
    pub const PLAIN: Self = Self(());

    /// A bit for each of the words that lies in one of the ranges, each a start and a length; None where no instruction of
    /// this processor is made for that.
    #[inline(always)]
    pub fn inside(self, _words: &[u64; 8], _ranges: &[(u64, u64)]) -> Option<u8> {
        None
    }

    /// Writes those of the words that have a bit, in order, and whatever behind them; None as above.
    #[inline(always)]
    pub fn compress(self, _words: &[u64; 8], _bits: u8, _to: &mut [u64; 8]) -> Option<()> {
        None
    }
}

/// Does `work` with the widest vectors of this processor.
#[inline]
pub fn widest<R>(work: impl FnOnce(Lanes) -> R) -> R {
    work(Lanes(()))
}

/// Asks for memory that is read soon.
#[inline(always)]
pub fn prefetch<T>(items: &[T]) {
    for line in items.chunks(LINE / size_of::<T>()) {
        // SAFETY: the instruction has no effect that a program sees.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) line.as_ptr(), options(nostack, readonly, preserves_flags))
        };
    }
}
