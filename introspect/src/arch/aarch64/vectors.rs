//! Every arm64 processor has vectors of 128 bits: code is compiled once.

/// Does `work` with the widest vectors of this processor.
#[inline]
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    work()
}
