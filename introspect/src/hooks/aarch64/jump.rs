//! Jumps in the place of traps, of which arm64 has none: nobody makes their stubs yet.

use crate::memory::Va;

/// An instruction.
pub const JUMP_LEN: usize = 4;

/// A place for a jump: there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jump {}

impl Jump {
    /// Link address of the first byte.
    pub fn va(self) -> Va {
        match self {}
    }

    /// Bytes displaced.
    pub fn len(self) -> usize {
        match self {}
    }

    /// False: no jump is.
    pub fn is_empty(self) -> bool {
        match self {}
    }
}
