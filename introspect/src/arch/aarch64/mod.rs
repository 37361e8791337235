//! arm64: registers, paging, instructions, address-space constants.

pub(crate) mod instruction;
pub mod layout;
mod paging;
pub mod prstatus;
mod registers;
mod vectors;

pub use paging::{AddressSpace, Leaf, MAX_ENTRIES, Translation};
pub use registers::{CpuState, Registers, strip_pac};
pub use vectors::{Lanes, Vectors, Wide, prefetch};

/// Length of the instruction that `code` begins with: all have the same.
pub fn instruction_len(code: &[u8]) -> Option<usize> {
    const LEN: usize = 4;
    (code.len() >= LEN).then_some(LEN)
}
