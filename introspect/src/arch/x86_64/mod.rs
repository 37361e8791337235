//! x86-64: registers, paging, address-space constants.

pub mod layout;
mod paging;
pub mod prstatus;
mod registers;
mod vectors;

use iced_x86::{Decoder, DecoderOptions};

pub use paging::{AddressSpace, Leaf, MAX_ENTRIES, gigabyte_leaf};
pub use registers::{CpuState, Registers};
pub use vectors::{Lanes, Vectors, Wide, prefetch};

/// Length of the instruction that `code` begins with; None where it is none, or not all of it is there.
pub fn instruction_len(code: &[u8]) -> Option<usize> {
    let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then(|| instruction.len())
}
