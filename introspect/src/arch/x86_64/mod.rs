//! x86-64: registers, paging, address-space constants.

pub mod layout;
mod paging;
mod registers;

pub use paging::{AddressSpace, Leaf};
pub use registers::{CpuState, Registers};
