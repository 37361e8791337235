//! x86-64: registers, paging, address-space constants.

pub mod layout;
mod paging;
pub mod prstatus;
mod registers;
mod vectors;

pub use paging::{AddressSpace, Leaf, MAX_ENTRIES, gigabyte_leaf};
pub use registers::{CpuState, Registers};
pub use vectors::widest;
