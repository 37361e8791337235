//! arm64: registers, paging, instructions, address-space constants.

pub(crate) mod instruction;
pub mod layout;
mod paging;
pub mod prstatus;
mod registers;
mod vectors;

pub use paging::{AddressSpace, Leaf, MAX_ENTRIES, Translation};
pub use registers::{CpuState, Registers, strip_pac};
pub use vectors::widest;
